"""Shapes that fill neither words nor groups: refused, or with ``--pad`` written so that the public loader reads the very weights."""

from __future__ import annotations

import pytest
import torch
from conftest import TARGETS, save_adapter, save_nf4
from oracles.dequantized import fill, logits
from transformers import AutoModelForCausalLM

from qmerge.quality.arms import load_candidate
from qmerge.quality.plain import dense_weights

pytest.importorskip("gptqmodel")
pytest.importorskip("compressed_tensors")

CASES = {
    "gptq-4-128": ("gptq",),
    "gptq-2-32-asym": ("gptq", "--bits", "2", "--group-size", "32", "--asym"),
    "gptq-8-row": ("gptq", "--bits", "8", "--group-size", "-1"),
    "gptq-4-nearest": ("gptq", "--rtn"),
    "ct-4-row": ("compressed-tensors", "--group-size", "-1"),
    "ct-8-row-asym": ("compressed-tensors", "--bits", "8", "--group-size", "-1", "--asym"),
}


@pytest.fixture(scope="module")
def odd(zoo) -> tuple[str, str]:
    """A Llama of 64 channels and 172 inner ones, in NF4, and its adapter: 172 is no multiple of 8 or 32, and neither is one of 128."""
    source = zoo.float("llama", "unpacked", hidden_size=64, intermediate_size=172)
    base = save_nf4(source, zoo.root / "unpacked-nf4", True)
    return base, save_adapter(source, zoo.root / "unpacked-adapter", base, 0.02, 1, target_modules=TARGETS["llama"])


@pytest.mark.parametrize("case", CASES)
def test_the_public_loader_reads_padded_rows(zoo, odd, written, cli, case):
    """A short last group that takes a neighbour's scale, a padded code that becomes a weight, or a file that `verify` cannot unpack."""
    base, adapter = odd
    out, weights = written("llama", *CASES[case], "--pad", base=base, adapter=adapter)
    model = load_candidate("d", str(out)).model
    found = dense_weights(model)
    assert {weight.shape for weight in weights.values()} >= {(64, 172), (172, 64)}
    for name, weight in weights.items():
        assert torch.equal(found[name.removesuffix(".weight")], weight), name
    whole = fill(AutoModelForCausalLM.from_pretrained(zoo.float("llama", "unpacked", hidden_size=64, intermediate_size=172), dtype=torch.float32),
                 {name.removesuffix(".weight"): weight for name, weight in weights.items()})  # fmt: skip
    wanted = logits(whole, zoo.batch())
    assert float((logits(model, zoo.batch()) - wanted).norm() / wanted.norm()) < 1e-6
    answer = cli("verify", out, "--base", base, "--adapter", adapter)
    assert answer.code == 0, answer.out + answer.err


@pytest.mark.parametrize(
    "flags, code, says",
    [
        (("gptq",), 4, "--pad writes it padded"),
        (("gptq", "--pad", "--bits", "3"), 4, "with 3 bits no loader takes padding"),
        (("compressed-tensors", "--group-size", "-1"), 4, "--pad writes it padded"),
        (("compressed-tensors", "--pad"), 4, "do not divide into groups of 128"),
        (("awq", "--pad"), 2, "--pad belongs to --format gptq and compressed-tensors"),
        (("gptq", "--pad", "--polish", "distill"), 2, "leave one of them out"),
    ],
)
def test_what_is_refused(zoo, odd, cli, tmp_path, flags, code, says):
    """Shapes padded without being asked for, or a flag taken and not followed."""
    answer = cli("merge", "--base", odd[0], "--adapter", odd[1], "--out", tmp_path / "out", "--calibration", zoo.calibration, "--format", *flags)
    assert answer.code == code and says in answer.err and not (tmp_path / "out").exists(), answer.err


def test_the_plan_names_what_is_padded(odd, cli, tmp_path):
    """A user who learns at deployment that the engine refuses the file."""
    answer = cli("merge", "--base", odd[0], "--adapter", odd[1], "--out", tmp_path / "out", "--rtn", "--pad", "--dry-run")
    assert answer.code == 0 and "14 linears are written padded (--pad)" in answer.out + answer.err


def test_the_plan_knows_the_size(odd, written):
    """Bytes planned from whole words where the file has padded ones."""
    from qmerge.formats import gptq
    from qmerge.store.checkpoint import open_checkpoint
    from qmerge.types import Grid

    out, weights = written("llama", *CASES["gptq-2-32-asym"], "--pad", base=odd[0], adapter=odd[1])
    specs = open_checkpoint(out).specs
    for name, weight in weights.items():
        stored = sum(specs[name.removesuffix("weight") + suffix].nbytes for suffix in gptq.SUFFIXES)
        assert stored == gptq.stored_bytes(tuple(weight.shape), Grid("int", 2, 32, False)), name
