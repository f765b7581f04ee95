"""Is a candidate worse than the one that was accepted before, measured on the same tokens?

Both were measured against their own separate model. Where the per-token numbers of both runs are there and belong to the same tokens,
differences are taken token by token and clustered (paired); else from the two intervals, as for independent samples, which can only
widen them. A worsening below a margin is taken for noise: it is smaller than what other threads or another processor change.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from qmerge.errors import Refused
from qmerge.quality.compare import REFERENCE_ARMS, differing_keys
from qmerge.quality.stats import cluster_mean, cluster_ratio
from qmerge.types import Metric, known

if TYPE_CHECKING:
    from qmerge.quality.measure import TokenScores
    from qmerge.quality.sidecar import Scores

MARGINS = {"kl_mean": 1e-6, "nll_delta": 1e-3, "top1_agreement": 2e-3, "retention": 5e-3, "ratio": 1e-3, "exact_match": 0.02, "macro_accuracy_delta": 5e-3}
"""absolute, in the metric's own unit; KL's grows with the old value and with the noise floor"""
MORE_IS_BETTER = ("top1_agreement", "retention", "exact_match", "macro_accuracy_delta")
KL_SHARE, FLOOR_SHARE = 0.05, 0.1
SECTIONS = ("perplexity", "generation", "suite")
"""parts of a fingerprint that belong to measurements of their own: compared where both runs made them"""
SIDES = ("these results", "the baseline")
MOST_TOLD = 8
"""differences of two fingerprints that a message lists"""
NOT_GIVEN = "no per-token numbers were given"
NOT_KEPT = "this measure is not kept per token"
DROPPED = ("linears", "path", "loader", "kl_quantiles", "kl_by_confidence", "window_nll_delta", "samples")


def baseline_of(results: Mapping[str, Any]) -> dict[str, Any]:
    """What a later run needs of ``results`` to be held against them: the fingerprint and the candidates' metrics. ``left_out`` says what is gone."""

    def kept(node: Any) -> Any:
        return {key: kept(item) for key, item in node.items() if key not in DROPPED} if isinstance(node, Mapping) else node

    rest = {key: results[key] for key in ("schema_version", "measured_at", "fingerprint", "noise_floor", "tasks") if key in results}
    verdict = {key: results["verdict"][key] for key in ("state", "budget") if key in results.get("verdict", {})}
    arms = {name: kept(arm) for name, arm in results["arms"].items() if name not in REFERENCE_ARMS}
    return rest | {"arms": arms, "verdict": verdict, "left_out": ["reference arms", "serving", "reasons", "checks", *DROPPED]}


def baseline_checks(
    results: Mapping[str, Any], baseline: Mapping[str, Any], pairs: list[tuple[str, str]], *, scores: Scores | None = None, old_scores: Scores | None = None, why: str = NOT_GIVEN
) -> list[dict[str, Any]]:
    """One row per metric and text of every pair (new candidate, old one): arm, text, metric, the difference with its interval, ``new``, ``old``,
    ``paired``, ``unpaired`` (why not), limit, state, reason. ``why``: why there are no scores. A difference whose interval lies beyond the margin fails; a point
    beyond it, with an interval that reaches back, is open."""
    checks = []
    for name, old_name in pairs:
        new, old = results["arms"][name], baseline["arms"][old_name]
        for text in new.get("texts", {}):
            if text not in old.get("texts", {}):
                checks.append(_open(name, text, "the baseline holds nothing on this text"))
                continue
            rows = tuple(arm["texts"][text]["metrics"] for arm in (new, old))
            tokens = _same_tokens(scores, old_scores, text, (name, old_name), rows) if scores and old_scores else why
            floor = _number(results.get("noise_floor", {}).get(text, {}).get("value"))
            checks += _text_checks(name, text, rows, tokens, floor or 0.0)
        checks += _section_checks(name, new, old)
    return checks


def check_fingerprints(results: Mapping[str, Any], baseline: Mapping[str, Any], ignore_versions: bool) -> None:
    """``Refused`` where the two were not measured the same way. What only one of them measured (other protocols, generation, tasks) is not held against it."""
    new, old = (dict(r.get("fingerprint", {})) for r in (results, baseline))
    if ignore_versions:
        new.pop("versions", None), old.pop("versions", None)
    for section in SECTIONS:
        if not (new.get(section) and old.get(section)):
            new.pop(section, None), old.pop(section, None)
    keys = differing_keys(new, old)
    if keys:
        only_versions = all(key.startswith("versions.") for key in keys)
        raise Refused(
            "the results and the baseline were not measured the same way, so they cannot be compared",
            where="fingerprint", expected="equal fingerprints", found="differing: " + _told(new, old),
            fix="--ignore-versions, or measure the baseline again" if only_versions else "measure these results as the baseline was, or accept them: qmerge compare RESULTS --save-baseline FILE",
        )


def _told(new: Mapping[str, Any], old: Mapping[str, Any]) -> str:
    """At what two fingerprints differ, with both values, so that a log alone says which side to change."""
    rows = list(_differences(new, old, ""))
    return "; ".join(rows[:MOST_TOLD]) + (f"; and {len(rows) - MOST_TOLD} more" if len(rows) > MOST_TOLD else "")


def _differences(new: Any, old: Any, path: str) -> Iterator[str]:
    if isinstance(new, Mapping) and isinstance(old, Mapping):
        for key in sorted({*new, *old}):
            yield from _differences(new.get(key), old.get(key), f"{path}.{key}" if path else str(key))
    elif new != old:
        sides = [SIDES[i] for i, side in enumerate((new, old)) if side is not None]
        yield f"{path} is only in {sides[0]}" if len(sides) < 2 else f"{path}: {str(new)[:40]} here, {str(old)[:40]} in the baseline"


def _text_checks(name: str, text: str, rows: tuple[dict[str, Any], dict[str, Any]], tokens: _Tokens | str, floor: float) -> Iterator[dict[str, Any]]:
    for key in ("kl_mean", "nll_delta", "top1_agreement", "retention"):
        new, old = (row.get(key, {}) for row in rows)
        if key != "kl_mean" and _number(new.get("value")) is None and _number(old.get("value")) is None:
            continue  # undefined in both: on this text the adapter's gain is not above the noise
        margin = MARGINS[key]
        if key == "kl_mean":
            margin = max(margin, KL_SHARE * (_number(old.get("value")) or 0.0), FLOOR_SHARE * floor)
        yield _judge(name, text, key, new, old, tokens if isinstance(tokens, str) else tokens.difference(key), margin)


def _section_checks(name: str, new: Mapping[str, Any], old: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for label, row in new.get("perplexity", {}).items():
        if label in old.get("perplexity", {}):
            yield _judge(name, label, "ratio", row["metrics"].get("ratio", {}), old["perplexity"][label]["metrics"].get("ratio", {}), NOT_KEPT, MARGINS["ratio"])
    for text, row in new.get("generation", {}).items():
        if text in old.get("generation", {}):
            yield _judge(name, text, "exact_match", row.get("exact_match", {}), old["generation"][text].get("exact_match", {}), NOT_KEPT, MARGINS["exact_match"])
    macro = [arm.get("tasks", {}).get("macro_accuracy_delta") for arm in (new, old)]
    if all(macro):
        yield _judge(name, "tasks", "macro_accuracy_delta", macro[0], macro[1], NOT_KEPT, MARGINS["macro_accuracy_delta"])


def _judge(name: str, text: str, key: str, new: Mapping[str, Any], old: Mapping[str, Any], paired: Metric | str, margin: float) -> dict[str, Any]:
    """``paired``: the difference token by token, or why there is none."""
    found = paired if isinstance(paired, Metric) and paired.ci_low is not None else None
    why = paired if isinstance(paired, str) else None if found else "too few documents or windows to pair"
    difference = found or unpaired_difference(new, old)
    if difference is None:
        return _open(name, text, f"{key} has no interval in both runs", key)
    sign = -1.0 if key in MORE_IS_BETTER else 1.0
    worse = sorted(sign * known(end) for end in (difference.ci_low, difference.ci_high))
    state = "fail" if worse[0] > margin else "pass" if sign * known(difference.value) <= margin else "inconclusive"
    word = {"fail": "worse", "pass": "not worse", "inconclusive": "perhaps worse, more text would tell"}[state]
    how = "token by token" if found else f"from the two intervals, as {why}"
    shown = [_shown(x) for x in (new.get("value"), old.get("value"), difference.value, difference.ci_low, difference.ci_high)]
    change = f"{'a loss' if sign < 0 else 'a rise'} of up to {margin:.2g} is noise, as another processor changes as much"
    reason = f"{name} on {text}: {key} {shown[0]}, the baseline's {shown[1]}: {word} (new minus old, {how}: {shown[2]}, {shown[3]} to {shown[4]}; {change})"
    return {
        "arm": name, "text": text, "metric": f"{key}_vs_baseline", "value": difference.value, "ci_low": difference.ci_low, "ci_high": difference.ci_high,
        "limit": {"min": -margin} if sign < 0 else {"max": margin}, "state": state, "reason": reason,
        "new": _number(new.get("value")), "old": _number(old.get("value")), "paired": found is not None, **({} if found else {"unpaired": why}),
    }  # fmt: skip


def _open(name: str, text: str, why: str, key: str = "kl_mean") -> dict[str, Any]:
    row = {"arm": name, "text": text, "metric": f"{key}_vs_baseline", "value": None, "ci_low": None, "ci_high": None, "limit": None}
    return row | {"state": "inconclusive", "reason": f"{name} on {text}: {why}", "new": None, "old": None, "paired": None}


def unpaired_difference(new: Mapping[str, Any], old: Mapping[str, Any]) -> Metric | None:
    """New minus old with the interval of two independent samples: half widths add in squares. None where either lacks a value or an interval.

    >>> unpaired_difference({"value": 2.0, "ci_low": 1.7, "ci_high": 2.3}, {"value": 1.0, "ci_low": 0.6, "ci_high": 1.4}).ci_high
    1.5
    """
    numbers = [[_number(row.get(key)) for key in ("value", "ci_low", "ci_high")] for row in (new, old)]
    found = [x for row in numbers for x in row if x is not None]
    if len(found) < 6:
        return None
    value, low, high, before, old_low, old_high = found
    half = math.hypot((high - low) / 2, (old_high - old_low) / 2)
    return Metric(value - before, value - before - half, value - before + half, min(int(row.get("n") or 0) for row in (new, old)), str(new.get("unit") or ""))


class _Tokens:
    """The per-token numbers of both candidates on one text, row by row the same tokens."""

    def __init__(self, new: TokenScores, old: TokenScores, new_base: TokenScores | None, old_base: TokenScores | None) -> None:
        self.new, self.old, self.base, self.old_base = new, old, new_base, old_base
        self.keep = new.finite & old.finite

    def difference(self, key: str) -> Metric | str:
        """New minus old, or why that has no meaning token by token."""
        new, old, keep = self.new, self.old, self.keep
        clusters = new.clusters[keep]

        def minus(a: np.ndarray, b: np.ndarray) -> np.ndarray:
            found: np.ndarray = a[keep].astype(np.float64) - b[keep].astype(np.float64)
            return found

        if key == "kl_mean":
            return cluster_mean(minus(new.kl, old.kl), clusters, "nats/token")
        if key == "nll_delta":
            return cluster_mean(minus(new.nll_cand, new.nll_ref) - minus(old.nll_cand, old.nll_ref), clusters, "nats/token")
        if key == "top1_agreement":
            return cluster_mean(minus(new.agree, old.agree), clusters, "share")
        same_gain = self.base is not None and self.old_base is not None and np.allclose(self.base.nll_cand[keep], self.old_base.nll_cand[keep], atol=1e-4)
        if not same_gain or not np.allclose(new.nll_ref[keep], old.nll_ref[keep], atol=1e-4):
            return "the adapter's gain that it divides by is another one"
        return cluster_ratio(minus(old.nll_cand, new.nll_cand), minus(known(self.base).nll_cand, new.nll_ref), clusters, "share")


def _same_tokens(scores: Scores, old_scores: Scores, text: str, names: tuple[str, str], rows: tuple[dict[str, Any], dict[str, Any]]) -> _Tokens | str:
    """Both candidates' arrays, if they are of the same tokens and really belong to the results beside them; else what is wrong with them."""
    found = [have.get(text, {}).get(name) for have, name in zip((scores, old_scores), names, strict=True)]
    for one, metrics, name, whose in zip(found, rows, names, SIDES, strict=True):
        if one is None:
            return f"the .npz beside {whose} holds no {name} on {text}"
        stated = _number(metrics.get("kl_mean", {}).get("value"))
        mean = float(one.kl[one.finite].astype(np.float64).mean()) if one.finite.any() else math.nan
        if stated is None or not math.isclose(mean, stated, rel_tol=1e-3, abs_tol=1e-12):
            return f"the .npz beside {whose} belongs to another run: its mean KL is {_shown(mean)}, the results say {_shown(stated)}"
    new, old = (known(one) for one in found)
    if not (np.array_equal(new.window, old.window) and np.array_equal(new.doc, old.doc)):
        return "the two .npz are of other tokens"
    return _Tokens(new, old, scores[text].get("base"), old_scores[text].get("base"))


def _number(x: Any) -> float | None:
    return float(x) if isinstance(x, (int, float)) and not isinstance(x, bool) and math.isfinite(x) else None


def _shown(x: Any) -> str:
    value = _number(x)
    if value is None:
        return "?"
    return f"{value:.2e}" if value and abs(value) < 1e-3 else f"{value:.4g}"
