"""The curvature of real models' outputs: is it the KL's, does it help, and is it the same whatever the threads?"""

from __future__ import annotations

import torch
from oracles.dequantized import divergence, fill, logits
from safetensors.torch import load_file
from test_requantize_budget import float_model, job

from qmerge.pipeline.gradients import curvatures
from qmerge.pipeline.outputs import model_dtype
from qmerge.pipeline.requantize import Steps
from qmerge.pipeline.run import quiet
from qmerge.pipeline.streams import requantize_blocks
from qmerge.store.manifest import read_manifest


def test_curvature_predicts_which_errors_of_a_linear_cost_most(zoo, tmp_path):
    """Gradients of the wrong thing or the wrong linear: errors of equal size along G's largest and smallest directions must cost the model what G says they do, relative to one another."""
    made, merged, calibration = job(zoo, tmp_path / "out", samples=64)
    found = curvatures(made, merged, calibration, 4096, quiet).by_name
    model, ids = float_model(zoo, merged), zoo.batch(16)
    wanted = logits(model, ids)
    assert sorted(found) == sorted(made.requantized)
    draw = torch.Generator().manual_seed(0)
    checked = 0
    for name in sorted(found):
        weight = merged.weight(name)
        values, vectors = torch.linalg.eigh(found[name].blocks[0].double())
        input_side = torch.randn(weight.shape[1], generator=draw)
        costs = []
        for at in (-1, len(values) // 4):
            change = vectors[:, at].float().unsqueeze(1) * input_side
            fill(model, {name.removesuffix(".weight"): weight + 0.02 * change / change.norm() * weight.norm()})
            costs.append(divergence(wanted, logits(model, ids)))
        fill(model, {name.removesuffix(".weight"): weight})
        predicted = float(values[-1] / values[len(values) // 4].clamp(min=1e-6))
        if predicted > 5:
            checked += 1
            assert costs[0] > 2 * costs[1], name
    assert checked >= len(found) // 2


def test_coupled_rows_lose_less_on_unseen_text(zoo, tmp_path):
    made, merged, calibration = job(zoo, tmp_path / "out", samples=64)
    ids, lost = zoo.batch(16), {}
    wanted = logits(float_model(zoo, merged), ids)
    for coupled in (True, False):
        seen = curvatures(made, merged, calibration, 4096, quiet).by_name if coupled else None
        with torch.no_grad():
            solved = dict(pair for _, found in requantize_blocks(made, merged, calibration, model_dtype(made), None, quiet, Steps(coupled=coupled), curvatures=seen) for pair in found.items())
        assert all(result.choice.coupled is coupled for result in solved.values())
        lost[coupled] = divergence(wanted, logits(fill(float_model(zoo, merged), {name.removesuffix(".weight"): result.weight for name, result in solved.items()}), ids))
    assert lost[True] < 0.95 * lost[False], lost  # random weights share little: on trained ones it is half (docs/measurements/quality.md)


def test_curvature_does_not_depend_on_threads(zoo, tmp_path):
    made, merged, calibration = job(zoo, tmp_path / "out")
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(curvatures(made, merged, calibration, 1024, quiet).by_name)
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for name in found[0] for a, b in zip(found[0][name].blocks, other[name].blocks, strict=True))


def test_the_command_says_what_was_coupled(zoo, cli, tmp_path):
    """A switch that switches nothing, or a manifest that tells it otherwise."""
    common = ("--base", zoo.nf4("llama"), "--adapter", zoo.adapter("llama"), "--device", "cpu", "--calibration", zoo.calibration, "--samples", "16", "--tokens", "64")
    weights = {}
    for tokens in ("0", "1024"):
        out = tmp_path / tokens
        answer = cli("merge", *common, "--out", out, "--curvature-tokens", tokens)
        assert answer.code == 0, answer.err
        manifest = read_manifest(out)
        assert {row["coupled"] for row in manifest["linears"].values()} == {tokens != "0"} and manifest["recipe"]["curvature_tokens"] == int(tokens)
        assert ("gradients: forwards done" in answer.err) is (tokens != "0")
        told = manifest.get("curvature", {})
        assert (told == {}) if tokens == "0" else (told["linears"] == 14 and told["rows_together"] == 256 and 0 < told["tokens"] <= 1024), told
        weights[tokens] = load_file(out / "model.safetensors")
    assert any(not torch.equal(weights["0"][name], weights["1024"][name]) for name in weights["0"] if name.endswith("qweight"))
    answer = cli("merge", *common, "--out", tmp_path / "never", "--curvature-tokens", "-1")
    assert answer.code == 2 and "--curvature-tokens -1" in answer.err and not (tmp_path / "never").exists()
