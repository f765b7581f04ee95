"""Do two arms answer the same items alike? Statistics of one arm against ``separate``, paired by item, from the items alone."""

from __future__ import annotations

from typing import Any

import numpy as np

from qmerge.errors import Refused
from qmerge.quality.metrics import json_metric
from qmerge.quality.stats import cluster_mean, holm, macro_bootstrap, macro_share, mcnemar_exact, paired_share, smallest_difference, wilson
from qmerge.quality.tasks import Answers, Item
from qmerge.types import Metric

REFERENCE = "separate"


def task_rows(answers: dict[str, Answers], arms: dict[str, Any], *, seed: int = 0) -> dict[str, Any]:
    """``tasks`` of the results. Adds ``tasks`` to each arm's row of ``arms``: per task the accuracy and, against ``separate``, the paired
    difference, flips, exact McNemar p (and Holm's over tasks), the smallest difference this n could have shown and the change of the gold
    answer's margin; over tasks ``macro_accuracy_delta`` (t interval) and ``macro_bootstrap`` (the same mean, bootstrapped)."""
    if REFERENCE not in answers:
        raise Refused("the items of the separate model are not there, and all others are counted against them", where="tasks", expected=f"an arm {REFERENCE}", found=", ".join(answers))
    reference = answers[REFERENCE]
    for arm, found in answers.items():
        rows, deltas, groups = {}, [], []
        for task, items in reference.items():
            theirs = _matched(items, found.get(task, []), f"{arm}, {task}")
            clusters = cluster_labels(items)
            rows[task], delta = paired_row(scores(items), scores(theirs), clusters, same=arm == REFERENCE)
            rows[task] |= {"metric": items[0].metric} | margin_rows(items, theirs, clusters)
            deltas.append(delta)
            groups.append(clusters)
        for row, p in zip(rows.values(), holm([row["mcnemar_p"] for row in rows.values()]), strict=True):
            row["holm_p"] = p
        macro = _nothing(sum(map(len, deltas))) if arm == REFERENCE else macro_share(deltas, groups)
        drawn = macro if arm == REFERENCE else macro_bootstrap(deltas, groups, seed=seed)
        arms[arm]["tasks"] = rows | {"macro_accuracy_delta": json_metric(macro), "macro_bootstrap": json_metric(drawn)}
    return {task: {"n": len(items), "metric": items[0].metric} | _chance(items) | _truncated(items) for task, items in reference.items()}


def paired_row(reference: np.ndarray, candidate: np.ndarray, clusters: np.ndarray | None = None, *, same: bool = False) -> tuple[dict[str, Any], np.ndarray]:
    """One arm on one task from scores ``[items]`` (1 right, 0 wrong; or shares), and the per-item differences. ``same``: the reference itself.

    McNemar's p takes items for independent also where they share a passage; the interval of ``delta`` does not.
    """
    n = len(candidate)
    clusters = np.arange(n) if clusters is None else clusters
    difference = candidate - reference
    lost, won = int((difference < 0).sum()), int((difference > 0).sum())
    whole = bool(np.isin(candidate, (0.0, 1.0)).all()) and len(np.unique(clusters)) == n
    return {
        "accuracy": json_metric(wilson(int(candidate.sum()), n) if whole else cluster_mean(candidate, clusters, "share")),
        "delta": json_metric(_nothing(n) if same else paired_share(difference, clusters)),
        "flips": lost + won,
        "lost": lost,
        "won": won,
        "mcnemar_p": mcnemar_exact(lost, won),
        "smallest_detectable": smallest_difference(float((difference**2).sum()), n),
    }, difference


def margin_rows(reference: list[Item], candidate: list[Item], clusters: np.ndarray) -> dict[str, Any]:
    """``margin_delta``, nats: mean change of the gold answer's margin against ``separate``; ``margin_norm_delta``, nats per character, where
    the metric is ``acc_norm``. {} for generated text. Accuracy sees an item only when its margin crosses 0; this sees all the way there."""
    if not any(item.loglikelihoods for item in reference):
        return {}
    alone = len(reference[0].loglikelihoods) == 1
    note = "no alternatives are scored: the change of the target's own log-likelihood" if alone else None
    found = {"margin_delta": _margin_delta(reference, candidate, clusters, False, note)}
    if reference[0].metric.partition(",")[0] == "acc_norm":
        found["margin_norm_delta"] = _margin_delta(reference, candidate, clusters, True, None)
    return found


def margin(item: Item, *, normalised: bool = False) -> float | None:
    """Log-likelihood of the best gold choice minus that of the best wrong one, nats (``normalised``: each first divided by its characters).

    One choice alone: its log-likelihood. None where a number is not finite, no gold is known, or the lengths are missing.
    """
    lls = item.loglikelihoods
    values = [value for value in lls if value is not None]
    if not values or not item.gold or len(values) != len(lls) or (normalised and len(item.lengths) != len(lls)):
        return None
    if normalised:
        values = [value / max(1, length) for value, length in zip(values, item.lengths, strict=True)]
    wrong = [value for index, value in enumerate(values) if index not in item.gold]
    return max(values[index] for index in item.gold) - (max(wrong) if wrong else 0.0)


def scores(items: list[Item]) -> np.ndarray:
    """Right or wrong per item, float64 ``[items]``."""
    return np.array([item.correct for item in items], np.float64)


def cluster_labels(items: list[Item]) -> np.ndarray:
    """One integer per item; equal where items of one task share their cluster."""
    known: dict[Any, int] = {}
    return np.array([known.setdefault((item.task, item.cluster) if item.cluster is not None else item.key, len(known)) for item in items])


def _margin_delta(reference: list[Item], candidate: list[Item], clusters: np.ndarray, normalised: bool, note: str | None) -> dict[str, Any]:
    pairs = [(margin(a, normalised=normalised), margin(b, normalised=normalised)) for a, b in zip(reference, candidate, strict=True)]
    keep = [a is not None and b is not None for a, b in pairs]
    change = np.array([b - a for (a, b), known in zip(pairs, keep, strict=True) if known], np.float64)  # type: ignore[operator]
    metric = cluster_mean(change, clusters[keep], "nats/character" if normalised else "nats")
    lost = keep.count(False)
    said = "; ".join(part for part in (note, metric.note, f"{lost} items have no finite margin" if lost else None) if part)
    return json_metric(Metric(metric.value, metric.ci_low, metric.ci_high, metric.n, metric.unit, said or None))


def _matched(reference: list[Item], candidate: list[Item], where: str) -> list[Item]:
    """``candidate`` in the reference's order; by key, never by position."""
    by_key = {item.key: item for item in candidate}
    if set(by_key) != {item.key for item in reference} or len(by_key) != len(candidate) or not reference:
        raise Refused("the arms did not answer the same items", where=where, expected=f"{len(reference)} items", found=f"{len(candidate)}, {len(set(by_key) - {item.key for item in reference})} of them others")
    return [by_key[item.key] for item in reference]


def _chance(items: list[Item]) -> dict[str, float]:
    """What guessing scores, where each item has choices."""
    if any(len(item.loglikelihoods) < 2 or not item.gold for item in items):
        return {}
    return {"chance": sum(len(item.gold) / len(item.loglikelihoods) for item in items) / len(items)}


def _truncated(items: list[Item]) -> dict[str, int]:
    count = sum(item.truncated for item in items)
    return {"truncated": count} if count else {}


def _nothing(n: int) -> Metric:
    """The reference against itself: 0, exactly."""
    return Metric(0.0, 0.0, 0.0, n, "share")
