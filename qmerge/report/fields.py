"""How are parts of results.json found when some may be missing? Every function here answers with an empty value, never with an error."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

BASE, REFERENCE, MERGED = "base", "separate", "merged"
NOT_CANDIDATES = (BASE, REFERENCE, MERGED)
FOR_COMPARISON = ("rtn", "original")
"""arms that are measured to be compared with, which nobody wrote as a file"""
STATES = ("pass", "fail", "inconclusive")

Results = Mapping[str, Any]


def as_dict(value: Any) -> dict[str, Any]:
    """``value`` if it is a mapping, with its keys as strings, else ``{}``."""
    return {str(key): item for key, item in value.items()} if isinstance(value, Mapping) else {}


def as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else []


def number(value: Any) -> float | None:
    """A finite float, or None: NaN and infinities are "undefined" to a reader."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        result = float(value)
    except OverflowError:
        return None
    return result if math.isfinite(result) else None


def numbers(value: Any) -> list[float]:
    return [found for item in as_list(value) if (found := number(item)) is not None]


def arms(results: Results) -> dict[str, dict[str, Any]]:
    """Arms by name: base, separate, merged first, then the others in the file's order."""
    found = {name: as_dict(arm) for name, arm in as_dict(results.get("arms")).items()}
    order = [name for name in NOT_CANDIDATES if name in found] + [name for name in found if name not in NOT_CANDIDATES]
    return {name: found[name] for name in order}


def one_arm(results: Results, name: str) -> dict[str, Any]:
    """One arm, without a look at the others."""
    found = results.get("arms")
    return as_dict(found.get(name)) if isinstance(found, Mapping) else {}


def candidate_names(results: Results) -> list[str]:
    return [name for name in as_dict(results.get("arms")) if name not in NOT_CANDIDATES]


def text_names(results: Results) -> list[str]:
    """Every evaluation text that any arm was measured on, in the order of first appearance."""
    return list(dict.fromkeys(text for arm in arms(results).values() for text in as_dict(arm.get("texts"))))


def cell(results: Results, arm: str, text: str) -> dict[str, Any]:
    """What was measured for ``arm`` on ``text``: metrics, kl_quantiles, window_nll_delta, …"""
    return as_dict(as_dict(one_arm(results, arm).get("texts")).get(text))


def metric(results: Results, arm: str, text: str, name: str) -> dict[str, Any] | None:
    found = as_dict(cell(results, arm, text).get("metrics")).get(name)
    return as_dict(found) or None


def value(results: Results, arm: str, text: str, name: str) -> float | None:
    return number((metric(results, arm, text, name) or {}).get("value"))


def noise_floor(results: Results, text: str) -> dict[str, Any]:
    """The floor's metric with its ``source``, or ``{}``. A bare number is read as its value."""
    found = as_dict(results.get("noise_floor")).get(text)
    return as_dict(found) or ({"value": number(found)} if number(found) is not None else {})


def linears(results: Results, arm: str) -> dict[str, dict[str, Any]]:
    return {module: as_dict(row) for module, row in as_dict(one_arm(results, arm).get("linears")).items()}


def worst_linears(results: Results, arm: str, count: int = 10) -> list[tuple[str, dict[str, Any]]]:
    """The ``count`` linears that kept the least of their delta, the worst first; ties by name, so that the order is fixed."""
    rated = [(number(row.get("delta_survival")), name, row) for name, row in linears(results, arm).items()]
    known = sorted((survival, name, row) for survival, name, row in rated if survival is not None)
    return [(name, row) for _, name, row in known[:count]]


def verdict_state(results: Results) -> str | None:
    state = as_dict(results.get("verdict")).get("state")
    return state if state in STATES else None


def reasons(results: Results) -> list[str]:
    return [reason for reason in as_list(as_dict(results.get("verdict")).get("reasons")) if isinstance(reason, str)]


def other_reasons(results: Results) -> list[str]:
    """The reasons beside the first that decide something: those of checks that did not pass, or all where checks carry none."""
    open_ones = [row["reason"] for row in checks(results) if row.get("state") in ("fail", "inconclusive") and isinstance(row.get("reason"), str)]
    carried = any("reason" in row for row in checks(results))
    first = reasons(results)[:1]
    return [reason for reason in (open_ones if carried else reasons(results)) if reason not in first]


def checks(results: Results, arm: str | None = None) -> list[dict[str, Any]]:
    """The gate's checks, of one arm or of all."""
    rows = [as_dict(row) for row in as_list(as_dict(results.get("verdict")).get("checks"))]
    return [row for row in rows if row and (arm is None or str(row.get("arm")) == arm)]


def candidate_state(results: Results, candidate: str) -> str | None:
    """The candidate's own verdict: its worst check, or a worse one of the arms that all candidates rest on (base, separate, merged).

    A candidate without checks has no verdict, unless it is alone: then the overall one is about it.
    """
    others = candidate_names(results)
    states = [str(row.get("state")) for row in checks(results) if str(row.get("arm")) == candidate]
    if not states and others != [candidate]:
        return None
    states += [str(row.get("state")) for row in checks(results) if str(row.get("arm")) not in others]
    if others == [candidate] and (whole := verdict_state(results)):
        states.append(whole)
    if not states:
        return None
    if "fail" in states:
        return "fail"
    return "pass" if "pass" in states and set(states) <= {"pass", "skipped"} else "inconclusive"
