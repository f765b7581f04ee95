"""Which tables follow the arms where something more was measured: perplexity protocols, generation, benchmarks, serving, a baseline?

One description serves Markdown and HTML: a cell is a string, or a pair (value, interval). Strings are cleaned here and escaped by the page.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from qmerge.report import fields
from qmerge.report.clean import clean
from qmerge.report.fields import Results
from qmerge.report.numbers import MISSING, format_value, metric_kind, metric_label, metric_parts
from qmerge.units import format_bytes, format_seconds

Cell = str | tuple[str, str]
MAX_ROWS = 60
RATES = ("prefill_tokens_per_s", "decode_tokens_per_s")
MAX_BATCHES = 6
BASELINE = "_vs_baseline"
MACRO = {"macro_accuracy_delta": "mean over tasks", "macro_bootstrap": "mean over tasks, bootstrap"}
PERPLEXITIES = {"ppl": ("perplexity per token", "ppl"), "word_ppl": ("perplexity per word", "ppl"), "byte_ppl": ("perplexity per byte", "ppl"), "bits_per_byte": ("bits per byte", "nll")}


@dataclass(frozen=True)
class Section:
    """A titled table. ``right`` names the columns of numbers; ``notes`` are sentences below it."""

    title: str
    how: str
    heads: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    right: tuple[int, ...] = ()
    notes: tuple[str, ...] = field(default=())


def text_of(cell: Cell) -> str:
    """``("0.5", "0.4 to 0.6")`` as ``"0.5 (0.4 to 0.6)"``."""
    return cell if isinstance(cell, str) else f"{cell[0]} ({cell[1]})" if cell[1] else cell[0]


def sections(results: Results) -> list[Section]:
    """Those that have rows, in the order of a page."""
    makers: tuple[Callable[[Results], Section | None], ...] = (baseline, perplexity, generation, tasks, serving, speed)
    return [found for make in makers if (found := make(results)) is not None and found.rows]


def _capped(title: str, how: str, heads: tuple[str, ...], rows: list[tuple[Cell, ...]], right: tuple[int, ...], notes: tuple[str, ...] = ()) -> Section:
    more = (f"{len(rows) - MAX_ROWS} more rows are in results.json.",) if len(rows) > MAX_ROWS else ()
    return Section(title, how, heads, tuple(rows[:MAX_ROWS]), right, notes + more)


def baseline(results: Results) -> Section | None:
    """New against old, from the checks that a comparison with a baseline made; what got worse first."""
    order = {"fail": 0, "inconclusive": 1}
    rows: list[tuple[Cell, ...]] = []
    unpaired: list[str] = []
    for check in sorted(fields.checks(results), key=lambda row: order.get(str(row.get("state")), 2)):
        name = str(check.get("metric"))
        if not name.endswith(BASELINE):
            continue
        metric, kind = name.removesuffix(BASELINE), metric_kind(name.removesuffix(BASELINE))
        unpaired += [clean(check.get("unpaired") or "the per-token numbers of one of the runs are not there, or are of other tokens")] if check.get("paired") is False else []
        values = [format_value(fields.number(check.get(key)), kind) for key in ("new", "old")]
        difference = metric_parts(check, "points" if kind == "percent" else "signed")
        rows.append((clean(check.get("arm") or MISSING), clean(check.get("text") or MISSING), clean(metric_label(metric)), *values, difference, clean(check.get("state") or MISSING)))
    how = "The candidate of these results against the one of the baseline. A difference fails where its whole interval is worse by more than what other threads or another processor change."
    notes = (f"{len(unpaired)} of {len(rows)} differences come from the two intervals, not token by token: {'; '.join(dict.fromkeys(unpaired))}.",)
    return _capped("Against the baseline", how, ("arm", "text", "metric", "new", "baseline", "difference", "state"), rows, (3, 4, 5), notes if unpaired else ())


def perplexity(results: Results) -> Section | None:
    rows: list[tuple[Cell, ...]] = []
    labels = dict.fromkeys(label for arm in fields.arms(results).values() for label in fields.as_dict(arm.get("perplexity")))
    for label in labels:
        told: set[str] = set()  # one ratio serves all measures of a protocol
        for key, (words, kind) in PERPLEXITIES.items():
            for name, arm in fields.arms(results).items():
                metrics = fields.as_dict(fields.as_dict(fields.as_dict(arm.get("perplexity")).get(label)).get("metrics"))
                if key in metrics:
                    ratio = metric_parts(metrics.get("ratio"), "ratio") if name != fields.REFERENCE else ("1 (reference)", "")
                    rows.append((clean(name), clean(label), words, metric_parts(metrics[key], kind), ratio if name not in told else ""))
                    told.add(name)
    protocols = [f"{clean(label)}: {clean(protocol, 300)}." for label in labels if (protocol := _protocol(results, label))]
    how = "Each under its own named protocol, so that it can be set beside figures elsewhere that used the same. The ratio to separate is paired on the same tokens."
    return _capped("Perplexity by protocol", how, ("arm", "protocol", "measure", "value", "ratio to separate"), rows, (3, 4), tuple(protocols[:12]))


def _protocol(results: Results, label: str) -> str:
    stated = [fields.as_dict(fields.as_dict(arm.get("perplexity")).get(label)).get("protocol") for arm in fields.arms(results).values()]
    return next((words for words in stated if isinstance(words, str)), "")


def generation(results: Results) -> Section | None:
    rows: list[tuple[Cell, ...]] = []
    for name, arm in fields.arms(results).items():
        for text, found in fields.as_dict(arm.get("generation")).items() if name != fields.REFERENCE else ():
            row = fields.as_dict(found)
            counts = [format_value(fields.number(row.get(key)), "count") for key in ("prompts", "new_tokens")]
            first, interval = metric_parts(row.get("first_divergence"), "tokens")
            median = fields.number(fields.as_dict(row.get("first_divergence")).get("value"))
            bound = "≥ " if median is not None and median == fields.number(row.get("new_tokens")) else ""  # those continuations never left the reference's
            rows.append((clean(name), clean(text), metric_parts(row.get("exact_match"), "percent"), (bound + first, interval), *counts))
    how = "Greedy continuations of the same prompts: the share that is token for token the separate model's, and the token at which the median one first differs."
    return _capped("Greedy continuations against separate", how, ("arm", "text", "equal throughout", "first other token, median", "prompts", "new tokens"), rows, (2, 3, 4, 5))


def tasks(results: Results) -> Section | None:
    """Accuracy and its paired difference per arm and task, and what accuracy cannot see: the change of the gold answer's margin."""
    rows: list[tuple[Cell, ...]] = []
    for name, arm in fields.arms(results).items():
        for task, found in fields.as_dict(arm.get("tasks")).items():
            row, macro = fields.as_dict(found), MACRO.get(task)
            label = clean(task) + (f" ({clean(row['metric'], 40)})" if isinstance(row.get("metric"), str) else "")
            if name == fields.REFERENCE:
                rows += [] if macro else [(clean(name), label, metric_parts(row.get("accuracy"), "percent"), "0 (reference)", "", "", "")]
                continue
            p = fields.number(row.get("holm_p", row.get("mcnemar_p")))
            delta = row if "value" in row else row.get("delta")  # the mean over tasks is a difference only
            cells = (metric_parts(row.get("accuracy"), "percent"), metric_parts(delta, "points"), format_value(fields.number(row.get("flips")), "count"))
            rows.append((clean(name), macro or label, *cells, MISSING if p is None else f"{p:.2g}", metric_parts(row.get("margin_delta"), "signed")))
    heads: tuple[str, ...] = ("arm", "task", "accuracy", "difference", "flipped", "McNemar p", "gold margin, nats")
    how = "Paired item by item with the separate model. p is exact, and Holm's over the tasks where there are several."
    if any(row[-1] and row[-1] != (MISSING, "") for row in rows):
        how += " The margin is the gold answer's log-likelihood over the best wrong one's: it moves before answers flip."
    else:
        heads, rows = heads[:-1], [row[:-1] for row in rows]
    known = [(clean(task), fields.number(fields.as_dict(row).get("chance"))) for task, row in fields.as_dict(results.get("tasks")).items()]
    chances = [f"{task} {format_value(chance, 'percent')}" for task, chance in known if chance is not None]
    return _capped("Benchmarks", how, heads, rows, tuple(range(2, len(heads))), (f"By chance: {', '.join(chances[:20])}.",) if chances else ())


def serving_rows(results: Results) -> dict[str, dict[str, Any]]:
    """What serving cost, by arm: separate, merged, then the candidates."""
    rows = fields.as_dict(fields.as_dict(results.get("serving")).get("rows"))
    order = [name for name in fields.NOT_CANDIDATES if name in rows] + [name for name in rows if name not in fields.NOT_CANDIDATES]
    return {name: fields.as_dict(rows[name]) for name in order}


def batches(results: Results) -> list[str]:
    """The batch sizes that speeds were measured at, ascending."""
    keys = {str(key) for row in serving_rows(results).values() for kind in RATES for key in fields.as_dict(row.get(kind))}
    return sorted((key for key in keys if key.isascii() and key.isdigit() and len(key) < 8), key=int)[:MAX_BATCHES]


def serving(results: Results) -> Section | None:
    """One row per arm: size, load, memory, time to first token, kernel, packages."""
    found = serving_rows(results)
    rows: list[tuple[Cell, ...]] = []
    for name, row in found.items():
        peaks = (bytes_text(row.get(f"peak_{part}_bytes")) for part in ("load", "prefill", "decode"))
        packages = ", ".join(clean(item, 60) for item in fields.as_list(row.get("packages"))[:12]) or MISSING
        rows.append((clean(name), bytes_text(row.get("bytes")), seconds_parts(row.get("load_s")), *peaks, seconds_parts(row.get("time_to_first_token_s")), clean(row.get("kernel") or MISSING, 80), packages))
    about = fields.as_dict(results.get("serving"))
    device, threads = clean(about.get("device") or "an unnamed device", 80), fields.number(about.get("threads"))
    how = f"Measured on {device}" + (f" with {threads:.0f} threads" if threads else "") + ", after warm-up, with the spread over repeats."
    notes = tuple(f"{clean(name)}: {clean(row['note'], 300)}" for name, row in found.items() if isinstance(row.get("note"), str))
    heads = ("arm", "size", "load", "peak, load", "peak, prefill", "peak, decode", "first token", "kernel", "packages")
    return _capped("Serving", how, heads, rows, (1, 2, 3, 4, 5, 6), notes)


def speed(results: Results) -> Section | None:
    """Tokens per second by arm and batch size, prefill and decode."""
    found = serving_rows(results)
    columns = [(key, batch) for key in RATES for batch in batches(results) if any(by_batch(row, key, batch) is not None for row in found.values())]
    rows: list[tuple[Cell, ...]] = [(clean(name), *(metric_parts(fields.as_dict(row.get(key)).get(batch), "rate") for key, batch in columns)) for name, row in found.items()] if columns else []
    heads = ("arm", *(f"{key.partition('_')[0]}, batch {batch}" for key, batch in columns))
    return _capped("Serving speed", "Tokens per second over all sequences of a batch.", heads, rows, tuple(range(1, len(heads))))


def bytes_text(count: object) -> str:
    value = fields.number(count)
    return MISSING if value is None or value < 0 else format_bytes(int(value))


def seconds_parts(metric: object) -> tuple[str, str]:
    """A duration with its interval in one unit: milliseconds below one second."""
    row = fields.as_dict(metric)
    value, low, high = (fields.number(row.get(key)) for key in ("value", "ci_low", "ci_high"))
    if value is None:
        return MISSING, ""
    if value >= 120:
        return format_seconds(value), ""
    scale, unit = (1000.0, "ms") if value < 1 else (1.0, "s")
    shown, bounds = f"{value * scale:.3g} {unit}", (low, high)
    return shown, "" if low is None or high is None or low == high else " to ".join(f"{bound * scale:,.0f}" if bound * scale >= 1000 else f"{bound * scale:.3g}" for bound in bounds if bound is not None)


def by_batch(row: Mapping[str, Any], key: str, batch: str) -> float | None:
    return fields.number(fields.as_dict(fields.as_dict(row.get(key)).get(batch)).get("value"))
