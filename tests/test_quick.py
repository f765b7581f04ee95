"""``--quick``: GPTQ without a teacher beside it must still be calibrated, and must say what it leaves out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from oracles.dequantized import divergence, load_public, logits

from qmerge.numerics.hessian import Statistics
from qmerge.store.manifest import read_manifest

DEMO = Path(__file__).resolve().parent.parent / "examples" / "demo"


@pytest.mark.slow
def test_it_is_between_rounding_and_the_whole_way(cli, tmp_path):
    """Text that does not reach the solver; or a step that is said to help and does not. On the demo, because a model that learned nothing has nothing that text could tell of."""
    base, adapter = str(DEMO / "base-nf4"), str(DEMO / "adapter")
    floats = str(tmp_path / "floats")
    assert cli("merge", "--base", base, "--adapter", adapter, "--format", "fp32", "--out", floats).code == 0
    ids, found = torch.randint(3, 2000, (16, 64), generator=torch.Generator().manual_seed(5)), {}
    wanted = logits(load_public(floats), ids)
    text = ("--calibration", DEMO / "calibration.jsonl", "--samples", 32, "--tokens", 128)
    for name, flags in (("whole", text), ("quick", (*text, "--quick")), ("rtn", ("--rtn",))):
        assert cli("merge", "--base", base, "--adapter", adapter, "--out", tmp_path / name, *flags).code == 0
        found[name] = divergence(wanted, logits(load_public(str(tmp_path / name)), ids))
    assert found["whole"] < found["quick"] < found["rtn"], found


def test_it_is_said(written):
    """A manifest of which nobody could tell how the file was made; or one that changes for those who never asked."""
    quick, whole = (read_manifest(written("llama", "gptq", *flags)[0]) for flags in (("--quick",), ()))
    assert quick["recipe"]["quick"] is True and 0 < quick["recipe"]["curvature_tokens"] < whole["recipe"]["curvature_tokens"]
    assert "quick" not in whole["recipe"]
    assert _shifts(quick) == {(0.0, 0.0)} and all(row["row_damp"] > 0 for row in _rows(quick))


def test_without_gradients_it_is_plain_gptq(written):
    """`--curvature-tokens 0` overridden by what --quick brings along."""
    plain = read_manifest(written("llama", "gptq", "--quick", "--curvature-tokens", "0")[0])
    assert plain["recipe"]["curvature_tokens"] == 0 and _shifts(plain) == {(0.0, 0.0)} and all(row["row_damp"] == 0 for row in _rows(plain))


def _rows(manifest):
    return [row for row in manifest["linears"].values() if "own_shift" in row]


def _shifts(manifest):
    return {(row["own_shift"], row["residual_shift"]) for row in _rows(manifest)}


@pytest.mark.parametrize(("fmt", "flags"), [("compressed-tensors", ("--quantize-head",)), ("nf4", ()), ("awq", ())])
def test_other_formats_take_it(written, cli, fmt, flags):
    """A statistic that only the teacher gives, asked for all the same."""
    out, _ = written("llama", fmt, "--quick", *flags)
    assert read_manifest(out)["recipe"]["quick"] is True
    assert cli("verify", out, "--base", written.zoo.nf4("llama"), "--adapter", written.zoo.adapter("llama")).code == 0


@pytest.mark.parametrize("flags", [("--polish", "blocks"), ("--rtn",), ("--bits-per-weight", 6, "--format", "compressed-tensors")], ids=lambda flags: flags[0])
def test_what_needs_a_teacher_is_refused_with_it(zoo, cli, tmp_path, flags):
    """A setting that is silently without effect."""
    text = () if flags == ("--rtn",) else ("--calibration", zoo.calibration)
    answer = cli("merge", "--base", zoo.nf4("llama"), "--adapter", zoo.adapter("llama"), "--out", tmp_path / "out", *text, "--quick", *flags)
    assert answer.code == 2 and "--quick" in answer.err and flags[0] in answer.err
    assert not (tmp_path / "out").exists()


def test_sums_without_a_teacher_hold_no_drift():
    """D of zeros, as large as H: half of what a quick run is to save."""
    x = torch.randn(300, 40)
    alone, both = Statistics(40, drifts=False), Statistics(40)
    for sums in (alone, both):
        sums.add(x, x)
    assert alone.drift is None and torch.equal(alone.hessian, both.hessian)
    assert sum(part.numel() for part in Statistics(40, drifts=False).strips()) < sum(part.numel() for part in Statistics(40).strips())
