"""Arm C (merged in memory) is arm B (base + adapter through PEFT) for every kind of adapter and base, and an evaluation says so.

Tolerance: 1e-5 of the largest logit, which is fp32 in another order of summation (measured: up to MEASURED).
"""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build_config, build_tokenizer, run_cli, sentences, write_rows, OWN
from safetensors.torch import load_file, save_file
from test_adapters_experts import save_old
from test_adapters_names import config_of
from test_formats_base import BNB, GPTQ, Packed

from qmerge.adapters.several_adapters import AdapterSet, Combination, parse_choice
from qmerge.errors import Refused
from qmerge.quality import arms
from qmerge.quality.attach import as_set, attach, check_separate
from qmerge.quality.evaluate import evaluate
from qmerge.quality.merging import edited_weights, linear_rows, merge_in_memory, model_edits
from qmerge.quality.served import as_served

TIGHT = 1e-5
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
    "blocks": ("llama", {"target_modules": LINEARS, "use_bdlora": {"nblocks": 2, "match_strict": False, "target_modules_bd_a": ["q_proj"], "target_modules_bd_b": ["v_proj"]}}),
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
    """The largest difference of logits between B and C, over their largest value; the adapter must move them by more than ``matters``."""
    how = how or {"on": "original"}
    bare, separate, merged = (logits(load().model) for load in (partial(arms.load_base, base, **how), partial(arms.load_separate, base, adapter, **how), partial(arms.load_merged, base, adapter, **how)))
    shared = min(bare.shape[-1], separate.shape[-1])
    assert float((separate[..., :shared] - bare[..., :shared]).abs().max()) > matters
    return float((separate - merged).abs().max() / separate.abs().max())


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


def test_a_resized_vocabulary_is_grown_on_both_sides(made: Made) -> None:
    """PEFT cannot load embeddings of another height than the model's; the base has to grow first."""
    from peft import LoraConfig

    for name, settings in (("grown", {"modules_to_save": ["embed_tokens", "lm_head"]}), ("grown-unasked", {})):
        wish = LoraConfig(r=4, task_type="CAUSAL_LM", target_modules=LINEARS, init_lora_weights=False, **settings)
        adapter = made.adapter(name, "llama", wish, grow=328)
        assert difference(made.base("llama"), adapter) < TIGHT
        assert arms.load_merged(made.base("llama"), adapter, on="original").model.get_output_embeddings().weight.shape[0] == 328


def several(*texts: str, how: str = "sum", **options: Any) -> AdapterSet:
    return AdapterSet(tuple(parse_choice(text) for text in texts), Combination(how, **options))


def test_several_adapters_are_their_weighted_sum(made: Made) -> None:
    """The reference of a sum must hold all adapters, each with its weight; DoRA scales what stands before it and must come first."""
    base, first = made.lora("plain")
    second, third = made.lora("plain", 2)[1], made.lora("rslora", 3)[1]
    dora = made.lora("dora")[1]
    assert difference(base, several(f"{first}=0.5", f"{second}=-0.25", third)) < TIGHT
    assert difference(base, several(f"{first}=0.5", dora)) < TIGHT
    assert difference(base, f"{first}=0.3") < TIGHT


@pytest.mark.parametrize(("how", "options"), [("ties", {"density": 0.5}), ("svd", {"rank": 6}), ("dare_linear", {"density": 0.5, "seed": 3})])
def test_a_combination_is_pefts(made: Made, how: str, options: dict[str, Any]) -> None:
    """Random drops must be the same ones on both sides, in PEFT's order of modules."""
    base, first = made.lora("plain")
    assert difference(base, several(f"{first}=0.7", f"{made.lora('plain', 2)[1]}=0.6", how=how, **options)) < TIGHT


def test_what_peft_cannot_keep_separate_is_refused_before_anything_is_loaded(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Minutes of loading and measuring, and then a message that the headers would have told."""
    base, dora = made.lora("dora")
    plain, saved, tokens = (made.lora(name)[1] for name in ("plain", "saved-head", "tokens"))
    ia3, again = made.other("ia3")[1], str(shutil.copytree(dora, tmp_path / "again"))
    monkeypatch.setattr(arms, "_from_pretrained", lambda *_, **__: pytest.fail("a model was loaded"))
    for chosen, words in (
        (several(f"{dora}=0.5"), "cannot weigh"), (several(dora, again), "Two DoRA"), (several(plain, saved), "several adapters active"), (several(plain, tokens), "several adapters active"),
        (several(f"{ia3}=0.5"), "cannot weigh"),
    ):  # fmt: skip
        with pytest.raises(Refused, match=words):
            evaluate(base, chosen, {}, {"t": write_rows(tmp_path / "t.jsonl", sentences(OWN, 3, 1))}, 32, on="original")


def rewritten(adapter: str, folder: Path, rename: Any) -> str:
    shutil.copytree(adapter, folder)
    tensors = {rename(key): tensor for key, tensor in load_file(folder / "adapter_model.safetensors").items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return str(folder)


def test_names_that_pefts_loader_does_not_know(made: Made, tmp_path: Path) -> None:
    """PEFT leaves what it does not find at random and only warns: the reference would be another model."""
    base, plain = made.lora("plain")
    wrapped = rewritten(plain, tmp_path / "wrapped", lambda key: key.replace(".layers.", "._orig_mod.layers."))
    named = rewritten(plain, tmp_path / "named", lambda key: key.replace(".weight", ".mine.weight"))
    expected = logits(arms.load_separate(base, plain, on="original").model)
    for adapter in (wrapped, named, f"{named}#mine"):
        assert torch.equal(logits(arms.load_separate(base, adapter, on="original").model), expected)
        assert difference(base, adapter) < TIGHT


def test_a_pickle_is_never_opened_by_the_reference(made: Made, tmp_path: Path) -> None:
    """PEFT would unpickle it in this process, which --allow-pickle promises not to do."""
    base, plain = made.lora("plain")
    shutil.copytree(plain, tmp_path / "pickled")
    torch.save(load_file(tmp_path / "pickled/adapter_model.safetensors"), tmp_path / "pickled/adapter_model.bin")
    (tmp_path / "pickled/adapter_model.safetensors").unlink()
    chosen = AdapterSet((parse_choice(str(tmp_path / "pickled")),), Combination(), allow_pickle=True)
    assert torch.equal(logits(arms.load_separate(base, chosen, on="original").model), logits(arms.load_separate(base, plain, on="original").model))
    with pytest.raises(Refused, match="pickle"):
        check_separate(str(tmp_path / "pickled"))


def pissa(made: Made, tmp_path: Path) -> tuple[str, str]:
    """The base that PiSSA left behind, and a trained adapter with the one from before training in it."""
    from peft import LoraConfig, get_peft_model

    model = arms.load_base(made.base("llama"), on="original").model
    peft = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=LINEARS, init_lora_weights="pissa", task_type="CAUSAL_LM"))
    peft.save_pretrained(tmp_path / "trained/pissa_init")
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if ".lora_" in name:
                parameter.add_(0.05 * torch.randn_like(parameter))
    peft.save_pretrained(tmp_path / "trained")
    peft.unload().save_pretrained(tmp_path / "residual")
    build_tokenizer().save_pretrained(tmp_path / "residual")
    for folder in ("trained", "trained/pissa_init"):  # PEFT itself writes true
        config = json.loads((tmp_path / folder / "adapter_config.json").read_text())
        (tmp_path / folder / "adapter_config.json").write_text(json.dumps(config | {"init_lora_weights": "pissa"}))
    return str(tmp_path / "residual"), str(tmp_path / "trained")


def test_pissa_on_the_residual_and_on_the_whole_base(made: Made, tmp_path: Path) -> None:
    """PEFT would initialise again while loading and take the components out of the base a second time; on the whole base they must be taken out once."""
    residual, trained = pissa(made, tmp_path)
    chosen = AdapterSet((parse_choice(trained),), Combination(), residual_base=True)
    assert difference(residual, chosen) < TIGHT
    assert difference(made.base("llama"), trained) < TIGHT
    torch.testing.assert_close(logits(arms.load_separate(residual, chosen, on="original").model), logits(arms.load_separate(made.base("llama"), trained, on="original").model), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_adapters_with_the_names_of_single_experts(made: Made, kind: str, tmp_path: Path) -> None:
    """Adapters from before transformers 5 name experts one by one, which today are parts of fused parameters."""
    save_old(kind, tmp_path / "old", task_type="CAUSAL_LM")
    assert difference(made.base(kind), str(tmp_path / "old")) < TIGHT
