"""Which architectures are the columns of the support matrix, and what are their parts called?

Sizes are the smallest that still differ from each other: a transposed weight, a lost group or a wrong expert changes a shape or the logits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

VOCABULARY = 96
HIDDEN = 64
COMMON = {
    "vocab_size": VOCABULARY, "hidden_size": HIDDEN, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "max_position_embeddings": 64, "initializer_range": 0.1, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None, "tie_word_embeddings": False,
}  # fmt: skip


@dataclass(frozen=True)
class Architecture:
    """``linears``: what LoRA usually targets, two in attention first. ``biased``: linears of those that have a bias. ``fused``: parameters of fused experts; ``apart``:
    names of one expert's linears in the days when they were modules, with how the file spells them."""

    key: str
    title: str
    config: Callable[[], Any]
    linears: tuple[str, ...]
    biased: tuple[str, ...] = ()
    embedding: str = "embed_tokens"
    norm: str = "norm"
    blocks: str = "layers"
    tied: bool = False
    fused: tuple[str, ...] = ()
    apart: tuple[str, ...] = ()
    experts: str = ""

    @property
    def attention(self) -> list[str]:
        return list(self.linears[:2])


def _llama() -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(**COMMON)


def _qwen2() -> Any:
    from transformers import Qwen2Config

    return Qwen2Config(**COMMON | {"tie_word_embeddings": True})


def _gpt2() -> Any:
    from transformers import GPT2Config

    return GPT2Config(vocab_size=VOCABULARY, n_embd=HIDDEN, n_layer=2, n_head=4, n_positions=64, n_inner=96, initializer_range=0.1, bos_token_id=0, eos_token_id=1)


def _gemma2() -> Any:
    from transformers import Gemma2Config

    own = {"query_pre_attn_scalar": 16, "sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"], "tie_word_embeddings": True, "final_logit_softcapping": 10.0}
    return Gemma2Config(**COMMON | own)


def _mixtral() -> Any:
    from transformers import MixtralConfig

    return MixtralConfig(**COMMON | {"num_local_experts": 4, "num_experts_per_tok": 2})


def _qwen3_moe() -> Any:
    from transformers import Qwen3MoeConfig

    return Qwen3MoeConfig(**COMMON | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "decoder_sparse_step": 1})


def _gpt_oss() -> Any:
    from transformers import GptOssConfig

    own = {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 48, "pad_token_id": 2, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 16}
    return GptOssConfig(**COMMON | own)


_ALL = ("q_proj", "v_proj", "k_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_ATTENTION = _ALL[:4]
_FUSED = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")

ARCHITECTURES = {
    found.key: found
    for found in (
        Architecture("llama", "Llama", _llama, _ALL),
        Architecture("qwen2", "Qwen2", _qwen2, _ALL, biased=("q_proj", "k_proj", "v_proj"), tied=True),
        Architecture("gpt2", "GPT-2", _gpt2, ("c_attn", "c_fc", "c_proj"), biased=("c_attn", "c_fc", "c_proj"), embedding="wte", norm="ln_f", blocks="h", tied=True),
        Architecture("gemma2", "Gemma 2", _gemma2, _ALL, tied=True),
        Architecture("mixtral", "Mixtral", _mixtral, _ATTENTION, fused=_FUSED, apart=("w1", "w2", "w3"), experts="block_sparse_moe.experts"),
        Architecture("qwen3_moe", "Qwen3-MoE", _qwen3_moe, _ATTENTION, fused=_FUSED, apart=("gate_proj", "up_proj", "down_proj"), experts="mlp.experts"),
        Architecture("gpt_oss", "gpt-oss", _gpt_oss, _ATTENTION, biased=_ATTENTION, fused=_FUSED),
    )
}


_SLIDING = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
_ROUTED = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "decoder_sparse_step": 1}
_LINEAR_ATTENTION = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16}
REQUANTIZED: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "qwen2": ("Qwen2Config", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", {}),
    "mistral": ("MistralConfig", {"sliding_window": 16}),
    "gemma2": ("Gemma2Config", _SLIDING | {"query_pre_attn_scalar": 16}),
    "gemma3": ("Gemma3TextConfig", _SLIDING | {"query_pre_attn_scalar": 16, "rope_local_base_freq": 100.0, "tie_word_embeddings": True}),
    "phi3": ("Phi3Config", {}),
    "gpt2": ("GPT2Config", {"n_embd": HIDDEN, "n_layer": 2, "n_head": 4, "n_positions": 128, "n_inner": 96}),
    "gpt_neox": ("GPTNeoXConfig", {}),
    "gpt_neox-serial": ("GPTNeoXConfig", {"use_parallel_residual": False}),
    "opt": ("OPTConfig", {"ffn_dim": 96, "word_embed_proj_dim": HIDDEN, "do_layer_norm_before": True}),
    "opt-projected": ("OPTConfig", {"ffn_dim": 96, "word_embed_proj_dim": 32, "do_layer_norm_before": False}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe": ("Qwen3MoeConfig", _ROUTED),
    "gpt_oss": ("GptOssConfig", _SLIDING | {"num_local_experts": 4, "num_experts_per_tok": 2, "pad_token_id": 2}),
    "lfm2": ("Lfm2Config", {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False, "rope_theta": 10000.0}),
    "qwen3_next": ("Qwen3NextConfig", _ROUTED | _LINEAR_ATTENTION | {"layer_types": ["linear_attention", "full_attention"], "shared_expert_intermediate_size": 32, "partial_rotary_factor": 0.5}),
}  # fmt: skip
"""Models whose linears are requantized: config class and what is its own. Every kind of block, mask, position and projection that tells one architecture from another."""


def requantized_config(key: str) -> Any:
    """The config, with shapes that every format can hold in groups of 32 and a vocabulary that the tests' tokenizer fills."""
    import transformers

    kind, own = REQUANTIZED[key]
    return getattr(transformers, kind)(**COMMON | {"vocab_size": 320, "max_position_embeddings": 128} | own)
