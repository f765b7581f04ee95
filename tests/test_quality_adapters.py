"""Arm C (merged in memory) is arm B (base + adapter through PEFT) for every kind of adapter and base, and an evaluation says so.

Tolerance: 3e-5 absolute on logits of up to about 4, which is fp32 in another order of summation; the largest that was measured is in the test's comment.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build_config, build_tokenizer, run_cli, sentences, write_rows, OWN
from safetensors.torch import load_file, save_file
from test_adapters_names import config_of
from test_formats_base import BNB, GPTQ, Packed

from qmerge.adapters.several_adapters import AdapterSet, Combination, parse_choice
from qmerge.errors import Refused
from qmerge.quality import arms
from qmerge.quality.attach import as_set, attach, check_separate
from qmerge.quality.evaluate import evaluate
from qmerge.quality.merging import edited_weights, linear_rows, merge_in_memory, model_edits
from qmerge.quality.served import as_served

TIGHT = 3e-5
LINEARS = ["q_proj", "v_proj", "down_proj"]
FUSED = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
SMALL = {"hidden_size": 64, "intermediate_size": 96, "max_position_embeddings": 64}
# name -> (base, settings of the adapter)
LORAS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", {"target_modules": LINEARS}),
    "rslora": ("llama", {"target_modules": LINEARS, "use_rslora": True, "r": 9, "rank_pattern": {"v_proj": 4}}),
    "dora": ("llama", {"target_modules": LINEARS, "use_dora": True}),
    "lora-bias": ("qwen2", {"target_modules": ["q_proj", "v_proj"], "lora_bias": True}),
    "bias-all": ("qwen2", {"target_modules": ["q_proj", "v_proj"], "bias": "all"}),
    "bias-lora-only": ("qwen2", {"target_modules": ["q_proj", "v_proj"], "bias": "lora_only"}),
    "embedding": ("llama", {"target_modules": ["q_proj", "embed_tokens"]}),
    "embedding-dora": ("llama", {"target_modules": ["q_proj", "embed_tokens"], "use_dora": True}),
    "head": ("llama", {"target_modules": ["q_proj", "lm_head"]}),
    "all-linear-gpt2": ("gpt2", {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}),
    "dora-gpt2": ("gpt2", {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True, "use_dora": True}),
    "saved-head": ("llama", {"target_modules": LINEARS, "modules_to_save": ["lm_head"]}),
    "saved-both": ("llama", {"target_modules": LINEARS, "modules_to_save": ["lm_head", "embed_tokens"]}),
    "saved-mlp": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["mlp"]}),
    "tied-saved-embedding": ("qwen2", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}),
    "tied-saved-head": ("qwen2", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "tied-saved-both-ensured": ("qwen2", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
    "tied-embedding": ("qwen2", {"target_modules": ["q_proj", "embed_tokens"]}),
    "tied-embedding-ensured": ("qwen2", {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True}),
    "tied-head": ("qwen2", {"target_modules": ["q_proj", "lm_head"]}),
    "tokens": ("llama", {"target_modules": ["q_proj"], "trainable_token_indices": [3, 5, 90]}),
    "tokens-tied": ("qwen2", {"target_modules": ["q_proj"], "trainable_token_indices": [3, 5, 90]}),
    "tokens-both": ("llama", {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [3, 5], "lm_head": [7]}}),
    "replicated": ("llama", {"target_modules": LINEARS, "layer_replication": [[0, 2], [1, 2]]}),
    "replicated-dora": ("llama", {"target_modules": LINEARS, "layer_replication": [[0, 2], [1, 2]], "use_dora": True}),
    "fused-mixtral": ("mixtral", {"target_modules": ["q_proj"], "target_parameters": FUSED}),
    "fused-qwen3": ("qwen3_moe", {"target_modules": [], "target_parameters": FUSED}),
    "fused-one": ("qwen3_moe", {"target_modules": ["v_proj"], "target_parameters": FUSED[:1]}),
    "blocks": ("llama", {"target_modules": LINEARS, "use_bdlora": {"nblocks": 2, "target_modules_bd_a": ["q_proj"], "target_modules_bd_b": ["v_proj"]}}),
}
OTHERS = {
    "ia3": ("IA3Config", {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}),
    "loha": ("LoHaConfig", {"target_modules": LINEARS, "r": 4, "init_weights": False}),
    "lokr": ("LoKrConfig", {"target_modules": LINEARS, "r": 4, "init_weights": False}),
    "oft": ("OFTConfig", {"target_modules": LINEARS, "oft_block_size": 8}),
    "vera": ("VeraConfig", {"target_modules": ["q_proj"], "r": 8}),
    "ln": ("LNTuningConfig", {"target_modules": ["input_layernorm", "norm"]}),
    "trainable-tokens": ("TrainableTokensConfig", {"token_indices": [3, 5, 90], "target_modules": ["embed_tokens"]}),
}


class Made:
    """Tiny fp32 bases and adapters on them, each made once."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def base(self, kind: str) -> str:
        folder = self.root / kind
        if not folder.exists():
            from transformers import AutoModelForCausalLM

            torch.manual_seed(0)
            changes = {"num_key_value_heads": 2, "tie_word_embeddings": kind == "qwen2"}
            config = build_config(kind) if kind == "gpt2" else build_config(kind, **SMALL | changes) if kind in ("llama", "qwen2") else config_of(kind, vocab_size=320)
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(0.05 * torch.randn_like(parameter))
            model.save_pretrained(folder)
            build_tokenizer().save_pretrained(folder)
        return str(folder)

    def adapter(self, name: str, kind: str, config: Any, seed: int = 1, grow: int | None = None) -> str:
        folder = self.root / f"{name}-adapter"
        if not folder.exists():
            from peft import get_peft_model

            model = arms.load_base(self.base(kind), on="original").model
            if grow:
                model.resize_token_embeddings(grow)
            torch.manual_seed(seed)
            model = get_peft_model(model, config)
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.requires_grad:
                        parameter.add_(0.05 * torch.randn_like(parameter))
            model.save_pretrained(folder)
        return str(folder)

    def lora(self, name: str, seed: int = 1) -> tuple[str, str]:
        from peft import LoraConfig

        kind, settings = LORAS[name]
        wish = LoraConfig(**{"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM", "init_lora_weights": False} | settings)
        return self.base(kind), self.adapter(f"{name}-{seed}", kind, wish, seed)

    def other(self, name: str) -> tuple[str, str]:
        import peft

        cls, settings = OTHERS[name]
        return self.base("llama"), self.adapter(name, "llama", getattr(peft, cls)(task_type="CAUSAL_LM", **settings))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(tmp_path_factory.mktemp("made"))


@torch.inference_mode()
def logits(model: torch.nn.Module) -> torch.Tensor:
    ids = torch.cat([torch.arange(2, 42), torch.tensor([90, 3, 5, 7])])[None]
    return model(input_ids=ids).logits.float()


def difference(base: str, adapter: str | AdapterSet, matters: float = 1e-2, **how: Any) -> float:
    """The largest difference of logits between B and C; the adapter must move them by more than ``matters``."""
    how = how or {"on": "original"}
    separate, merged, bare = (logits(arm.model) for arm in (arms.load_separate(base, adapter, **how), arms.load_merged(base, adapter, **how), arms.load_base(base, **how)))
    shared = min(bare.shape[-1], separate.shape[-1])
    assert float((separate - bare)[..., :shared].abs().max() if False else (separate[..., :shared] - bare[..., :shared]).abs().max()) > matters
    return float((separate - merged).abs().max())


@pytest.mark.parametrize("name", LORAS)
def test_merged_is_separate_for_every_lora(made: Made, name: str) -> None:
    """A merge in memory that is another model than PEFT runs: then the floor of every evaluation of such an adapter would be a lie."""
    base, adapter = made.lora(name)
    assert difference(base, adapter) < TIGHT


@pytest.mark.parametrize("name", OTHERS)
def test_merged_is_separate_for_other_types(made: Made, name: str) -> None:
    """IA3 and its kin go through PEFT's own layers, one linear at a time; the model must come out as PEFT runs it."""
    base, adapter = made.other(name)
    assert difference(base, adapter) < TIGHT
