"""How often do the intervals cover, and what does the gate find? Simulations of qmerge's own estimators and gate on data whose truth is known.

    python scripts/bench_stats.py             writes docs/measurements/statistics.md and .json (minutes on one core; --rounds sets them)

Tokens come in clusters (documents): each cluster has a level of its own, which gives tokens of one cluster the correlation ``rho``.
Nothing here is fitted to the estimators: the data are drawn, the truth is computed from the distribution, and the package's functions are called.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from bench_stats_gate import gate_rates, item_tests
from bench_stats_page import markdown
from scipy import stats as distributions

from qmerge.quality import stats
from qmerge.types import Metric

ROOT = Path(__file__).parents[1]
SIZES = {"equal": "25 tokens each", "unequal": "log-normal sizes, σ = 1, 2 to 400 tokens: the largest tenth of the clusters holds 40 % of the tokens"}
Draw = Callable[[np.random.Generator], tuple[Metric, float]]
"""one simulated data set -> (the interval, the truth)"""


def clusters_of(random: np.random.Generator, groups: int, sizes: str) -> np.ndarray:
    """Cluster labels, one per token."""
    size = np.full(groups, 25) if sizes == "equal" else np.clip(random.lognormal(3.0, 1.0, groups), 2, 400).astype(int)
    return np.repeat(np.arange(groups), size)


def correlated(random: np.random.Generator, clusters: np.ndarray, rho: float) -> np.ndarray:
    """Standard normal values with correlation ``rho`` inside a cluster."""
    level = random.normal(size=clusters[-1] + 1)[clusters]
    return np.sqrt(rho) * level + np.sqrt(1 - rho) * random.normal(size=len(clusters))


def naive(values: np.ndarray) -> Metric:
    """What one gets by taking tokens for independent."""
    half = 1.959964 * values.std(ddof=1) / np.sqrt(len(values))
    return Metric(values.mean(), values.mean() - half, values.mean() + half, len(values), "")


def coverage(draw: Draw, rounds: int, seed: int) -> dict[str, Any]:
    """Share of intervals that hold the truth, of those that there are; ``undefined`` is the share without an interval."""
    random = np.random.default_rng(seed)
    held = given = low = 0
    for _ in range(rounds):
        metric, truth = draw(random)
        if metric.ci_low is None or metric.ci_high is None:
            continue
        given += 1
        held += metric.ci_low <= truth <= metric.ci_high
        low += truth < metric.ci_low
    found = stats.wilson(held, given)
    return {"coverage": found.value, "ci_low": found.ci_low, "ci_high": found.ci_high, "rounds": rounds, "undefined": 1 - given / rounds, "truth_below": low / max(given, 1)}


def draw_mean(groups: int, sizes: str, rho: float, skewed: bool, method: Callable[..., Metric]) -> Draw:
    """A mean of normal values, or of log-normal ones, which are skewed as KL is."""

    def draw(random: np.random.Generator) -> tuple[Metric, float]:
        clusters = clusters_of(random, groups, sizes)
        x = correlated(random, clusters, rho)
        x = np.exp(x) if skewed else x
        metric = method(x) if method is naive else method(x, clusters)
        return metric, float(np.exp(0.5)) if skewed else 0.0

    return draw


def losses(random: np.random.Generator, clusters: np.ndarray, kept: float, gain: float = 0.5) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """NLL per token of base, separate and a candidate that truly keeps the share ``kept`` of a mean gain of ``gain`` nats."""
    separate = 2.0 + 0.7 * correlated(random, clusters, 0.3)
    gained = gain * (1.0 + 0.8 * correlated(random, clusters, 0.3))
    return separate + gained, separate, separate + (1 - kept) * gained + 0.1 * correlated(random, clusters, 0.1)


def draw_retention(groups: int, sizes: str) -> Draw:
    def draw(random: np.random.Generator) -> tuple[Metric, float]:
        clusters = clusters_of(random, groups, sizes)
        return stats.retention(*losses(random, clusters, 0.9), clusters), 0.9

    return draw


def draw_ratio(groups: int, sizes: str) -> Draw:
    """Two correlated positive means, as KL over the base's KL."""

    def draw(random: np.random.Generator) -> tuple[Metric, float]:
        clusters = clusters_of(random, groups, sizes)
        den = np.exp(0.7 * correlated(random, clusters, 0.3))
        num = 0.1 * den * np.exp(0.3 * correlated(random, clusters, 0.3))
        return stats.cluster_ratio(num, den, clusters), 0.1 * float(np.exp(0.3**2 / 2))

    return draw


def draw_quantile(groups: int, sizes: str, level: float) -> Draw:
    def draw(random: np.random.Generator) -> tuple[Metric, float]:
        clusters = clusters_of(random, groups, sizes)
        return stats.cluster_quantiles(np.exp(correlated(random, clusters, 0.3)), clusters, [level])[0], float(np.exp(distributions.norm.ppf(level)))

    return draw


def flips(random: np.random.Generator, items: int, lost: float, won: float, twins: bool) -> tuple[np.ndarray, np.ndarray]:
    """Differences (-1, 0, 1) of paired answers and clusters; with ``twins`` two items share a cluster, and half of the pairs change together."""
    clusters = np.arange(items) // 2 if twins else np.arange(items)
    uniform = random.uniform(size=items)
    if twins:
        uniform[1::2] = np.where(random.uniform(size=len(uniform[1::2])) < 0.5, uniform[: 2 * (items // 2) : 2], uniform[1::2])
    return np.where(uniform < lost, -1.0, np.where(uniform > 1 - won, 1.0, 0.0)), clusters


def draw_delta(items: int, lost: float, won: float, twins: bool) -> Draw:
    return lambda random: (stats.paired_share(*flips(random, items, lost, won, twins)), won - lost)


def draw_macro(method: Callable[..., Metric], lost: float, won: float) -> Draw:
    """Four benchmarks of different size, one of them in pairs that share a sentence."""

    def draw(random: np.random.Generator) -> tuple[Metric, float]:
        tasks = [flips(random, n, lost, won, twins) for n, twins in ((200, False), (500, True), (1000, False), (2000, False))]
        return method([d for d, _ in tasks], [c for _, c in tasks]), won - lost

    return draw


def draw_wilson(items: int, rate: float) -> Draw:
    return lambda random: (stats.wilson(int(random.binomial(items, rate)), items), rate)


def cells() -> Iterator[tuple[str, dict[str, Any], Draw]]:
    """(estimator, setting, draw)"""
    for skewed in (False, True):
        for groups in (5, 10, 20, 50, 200):
            for sizes in SIZES:
                setting = {"values": "skewed" if skewed else "normal", "clusters": groups, "sizes": sizes, "rho": 0.3}
                for name, method in (("cluster_mean", stats.cluster_mean), ("tokens taken for independent", naive)):
                    yield name, setting, draw_mean(groups, sizes, 0.3, skewed, method)
    for rho in (0.02, 0.9):
        yield "cluster_mean", {"values": "normal", "clusters": 20, "sizes": "unequal", "rho": rho}, draw_mean(20, "unequal", rho, False, stats.cluster_mean)
    for groups in (10, 20, 50, 200):
        for sizes in SIZES:
            yield "cluster_ratio", {"clusters": groups, "sizes": sizes}, draw_ratio(groups, sizes)
            yield "retention", {"clusters": groups, "sizes": sizes}, draw_retention(groups, sizes)
            for level in (0.5, 0.9, 0.99, 0.999):
                yield "cluster_quantiles", {"level": level, "clusters": groups, "sizes": sizes}, draw_quantile(groups, sizes, level)
    for items in (100, 500, 2000):
        for lost, won in ((0.01, 0.01), (0.06, 0.03)):
            for twins in (False, True):
                yield "paired_share", {"items": items, "lost": lost, "won": won, "twins": twins}, draw_delta(items, lost, won, twins)
        yield "wilson", {"items": items, "rate": 0.9}, draw_wilson(items, 0.9)
    for lost, won in ((0.002, 0.002), (0.01, 0.01), (0.06, 0.03)):
        for name, method in (("macro_share", stats.macro_share), ("macro_bootstrap", stats.macro_bootstrap)):
            yield name, {"tasks": 4, "lost": lost, "won": won}, draw_macro(method, lost, won)


def measure(rounds: int) -> dict[str, Any]:
    began = time.process_time()
    found: dict[str, Any] = {"coverage": [{"estimator": name, **setting, **coverage(draw, rounds, index)} for index, (name, setting, draw) in enumerate(cells())]}
    found["tests"] = item_tests(rounds, flips)
    found["gate"] = gate_rates(max(200, rounds // 5), clusters_of, losses, correlated, flips)
    return found | {"sizes": SIZES, "cpu_seconds": round(time.process_time() - began, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=2000, help="simulated data sets per cell (default 2000; the gate takes a fifth)")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "measurements", metavar="DIR")
    options = parser.parse_args()
    found = {"command": " ".join(["python scripts/bench_stats.py", *sys.argv[1:]])} | measure(options.rounds)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "statistics.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    (options.out / "statistics.md").write_text(markdown(found), encoding="utf-8")
    print(markdown(found))


if __name__ == "__main__":
    main()
