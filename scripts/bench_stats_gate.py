"""At which rates do the tests and the real gate find a planted regression, and leave alone what is none?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from qmerge.quality.compare import compare, load_budget
from qmerge.quality.measure import TokenScores
from qmerge.quality.metrics import json_metric, text_row
from qmerge.quality.paired import paired_row
from qmerge.quality.stats import cluster_mean, holm, macro_share, mcnemar_exact, smallest_difference, wilson

KEPT = {"none": 1.0, "small": 0.96, "at the limit": 0.90, "planted": 0.80}
"""what a candidate truly keeps of the adapter's gain; the default budget asks for 0.90"""
LOST = {"none": 0.03, "small": 0.035, "at the limit": 0.05, "planted": 0.07}
"""share of items that a candidate truly loses, where it wins 0.03: 0, -0.5, -2 and -4 points; the default budget allows -2"""


def rate(hits: int, rounds: int) -> dict[str, Any]:
    found = wilson(hits, rounds)
    return {"rate": found.value, "ci_low": found.ci_low, "ci_high": found.ci_high, "rounds": rounds}


def item_tests(rounds: int, flips: Callable[..., Any]) -> list[dict[str, Any]]:
    """McNemar and Holm under no difference (type I) and with one of the stated smallest detectable size (power), and what margins see meanwhile."""
    random, found = np.random.default_rng(101), []

    def p_of(difference: np.ndarray) -> float:
        return mcnemar_exact(int((difference < 0).sum()), int((difference > 0).sum()))

    for items in (200, 1000):
        null = sum(p_of(flips(random, items, 0.05, 0.05, False)[0]) < 0.05 for _ in range(rounds))
        found.append({"test": "exact McNemar", "what": f"no difference, {items} items, 10 % flip", "aim": "≤ 5 %", **rate(null, rounds)})
        size = float(smallest_difference(0.10 * items, items) or 0)
        power = sum(p_of(flips(random, items, 0.05 + size / 2, 0.05 - size / 2, False)[0]) < 0.05 for _ in range(rounds))
        found.append({"test": "exact McNemar", "what": f"a loss of `smallest_detectable` = {100 * size:.1f} points, {items} items", "aim": "about 80 %", **rate(power, rounds)})
    any_false = sum(min(holm([p_of(flips(random, 500, 0.04, 0.04, False)[0]) for _ in range(8)])) < 0.05 for _ in range(rounds))
    found.append({"test": "Holm over 8 tasks", "what": "no difference anywhere: any task called significant", "aim": "≤ 5 %", **rate(any_false, rounds)})
    return found + margin_power(random, rounds)


def margin_power(random: np.random.Generator, rounds: int, items: int = 500) -> list[dict[str, Any]]:
    """Margins of 500 items (gold minus best wrong, spread 5 nats) that all fall by 0.05 nats, with noise of 0.3 nats from rounding."""
    seen = {"accuracy": 0, "margin": 0, "false": 0}
    for _ in range(rounds):
        margins, noise = 5 * random.normal(size=items), 0.3 * random.normal(size=items)
        row, _ = paired_row((margins > 0).astype(float), (margins - 0.05 + noise > 0).astype(float))
        seen["accuracy"] += row["mcnemar_p"] < 0.05
        found = cluster_mean(noise - 0.05, np.arange(items))
        seen["margin"] += (found.ci_high or 0) < 0
        still = cluster_mean(noise, np.arange(items))
        seen["false"] += not (still.ci_low or 0) <= 0 <= (still.ci_high or 0)
    what = f"every margin falls by 0.05 of 5 nats, {items} items"
    return [
        {"test": "exact McNemar", "what": what, "aim": "", **rate(seen["accuracy"], rounds)},
        {"test": "interval of margin_delta", "what": what, "aim": "", **rate(seen["margin"], rounds)},
        {"test": "interval of margin_delta", "what": "margins move by noise alone", "aim": "about 5 %", **rate(seen["false"], rounds)},
    ]


def token_scores(reference: np.ndarray, candidate: np.ndarray, kl: np.ndarray, clusters: np.ndarray) -> TokenScores:
    """Synthetic per-token numbers in the evaluation's own shape."""
    n = len(clusters)
    label = clusters.astype(np.int32)
    return TokenScores(*(x.astype(np.float32) for x in (reference, candidate, kl)), np.ones(n, bool), np.zeros(n, np.float32), np.full(n, 0.5, np.float32), label, label)


def synthetic_results(random: np.random.Generator, kept: float, lost: float, groups: int, clusters_of: Any, losses: Any, correlated: Any, flips: Any) -> dict[str, Any]:
    """results.json of one candidate, through `text_row` and `macro_share`: documents of unequal size, four benchmarks."""
    clusters = clusters_of(random, groups, "unequal")
    base, separate, candidate = losses(random, clusters, kept)
    spread = np.exp(0.7 * correlated(random, clusters, 0.3))
    bare = token_scores(separate, base, 0.3 * spread, clusters)
    row = text_row(token_scores(separate, candidate, 0.01 * spread, clusters), bare)
    tasks = [flips(random, n, lost, 0.03, twins) for n, twins in ((1000, False), (1200, True), (1800, False), (2300, False))]
    macro = macro_share([d for d, _ in tasks], [c for _, c in tasks])
    empty = {"texts": {"held-out": {"metrics": {}}}}
    arm = {"texts": {"held-out": row}, "tasks": {"macro_accuracy_delta": json_metric(macro)}}
    return {"fingerprint": {}, "arms": {"base": empty, "separate": empty, "candidate": arm}, "tasks": {"t": {}}}


def gate_rates(rounds: int, clusters_of: Any, losses: Any, correlated: Any, flips: Any) -> list[dict[str, Any]]:
    """How often the gate's retention and accuracy checks say pass, inconclusive and fail, by what is true, on 20 and 100 documents."""
    budget = load_budget("default")
    watched = {key: budget["limits"][key] for key in ("retention", "macro_accuracy_delta")}
    found = []
    for groups in (20, 100):
        for size, (kept, lost) in {name: (KEPT[name], LOST[name]) for name in KEPT}.items():
            random = np.random.default_rng(202)
            counts = {key: dict.fromkeys(("pass", "inconclusive", "fail"), 0) for key in watched}
            for _ in range(rounds):
                verdict = compare(synthetic_results(random, kept, lost, groups, clusters_of, losses, correlated, flips), {"name": "default", "limits": watched})
                for check in verdict["checks"]:
                    if check["metric"] in counts and check["state"] in counts[check["metric"]]:
                        counts[check["metric"]][check["state"]] += 1
            for key, states in counts.items():
                if key == "retention" or groups == 100:
                    truth = f"{kept:.2f}" if key == "retention" else f"{100 * (0.03 - lost):+.1f} points"
                    found.append({"check": key, "documents": groups if key == "retention" else None, "regression": size, "truth": truth, "rounds": rounds,
                                  **{state: count / rounds for state, count in states.items()}})
    return found
