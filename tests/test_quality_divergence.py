"""Do the numbers of a text's row equal a slow fp64 count, also where two models do not know the same tokens?"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from oracles import divergence_slow as slow
from test_quality_measure import Table, some_windows

from qmerge.quality.measure import measure, support_divergence
from qmerge.quality.metrics import CONFIDENCE_EDGES, reference_scores, text_metrics, text_row
from qmerge.quality.sidecar import read_scores, recompute, text_rows, write_results
from qmerge.report.tables import notes

WINDOWS = some_windows(tokens=64, docs=(300, 250, 90))


def spread(vocabulary, seed, wide=4.0):
    """A table whose rows are from sure to unsure, so that every confidence is seen."""
    table = Table(vocabulary, seed)
    table.table *= torch.linspace(0.2, wide, vocabulary)[:, None]
    return table


def near(table, seed, by=0.3):
    other = Table(table.table.shape[0], seed)
    other.table = table.table + by * other.table
    return other


def answers(table):
    """Logits per scored token, fp64."""
    return [table.table[ids[at - 1]].double().tolist() for ids, scored in zip(WINDOWS.ids, WINDOWS.scored, strict=True) for at in range(1, len(ids)) if scored[at]]


def targets():
    return [int(ids[at]) for ids, scored in zip(WINDOWS.ids, WINDOWS.scored, strict=True) for at in range(1, len(ids)) if scored[at]]


@pytest.mark.parametrize("broken", [False, True])
def test_row_equals_the_slow_count(broken):
    """A percentile of the wrong tail, a bucket that counts its border twice, a root forgotten, a broken token that moves a mean."""
    reference = spread(10, 1)
    candidate = near(reference, 2)
    if broken:
        candidate.table[4, 2] = torch.nan
    scores = measure(reference, candidate, WINDOWS)
    found, expected = text_metrics(scores), slow.summary(answers(reference), answers(candidate), targets(), CONFIDENCE_EDGES)
    for name in ("kl_mean", "kl_median", "kl_p90", "kl_p99", "kl_p999", "top1_agreement", "delta_p_rms", "nonfinite"):
        assert found[name].value == pytest.approx(expected[name], rel=2e-5, abs=2e-7), name
    rows = text_row(scores)["kl_by_confidence"]
    assert [row["n"] for row in rows] == [n for n, _ in expected["buckets"]] and min(row["n"] for row in rows) > 0
    assert [row["kl_mean"] for row in rows] == pytest.approx([mean for _, mean in expected["buckets"]], rel=2e-5)
    assert (expected["nonfinite"] > 0) == broken and "js_mean" not in found


def test_js_of_other_vocabularies_sees_what_the_cut_hides():
    """KL over the common tokens is 0 for a head that gives half of its probability to a token which the other model does not have."""
    small, large = spread(10, 1), Table(11, 1)
    large.table = torch.cat([torch.cat([small.table, small.table.logsumexp(-1, keepdim=True)], 1), torch.zeros(1, 11)])
    scores = measure(small, large, WINDOWS)
    found = text_metrics(scores)
    expected = [slow.js(slow.probabilities(p), slow.probabilities(q)) for p, q in zip(answers(small), answers(large), strict=True)]
    np.testing.assert_allclose(scores.js, expected, rtol=2e-6)
    assert found["js_mean"].value == pytest.approx(math.fsum(expected) / len(expected), rel=2e-6) and found["js_mean"].ci_low < found["js_mean"].value
    assert found["kl_mean"].value < 1e-9 and found["js_mean"].value > 0.2
    assert "cut to the 10 entries" in found["js_mean"].note and text_row(scores)["vocabulary_cut"] == 10


def test_js_of_tokens_that_one_model_excludes():
    """KL is infinite there and those tokens leave every mean: what they cost would be in no number."""
    reference = spread(10, 1)
    candidate = near(reference, 2)
    candidate.table[3, 5] = candidate.table[7, 0] = -torch.inf
    scores = measure(reference, candidate, WINDOWS)
    rows = [(p, q) for p, q in zip(answers(reference), answers(candidate), strict=True) if -math.inf in q]
    assert int(np.isfinite(scores.js).sum()) == len(rows) == text_metrics(scores)["nonfinite"].value
    np.testing.assert_allclose(scores.js[np.isfinite(scores.js)], [slow.js(slow.probabilities(p), slow.probabilities(q)) for p, q in rows], rtol=1e-5)
    assert f"over the {len(rows)} of" in text_metrics(scores)["js_mean"].note


def test_js_is_left_out_where_both_exclude_the_same():
    """A mask that both share is no difference of support; a second divergence for every arm would only be more to read."""
    reference = spread(10, 1)
    reference.table[:, 9] = -torch.inf
    candidate = near(reference, 2)
    windows = some_windows(tokens=64, docs=(100, 100))
    for ids in windows.ids:
        ids[ids == 9] = 0
    scores = measure(reference, candidate, windows)
    assert len(scores.js) == 0 and np.isfinite(scores.kl).all() and "js_mean" not in text_metrics(scores)


def test_js_is_symmetric_bounded_and_exact_near_zero():
    """A half lost, or fp32 noise where two models almost agree."""
    random = torch.Generator().manual_seed(0)
    p, q = torch.randn(5, 50, generator=random) * 3, torch.randn(5, 60, generator=random) * 3
    torch.testing.assert_close(support_divergence(p, q), support_divergence(q, p))
    assert (support_divergence(p, q) <= math.log(2)).all()
    apart = support_divergence(torch.tensor([[0.0, -torch.inf]]), torch.tensor([[-torch.inf, 0.0]]))
    assert float(apart) == pytest.approx(math.log(2))
    close = torch.cat([p, torch.full((5, 1), -10.0)], 1)
    expected = [slow.js(slow.probabilities(a.double().tolist()), slow.probabilities(b.double().tolist())) for a, b in zip(p, close, strict=True)]
    np.testing.assert_allclose(support_divergence(p, close).numpy(), expected, rtol=1e-3)
    assert 0 < max(expected) < 1e-6


def test_js_comes_back_from_the_sidecar_and_is_noted(tmp_path):
    """A gate rerun from the arrays that loses a metric; a number that no reader of the report sees."""
    reference, candidate = spread(10, 1), spread(12, 2)
    base = measure(reference, near(reference, 3), WINDOWS)
    scores = {"t": {"base": base, "separate": reference_scores(base), "x": measure(reference, candidate, WINDOWS)}}
    results = {"arms": {name: {"kind": "x", "texts": {"t": row}} for name, row in text_rows(scores["t"]).items()}}
    write_results(results, scores, tmp_path / "results.json")
    assert recompute(results, read_scores(tmp_path / "results.npz")) == results and "js_mean" in results["arms"]["x"]["texts"]["t"]["metrics"]
    [note] = [line for line in notes(results, "t") if "Jensen" in line]
    assert note.startswith("x: mean Jensen–Shannon divergence") and "cut to the 10 entries" in note
