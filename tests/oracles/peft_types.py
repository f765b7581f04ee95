"""Adapters of every PEFT type on tiny models, as ``save_pretrained`` writes them, and the edits that qmerge reads off each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from qmerge.adapters.delegated import delegated_edits
from qmerge.store.headers import read_header
from qmerge.store.tensors import read_tensor

TARGETS = {"llama": ["q_proj", "v_proj", "down_proj"], "qwen2": ["q_proj", "v_proj", "down_proj"], "gpt2": ["c_attn", "c_fc"]}
# settings small enough for layers of 64, 32 and 96
SETTINGS: dict[str, dict[str, Any]] = {
    "ADALORA": {"r": 4, "init_r": 4, "target_r": 2, "total_step": 100, "tinit": 1, "tfinal": 1},
    "BEFT": {},
    "BOFT": {"boft_block_size": 4},
    "C3A": {"block_size": 16},
    "DEFT": {"r": 4},
    "DELORA": {"r": 4},
    "FOURIERFT": {"n_frequency": 200},
    "FROD": {"progressbar": False},
    "GLORA": {"r": 4, "config_C": "none"},
    "GRALORA": {"r": 8},
    "HIRA": {"r": 4},
    "HRA": {"r": 4},
    "IA3": {"feedforward_modules": ["down_proj", "c_fc"]},
    "LN_TUNING": {},
    "LOHA": {"r": 4},
    "LOKR": {"r": 4},
    "MISS": {"r": 4},
    "OFT": {"oft_block_size": 8},
    "OSF": {"effective_rank": 8},
    "PEANUT": {"r": 4, "depth": 1},
    "PVERA": {"r": 4},
    "RANDLORA": {"r": 8},
    "ROAD": {"group_size": 16},
    "SHIRA": {"r": 4},
    "SUPERTUNING": {"sparsity": 0.9, "r": 4, "lora_alpha": 8},
    "TINYLORA": {"r": 4, "u": 4, "weight_tying": 0.4},
    "TRAINABLE_TOKENS": {"token_indices": [3, 5, 90]},
    "UNILORA": {},
    "VBLORA": {"num_vectors": 32, "vector_length": 16},
    "VERA": {"r": 4},
    "WAVEFT": {"n_frequency": 200},
}
# what a type targets where it is not the usual linears
ELSEWHERE = {"LN_TUNING": ["input_layernorm", "norm"], "TRAINABLE_TOKENS": ["embed_tokens"]}


def fresh_base(kind: str) -> Any:
    """The same fp32 weights at each call, biases and norms off their initial values."""
    import transformers as tf

    common = {
        "vocab_size": 96,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.1,
    }
    config = {
        "llama": lambda: tf.LlamaConfig(**common, tie_word_embeddings=False),
        "qwen2": lambda: tf.Qwen2Config(**common, tie_word_embeddings=True),
        "gpt2": lambda: tf.GPT2Config(vocab_size=96, n_embd=64, n_layer=2, n_head=4, n_positions=64, n_inner=96, initializer_range=0.1),
    }[kind]()
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def save_adapter(folder: Path, kind: str, base: str, changes: dict[str, Any]) -> Path:
    """An adapter of this type whose tensors all moved away from where they started, as ``save_pretrained`` writes it."""
    from peft import get_peft_model
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    settings = {"target_modules": ELSEWHERE.get(kind, TARGETS[base]), "task_type": "CAUSAL_LM"} | SETTINGS[kind] | changes
    if kind == "IA3":
        settings["feedforward_modules"] = [name for name in settings["feedforward_modules"] if name in settings["target_modules"]]
    budget = settings.pop("rank_pattern", None)
    model = get_peft_model(fresh_base(base), PEFT_TYPE_TO_CONFIG_MAPPING[kind](**settings))
    torch.manual_seed(1)
    with torch.no_grad():
        for _, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    if budget:  # as AdaLoRA's allocator leaves it: other ranks kept in each module
        names = [name.replace(".lora_E.default", ".lora_E") for name, _ in model.base_model.model.named_parameters() if ".lora_E" in name]
        model.peft_config["default"].rank_pattern = {name: [(at + number) % 3 != 0 for number in range(4)] for at, name in enumerate(names)}
    model.save_pretrained(folder)
    return folder


def edited(model: Any, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """``(edits, specs)`` of the adapter in ``folder`` for ``model``, from headers, config and shapes alone."""
    from transformers.pytorch_utils import Conv1D

    conv = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Conv1D)}
    order = [name for name, module in model.named_modules() if isinstance(module, (torch.nn.Linear, Conv1D))]
    shapes = {name: tuple(value.shape)[::-1] if name in conv else tuple(value.shape) for name, value in model.named_parameters()}
    config, specs = json.loads((folder / "adapter_config.json").read_text()), read_header(folder / "adapter_model.safetensors")[0]
    found = delegated_edits(folder, "an adapter", config, specs, lambda key: read_tensor(folder, specs[key]), shapes, conv=conv, order=order)
    return found, specs
