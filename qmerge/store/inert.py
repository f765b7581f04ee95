"""Which keys of a stranger's config could make a library run code, or read other files than the ones that were checked?

Such keys are in no output, and no library is handed a model's config that still has them. What is known of transformers 5.23 and gptqmodel 7.7: ``auto_map`` names
Python files; ``transformers_weights`` a weight file to take instead of model.safetensors, pickle included; ``attn_implementation`` may name kernels on the hub, as
may ``kernel_config``; ``adapter`` in a quantization_config another folder. Keys that begin with ``_`` are a library's own notes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

NAMES_CODE = frozenset({
    "auto_map", "custom_pipelines", "custom_generate", "trust_remote_code", "transformers_weights", "attn_implementation", "experts_implementation", "kernel_config", "use_kernels",
    "adapter_path", "lora_path", "distributed_config", "fusion_config", "extra_files", "extra_config_files", "parent_library", "megatron_core", "megatron_config",
})  # fmt: skip
PLAIN_IMPLEMENTATIONS = frozenset({"eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention", "grouped_mm", "batched_mm"})
"""what transformers itself brings under ``attn_implementation`` and ``experts_implementation``"""
PLACES = frozenset({"name_or_path", "tokenizer_file", "special_tokens_map_file", "added_tokens_file", "vocab_file", "merges_file", "cache_dir", "local_dir"})
"""what tokenizers and configs of older versions note of where they were"""
REDIRECTING = frozenset({"transformers_weights", "kernel_config", "use_kernels"})
"""refused in a config that a library has to read itself; the other keys do nothing there, as long as trust_remote_code is False"""


def inert(value: Any) -> Any:
    """``value`` (a config, JSON data) without such keys, at any depth."""
    if isinstance(value, Mapping):
        return {key: inert(item) for key, item in value.items() if not (isinstance(key, str) and (key in NAMES_CODE or key.startswith("_")))}
    return [inert(item) for item in value] if isinstance(value, list) else value


def without_code(value: Any) -> Any:
    """``value`` (a tokenizer's or processor's config, JSON data) without keys that name code, at any depth, and without the places that libraries note there of the machine that it was saved on."""
    if isinstance(value, Mapping):
        return {key: without_code(item) for key, item in value.items() if not (key in NAMES_CODE or key.lstrip("_") in PLACES and _is_local(item))}
    return [without_code(item) for item in value] if isinstance(value, list) else value


def _is_local(value: Any) -> bool:
    return isinstance(value, str) and (value.startswith(("/", "~", "\\\\", "file:")) or value[1:3] in (":\\", ":/"))


def redirecting(config: Any, path: str = "") -> Iterator[str]:
    """Dotted names of what would lead a loader elsewhere: files or folders other than the checked ones, kernels of the hub."""
    for key, value in config.items() if isinstance(config, Mapping) else enumerate(config) if isinstance(config, list) else ():
        here = f"{path}.{key}" if path else str(key)
        foreign = key in ("attn_implementation", "experts_implementation") and not _plain(value)
        elsewhere = key == "adapter" and path.endswith("quantization_config")
        if (key in REDIRECTING or foreign or elsewhere) and value not in (None, False, {}, ""):
            yield here
        elif isinstance(value, (Mapping, list)):
            yield from redirecting(value, here)


def _plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(_plain(item) for item in value.values())
    return value is None or (isinstance(value, str) and value in PLAIN_IMPLEMENTATIONS)
