"""A merged float checkpoint answers as PEFT's separate model does, on every architecture and with every adapter feature that is merged."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from conftest import KINDS
from oracles.dequantized import base_model, logits, nf4_weights, separate_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from qmerge.store.manifest import read_manifest

FIRST = {"llama": "q_proj", "qwen2": "q_proj", "gpt2": "c_attn", "gemma2": "q_proj"}
EMBEDDING = {"llama": "embed_tokens", "qwen2": "embed_tokens", "gpt2": "wte", "gemma2": "embed_tokens"}
LORA = {
    "plain": lambda kind: {},
    "rslora": lambda kind: {"use_rslora": True, "r": 9},
    "patterns": lambda kind: {"rank_pattern": {FIRST[kind]: 2}, "alpha_pattern": {r"(layers|h)\.1\..*": 3}},
    "head": lambda kind: {"modules_to_save": ["lm_head"]},
    "embedding": lambda kind: {"modules_to_save": [EMBEDDING[kind]]},
}


def loaded(folder: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("feature", LORA)
@pytest.mark.parametrize("kind", KINDS)
def test_merged_answers_as_separate(zoo, written, kind, feature):
    """A scaling, a pattern, a transposed Conv1D, a saved module or a tied head that is lost. Weights are cast to bf16 once, 2^-9 of each: logits move by
    less than 1 % in all, and the adapter moves them by far more."""
    adapter = zoo.adapter(kind, feature, relative=0.05, **LORA[feature](kind))
    out, _ = written(kind, "bf16", adapter=adapter)
    ids = zoo.batch()
    wanted, base = logits(separate_model(zoo.float(kind), zoo.nf4(kind), adapter), ids), logits(base_model(zoo.float(kind), zoo.nf4(kind)), ids)
    found = logits(loaded(out), ids)
    assert distance(found, wanted) < 0.01 and distance(base, wanted) > 0.08


@pytest.mark.parametrize("kind", KINDS)
def test_every_weight_is_one_cast_of_the_sum(zoo, written, kind):
    """Two roundings instead of one, or a sum in 16 bits: OUT must hold (W + s·B·A).bfloat16() exactly, W as bitsandbytes dequantizes it."""
    out, _ = written(kind, "bf16", adapter=zoo.adapter(kind, "plain", relative=0.05))
    theirs, tensors = nf4_weights(zoo.nf4(kind)), load_file(out / "model.safetensors")
    lora = load_file(Path(zoo.adapter(kind, "plain", relative=0.05)) / "adapter_model.safetensors")
    untouched = 0
    for name, weight in theirs.items():
        a, b = (lora.get(f"base_model.model.{name}.lora_{side}.weight") for side in "AB")
        delta = (b.float() @ a.float()) * (8 / 4) if a is not None else 0
        untouched += a is None
        merged = (weight + delta).bfloat16()
        assert torch.equal(tensors[f"{name}.weight"], merged.T if kind == "gpt2" else merged), name
    assert untouched == {"llama": 0, "qwen2": 6, "gpt2": 0, "gemma2": 0}[kind]
    float_base = load_file(Path(zoo.float(kind)) / "model.safetensors")
    assert {n: (tuple(t.shape), t.dtype) for n, t in tensors.items()} == {n: (tuple(t.shape), t.dtype) for n, t in float_base.items()}
    for name in set(float_base) - {f"{name}.weight" for name in theirs}:
        assert torch.equal(tensors[name], float_base[name]), name


def test_fp16(zoo, written):
    """A merge to fp16 that goes through bf16, or a config that still says bf16."""
    adapter = zoo.adapter("llama")
    out, _ = written("llama", "fp16", adapter=adapter)
    tensors = load_file(out / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16} and json.loads((out / "config.json").read_text())["dtype"] == "float16"
    wanted = logits(separate_model(zoo.float("llama"), zoo.nf4("llama"), adapter), zoo.batch())
    assert distance(logits(loaded(out), zoo.batch()), wanted) < 0.002


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("way", ["recipe", "original"])
def test_float_bases(zoo, written, kind, way):
    """A float base with a recipe merged without its rounding, or an original base merged with it."""
    adapter = zoo.adapter(kind)
    flags = ("--nf4-recipe", "single") if way == "recipe" else ("--on", "original")
    out, _ = written(kind, "bf16", *flags, base=zoo.float(kind), adapter=adapter)
    same = separate_model(zoo.float(kind), zoo.nf4(kind, double=False) if way == "recipe" else None, adapter)
    other = separate_model(zoo.float(kind), None if way == "recipe" else zoo.nf4(kind, double=False), adapter)
    found = logits(loaded(out), zoo.batch())
    assert distance(found, logits(same, zoo.batch())) < 0.01 < distance(found, logits(other, zoo.batch())) / 5


def test_original_beside_an_nf4_base(zoo, written):
    """``--original`` named and the NF4 base merged all the same."""
    flags = ("--on", "original", "--original", zoo.float("llama"))
    both, _ = written("llama", "bf16", *flags)
    alone, _ = written("llama", "bf16", "--on", "original", base=zoo.float("llama"))
    assert load_file(both / "model.safetensors").keys() == load_file(alone / "model.safetensors").keys()
    assert (both / "model.safetensors").read_bytes() == (alone / "model.safetensors").read_bytes()
    assert read_manifest(both)["recipe"]["merged_on"] == "float base"


@pytest.mark.parametrize("feature, same", [("head", True), ("embedding", True), ("plain", False)])
@pytest.mark.parametrize("kind", ["qwen2", "gpt2", "gemma2"])
def test_tied_heads_are_untied_where_one_side_changed(zoo, written, kind, feature, same):
    """A replaced embedding that drags the head along (or the other way round) because the config still ties them; or a head written for nothing."""
    adapter = zoo.adapter(kind, feature, relative=0.05, **LORA[feature](kind))
    out, _ = written(kind, "bf16", adapter=adapter)
    tensors, config = load_file(out / "model.safetensors"), json.loads((out / "config.json").read_text())
    assert ("lm_head.weight" in tensors) == same and (config.get("tie_word_embeddings") is False) == same
    assert any("tied embeddings" in warning for warning in read_manifest(out)["warnings"]) == same
    if same:
        model = loaded(out)
        assert not torch.equal(model.get_input_embeddings().weight, model.get_output_embeddings().weight)


def test_tied_head_that_the_file_holds_all_the_same(zoo, written, tmp_path):
    """Some tied checkpoints store the head too. The adapter's head must not lose against the tie that the config still names."""
    base = tmp_path / "both"
    shutil.copytree(zoo.float("qwen2"), base)
    tensors = load_file(base / "model.safetensors")
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, base / "model.safetensors", {"format": "pt"})
    adapter = zoo.adapter("qwen2", "head", relative=0.05, **LORA["head"]("qwen2"))
    out, _ = written("qwen2", "bf16", "--on", "original", base=str(base), adapter=adapter)
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
    wanted = logits(separate_model(zoo.float("qwen2"), None, adapter), zoo.batch())
    assert distance(logits(loaded(out), zoo.batch()), wanted) < 0.01


def test_manifest_tells_what_was_merged(zoo, written):
    """A manifest that names other inputs, or one that says where they lay on this machine."""
    out, _ = written("llama", "bf16")
    manifest = read_manifest(out)
    assert manifest["inputs"]["base"]["name"] == Path(zoo.nf4("llama")).name and manifest["inputs"]["adapter"]["name"] == Path(zoo.adapter("llama")).name
    assert manifest["recipe"]["format"] == "bf16" and {"torch", "transformers", "qmerge"} <= set(manifest["versions"])
    assert str(zoo.root) not in (out / "manifest.json").read_text() and str(zoo.root) not in (out / "config.json").read_text()


def test_scaling_of_rslora_by_hand(zoo, written):
    """alpha / r where rsLoRA means alpha / sqrt(r): with rank 9 a third of the delta."""
    adapter = zoo.adapter("llama", "rslora", relative=0.05, **LORA["rslora"]("llama"))
    out, _ = written("llama", "bf16", adapter=adapter)
    name = "model.layers.1.mlp.down_proj"
    lora = load_file(Path(adapter) / "adapter_model.safetensors")
    delta = lora[f"base_model.model.{name}.lora_B.weight"] @ lora[f"base_model.model.{name}.lora_A.weight"] * (8 / math.sqrt(9))
    merged = (nf4_weights(zoo.nf4("llama"))[name] + delta).bfloat16()
    assert torch.equal(load_file(out / "model.safetensors")[f"{name}.weight"], merged)


def test_dry_run_writes_nothing(zoo, cli, tmp_path):
    """A dry run that leaves a folder behind, or promises another size than what is written."""
    arguments = ("merge", "--base", zoo.nf4("llama"), "--adapter", zoo.adapter("llama"), "--out", tmp_path / "out", "--format", "bf16", "--device", "cpu", "--json")
    answer = cli(*arguments, "--dry-run")
    assert answer.code == 0 and list(tmp_path.iterdir()) == []
    promised = json.loads(answer.out)["bytes_out"]
    assert cli(*arguments).code == 0
    held = sum(tensor.nbytes for tensor in load_file(tmp_path / "out" / "model.safetensors").values())
    assert promised == held


def test_verify_accepts_its_own_and_sees_a_changed_weight(zoo, written, cli, tmp_path):
    """A verification that passes whatever it is given: a weight changed behind a renewed hash must be found by deriving it again."""
    out, _ = written("llama", "bf16")
    names = ("--base", zoo.nf4("llama"), "--adapter", zoo.adapter("llama"))
    assert cli("verify", out, *names).code == 0
    changed = tmp_path / "changed"
    shutil.copytree(out, changed)
    tensors = load_file(changed / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] += 1
    save_file(tensors, changed / "model.safetensors", {"format": "pt"})
    assert cli("verify", changed).code == 1
    manifest = json.loads((changed / "manifest.json").read_text())
    from qmerge.store.manifest import digest_file

    manifest["files"]["model.safetensors"] = digest_file(changed / "model.safetensors")
    (changed / "manifest.json").write_text(json.dumps(manifest))
    answer = cli("verify", changed, *names)
    assert answer.code == 1 and "up_proj" in answer.err


def test_a_pair_on_a_tied_head(zoo, written):
    """A LoRA pair on a head that shares the embedding's tensor: merged in place it would change the embedding too."""
    adapter = zoo.adapter("qwen2", "on the head", relative=0.05, target_modules=["q_proj", "lm_head"])
    out, _ = written("qwen2", "bf16", adapter=adapter)
    wanted = logits(separate_model(zoo.float("qwen2"), zoo.nf4("qwen2"), adapter), zoo.batch())
    assert distance(logits(loaded(out), zoo.batch()), wanted) < 0.01
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False


def test_a_pair_on_a_free_head_is_merged(zoo, written):
    """A head outside the blocks that is overlooked."""
    adapter = zoo.adapter("llama", "on the head", relative=0.05, target_modules=["q_proj", "lm_head"])
    out, _ = written("llama", "bf16", adapter=adapter)
    wanted = logits(separate_model(zoo.float("llama"), zoo.nf4("llama"), adapter), zoo.batch())
    assert distance(logits(loaded(out), zoo.batch()), wanted) < 0.01
