"""Every format that qmerge writes, from disk through the loader that its users have: weights bit for bit, logits of the same weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from oracles.dequantized import fill, logits
from transformers import AutoModelForCausalLM

from qmerge.quality.arms import load_candidate
from qmerge.quality.plain import dense_weights

pytest.importorskip("gptqmodel")
pytest.importorskip("compressed_tensors")

NEAREST = {
    "gptq-2-asym-32": ("gptq", "--bits", "2", "--asym", "--group-size", "32"),
    "gptq-3": ("gptq", "--bits", "3", "--group-size", "64"),
    "gptq-3-asym-row": ("gptq", "--bits", "3", "--asym", "--group-size", "-1"),
    "gptq-8": ("gptq", "--bits", "8"),
    "gptq-head": ("gptq", "--quantize-head"),
    "ct-4": ("compressed-tensors",),
    "ct-4-asym-32": ("compressed-tensors", "--asym", "--group-size", "32"),
    "ct-4-asym-row": ("compressed-tensors", "--asym", "--group-size", "-1"),
    "ct-8-row": ("compressed-tensors", "--bits", "8", "--group-size", "-1"),
    "ct-8-asym": ("compressed-tensors", "--bits", "8", "--asym"),
    "ct-head": ("compressed-tensors", "--quantize-head"),
    "awq-32": ("awq", "--group-size", "32"),
    "awq-row": ("awq", "--group-size", "-1"),
    "nf4-32-single": ("nf4", "--block-size", "32", "--single-quant"),
    "nf4-256": ("nf4", "--block-size", "256"),
    "nf4-head": ("nf4", "--quantize-head"),
    "fp4": ("fp4",),
    "fp4-128-single": ("fp4", "--block-size", "128", "--single-quant"),
}
SOLVED = {"gptq-3-solved": ("gptq", "--bits", "3", "--asym", "--group-size", "32"), "ct-solved": ("compressed-tensors", "--asym"), "awq-solved": ("awq",), "fp4-solved": ("fp4",)}
CASES = {name: (*flags, "--rtn") for name, flags in NEAREST.items()} | SOLVED
EVERY = pytest.mark.parametrize("case", CASES)


def expected(zoo, weights: dict[str, torch.Tensor]) -> torch.nn.Module:
    """The base's float model with the linears that the pipeline computed."""
    return fill(AutoModelForCausalLM.from_pretrained(zoo.float("llama"), dtype=torch.float32), {name.removesuffix(".weight"): weight for name, weight in weights.items()})


@EVERY
def test_the_public_loader_reads_our_weights(zoo, written, case):
    """Evidence about other weights than users load: codes, scales or zeros misread by the loader, rounded on the way, or left at random. Bit for bit in fp32;
    logits on the CPU in fp32 then differ by the order of sums alone."""
    out, weights = written("llama", *CASES[case])
    arm = load_candidate("d", str(out))
    found = dense_weights(arm.model)
    assert len(weights) == 14 + ("head" in case)
    for name, weight in weights.items():
        assert torch.equal(found[name.removesuffix(".weight")], weight), name
    ids = zoo.batch()
    wanted = logits(expected(zoo, weights), ids)
    assert float((logits(arm.model, ids) - wanted).norm() / wanted.norm()) < 1e-6


@EVERY
def test_verify_reads_it_back(zoo, written, cli, case):
    """A format that is written and cannot be checked afterwards."""
    out, _ = written("llama", *CASES[case])
    answer = cli("verify", out, "--base", zoo.nf4("llama"), "--adapter", zoo.adapter("llama"))
    assert answer.code == 0, answer.out + answer.err


def plain_load(out: Path, **options) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(out, device_map={"": "cpu"}, **options).eval()


@pytest.mark.parametrize("case", ["ct-4", "ct-8-row", "ct-4-asym-32", "ct-4-asym-row", "ct-8-asym", "ct-head", "ct-solved", "fp4", "nf4-32-single", "nf4-head"])
def test_a_plain_load_answers_the_same(zoo, written, case):
    """A file that only our own way of loading reads. In bf16, as a user loads it; asymmetric compressed-tensors with ``dequantize=True``, the only way in which
    transformers 5.23 reads it. The logits lie no farther from fp32 than bf16 arithmetic on the same weights puts them."""
    from transformers import CompressedTensorsConfig

    out, weights = written("llama", *CASES[case])
    wish = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if "--asym" in CASES[case] else {}
    ids, model = zoo.batch(), plain_load(out, dtype=torch.bfloat16, **wish)
    assert all(p.dtype in (torch.bfloat16, torch.uint8) for p in model.parameters() if p.dtype != torch.int32 and p.dtype != torch.int64)
    ours = expected(zoo, weights)
    wanted = logits(ours, ids)
    rounding = float((logits(ours.to(torch.bfloat16), ids) - wanted).norm() / wanted.norm())
    assert float((logits(model, ids) - wanted).norm() / wanted.norm()) < 2 * rounding < 0.05


@pytest.mark.parametrize("case", ["nf4-32-single", "nf4-256", "fp4", "fp4-128-single"])
def test_bitsandbytes_config_fits_the_tensors(written, case):
    """A config that names another type or nesting than the tensors have."""
    out, _ = written("llama", *CASES[case])
    found = json.loads((out / "config.json").read_text())["quantization_config"]
    state = plain_load(out).model.layers[0].mlp.up_proj.weight.quant_state
    size = int(CASES[case][2]) if "--block-size" in CASES[case] else 64
    assert found["bnb_4bit_quant_type"] == state.quant_type == CASES[case][0] and found["bnb_4bit_use_double_quant"] == state.nested == ("single" not in case) and state.blocksize == size


@pytest.mark.parametrize("fmt", ["compressed-tensors", "awq"])
def test_conv1d_is_refused(zoo, cli, tmp_path, fmt):
    """GPT-2 written in a container whose loaders replace nn.Linear alone: its weights would stay at random."""
    answer = cli("merge", "--base", zoo.nf4("gpt2"), "--adapter", zoo.adapter("gpt2"), "--out", tmp_path / "out", "--format", fmt, "--rtn")
    assert answer.code == 4 and "Conv1D" in answer.err and "--format gptq" in answer.err and not (tmp_path / "out").exists()


def test_a_tied_head_is_refused(zoo, cli, tmp_path):
    """Embeddings quantized with the head, or a head that the loader ties over."""
    answer = cli("merge", "--base", zoo.nf4("qwen2"), "--adapter", zoo.adapter("qwen2"), "--out", tmp_path / "out", "--format", "compressed-tensors", "--rtn", "--quantize-head")
    assert answer.code == 4 and "shares its weight with the embeddings" in answer.err


def test_partly_float_models_say_which(zoo, written):
    """A linear that the base keeps float packed by a loader because the config does not name it: Qwen2's tied head, and what a recipe skips."""
    recipe = zoo.root / "skip.json"
    recipe.write_text(json.dumps({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "llm_int8_skip_modules": ["lm_head", "model.layers.1.mlp"]}))
    for fmt in ("nf4", "compressed-tensors", "awq"):
        out, weights = written("llama", fmt, "--rtn", "--nf4-recipe", str(recipe), base=zoo.float("llama"))
        assert len(weights) == 11 and not [name for name in weights if "layers.1.mlp" in name]
        found = dense_weights(load_candidate("d", str(out)).model)
        for name, weight in weights.items():
            assert torch.equal(found[name.removesuffix(".weight")], weight), (fmt, name)
