"""What do the per-token numbers of one arm on one text say together?"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np

from qmerge.quality.measure import TokenScores
from qmerge.quality.stats import cluster_mean, cluster_quantiles, cluster_ratio, retention, root, safe_exp, transform
from qmerge.types import Metric

QUANTILES = {"kl_median": 0.5, "kl_p90": 0.9, "kl_p99": 0.99, "kl_p999": 0.999}
CONFIDENCE_EDGES = (0.0, 0.25, 0.5, 0.75, 0.95, 1.0)


def text_row(scores: TokenScores, base: TokenScores | None = None, floor: TokenScores | None = None) -> dict[str, Any]:
    """One arm on one text, as JSON: its metrics and the curves that a report plots.

    ``base`` (the bare base on the same tokens) gives ``retention`` and ``kl_vs_base``; ``floor`` (the reference as served) gives ``floor_factor``.
    Tokens with non-finite numbers are counted in ``nonfinite`` and left out of the rest.
    """
    keep = scores.finite & (base.finite if base else True) & (floor.finite if floor else True)
    window = scores.window[keep]
    row: dict[str, Any] = {"metrics": {name: json_metric(m) for name, m in text_metrics(scores, base, floor).items()}}
    kl, delta = scores.kl[keep].astype(np.float64), (scores.nll_cand - scores.nll_ref)[keep].astype(np.float64)
    row["kl_quantiles"] = [float(q) for q in np.quantile(kl, np.linspace(0, 1, 101))] if len(kl) else []
    row["kl_by_confidence"] = _by_confidence(kl, scores.confidence[keep])
    row["window_nll_delta"] = [float(delta[window == w].mean()) for w in np.unique(window)]
    if scores.vocabulary_cut:
        row["vocabulary_cut"] = scores.vocabulary_cut
    return row


def text_metrics(scores: TokenScores, base: TokenScores | None = None, floor: TokenScores | None = None) -> dict[str, Metric]:
    """Every scalar of one arm on one text; nats per token where not said otherwise. ``nll_delta`` and ``ppl_ratio`` are paired with the reference."""
    keep = scores.finite & (base.finite if base else True) & (floor.finite if floor else True)
    clusters = scores.clusters[keep]
    ref, cand, kl, dp = (getattr(scores, k)[keep].astype(np.float64) for k in ("nll_ref", "nll_cand", "kl", "delta_p"))
    bad = int((~scores.finite).sum())
    nll = cluster_mean(cand, clusters, "nats/token")
    delta = cluster_mean(cand - ref, clusters, "nats/token")
    found = {
        "nll": nll,
        "ppl": transform(nll, safe_exp, "perplexity"),
        "nll_delta": delta,
        "ppl_ratio": transform(delta, safe_exp, "ratio"),
        "kl_mean": cluster_mean(kl, clusters, "nats/token"),
        "top1_agreement": cluster_mean(scores.agree[keep].astype(np.float64), clusters, "share"),
        "delta_p_rms": transform(cluster_mean(dp**2, clusters), root, "probability"),
        "nonfinite": Metric(float(bad), float(bad), float(bad), len(scores.kl), "tokens"),
    }
    if len(scores.js):
        found["js_mean"] = _js_mean(scores)
    levels = cluster_quantiles(kl, clusters, list(QUANTILES.values()), "nats/token")
    found |= dict(zip(QUANTILES, levels, strict=True))
    if base is not None:
        found["retention"] = retention(base.nll_cand[keep].astype(np.float64), ref, cand, clusters)
        found["kl_vs_base"] = cluster_ratio(kl, base.kl[keep].astype(np.float64), clusters, "share")
    if floor is not None:
        found["floor_factor"] = cluster_ratio(kl, floor.kl[keep].astype(np.float64), clusters, "ratio")
    return found


def reference_scores(scores: TokenScores) -> TokenScores:
    """The reference against itself, from any arm's numbers: the same NLL, divergence 0 by definition."""
    zero = np.zeros_like(scores.kl)
    ok = np.isfinite(scores.nll_ref)
    return TokenScores(scores.nll_ref, scores.nll_ref, np.where(ok, zero, np.nan).astype(np.float32), np.ones(len(zero), bool), zero, scores.confidence, scores.window, scores.doc)


def json_metric(metric: Metric) -> dict[str, Any]:
    """``Metric.to_json`` for numbers that JSON has: an infinite value becomes None, with a note."""
    ends = [None if x is None or not math.isfinite(x) else float(x) for x in (metric.value, metric.ci_low, metric.ci_high)]
    lost = metric.value is not None and ends[0] is None
    return Metric(ends[0], ends[1], ends[2], metric.n, metric.unit, f"not finite: {metric.value}" if lost else metric.note).to_json()


def _js_mean(scores: TokenScores) -> Metric:
    """Over the tokens where the models exclude different ones, also those whose KL is infinite: they are what it is for."""
    here = np.isfinite(scores.js)
    mean = cluster_mean(scores.js[here].astype(np.float64), scores.clusters[here], "nats/token")
    told = f"over the {here.sum()} of {len(here)} tokens at which the models exclude different parts of the vocabulary"
    cut = f"; all other measures are cut to the {scores.vocabulary_cut} entries that both have" if scores.vocabulary_cut else ""
    return replace(mean, note="; ".join(filter(None, (mean.note, told + cut))))


def _by_confidence(kl: np.ndarray, confidence: np.ndarray) -> list[dict[str, Any]]:
    """Mean KL by the reference's highest probability: where it is sure, a difference costs more."""
    rows = []
    for low, high in zip(CONFIDENCE_EDGES, CONFIDENCE_EDGES[1:], strict=False):
        here = (confidence >= low) & ((confidence < high) if high < 1.0 else True)
        rows.append({"from": low, "to": high, "n": int(here.sum()), "kl_mean": float(kl[here].mean()) if here.any() else None})
    return rows
