"""Arm C (merged in memory) is arm B (base + adapter through PEFT) for every kind of adapter and base, and an evaluation says so.

Tolerance: 1e-5 of the largest logit, which is fp32 in another order of summation (measured: up to 2e-6).
"""

from __future__ import annotations

import json
import shlex
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import OWN, Zoo, build_config, build_tokenizer, run_cli, sentences, write_rows
from safetensors.torch import load_file, save_file
from support.packed import Packed
from test_adapters_experts import save_old
from test_adapters_names import config_of

from qmerge.adapters.choices import AdapterSet, Combination, parse_choice
from qmerge.errors import Refused
from qmerge.quality import arms
from qmerge.quality.attach import check_separate
from qmerge.quality.evaluate import evaluate
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

    both = {"modules_to_save": ["embed_tokens", "lm_head"]}
    for name, kind, settings in (("grown", "llama", both), ("grown-unasked", "llama", {}), ("grown-tied", "qwen2", {}), ("grown-tied-saved", "qwen2", both)):
        wish = LoraConfig(r=4, task_type="CAUSAL_LM", target_modules=LINEARS, init_lora_weights=False, **settings)
        adapter = made.adapter(name, kind, wish, grow=328)
        assert difference(made.base(kind), adapter) < TIGHT
        assert arms.load_merged(made.base(kind), adapter, on="original").model.get_output_embeddings().weight.shape[0] == 328


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
    monkeypatch.setattr(arms, "from_pretrained", lambda *_, **__: pytest.fail("a model was loaded"))
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


BASES = {
    "nf4-double": {}, "nf4-single": {}, "fp4": {}, "fp4-double-gpt2": {}, "nf4-skipping": {}, "int8": {}, "gptq-4": {}, "gptq-4-asym-act-v2": {}, "awq": {},
    "float": {"on": "original"}, "float-double": {"nf4_recipe": {"double_quant": True}}, "float-fp4-128": {"nf4_recipe": {"quant_type": "fp4", "block_size": 128}},
}  # fmt: skip


def base_of(name: str, zoo: Zoo, packed: Packed) -> tuple[str, str]:
    kind = "gpt2" if "gpt2" in name else "llama"
    if name.startswith("nf4-") and name != "nf4-skipping":
        return zoo.nf4(kind, name == "nf4-double"), zoo.adapter(kind)
    return zoo.float(kind) if name.startswith("float") else packed(name), zoo.adapter(kind)


@pytest.mark.parametrize("name", BASES)
def test_merged_is_separate_on_every_base(name: str, zoo: Zoo, packed: Packed) -> None:
    """A base that evaluation dequantizes otherwise than the merge, or once more per arm."""
    base, adapter = base_of(name, zoo, packed)
    assert difference(base, adapter, **({"on": "dequantized"} | BASES[name])) < TIGHT


# gptqmodel compiles its kernels for bf16 (a minute of both cores) where the processor has AVX512-BF16
SLOW_KERNELS = ("gptq-4", "gptq-4-asym-act-v2", "awq")


def slow_where_compiled(*names: str) -> list[Any]:
    return [pytest.param(name, marks=pytest.mark.slow) if name in SLOW_KERNELS else name for name in names]


@pytest.mark.parametrize("name", slow_where_compiled(*BASES))
def test_the_reference_as_its_loader_runs_it_is_the_reference(name: str, zoo: Zoo, packed: Packed) -> None:
    """A noise floor measured on another model: the public loader's kernel on another base, or without the adapter."""
    base, adapter = base_of(name, zoo, packed)
    model, source = as_served(base, adapter, **({"on": "dequantized"} | BASES[name]))
    assert source and float((logits(model) - logits(arms.load_separate(base, adapter, **({"on": "dequantized"} | BASES[name])).model)).abs().max()) < 0.5, source


@pytest.mark.parametrize("name", slow_where_compiled("nf4-double", "int8", "gptq-4", "awq", "float", "float-double"))
def test_a_dense_merge_of_every_base_lies_within_the_floor(name: str, zoo: Zoo, packed: Packed, tmp_path: Path) -> None:
    """What `merge` writes and what evaluation takes for base + adapter must be one model: KL at the rounding to bf16, and the merge in memory at fp32's (measured: out 2.8e-5 on AWQ, merged 7e-13)."""
    base, adapter = base_of(name, zoo, packed)
    flags = {"float": ("--on", "original"), "float-double": ("--nf4-recipe", "double")}.get(name, ())
    answer = run_cli("merge", "--base", base, "--adapter", adapter, "--out", tmp_path / "out", "--format", "bf16", "--device", "cpu", *flags)
    assert answer.code == 0, answer.err
    results = evaluate(base, adapter, {"out": str(tmp_path / "out")}, {"t": zoo.held_out}, 64, **({"on": "dequantized"} | BASES[name]))
    kl = {arm: row["texts"]["t"]["metrics"]["kl_mean"]["value"] for arm, row in results["arms"].items()}
    floor = results["noise_floor"]["t"]["value"]
    assert kl["merged"] < max(2 * floor, 1e-9) and kl["out"] < max(2 * floor, 5e-5) < kl["base"], (kl, floor, results["noise_floor"]["t"]["source"])
    rows = results["arms"]["out"]["linears"]
    assert len(rows) == 14 and all(row["delta_survival"] == pytest.approx(1, abs=0.03) for row in rows.values())


WRITTEN = ["dora", "lora-bias", "bias-all", "tied-saved-head", "tied-embedding", "tokens-tied", "replicated", "fused-mixtral", "fused-qwen3", "ia3", "loha", "several"]


@pytest.mark.parametrize("name", WRITTEN)
def test_a_written_merge_of_every_adapter_is_the_reference(name: str, made: Made, zoo: Zoo, tmp_path: Path) -> None:
    """The whole way for kinds of adapters: `merge --format fp32`, then `evaluate`, which must find nothing lost; delta survival is told per tensor."""
    if name == "several":
        base, texts = made.lora("plain")[0], [f"{made.lora('plain')[1]}=0.5", made.lora("rslora", 3)[1]]
    else:
        base, adapter = made.other(name) if name in OTHERS else made.lora(name)
        texts = [adapter]
    adapters = [part for text in texts for part in ("--adapter", text)]
    answer = run_cli("merge", "--base", base, *adapters, "--out", tmp_path / "out", "--format", "fp32", "--on", "original", "--device", "cpu")
    assert answer.code == 0, answer.err
    results = evaluate(base, AdapterSet.of(*texts), {"out": str(tmp_path / "out")}, {"t": zoo.held_out}, 48, on="original")
    kl = {arm: row["texts"]["t"]["metrics"]["kl_mean"]["value"] for arm, row in results["arms"].items()}
    assert kl["out"] < 1e-8 and kl["merged"] < 1e-8 and kl["base"] > 1e-5, kl
    rows = results["arms"]["out"]["linears"]
    assert rows and all(row["delta_survival"] == pytest.approx(1, abs=1e-4) for row in rows.values())
    assert any(".experts." in name for name in rows) == name.startswith("fused")


def test_text_of_tokens_that_the_adapter_brought(made: Made, tmp_path: Path) -> None:
    """The base has no rows for them: an IndexError in the middle of an evaluation, where "the base knows nothing of them" is the answer."""
    from peft import LoraConfig

    tokenizer = build_tokenizer()
    tokenizer.add_tokens([f"<new{number}>" for number in range(8)])
    wish = LoraConfig(r=4, task_type="CAUSAL_LM", target_modules=LINEARS, init_lora_weights=False)
    adapter = str(shutil.copytree(made.adapter("grown-unasked", "llama", wish, grow=328), tmp_path / "adapter"))
    tokenizer.save_pretrained(adapter)
    text = write_rows(tmp_path / "t.jsonl", [f"{line} <new3> <new5>" for line in sentences(OWN, 8, 5)])
    answer = run_cli("merge", "--base", made.base("llama"), "--adapter", adapter, "--out", tmp_path / "out", "--format", "fp32", "--on", "original", "--device", "cpu")
    assert answer.code == 0, answer.err
    results = evaluate(made.base("llama"), adapter, {"out": str(tmp_path / "out")}, {"t": text}, 48, on="original")
    kl = {arm: row["texts"]["t"]["metrics"]["kl_mean"]["value"] for arm, row in results["arms"].items()}
    assert kl["out"] < 1e-8 and kl["merged"] < 1e-8 and kl["base"] > 1e-5 and "mean of the others" in results["arms"]["base"]["note"], kl
    with pytest.raises(Refused, match="numbers tokens otherwise"):
        evaluate(made.base("llama"), adapter, {"bare": made.base("llama")}, {"t": text}, 48, on="original")
    bare = shutil.copytree(made.base("llama"), tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*", "special_tokens*", "chat_template*"))
    with pytest.raises(Refused, match="lacks tokens"):
        evaluate(made.base("llama"), adapter, {"bare": str(bare)}, {"t": text}, 48, on="original")


def test_run_measures_against_all_adapters(zoo: Zoo, tmp_path: Path) -> None:
    """The reference of `run` with one of two adapters, or without the weight; a next command that measures something else."""
    first, second = zoo.adapter("llama"), zoo.adapter("llama", "second", seed=2)
    flags = ("--base", zoo.nf4("llama"), "--adapter", first, "--adapter", f"{second}=0.5", "--out", tmp_path / "out", "--format", "bf16", "--device", "cpu")
    answer = run_cli("run", *flags, "--text", zoo.held_out, "--tokens", 64, "--json")
    assert answer.code in (0, 3), answer.err
    results = json.loads((tmp_path / "out.eval/results.json").read_text())
    kl = {arm: row["texts"]["held_out"]["metrics"]["kl_mean"]["value"] for arm, row in results["arms"].items()}
    assert kl["merged"] < 1e-9 and kl["out"] < 1e-4 < kl["base"], kl
    line = next(row for row in answer.err.splitlines() if "qmerge eval" in row).partition("qmerge ")[2]
    words = shlex.split(line.replace("FILE", zoo.held_out).replace("results.json", str(tmp_path / "again.json")))
    assert [words[i + 1] for i, word in enumerate(words) if word == "--adapter"] == [first, f"{second}=0.5"]
    assert run_cli(*words, "--tokens", 64, "--device", "cpu").code == 0
    again = json.loads((tmp_path / "again.json").read_text())
    assert again["arms"]["out"]["texts"]["held_out"]["metrics"]["kl_mean"] == results["arms"]["out"]["texts"]["held_out"]["metrics"]["kl_mean"]


def test_the_next_command_repeats_how_it_was_merged(zoo: Zoo, tmp_path: Path) -> None:
    """`qmerge eval` as printed must measure the same thing: recipe of a float base, combination, and a folder with a blank in its name."""
    first, second = zoo.adapter("llama"), zoo.adapter("llama", "second", seed=2)
    flags = ("--nf4-recipe", "single", "--combine", "ties", "--density", "0.5")
    answer = run_cli("merge", "--base", zoo.float("llama"), "--adapter", first, "--adapter", second, "--out", tmp_path / "my out", "--format", "bf16", "--device", "cpu", *flags)
    assert answer.code == 0, answer.err
    line = answer.err.splitlines()[-1].partition("Next: qmerge ")[2]
    assert all(f"{flag} {value}" in line for flag, value in zip(flags[::2], flags[1::2], strict=True)) and "'" in line
    words = shlex.split(line.replace("FILE", zoo.held_out).replace("results.json", str(tmp_path / "r.json")))
    assert run_cli(*words, "--tokens", 64, "--device", "cpu").code == 0
    arms_ = json.loads((tmp_path / "r.json").read_text())["arms"]
    assert arms_["my-out"]["texts"]["held_out"]["metrics"]["kl_mean"]["value"] < 1e-4 and arms_["merged"]["texts"]["held_out"]["metrics"]["kl_mean"]["value"] < 1e-9


def test_a_float_base_without_a_word_on_its_use_is_refused(zoo: Zoo) -> None:
    """Evaluation took NF4 with double quantization where the merge asks; an adapter trained on the float base would have another reference."""
    with pytest.raises(Refused, match="must not be guessed"):
        evaluate(zoo.float("llama"), zoo.adapter("llama"), {}, {"t": zoo.held_out}, 64)


def test_a_folder_that_says_how_its_base_was_quantized(zoo: Zoo, tmp_path: Path) -> None:
    """The merge reads it there; the reference must too."""
    adapter = shutil.copytree(zoo.adapter("llama"), tmp_path / "adapter")
    (adapter / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": False}}))
    results = evaluate(zoo.float("llama"), str(adapter), {"base-as-trained": zoo.nf4("llama", double=False)}, {"t": zoo.held_out}, 64)
    assert results["fingerprint"]["nf4_recipe"]["double_quant"] is False
    row = {name: arm["texts"]["t"]["metrics"]["nll"]["value"] for name, arm in results["arms"].items()}
    assert row["base-as-trained"] == row["base"]
