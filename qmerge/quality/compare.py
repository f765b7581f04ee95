"""Is a candidate good enough: pass, fail, or not known from this much text?

A limit is held against the whole 95 % interval, not the point: an interval that reaches over the limit is ``inconclusive``. The
verdict's words and the exit code come from the same checks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qmerge.errors import UsageProblem
from qmerge.store.yamlfiles import BadYaml, read_yaml

if TYPE_CHECKING:
    from qmerge.quality.sidecar import Scores

DIRECTIONS = {
    "ppl_ratio": "max", "kl_mean": "max", "kl_vs_base": "max", "top1_agreement": "min",
    "retention": "min", "macro_accuracy_delta": "min", "merged_floor_factor": "max",
}  # fmt: skip
REFERENCE_ARMS = ("base", "separate", "merged", "rtn", "original")
GAIN_METRICS = ("retention", "kl_vs_base")
"""they divide by what the adapter changed, so they say something only on text where it measurably helps"""
SAME_ARITHMETIC_KL = 1e-6
"""KL that fp32 rounding alone leaves; used where the noise floor itself is 0"""


def load_budget(name_or_path: str | Path) -> dict[str, Any]:
    """``{"name", "limits": {metric: {"max" | "min": number}}}`` of a budget that comes with qmerge (strict, default, lenient) or of a YAML file.

    A metric that the file leaves out is not checked. Raises ``UsageProblem`` with every fault of the file at once.
    """
    budgets = Path(__file__).parent / "budgets"
    shipped = budgets / f"{name_or_path}.yaml"
    file = shipped if shipped.is_file() else Path(name_or_path)
    try:
        content = read_yaml(file)
    except OSError as error:
        known = ", ".join(sorted(p.stem for p in budgets.glob("*.yaml")))
        raise UsageProblem("no such budget", where=str(name_or_path), expected=f"{known}, or a YAML file", found=error.strerror or str(error), fix="qmerge run --budget default, or the path of a YAML file; eval/budgets and docs/evidence.md show one") from error
    except BadYaml as error:
        raise UsageProblem("the budget is not YAML", where=str(name_or_path), found=str(error)) from error
    return _checked(file.stem, content, str(name_or_path))


def budget_of(given: str | Path | Mapping[str, Any]) -> dict[str, Any]:
    """`load_budget`, or limits given as ``{metric: {"max" | "min": number}}``. Raises as it does."""
    return _checked("given", dict(given), "budget") if isinstance(given, Mapping) else load_budget(given)


def _checked(name: str, limits: Any, where: str) -> dict[str, Any]:
    if faults := _budget_faults(limits):
        raise UsageProblem("the budget is malformed", where=where, expected="metric: {max: number} or {min: number}", found="; ".join(faults), fix="docs/evidence.md lists the metrics with their direction and unit")
    return {"name": name, "limits": limits}


def compare(
    results: dict[str, Any], budget: dict[str, Any], baseline: dict[str, Any] | None = None, *, ignore_versions: bool = False, tokens: tuple[Scores, Scores] | str | None = None
) -> dict[str, Any]:
    """The verdict ``{"state", "reasons", "checks", "budget"}`` on results.json's content; ``checks`` rows hold arm, text, metric, value,
    ci_low, ci_high, limit, state (``pass``, ``fail``, ``inconclusive``, ``skipped``) and reason. ``reasons`` starts with the decisive ones.

    With ``baseline`` (older results) the candidates are also held against the old ones; ``Refused`` where the fingerprints differ. ``tokens``: the
    per-token numbers of both runs (`sidecar.read_scores`), new first; then differences are paired. Or, in words, why they are not there.
    """
    limits = budget["limits"]
    checks: list[dict[str, Any]] = []
    candidates = [name for name in results["arms"] if name not in REFERENCE_ARMS]
    for arm in candidates:
        checks += _arm_checks(arm, results["arms"][arm]["texts"], limits)
        if "macro_accuracy_delta" in limits and results.get("tasks"):
            metric = results["arms"][arm].get("tasks", {}).get("macro_accuracy_delta", {})
            checks.append(_check(arm, "tasks", "macro_accuracy_delta", metric, limits["macro_accuracy_delta"]))
    elsewhere = results.get("fingerprint", {}).get("merged_into") == "another base"
    if "merged_floor_factor" in limits and elsewhere:
        reason = "merged: the noise floor is not checked, as the merge is into another base than the reference's"
        checks.append(_row("merged", "", "merged_floor_factor", {}, limits["merged_floor_factor"], "skipped", reason))
    elif "merged_floor_factor" in limits and "merged" in results["arms"]:
        checks += [_merge_check(text, row["metrics"], limits["merged_floor_factor"]) for text, row in results["arms"]["merged"]["texts"].items()]
    if baseline is not None:
        checks += _baseline_checks(results, baseline, candidates, ignore_versions, tokens)
    if not candidates:
        checks.append(_row("", "", "", {}, None, "inconclusive", "there is no candidate to judge"))
    state = next((s for s in ("fail", "inconclusive") if any(c["state"] == s for c in checks)), "pass")
    order = {state: 0, "fail": 1, "inconclusive": 2, "pass": 3, "skipped": 4}
    ranked = sorted(checks, key=lambda c: 0 if c["state"] == state else order[c["state"]])
    return {"state": state, "reasons": [c["reason"] for c in ranked], "checks": checks, "budget": budget["name"]}


def exit_code(verdict: dict[str, Any], strict: bool = False) -> int:
    """0 pass, 3 fail; inconclusive is 0 (the caller warns), or 3 where ``strict``."""
    return 3 if verdict["state"] == "fail" or (strict and verdict["state"] == "inconclusive") else 0


def differing_keys(a: Any, b: Any, path: str = "") -> list[str]:
    """Dotted names at which two fingerprints differ."""
    if isinstance(a, dict) and isinstance(b, dict):
        return [found for key in sorted({*a, *b}) for found in differing_keys(a.get(key), b.get(key), f"{path}.{key}" if path else str(key))]
    return [] if a == b else [path]


def _arm_checks(arm: str, texts: dict[str, Any], limits: dict[str, Any]) -> list[dict[str, Any]]:
    checks, measurable = [], 0
    for text, row in texts.items():
        metrics = row["metrics"]
        gain = metrics.get("retention", {})
        measurable += gain.get("value") is not None
        for key in ("ppl_ratio", "kl_mean", "top1_agreement", *GAIN_METRICS):
            if key not in limits:
                continue
            if key in GAIN_METRICS and gain.get("value") is None:
                reason = f"{arm} on {text}: {key} is not checked: {gain.get('note', 'retention was not measured')}"
                checks.append(_row(arm, text, key, metrics.get(key, {}), limits[key], "skipped", reason))
            else:
                checks.append(_check(arm, text, key, metrics.get(key, {}), limits[key]))
        bad = metrics.get("nonfinite", {}).get("value")
        if bad:
            checks.append(_row(arm, text, "nonfinite", metrics["nonfinite"], {"max": 0}, "fail", f"{arm} on {text}: {bad:g} tokens are not finite"))
    if not measurable and any(key in limits for key in GAIN_METRICS):
        reason = f"{arm}: on no text does the adapter help measurably, so nothing shows that it was kept; add held-out text of its own domain"
        checks.append(_row(arm, "", "retention", {}, limits.get("retention"), "inconclusive", reason))
    return checks


def _merge_check(text: str, metrics: dict[str, Any], limit: dict[str, float]) -> dict[str, Any]:
    """Merged float weights against the reference. Where the floor is 0 (or was not measured) only rounding may separate them."""
    factor, kl = metrics.get("floor_factor", {}), metrics.get("kl_mean", {})
    if factor.get("value") is not None:
        return _check("merged", text, "merged_floor_factor", factor, limit)
    ok = kl.get("value") is not None and kl["value"] <= SAME_ARITHMETIC_KL
    reason = f"merged on {text}: mean KL {_number(kl.get('value'))} {'≤' if ok else '>'} {SAME_ARITHMETIC_KL:g} (no noise floor to compare with)"
    return _row("merged", text, "merged_floor_factor", kl, limit, "pass" if ok else "fail", reason)


def _baseline_checks(results: dict[str, Any], baseline: dict[str, Any], candidates: list[str], ignore_versions: bool, tokens: tuple[Scores, Scores] | str | None) -> list[dict[str, Any]]:
    from qmerge.quality.baseline import NOT_GIVEN, baseline_checks, check_fingerprints

    check_fingerprints(results, baseline, ignore_versions)
    before = [name for name in baseline["arms"] if name not in REFERENCE_ARMS]
    # One candidate on each side is the same thing under another folder name.
    pairs = [(candidates[0], before[0])] if len(candidates) == len(before) == 1 else [(n, n) for n in candidates if n in before]
    if not pairs:
        return [_row("", "", "baseline", {}, None, "inconclusive", "the baseline holds no candidate of these names")]
    if tokens is None or isinstance(tokens, str):
        return baseline_checks(results, baseline, pairs, why=tokens or NOT_GIVEN)
    return baseline_checks(results, baseline, pairs, scores=tokens[0], old_scores=tokens[1])


def _check(arm: str, text: str, key: str, metric: dict[str, Any], limit: dict[str, float]) -> dict[str, Any]:
    side, bound = next(iter(limit.items()))
    value, low, high = (metric.get(k) for k in ("value", "ci_low", "ci_high"))
    here = f"{arm} on {text}: {key}"
    if value is None or low is None or high is None or not all(map(math.isfinite, (value, low, high))):
        why = metric.get("note") or "not measured"
        number = "" if value is None else f" {_number(value)}"
        return _row(arm, text, key, metric, limit, "inconclusive", f"{here}{number} has no interval to hold against {bound:g}: {why}")
    good, bad = (high <= bound, low > bound) if side == "max" else (low >= bound, high < bound)
    state = "pass" if good else "fail" if bad else "inconclusive"
    sign = {"max": {"pass": "≤", "fail": ">"}, "min": {"pass": "≥", "fail": "<"}}[side].get(state, "cannot be told from the limit")
    more = "" if state != "inconclusive" else f": more {'items' if text == 'tasks' else 'text'} would narrow the interval"
    return _row(arm, text, key, metric, limit, state, f"{here} {_interval(metric)} {sign} {bound:g}{more}")


def _row(arm: str, text: str, key: str, metric: dict[str, Any], limit: dict[str, float] | None, state: str, reason: str) -> dict[str, Any]:
    numbers = {k: metric.get(k) for k in ("value", "ci_low", "ci_high")}
    return {"arm": arm, "text": text, "metric": key, **numbers, "limit": limit, "state": state, "reason": reason}


def _interval(metric: dict[str, Any]) -> str:
    return f"{_number(metric['value'])} ({_number(metric['ci_low'])} to {_number(metric['ci_high'])})"


def _number(x: float | None) -> str:
    if x is None:
        return "?"
    return f"{x:.2e}" if x and abs(x) < 1e-3 else f"{x:.4f}" if 0.1 <= abs(x) < 10 else f"{x:.4g}"


def _budget_faults(content: Any) -> list[str]:
    if not isinstance(content, dict) or not content:
        return ["it holds no limits"]
    faults = []
    for key, limit in content.items():
        if key not in DIRECTIONS:
            near = get_close_matches(str(key)[:80], DIRECTIONS, 1)
            faults.append(f"unknown metric {repr(key)[:80]} ({f'did you mean {near[0]}?' if near else 'known: ' + ', '.join(DIRECTIONS)})")
        elif not isinstance(limit, dict) or list(limit) != [DIRECTIONS[key]]:
            faults.append(f"{key} wants {{{DIRECTIONS[key]}: number}}, found {repr(limit)[:120]}")
        elif isinstance(limit[DIRECTIONS[key]], bool) or not isinstance(limit[DIRECTIONS[key]], (int, float)) or not abs(limit[DIRECTIONS[key]]) < 1e300:
            faults.append(f"{key}.{DIRECTIONS[key]} is not a number: {repr(limit[DIRECTIONS[key]])[:120]}")
    return faults
