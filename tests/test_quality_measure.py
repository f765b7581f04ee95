"""Per-token numbers against a slow, obvious implementation; what is not scored stays out; broken numbers are counted."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from qmerge.errors import Refused
from qmerge.quality import measure as module
from qmerge.quality.measure import cluster_labels, compare_logits, measure
from qmerge.quality.metrics import json_metric, reference_scores, text_metrics, text_row
from qmerge.quality.sidecar import read_scores, recompute, text_rows, write_results
from qmerge.store.windows import TokenDoc, pack_windows
from qmerge.types import Metric


class Table(torch.nn.Module):
    """A bigram model: logits are a row of a table."""

    def __init__(self, vocabulary: int, seed: int) -> None:
        super().__init__()
        self.table = torch.randn(vocabulary, vocabulary, generator=torch.Generator().manual_seed(seed))

    def forward(self, input_ids, use_cache=False):
        return SimpleNamespace(logits=self.table[input_ids][..., : self.table.shape[1]])


def some_windows(tokens=8, docs=(20, 11, 6), scored=True):
    random = torch.Generator().manual_seed(0)
    items = []
    for n in docs:
        ids, mask = torch.randint(0, 10, (n,), generator=random), torch.ones(n, dtype=torch.bool)
        mask[0] = False
        if not scored:
            mask[: n // 2] = False
        items.append(TokenDoc(ids, mask))
    return pack_windows(items, tokens, keep_tail=True)


def slow(ref: Table, cand: Table, windows) -> list[tuple[float, float, float, bool, float, int]]:
    rows = []
    for w, (ids, scored) in enumerate(zip(windows.ids, windows.scored, strict=True)):
        for at in range(1, len(ids)):
            if not scored[at]:
                continue
            p, q = (np.exp(t.double().numpy()) for t in (ref.table[ids[at - 1]], cand.table[ids[at - 1]]))
            p, q = p / p.sum(), q / q.sum()
            target = int(ids[at])
            kl = sum(float(a) * math.log(a / b) for a, b in zip(p, q, strict=True))
            rows.append((-math.log(p[target]), -math.log(q[target]), kl, p.argmax() == q.argmax(), q[target] - p[target], w))
    return rows


@pytest.mark.parametrize("scored", [True, False])
def test_scores_equal_the_slow_implementation(monkeypatch, scored):
    """Off by one position, a wrong direction of KL, or chunks that drop tokens."""
    monkeypatch.setattr(module, "LOGIT_BYTES", 700), monkeypatch.setattr(module, "CHUNK_BYTES", 130)
    ref, cand, windows = Table(10, 1), Table(10, 2), some_windows(scored=scored)
    found, expected = measure(ref, cand, windows), slow(ref, cand, windows)
    columns = np.array(expected, dtype=np.float64).T
    for key, column in zip(("nll_ref", "nll_cand", "kl", "agree", "delta_p", "window"), columns, strict=True):
        np.testing.assert_allclose(getattr(found, key).astype(np.float64), column, atol=2e-6, err_msg=key)


def test_identical_models_have_no_divergence():
    """The zero of the scale."""
    found = measure(Table(10, 1), Table(10, 1), some_windows())
    assert found.kl.max() == 0.0 and found.agree.all() and (found.nll_ref == found.nll_cand).all()


def test_a_token_that_the_reference_excludes_adds_nothing():
    """0 · inf must not make a NaN of a masked vocabulary entry."""
    ref, cand = torch.tensor([[0.0, 0.0, -torch.inf]]), torch.tensor([[0.0, 1.0, -torch.inf]])
    row = compare_logits(ref, cand, torch.tensor([0]))
    assert float(row["kl"]) == pytest.approx(0.5 * math.log(0.5 / (1 / (1 + math.e))) + 0.5 * math.log(0.5 / (math.e / (1 + math.e))), rel=1e-6)


def test_other_vocabulary_is_cut_and_said():
    """An adapter that added a token: both are renormalized over what they share, and the row says so."""
    found = measure(Table(12, 1), Table(10, 1), some_windows())
    assert found.vocabulary_cut == 10 and np.isfinite(found.kl).all()
    assert text_row(found)["vocabulary_cut"] == 10
    with pytest.raises(Refused, match="vocabulary"):
        measure(Table(12, 1), Cut(12, 5), some_windows())


class Cut(Table):
    def forward(self, input_ids, use_cache=False):
        return SimpleNamespace(logits=self.table[input_ids][..., :5])


def test_non_finite_tokens_are_counted_and_left_out():
    """One NaN would otherwise turn every mean into NaN, or be dropped in silence."""
    broken = Table(10, 2)
    broken.table[3] = torch.nan
    windows = some_windows()
    found = text_metrics(measure(Table(10, 1), broken, windows))
    assert found["nonfinite"].value > 0 and math.isfinite(found["kl_mean"].value)
    assert found["kl_mean"].n + found["nonfinite"].value == found["nonfinite"].n


def test_clusters_are_documents_only_where_windows_do_not_mix_them():
    """Windows of one document are not independent; windows that mix documents cannot be given to one of them."""
    window, doc = np.array([0, 0, 1, 1, 2, 2]), np.array([5, 5, 5, 5, 6, 6])
    assert cluster_labels(window, doc).tolist() == doc.tolist()
    assert cluster_labels(window, np.array([5, 5, 5, 6, 6, 6])).tolist() == window.tolist()
    assert cluster_labels(window, np.zeros(6)).tolist() == window.tolist()


def test_ppl_ratio_is_paired():
    """Differences of two perplexities' intervals would be ten times too wide."""
    found = text_metrics(measure(Table(10, 1), Table(10, 2), some_windows(docs=(40, 40, 40))))
    assert found["ppl_ratio"].value == pytest.approx(found["ppl"].value / math.exp(found["nll"].value - found["nll_delta"].value))
    assert found["delta_p_rms"].value > 0 and found["kl_p90"].value >= found["kl_median"].value


def test_metrics_come_back_from_the_sidecar(tmp_path):
    """A gate that is rerun from the arrays must give the same numbers, and the file must be plain JSON and npz."""
    windows = some_windows(docs=(40, 40))
    base, cand = measure(Table(10, 1), Table(10, 2), windows), measure(Table(10, 1), Table(10, 3), windows)
    scores = {"text": {"base": base, "separate": reference_scores(base), "x": cand, "served": cand}}
    results = {"arms": {name: {"kind": "x", "texts": {"text": row}} for name, row in text_rows(scores["text"]).items()}}
    write_results(results, scores, tmp_path / "results.json")
    assert recompute(results, read_scores(tmp_path / "results.npz")) == results
    assert sorted(p.name for p in tmp_path.iterdir()) == ["results.json", "results.npz"]
    (tmp_path / "bad.npz").write_bytes(b"PK")
    with pytest.raises(Refused):
        read_scores(tmp_path / "bad.npz")


def test_infinite_metric_is_valid_json():
    """`Infinity` is no JSON, and readers other than Python stop there."""
    row = json_metric(Metric(math.inf, 1.0, math.inf, 3, "perplexity"))
    assert (row["value"], row["ci_low"], row["ci_high"]) == (None, 1.0, None) and "not finite" in row["note"]
