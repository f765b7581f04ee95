"""How is a measured value written, so that it shows what is known and no more?"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from qmerge.report.fields import number
from qmerge.types import Metric

MISSING = "—"
UNDEFINED = "undefined"
SHARES = ("percent", "points")

# metric name in results.json -> (words for a reader, kind of number, True where more is better and the limit is a minimum)
METRICS: dict[str, tuple[str, str, bool]] = {
    "ppl": ("perplexity", "ppl", False),
    "nll": ("NLL (nats/token)", "nll", False),
    "nll_delta": ("ΔNLL (nats/token)", "signed", False),
    "ppl_ratio": ("perplexity ratio", "ratio", False),
    "kl_mean": ("mean KL (nats/token)", "kl", False),
    "kl_median": ("median KL (nats/token)", "kl", False),
    "kl_p90": ("KL p90 (nats/token)", "kl", False),
    "kl_p99": ("KL p99 (nats/token)", "kl", False),
    "kl_p999": ("KL p99.9 (nats/token)", "kl", False),
    "js_mean": ("mean Jensen–Shannon divergence (nats/token)", "kl", False),
    "top1_agreement": ("top-1 agreement", "percent", True),
    "delta_p_rms": ("RMS Δp", "percent", False),
    "retention": ("retention", "percent", True),
    "kl_vs_base": ("mean KL over the base's", "percent", False),
    "ratio": ("perplexity ratio", "ratio", False),
    "exact_match": ("identical continuations", "percent", True),
    "kl_mean_vs_baseline": ("mean KL, new − baseline (nats/token)", "signed", False),
    "nll_delta_vs_baseline": ("ΔNLL, new − baseline (nats/token)", "signed", False),
    "top1_agreement_vs_baseline": ("top-1 agreement, new − baseline", "points", True),
    "retention_vs_baseline": ("retention, new − baseline", "points", True),
    "ratio_vs_baseline": ("perplexity ratio, new − baseline", "signed", False),
    "exact_match_vs_baseline": ("identical continuations, new − baseline", "points", True),
    "macro_accuracy_delta_vs_baseline": ("macro accuracy, new − baseline", "points", True),
    "floor_factor": ("KL over the noise floor", "kl", False),
    "merged_floor_factor": ("KL of merged over the noise floor", "kl", False),
    "macro_accuracy_delta": ("macro accuracy difference", "points", True),
    "nonfinite": ("non-finite tokens", "count", False),
    "accuracy": ("accuracy", "percent", True),
    "delta": ("accuracy difference", "points", True),
}


def significant(value: float, digits: int) -> int:
    """Decimals that show ``digits`` significant digits of ``value``: ``significant(0.00011, 2) == 5``."""
    return 0 if value == 0 else max(0, digits - 1 - math.floor(math.log10(abs(value)) + 1e-12))


def _fixed(value: float, decimals: int) -> str:
    text = f"{value:.{decimals}f}"
    return text.removeprefix("-") if float(text) == 0 else text.replace("-", "−")


def _small(value: float, digits: int, decimals: int) -> str:
    """Plain decimals while six of them are enough, powers of ten beyond."""
    if decimals <= 6:
        return _fixed(value, decimals)
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    return f"{mantissa}e{int(exponent)}".replace("-", "−")


def format_value(value: float | None, kind: str, like: float | None = None) -> str:
    """``value`` as text. ``like`` sets the decimals where an interval's bounds shall be written like their value.

    ``format_value(0.000114, "kl") == "0.00011"``, ``format_value(0.9912, "percent") == "99.1 %"``.
    """
    if value is None:
        return MISSING
    pattern = value if like is None else like
    if kind == "percent":
        return f"{_fixed(100 * value, 1)} %"
    if kind == "points":
        return f"{_fixed(100 * value, 1)} points"
    if kind == "count":
        return f"{value:,.0f}"
    if kind in ("tokens", "rate"):  # positions, and tokens per second: three digits
        return f"{value:,.0f}" if abs(pattern) >= 100 else _fixed(value, min(2, significant(pattern, 3)))
    if kind == "ratio":
        return _fixed(value, 4)
    if kind in ("ppl", "nll"):
        return _fixed(value, min(4, significant(pattern, 4)))
    digits = 3 if abs(pattern) >= 0.01 else 2
    shown = "0" if value == 0 else _small(value, digits, significant(pattern, digits))
    return f"+{shown}" if kind == "signed" and value > 0 and shown.strip("0.") else shown


def fraction(value: float | None, unit: object) -> float | None:
    """A share as 0…1, also where the file gives it in percent or points."""
    return value / 100 if value is not None and unit in ("%", "percent", "points") else value


def metric_parts(metric: Metric | Mapping[str, Any] | None, kind: str) -> tuple[str, str]:
    """``("0.00011", "0.00009 to 0.00013")``: the value and its 95 % interval (empty where there is none)."""
    row = metric.to_json() if isinstance(metric, Metric) else metric
    if not isinstance(row, Mapping):
        return MISSING, ""
    unit = row.get("unit") if kind in SHARES else None
    value, low, high = (fraction(number(row.get(key)), unit) for key in ("value", "ci_low", "ci_high"))
    if value is None:
        return (UNDEFINED if row.get("note") else MISSING), ""
    # a difference is known to the decimals of its interval; other values set the decimals themselves
    like = max((abs(bound) for bound in (value, low, high) if bound is not None), default=value) if kind == "signed" else value
    shown = format_value(value, kind, like)
    if low is None or high is None or low == high == value:
        return shown, ""
    if kind in SHARES:  # one unit for the value and its bounds
        return shown, f"{_fixed(100 * low, 1)} to {_fixed(100 * high, 1)}"
    bounds = [format_value(bound, kind, like=like or high or low) for bound in (low, high)]
    return shown, " to ".join(bounds)


def format_metric(metric: Metric | Mapping[str, Any] | None, kind: str) -> str:
    """Value and interval in one string: ``"0.00011 (0.00009 to 0.00013)"``; ``"—"`` if missing, ``"undefined"`` if the file says why."""
    shown, interval = metric_parts(metric, kind)
    return f"{shown} ({interval})" if interval else shown


def metric_label(name: object) -> str:
    return METRICS[str(name)][0] if str(name) in METRICS else str(name)


def metric_kind(name: object) -> str:
    return METRICS[str(name)][1] if str(name) in METRICS else "kl"


def format_limit(name: object, limit: object) -> str:
    """``"≤ 0.05"`` or ``"≥ 90 %"``, from ``{"max": 0.05}``, ``{"min": 0.9}``, or a bare number whose side the metric's name tells, if known here."""
    more_is_better = METRICS[str(name)][2] if str(name) in METRICS else None
    if isinstance(limit, Mapping):
        side = next((side for side in ("max", "min") if side in limit), "")
        more_is_better, limit = (side == "min") if side else more_is_better, limit.get(side)
    found = number(limit)
    if found is None:
        return MISSING if limit is None else str(limit)
    sign = "" if more_is_better is None else "≥ " if more_is_better else "≤ "
    kind = metric_kind(name)
    shown = f"{100 * found:.4g} %" if kind == "percent" else f"{100 * found:.4g} points" if kind == "points" else f"{found:.6g}"
    return sign + shown.replace("-", "−")  # as it was set, not as it was measured: no zeros behind it
