"""How sure is a mean, a ratio or a quantile over tokens that come in clusters?

Tokens of one document or window are not independent: error bars that treat them so are 1.3 to 2.3 times too small. So every
estimator here is a ratio of sums over tokens whose error comes from the clusters' totals, with Student's t (linearization, as for
cluster samples in survey statistics: Cochran 1977, chapter 6). Comparisons are paired: subtract first. `scripts/bench_stats.py` measures
how often the intervals cover; docs/measurements/statistics.md holds the rates.
Arrays are 1-D numpy, one element per token; ``clusters`` is one integer label per token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from scipy import stats as distributions

from qmerge.types import Metric

ONE_CLUSTER = "one cluster only: no interval"
BEYOND = 5
"""clusters that must reach beyond a quantile before it gets an interval; with fewer its spread is a guess"""


def cluster_mean(values: np.ndarray, clusters: np.ndarray, unit: str = "") -> Metric:
    """Mean over tokens with a cluster-robust 95 % t interval; ``n`` counts tokens.

    Coverage is 94 to 98 %, and 91 to 93 % for strongly skewed values (KL) on 5 to 50 clusters of equal size, whose largest values are not in the sample.
    """
    return cluster_ratio(values, np.ones(len(values)), clusters, unit)


def cluster_ratio(num: np.ndarray, den: np.ndarray, clusters: np.ndarray, unit: str = "") -> Metric:
    """``sum(num) / sum(den)`` with a 95 % t interval by the delta method, from the residuals ``Σ_{i∈g} num_i - R·den_i`` of the clusters (`ratio_error`)."""
    value, error, df = ratio_error(num, den, clusters)
    n = len(num)
    if value is None:
        return Metric(None, None, None, n, unit, "nothing to divide by" if n else "no tokens")
    if error is None:
        return Metric(value, None, None, n, unit, ONE_CLUSTER)
    half = float(distributions.t.ppf(0.975, df)) * error
    return Metric(value, value - half, value + half, n, unit)


def ratio_error(num: np.ndarray, den: np.ndarray, clusters: np.ndarray) -> tuple[float | None, float | None, float]:
    """``(ratio, standard error, degrees of freedom)``; the error is None with fewer than 2 clusters, the ratio None where the denominator is 0.

    Clusters of equal size: ``SE² = G/(G-1) Σ_g e_g² / (Σ den)²`` and G - 1 degrees. Clusters of unequal size: a large one pulls the ratio to
    itself, so its residual is too small, and few large ones are few observations. Both are put right as if a cluster's total had a spread in
    proportion to its size (Bell and McCaffrey 2002; the degrees are Satterthwaite's); the plain form covers less than it says, the less the fewer clusters.
    """
    _, index = np.unique(clusters, return_inverse=True)
    top = np.bincount(index, weights=np.asarray(num, np.float64))
    bottom = np.bincount(index, weights=np.asarray(den, np.float64))
    return _ratio_of_totals(top, bottom, np.bincount(index).astype(np.float64))


def _ratio_of_totals(top: np.ndarray, bottom: np.ndarray, size: np.ndarray) -> tuple[float | None, float | None, float]:
    """`ratio_error` from the clusters' totals and numbers of tokens ``[G]``."""
    groups, total = len(top), float(bottom.sum())
    if total == 0.0:
        return None, None, 0.0
    ratio = float(top.sum()) / total
    if groups < 2:
        return ratio, None, 0.0
    residual = top - ratio * bottom
    # residual = (diag(size) - share sizeᵀ) u for independent u of one variance: its square sum is a quadratic form whose
    # first two moments follow from the traces of M and M² below, M = (…)ᵀ(…) = diag(size²) - v sizeᵀ - size vᵀ + |share|² size sizeᵀ.
    share = bottom / total
    v, s = size * share, float(share @ share)
    nn, nv = float(size @ size), float(size @ v)
    trace = nn - 2 * nv + s * nn
    square = float((size**4).sum()) + 2 * float((-2 * v + s * size) @ size**3) + 2 * nv**2 + 2 * float(v @ v) * nn + (s * nn) ** 2 - 4 * s * nv * nn
    error = math.sqrt(float(residual @ residual) * nn / trace) / abs(total)
    return ratio, error, max(1.0, trace**2 / square)


def transform(metric: Metric, function: Callable[[float], float], unit: str) -> Metric:
    """An increasing function of a metric: value and interval ends go through it (exp: NLL to perplexity; sqrt: mean square to RMS)."""
    ends = [None if x is None else function(x) for x in (metric.value, metric.ci_low, metric.ci_high)]
    return Metric(ends[0], ends[1], ends[2], metric.n, unit, metric.note)


def root(x: float) -> float:
    """sqrt that takes the negative lower ends, which a t interval for a mean square can have, for 0."""
    return math.sqrt(max(x, 0.0))


def safe_exp(x: float) -> float:
    """exp that answers ``inf`` where a float cannot hold the value."""
    return math.exp(x) if x < 709.0 else math.inf


def cluster_quantiles(values: np.ndarray, clusters: np.ndarray, levels: Sequence[float], unit: str = "") -> list[Metric]:
    """Quantiles over tokens with 95 % intervals by Woodruff's method (1952): how sure is the share of tokens up to the quantile, and which
    values lie at the ends of that share's t interval? No upper end can be known where that reaches 1: then there is no interval, and ``note``
    says so. Coverage is 93 to 98 %; less for p99 of few documents: 92 to 95 % with 50, 82 to 91 % with 20, of which then few get an interval at all.
    """
    n = len(values)
    if not n:
        return [Metric(None, None, None, 0, unit, "no tokens") for _ in levels]
    order = np.argsort(values, kind="stable")
    ranked = np.asarray(values, np.float64)[order]
    _, index = np.unique(clusters, return_inverse=True)
    return [_woodruff(ranked, index[order], level, unit) for level in levels]


def _woodruff(ranked: np.ndarray, clusters: np.ndarray, level: float, unit: str) -> Metric:
    """One quantile of sorted values; ``clusters`` are their labels 0 … G - 1."""
    n = len(ranked)
    point = _at(ranked, level)
    below = int(np.searchsorted(ranked, point, side="right"))
    size = np.bincount(clusters).astype(np.float64)
    if len(size) < 2:
        return Metric(point, None, None, n, unit, ONE_CLUSTER)
    _, error, df = _ratio_of_totals(np.bincount(clusters[:below], minlength=len(size)).astype(np.float64), size, size)
    half = float(distributions.t.ppf(0.975, df)) * error  # type: ignore[operator]
    beyond = len(np.unique(clusters[below:]))
    if beyond < BEYOND or level + half >= 1.0:
        return Metric(point, None, None, n, unit, "too few clusters reach beyond this quantile for an interval")
    return Metric(point, _at(ranked, level - half), _at(ranked, level + half), n, unit)


def _at(ranked: np.ndarray, level: float) -> float:
    """The smallest value up to which ``level`` of all lie (the inverse of the empirical distribution)."""
    return float(ranked[min(max(math.ceil(level * len(ranked) - 1e-9), 1), len(ranked)) - 1])


def retention(base: np.ndarray, separate: np.ndarray, candidate: np.ndarray, clusters: np.ndarray) -> Metric:
    """Share of the adapter's gain that a candidate keeps: ``(NLL_base - NLL_candidate) / (NLL_base - NLL_separate)``; arguments are NLL per token.

    Undefined (value None, ``note`` says why) where the gain is not above 3 standard errors: a ratio to noise means nothing.
    """
    gain, error, _ = ratio_error(base - separate, np.ones(len(base)), clusters)
    if gain is None or error is None:
        return Metric(None, None, None, len(base), "share", "the adapter's gain has no error estimate (fewer than 2 clusters)")
    if gain <= 3.0 * error:
        note = f"the adapter's gain on this text, {gain:.4g} nats/token, is not above 3 standard errors ({3 * error:.4g})"
        return Metric(None, None, None, len(base), "share", note)
    return cluster_ratio(base - candidate, base - separate, clusters, "share")


def paired_share(difference: np.ndarray, clusters: np.ndarray) -> Metric:
    """Mean difference of paired scores in [0, 1] (accuracy, item by item), with a cluster-robust 95 % t interval around it.

    Items that never changed say that changes are rare, not that there are none: the error counts one loss and one win more than were seen
    (Bonett and Price 2012, for clusters of one item), so that 200 items without a flip give ± 1.4 points and not ± 0.
    """
    n = len(difference)
    value, error, df = _share_error(difference, clusters)
    if value is None or error is None:
        return Metric(value, None, None, n, "share", ONE_CLUSTER if n else "no items")
    half = float(distributions.t.ppf(0.975, df)) * error
    return Metric(value, max(-1.0, value - half), min(1.0, value + half), n, "share")


def macro_share(differences: Sequence[np.ndarray], clusters: Sequence[np.ndarray]) -> Metric:
    """Mean over tasks of `paired_share`'s value; tasks are independent samples, so their variances add. 95 % t interval with Welch's degrees of freedom."""
    n = sum(map(len, differences))
    parts = [_share_error(d, c) for d, c in zip(differences, clusters, strict=True)]
    if not parts or any(value is None or error is None for value, error, _ in parts):
        return Metric(None, None, None, n, "share", "a task has fewer than 2 items" if parts else "no tasks")
    value = sum(v for v, _, _ in parts) / len(parts)  # type: ignore[misc]
    variances = [e * e for _, e, _ in parts]  # type: ignore[operator]
    df = sum(variances) ** 2 / sum(v * v / d for v, (_, _, d) in zip(variances, parts, strict=True))
    half = float(distributions.t.ppf(0.975, df)) * math.sqrt(sum(variances)) / len(parts)
    return Metric(value, max(-1.0, value - half), min(1.0, value + half), n, "share")


def macro_bootstrap(differences: Sequence[np.ndarray], clusters: Sequence[np.ndarray], *, rounds: int = 4000, seed: int = 0) -> Metric:
    """The same mean over tasks with a 95 % percentile interval: whole clusters are drawn anew within each task, both arms' answers together.

    Each task is drawn from its clusters and from one loss and one win more (see `paired_share`). Clusters with equal totals are one outcome
    of a multinomial draw, so single items cost three numbers per round and not n.
    """
    n = sum(map(len, differences))
    if not differences or any(len(np.unique(c)) < 2 for c in clusters):
        return Metric(None, None, None, n, "share", "a task has fewer than 2 items" if differences else "no tasks")
    random = np.random.default_rng(seed)
    drawn, value = np.zeros(rounds), 0.0
    for difference, labels in zip(differences, clusters, strict=True):
        top, size = _share_clusters(difference, labels)
        (tops, sizes), counts = _distinct(top, size)
        step = max(1, int(2e7 // len(counts)))
        for start in range(0, rounds, step):
            picks = random.multinomial(len(top), counts / len(top), size=min(step, rounds - start))
            drawn[start : start + step] += (picks @ tops) / (picks @ sizes) / len(differences)
        value += float(np.mean(difference)) / len(differences)
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Metric(value, min(float(low), value), max(float(high), value), n, "share")


def _share_clusters(difference: np.ndarray, clusters: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Per cluster the sum of differences and the items, then one cluster of average size that lost all and one that won all."""
    _, index = np.unique(clusters, return_inverse=True)
    size = np.bincount(index).astype(np.float64)
    typical = size.mean()
    return np.concatenate([np.bincount(index, weights=difference), [-typical, typical]]), np.concatenate([size, [typical, typical]])


def _share_error(difference: np.ndarray, clusters: np.ndarray) -> tuple[float | None, float | None, float]:
    """(mean, its error with one loss and one win more, degrees of freedom)"""
    difference = np.asarray(difference, np.float64)
    if not len(difference):
        return None, None, 0.0
    top, size = _share_clusters(difference, clusters)
    _, error, df = _ratio_of_totals(top, size, size)
    return float(difference.mean()), (error if len(top) > 3 else None), max(1.0, df - 2.0)


def _distinct(top: np.ndarray, size: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    pairs, counts = np.unique(np.stack([top, size]), axis=1, return_counts=True)
    return pairs, counts


def wilson(successes: int, n: int) -> Metric:
    """A proportion of independent items with Wilson's 95 % score interval (Wilson 1927), which behaves at 0 and 1."""
    if n == 0:
        return Metric(None, None, None, 0, "share", "no items")
    z = float(distributions.norm.ppf(0.975))
    p = successes / n
    centre, spread = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return Metric(p, max(0.0, (centre - spread) / (1 + z * z / n)), min(1.0, (centre + spread) / (1 + z * z / n)), n, "share")


def mcnemar_exact(b: int, c: int) -> float:
    """Exact two-sided McNemar p-value. ``b`` items only the first model had right, ``c`` only the second; 1.0 where they never differ."""
    n = b + c
    if n == 0:
        return 1.0
    return min(1.0, 2.0 * float(distributions.binom.cdf(min(b, c), n, 0.5)))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values (Holm 1979), in the order given: the family-wise error stays at the level one compares them with."""
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = highest
    return adjusted


def smallest_difference(flips: float, n: int) -> float | None:
    """Accuracy difference that ``n`` paired items with this many flips (sum of squared differences) would show with 80 % power at 5 %: ``(z.975 + z.8) √(flips)/n``."""
    return None if n == 0 else float(distributions.norm.ppf(0.975) + distributions.norm.ppf(0.8)) * math.sqrt(flips) / n
