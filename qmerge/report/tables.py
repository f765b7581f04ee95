"""Which rows do the tables of a report hold? The same strings serve the terminal, Markdown and HTML, which escape them in their own way."""

from __future__ import annotations

import textwrap
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any

from qmerge.report import fields
from qmerge.report.clean import clean, show_path
from qmerge.report.fields import Results
from qmerge.report.numbers import (
    MISSING,
    format_limit,
    format_metric,
    format_value,
    fraction,
    metric_kind,
    metric_label,
    metric_parts,
)
from qmerge.report.sections import Section, generation, perplexity, tasks, text_of
from qmerge.units import format_bytes

__all__ = ["check_rows", "fingerprint_rows", "format_metric", "linear_rows", "metric_parts", "notes", "plain_table", "skipped", "summary_rows", "terminal_table"]

SUMMARY = (
    ("arm", "arm"),
    ("perplexity", "perplexity"),
    ("kl", "KL to separate (nats/token)"),
    ("top1", "top-1 agreement"),
    ("retention", "retention"),
    ("bytes", "size"),
)
METRIC_OF = {"perplexity": ("ppl", "ppl"), "kl": ("kl_mean", "kl"), "top1": ("top1_agreement", "percent"), "retention": ("retention", "percent")}
REFERENCE_KL = "0 (reference)"
LEAST_ABOVE = 1.0005
"""a retention that is shown as more than 100.0 %"""
TERMINAL_COLUMNS = 110
MAX_SKIPPED = 12


def _size(arm: dict[str, Any]) -> str:
    count = fields.number(arm.get("bytes"))
    return MISSING if count is None or count < 0 else format_bytes(int(count))


def summary_rows(results: Results, text: str, parts: bool = False) -> list[dict[str, Any]]:
    """One row per arm: arm, kind, perplexity, kl, top1, retention, bytes, as strings. With ``parts``, measured cells are ``(value, interval)``."""
    rows = []
    for name, arm in fields.arms(results).items():
        row: dict[str, Any] = {"arm": clean(name), "kind": clean(arm.get("kind") or "")}
        for column, (metric, kind) in METRIC_OF.items():
            found = metric_parts(fields.metric(results, name, text, metric), kind)
            if name == fields.REFERENCE and column == "kl":
                found = (REFERENCE_KL, "")
            row[column] = found if parts else (f"{found[0]} ({found[1]})" if found[1] else found[0])
        rows.append(row | {"bytes": _size(arm)})
    return rows


def notes(results: Results, text: str) -> list[str]:
    """Why a cell says "undefined", one sentence per reason, with the arms that share it."""
    because: dict[tuple[str, str], list[str]] = {}
    broken: list[str] = []
    for name in fields.arms(results):
        for metric, _ in METRIC_OF.values():
            row = fields.metric(results, name, text, metric) or {}
            if fields.number(row.get("value")) is None and row.get("note"):
                because.setdefault((metric_label(metric), clean(row["note"], 300)), []).append(clean(name))
        if js := fields.metric(results, name, text, "js_mean"):
            broken.append(f"{clean(name)}: {metric_label('js_mean')} {format_metric(js, 'kl')}, {clean(js.get('note') or 'the models exclude different tokens', 300)}.")
        if count := fields.value(results, name, text, "nonfinite"):
            broken.append(f"{clean(name)}: {count:,.0f} tokens with non-finite values.")
    return broken + [f"{what[:1].upper()}{what[1:]} is undefined for {', '.join(names)}: {why}." for (what, why), names in because.items()] + more_than_all(results, text, fields.arms(results))


def more_than_all(results: Results, text: str, names: Iterable[str]) -> list[str]:
    """One sentence where one of the arms ``names`` shows a retention above 100 %, else none."""
    found = [(name, fields.metric(results, name, text, "retention") or {}) for name in names]
    above = [clean(name) for name, row in found if (kept := fraction(fields.number(row.get("value")), row.get("unit"))) is not None and kept >= LEAST_ABOVE]
    return [f"Retention above 100 % ({', '.join(above)}): rounding happened to predict this text a little better than separate does. It is chance, not more of the adapter."] if above else []


def check_rows(results: Results, parts: bool = False) -> list[dict[str, Any]]:
    """The gate: arm, text, metric, measured, limit, state; the failures first, then what is open."""
    order = {"fail": 0, "inconclusive": 1, "pass": 2, "skipped": 3}
    rows = []
    for check in sorted(fields.checks(results), key=lambda row: order.get(str(row.get("state")), 1)):
        metric = check.get("metric")
        measured = metric_parts(check, metric_kind(metric))
        rows.append(
            {
                "arm": clean(check.get("arm") or MISSING),
                "text": clean(check.get("text") or MISSING),
                "metric": clean(metric_label(metric)) if metric else MISSING,
                "measured": measured if parts else (f"{measured[0]} ({measured[1]})" if measured[1] else measured[0]),
                "limit": clean(format_limit(metric, check.get("limit"))),
                "state": clean(check.get("state") or MISSING),
            }
        )
    return rows


def skipped(results: Results) -> list[str]:
    """Why checks were skipped, one sentence each."""
    said = [clean(row["reason"], 300) for row in fields.checks(results) if row.get("state") == "skipped" and isinstance(row.get("reason"), str)]
    return list(dict.fromkeys(said))[:MAX_SKIPPED]


def linear_rows(results: Results, arm: str, count: int = 10) -> list[dict[str, str]]:
    """The linears that kept the least of their delta: module, survival, delta_ratio, error_ratio."""
    return [
        {
            "module": clean(module),
            "survival": "—" if (survival := fields.number(row.get("delta_survival"))) is None else f"{survival:.3f}".replace("-", "−"),
            "delta_ratio": format_value(fields.number(row.get("delta_ratio")), "kl"),
            "error_ratio": format_value(fields.number(row.get("error_ratio")), "kl"),
        }
        for module, row in fields.worst_linears(results, arm, count)
    ]


def fingerprint_rows(results: Results, count: int = 200) -> list[tuple[str, str]]:
    """The protocol and the versions, flattened to ``("protocol.window", "2048")``; absolute paths are cut to their last name."""
    rows: list[tuple[str, str]] = []

    def walk(prefix: str, node: Any, depth: int) -> None:
        if len(rows) >= count:
            return
        if isinstance(node, dict) and node and depth < 8:
            for key, item in node.items():
                walk(f"{prefix}.{key}" if prefix else str(key), item, depth + 1)
        elif isinstance(node, (list, tuple)):
            rows.append((clean(prefix), clean(", ".join(show_path(item) for item in node[:50]))))
        else:
            rows.append((clean(prefix), show_path(node) if node is not None else MISSING))

    walk("", fields.as_dict(results.get("fingerprint")), 0)
    return rows


def _width(text: str) -> int:
    return sum(0 if unicodedata.combining(char) else 2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in text)


def _fit(text: str, width: int) -> str:
    """Pad to ``width`` columns, or cut and end in "…"."""
    while _width(text) > width:
        text = text.removesuffix("…")[:-1] + "…"
    return text + " " * (width - _width(text))


def _block(results: Results, text: str) -> list[str]:
    heads = ("arm", "perplexity", "KL to separate, nats/token", "top-1", "retention", "size")
    table = [heads]
    for row in summary_rows(results, text, parts=True):
        kl, retention = (f"{row[key][0]} ({row[key][1]})" if row[key][1] else row[key][0] for key in ("kl", "retention"))
        table.append((row["arm"], row["perplexity"][0], kl, row["top1"][0], retention, row["bytes"]))
    said = [line for sentence in more_than_all(results, text, fields.arms(results)) for line in textwrap.wrap(sentence, TERMINAL_COLUMNS)]
    return [f"on {clean(text, 90)}", *_aligned(table, (TERMINAL_COLUMNS, 10, 31, 8, 25, 8)), *said]


def _aligned(table: Sequence[Sequence[str]], caps: Sequence[int]) -> list[str]:
    """Columns of at most ``caps``; the first gives way to the others."""
    widths = [min(cap, max(_width(line[column]) for line in table)) for column, cap in enumerate(caps)]
    widths[0] = min(widths[0], TERMINAL_COLUMNS - sum(widths[1:]) - 2 * (len(widths) - 1))
    lines = ["  ".join(_fit(item, width) for item, width in zip(line, widths, strict=True)).rstrip() for line in table]
    return [lines[0], "-" * max(map(_width, lines))] + lines[1:]


def plain_table(section: Section, columns: int = 150) -> str:
    """A section's rows for a terminal: columns aligned, each at most 34 wide, together at most ``columns`` where 12 each are enough. Where they do not fit,
    intervals are left out before anything is cut: of the first value (what follows is its difference), then from the right."""
    with_interval = [column for column in range(len(section.heads)) if any(not isinstance(row[column], str) and row[column][1] for row in section.rows)]
    bare: set[int] = set()
    for drop in (None, *with_interval[:1], *reversed(with_interval[1:])):
        bare |= {drop} if drop is not None else set()
        table = [section.heads, *([cell[0] if index in bare and not isinstance(cell, str) else text_of(cell) for index, cell in enumerate(row)] for row in section.rows)]
        widths = [min(34, max(_width(line[column]) for line in table)) for column in range(len(section.heads))]
        if sum(widths) + 2 * (len(widths) - 1) <= columns:
            break
    while sum(widths) + 2 * (len(widths) - 1) > columns and max(widths) > 12:
        widths[widths.index(max(widths))] -= 1
    lines = ["  ".join(_fit(item, width) for item, width in zip(line, widths, strict=True)).rstrip() for line in table]
    return "\n".join([lines[0], "-" * max(map(_width, lines)), *lines[1:]])


def terminal_table(results: Results) -> str:
    """Plain aligned text, one block per evaluation text, protocol table and so on, at most 110 columns; intervals are 95 %."""
    texts = fields.text_names(results)
    if not texts:
        return "no evaluation text was measured"
    blocks = ["\n".join(_block(results, text)) for text in texts]
    blocks += [f"{found.title}\n{plain_table(found, TERMINAL_COLUMNS)}" for make in (perplexity, generation, tasks) if (found := make(results)) and found.rows]
    return "\n\n".join(blocks)
