"""`qmerge merge --polish …` as a user runs it: is the file what was polished, read by its public loader, and verified?"""

from __future__ import annotations

import pytest
import torch
from oracles.dequantized import divergence, loaded_weights, logits, separate_model
from safetensors.torch import load_file
from test_pipeline_requantize import NF4, SYM, own_model, public

from qmerge.store.manifest import read_manifest

CASES = [
    pytest.param(fmt, steps, marks=() if (fmt, steps) in [(SYM, "distill"), (NF4, "blocks,distill")] else pytest.mark.slow, id=f"{fmt[0]}-{steps}")
    for fmt in (SYM, NF4) for steps in ("blocks", "distill", "blocks,distill")
]  # fmt: skip


@pytest.mark.parametrize(("fmt", "steps"), CASES)
def test_the_file_is_the_polished_model(zoo, written, cli, fmt, steps):
    """Steps that run and whose result is not what is written, or that leave a file which its loader or `verify` does not read."""
    plain, _ = written("llama", *fmt)
    out, weights = written("llama", *fmt, "--polish", steps)
    record = read_manifest(out)["polish"]
    assert set(record) == set(steps.split(","))
    before, after = load_file(plain / "model.safetensors"), load_file(out / "model.safetensors")
    assert before.keys() == after.keys()
    codes = [name for name in before if name.endswith("qweight") or (fmt[0] == "nf4" and name.endswith("_proj.weight"))]
    assert codes and ("blocks" in steps or all(torch.equal(before[name], after[name]) for name in codes)), "distill must leave codes alone"
    theirs = loaded_weights(public("llama", out, fmt))
    assert {f"{name}.weight" for name in theirs} == set(weights)
    for name, weight in theirs.items():
        assert torch.equal(weight, weights[f"{name}.weight"]), name
    ids, adapter = zoo.batch(8), zoo.adapter("llama")
    wanted = logits(separate_model(zoo.float("llama"), zoo.nf4("llama"), adapter), ids)
    without, polished = (divergence(wanted, logits(own_model(zoo, "llama", folder, fmt), ids)) for folder in (plain, out))
    assert polished < 1.5 * without, "on other text it may be no better, not much worse"
    answer = cli("verify", out, "--base", zoo.nf4("llama"), "--adapter", zoo.adapter("llama"))
    assert answer.code == 0, answer.out + answer.err


def test_no_state_is_left_beside_the_output(written):
    """The folder that a killed run would go on from, left behind by one that finished."""
    out, _ = written("llama", "nf4", "--polish", "blocks,distill")
    assert not [path.name for path in out.parent.iterdir() if "qmerge-" in path.name]
