"""Which settings of a stranger's config.json does an output keep?

Those that are known, and no others: a loader sets every key as an attribute of its config, and what a later version makes of one that nobody knows now, nobody knows. Known are names
that many architectures share, and those that transformers' own source of this architecture uses; of them none that is known to lead to code or other files (`inert`). The source is
read as text, so nothing is imported for the usual ones. Where transformers has no such architecture, plain values stay: numbers, yes and no, single words.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from qmerge.store.inert import NAMES_CODE, PLACES, inert

SHARED = frozenset({
    "architectures", "model_type", "dtype", "torch_dtype", "transformers_version", "quantization_config", "is_encoder_decoder", "is_decoder", "problem_type", "id2label", "label2id", "num_labels",
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "hidden_act", "hidden_activation", "max_position_embeddings",
    "initializer_range", "rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "attention_bias", "attention_dropout", "hidden_dropout", "mlp_bias", "pretraining_tp",
    "tie_word_embeddings", "rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor", "original_max_position_embeddings", "sliding_window", "use_sliding_window", "max_window_layers",
    "layer_types", "attn_logit_softcapping", "final_logit_softcapping", "query_pre_attn_scalar", "use_cache", "cache_implementation", "output_hidden_states", "output_attentions", "return_dict",
    "chunk_size_feed_forward", "bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "cls_token_id", "decoder_start_token_id", "text_config", "vision_config", "audio_config",
    "n_embd", "n_layer", "n_head", "n_positions", "n_ctx", "n_inner", "activation_function",
    # settings of generation, which older versions keep here; they are read from generation_config.json by newer ones
    "do_sample", "temperature", "top_k", "top_p", "typical_p", "min_length", "max_length", "max_new_tokens", "num_beams", "early_stopping", "length_penalty", "repetition_penalty", "no_repeat_ngram_size",
    "bad_words_ids", "forced_bos_token_id", "forced_eos_token_id", "suppress_tokens", "begin_suppress_tokens", "task_specific_params",
})  # fmt: skip
_WORD = re.compile(r"[A-Za-z0-9][\w-]{0,63}", re.ASCII)
_IN_CONFIG = re.compile(r"""^\s+(?:self\.)?(\w+)\s*[:=]|["'](\w+)["']""", re.ASCII | re.MULTILINE)
_IN_MODEL = re.compile(r"""config\.(\w+)|getattr\(\s*[\w.]*config,\s*["'](\w+)["']""", re.ASCII)


def known_settings(config: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """(the config without what is not known or leads elsewhere, the dotted names of what was not known, sorted). Keys that begin with ``_``, a library's own notes, go without a word."""
    left_out: list[str] = []
    return _known(config, str(config.get("model_type") or ""), "", left_out), sorted(left_out)


def _known(config: Mapping[str, Any], kind: str, path: str, left_out: list[str]) -> dict[str, Any]:
    kept = {}
    for key, value in config.items():
        if not isinstance(key, str) or key.startswith("_") or key in NAMES_CODE or key in PLACES:
            continue
        if not _is_known(key, value, kind):
            left_out.append(path + key)
        elif isinstance(value, Mapping) and key.endswith("_config") and key != "quantization_config":
            kept[key] = _known(value, str(value.get("model_type") or kind), f"{path}{key}.", left_out)
        else:
            kept[key] = inert(value)
    return kept


def _is_known(key: str, value: Any, kind: str) -> bool:
    if key in SHARED:
        return True
    names = names_of(kind)
    return _is_plain(value) if names is None else key in names


def _is_plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(_is_plain(item) for item in value.values())
    if isinstance(value, list):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, (bool, int, float)) or (isinstance(value, str) and _WORD.fullmatch(value) is not None)


@cache
def names_of(kind: str) -> frozenset[str] | None:
    """Names that transformers' source of an architecture uses for settings: fields, texts in its config's file, ``config.…`` in its model's. None where it has no such architecture."""
    found = importlib.util.find_spec("transformers")
    if found is None or found.origin is None or not _WORD.fullmatch(kind):
        return None
    home = Path(found.origin).parent
    folder = home / "models" / kind.replace("-", "_")
    if not folder.is_dir():  # gemma3_text lies in gemma3
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES, model_type_to_module_name

        if kind not in CONFIG_MAPPING_NAMES:
            return None
        folder = home / "models" / model_type_to_module_name(kind)
    sources = [(_IN_CONFIG, path) for path in sorted(folder.glob("configuration_*.py"))] + [(_IN_MODEL, path) for path in sorted(folder.glob("modeling_*.py"))]
    if not sources:
        return None
    sources.append((_IN_CONFIG, home / "modeling_rope_utils.py"))
    texts = [(form, path.read_text(encoding="utf-8")) for form, path in sources if path.is_file()]
    return frozenset(word for form, text in texts for groups in form.findall(text) for word in groups if word)
