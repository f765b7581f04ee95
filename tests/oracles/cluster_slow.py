"""Statistics written out the long way: matrices, subsets and loops instead of sums."""

from __future__ import annotations

import itertools

import numpy as np


def ratio_error(num: np.ndarray, den: np.ndarray, clusters: np.ndarray) -> tuple[float, float, float]:
    """(ratio, standard error, degrees of freedom) as Bell and McCaffrey (2002) define them, from the matrix of the residuals.

    Working model: the total of cluster g is R·den_g + n_g·u_g with independent u_g of one variance. Residuals are then A u, their
    square sum is uᵀAᵀA u, and the estimator's error is n·u / Σ den.
    """
    names = sorted(set(clusters.tolist()))
    t = np.array([sum(num[i] for i in range(len(num)) if clusters[i] == g) for g in names])
    b = np.array([sum(den[i] for i in range(len(num)) if clusters[i] == g) for g in names])
    n = np.array([sum(1.0 for c in clusters if c == g) for g in names])
    a = np.diag(n) - np.outer(b / b.sum(), n)
    m = a.T @ a
    ratio = t.sum() / b.sum()
    square_sum = sum((t[g] - ratio * b[g]) ** 2 for g in range(len(names)))
    variance = square_sum / np.trace(m) * (n @ n) / b.sum() ** 2
    return ratio, float(np.sqrt(variance)), float(np.trace(m) ** 2 / np.trace(m @ m))


def holm(p_values: list[float]) -> list[float]:
    """Adjusted p-values by the closure principle: the largest Bonferroni p of any set of hypotheses that holds this one."""
    everything = range(len(p_values))
    sets = [s for size in range(1, len(p_values) + 1) for s in itertools.combinations(everything, size)]
    return [max(min(1.0, len(s) * min(p_values[j] for j in s)) for s in sets if i in s) for i in everything]


def macro_bootstrap(differences: list[np.ndarray], clusters: list[np.ndarray], rounds: int, seed: int) -> tuple[float, float]:
    """95 % percentile interval of the mean over tasks: clusters drawn one by one, and one that lost and one that won all among them."""
    random = np.random.default_rng(seed)
    drawn = []
    for _ in range(rounds):
        means = []
        for d, c in zip(differences, clusters, strict=True):
            groups = [d[c == g] for g in np.unique(c)]
            typical = len(d) / len(groups)
            rows = [(g.sum(), len(g)) for g in groups] + [(-typical, typical), (typical, typical)]
            picked = [rows[k] for k in random.integers(0, len(rows), len(rows))]
            means.append(sum(s for s, _ in picked) / sum(n for _, n in picked))
        drawn.append(np.mean(means))
    low, high = np.quantile(drawn, [0.025, 0.975])
    return float(low), float(high)
