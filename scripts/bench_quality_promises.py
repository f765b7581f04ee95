"""What does the project promise of its checkpoints against the peers', and is it kept?

Every ratio of two arms is paired by window: both saw the same ones. Intervals: 95 %, seeded bootstrap over windows (retention: as in the tables). "Best" of several peers is picked per case and text by
the peer's own mean KL.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from bench_quality_arms import FOUR_BITS, INT4, LABELS
from bench_quality_cases import IN_DOMAIN, WIKITEXT
from bench_quality_measure import SERVED, Scores

from qmerge.quality.measure import TokenScores
from qmerge.quality.stats import retention

ROUNDS, SEED = 2000, 0
KL_INT4, KL_INT4_DISTILLED, KL_WIKITEXT, KL_LOW_BITS = 0.5, 0.35, 0.7, 0.6
KL_NF4_LIGHT, RETENTION_LIGHT = 1 / 200, 0.985
FLOOR = {"light": 2.0, "strong": 4.0}
SECONDS, BITS, SAME_BITS = 1.0, 1.01, 1.05
FIRST, DISTILLED, NF4 = "ours-gptq-int4", "ours-gptq-int4-distill", "ours-nf4"
LOW_BITS = (("ours-gptq-int3", "gptqmodel-int3"), ("ours-gptq-int2-g32", "gptqmodel-int2-g32"))
CHANNEL = tuple((f"ours-ct-{bits}-channel", f"llmcompressor-{bits}-channel") for bits in ("w4a16", "w8a16"))
"""what compressed-tensors can hold where no group divides the shapes"""
CHANNEL_TARGETS = ((1, IN_DOMAIN, "KL in-domain", KL_INT4), (4, WIKITEXT, "KL WikiText-2", KL_WIKITEXT))
Value = dict[str, Any]
"""``value``, ``ci_low``, ``ci_high``, ``n``"""


def promises(case: str, scores: Scores, arms: dict[str, dict[str, Any]], timing: dict[str, Any] | None) -> list[dict[str, Any]]:
    """One row per promise of a case. ``arms`` is how each was made; a promise whose arms are not there has no value and says why."""
    rows = _int4(scores, arms) + _wikitext(scores, arms) + _low_bits(scores) + _nf4(case, scores)
    pairs = [pair for pair in CHANNEL if pair[0] in arms]
    for number, text, what, target in CHANNEL_TARGETS:
        rows += [
            compared(number, scores[text], ours, theirs if theirs in scores[text] else None, kl_ratio, what, target, theirs)
            for ours, theirs in pairs
            if text in scores
        ]
    if timing:
        rows.append(row(5, "seconds", f"{label(FIRST)} / {label('gptqmodel')}", SECONDS, timing.get("ratio") or absent("not timed")))
    return rows


def _int4(scores: Scores, arms: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    domain = scores[IN_DOMAIN]
    best = best_of(domain, at_most_as_large(INT4, arms))
    rows = [
        compared(1, domain, ours, best, kl_ratio, "KL in-domain", target)
        for ours, target in ((FIRST, KL_INT4), (DISTILLED, KL_INT4_DISTILLED))
    ]
    rows.append(compared(1, domain, FIRST, best, ppl_ratio, "perplexity in-domain", 1.0))
    sizes = [arms.get(name or "", {}).get("bits_per_weight") for name in (FIRST, best)]
    size = {"value": sizes[0] / sizes[1], "ci_low": None, "ci_high": None, "n": None} if all(sizes) else absent("no file")
    return [*rows, row(1, "stored bits", f"{label(FIRST)} / {label(best)}", BITS, size)]


def _wikitext(scores: Scores, arms: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    if WIKITEXT not in scores:
        return []
    other = scores[WIKITEXT]
    best = best_of(other, at_most_as_large(FOUR_BITS, arms))
    return [
        compared(4, other, FIRST, best, kl_ratio, "KL WikiText-2", KL_WIKITEXT),
        compared(4, other, FIRST, best, ppl_ratio, "perplexity WikiText-2", 1.0),
    ]


def _low_bits(scores: Scores) -> list[dict[str, Any]]:
    domain = scores[IN_DOMAIN]
    return [
        compared(3, domain, ours, theirs if theirs in domain else None, kl_ratio, "KL in-domain", KL_LOW_BITS, theirs)
        for ours, theirs in LOW_BITS
    ]


def _nf4(case: str, scores: Scores) -> list[dict[str, Any]]:
    if case not in FLOOR:
        return []
    domain, rows = scores[IN_DOMAIN], []
    if case == "light":
        rows += [
            compared(2, domain, NF4, other if other in domain else None, kl_ratio, "KL in-domain", KL_NF4_LIGHT, other)
            for other in ("rtn", "peft-nf4")
        ]
    rows.append(compared(2, domain, NF4, SERVED, kl_ratio, "KL in-domain / noise floor", FLOOR[case]))
    if case == "light":
        value = kept(domain["base"], domain[NF4]) if NF4 in domain else absent(f"{label(NF4)} was not measured")
        rows.append(row(2, "retention in-domain", label(NF4), RETENTION_LIGHT, value, "≥"))
    return rows


def label(name: str | None) -> str:
    return LABELS.get(name or "", name or "—")


def at_most_as_large(names: tuple[str, ...], arms: dict[str, dict[str, Any]]) -> tuple[str, ...]:
    """Without peers that left linears in float (auto-round does where a shape does not suit it): those are not at the same bits."""
    limit = SAME_BITS * arms.get(FIRST, {}).get("bits_per_weight", math.inf)
    return tuple(name for name in names if arms.get(name, {}).get("bits_per_weight", math.inf) <= limit)


def best_of(scores: dict[str, TokenScores], names: tuple[str, ...]) -> str | None:
    """The one of ``names`` with the lowest mean KL."""
    found = {name: float(scores[name].kl[scores[name].finite].astype(np.float64).mean()) for name in names if name in scores}
    return min(found, key=found.get) if found else None


def compared(
    number: int,
    scores: dict[str, TokenScores],
    ours: str,
    theirs: str | None,
    how: Callable[[TokenScores, TokenScores], Value],
    what: str,
    target: float,
    named: str | None = None,
) -> dict[str, Any]:
    """A promise about the ratio of two arms."""
    there = ours in scores and theirs is not None
    value = (
        how(scores[ours], scores[theirs])
        if there
        else absent(f"{label(ours) if ours not in scores else label(named) if named else 'no such peer'} was not measured")
    )
    over = "" if theirs == SERVED else f" / {label(theirs or named)}"
    return row(number, what, label(ours) + over, target, value)


def row(number: int, what: str, who: str, target: float, value: Value, sign: str = "≤") -> dict[str, Any]:
    """``state``: judged by the value; with a word where the interval reaches over the target."""
    return {"promise": number, "what": what, "who": who, "sign": sign, "target": target} | value | {"state": state(target, value, sign)}


def state(target: float, value: Value, sign: str) -> str:
    if value["value"] is None:
        return value.get("why", "unknown")
    ends = [number for number in (value["value"], value["ci_low"], value["ci_high"]) if number is not None]
    good = [number <= target if sign == "≤" else number >= target for number in ends]
    return ("met" if good[0] else "missed") + ("" if len(set(good)) == 1 else " (the interval reaches over the target)")


def absent(why: str) -> Value:
    return {"value": None, "ci_low": None, "ci_high": None, "n": None, "why": why}


def kl_ratio(ours: TokenScores, theirs: TokenScores) -> Value:
    """Mean KL over mean KL."""
    return bootstrap(ours, theirs, lambda both: (ours.kl[both], theirs.kl[both]), lambda top, bottom, _: top / bottom)


def ppl_ratio(ours: TokenScores, theirs: TokenScores) -> Value:
    """Perplexity over perplexity: exp of the mean difference of NLL."""
    return bootstrap(
        ours, theirs, lambda both: (ours.nll_cand[both], theirs.nll_cand[both]), lambda top, bottom, count: np.exp((top - bottom) / count)
    )


def kept(base: TokenScores, ours: TokenScores) -> Value:
    """Retention: (NLL base − NLL ours) / (NLL base − NLL separate), as the tables have it; undefined where the adapter's gain is inside the noise."""
    both = ours.finite & base.finite
    nll = (one[both].astype(np.float64) for one in (base.nll_cand, ours.nll_ref, ours.nll_cand))
    found = retention(*nll, ours.clusters[both])
    if found.value is None:
        return absent(f"undefined: {found.note}")
    return {"value": found.value, "ci_low": found.ci_low, "ci_high": found.ci_high, "n": len(np.unique(ours.clusters[both]))}


def bootstrap(
    ours: TokenScores,
    theirs: TokenScores,
    parts: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]],
    combine: Callable[[Any, Any, Any], Any],
) -> Value:
    """``combine`` of the sums of two per-token numbers and the count, over all windows and over draws of windows (percentile interval)."""
    both = ours.finite & theirs.finite
    groups, index = np.unique(ours.clusters[both], return_inverse=True)
    sums = [np.bincount(index, weights=part.astype(np.float64)) for part in (*parts(both), np.ones(int(both.sum())))]
    value = float(combine(*(part.sum() for part in sums)))
    if not math.isfinite(value):
        return absent("nothing to divide by")
    draws = np.random.default_rng(SEED).integers(0, len(groups), (ROUNDS, len(groups)))
    low, high = np.quantile(combine(*(part[draws].sum(1) for part in sums)), [0.025, 0.975])
    return {"value": value, "ci_low": float(low), "ci_high": float(high), "n": len(groups)}
