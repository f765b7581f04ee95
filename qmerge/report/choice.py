"""Keep the adapter separate, or ship a merged file: bf16, nf4, gptq, …? One line why, and the table that the question is usually answered with.

Every figure is one of this model's measured values; what was not measured is called that. ``advice`` says which candidate the gate lets
through; this adds how many adapters are to be served, by which engine, at which measured speed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from qmerge.report import fields
from qmerge.report.advice import by_kl, recommend, worst_kl
from qmerge.report.alternative import nf4_instead
from qmerge.report.clean import clean
from qmerge.report.engines import ENGINES, FLOAT, format_name, loads
from qmerge.report.fields import Results
from qmerge.report.numbers import MISSING, format_metric, format_value, metric_parts
from qmerge.report.sections import Cell, Section, batches, bytes_text, seconds_parts, serving_rows

NOT_MEASURED = "not measured"
SEVERAL = 5
"""adapters that the table counts where nobody said how many are served"""
HOW_TO_TIME = "Speed, memory, kernels and packages: qmerge bench --base BASE --adapter ADAPTER --candidate OUT --into results.json measures them."
MAX_COLUMNS = 4
FASTER = 1.2
"""a measured speed counts as another one from this ratio on, where the intervals do not overlap"""


@dataclass(frozen=True)
class Choice:
    """``action``: ``keep separate``, ``ship merged bf16``, ``ship <format>``, ``keep what was accepted``, ``collect more text`` or ``none``; ``arm``: whose file. Plain text, names cleaned, not escaped."""

    action: str
    arm: str | None
    sentence: str
    reason: str
    alternative: str = ""
    """another product worth a look, in one sentence, or nothing"""


def choose(results: Results, adapters: int = 1, engine: str | None = None) -> Choice:
    """The advice for serving ``adapters`` fine-tunes of one base with ``engine`` (a key of ``ENGINES``, or None: any)."""
    known = ENGINES.get(engine or "")
    usable = [name for name in by_kl(results, _passing(results)) if not engine or loads(engine, fields.one_arm(results, name).get("kind"))]
    if adapters > 1 and (several := _several(results, adapters, usable, engine)):
        return several
    advice = recommend(results)
    if usable:
        found = _ship(results, usable, advice.reason if usable[0] == advice.candidate else "", adapters)
        return replace(found, alternative=nf4_instead(results, found.arm, engine))
    if advice.action == "ship":
        name = clean(str(advice.candidate))
        other = format_name(fields.one_arm(results, str(advice.candidate)).get("kind"))
        return Choice("keep separate", None, f"Keep the adapter separate: {known.name if known else engine} does not load {clean(other)}.", f"{name} holds the budget, but is in a format that this engine does not load; write another with --format.")
    if advice.action == "collect_more":
        return Choice("collect more text", advice.candidate, advice.sentence, advice.reason)
    if advice.action == "keep_accepted":
        return Choice("keep what was accepted", None, advice.sentence, advice.reason)
    if advice.action == "keep_separate":
        return replace(_merged_instead(results) or Choice("keep separate", None, advice.sentence, advice.reason), alternative=nf4_instead(results, None, engine))
    return Choice("none", None, advice.sentence, advice.reason)


def _passing(results: Results) -> list[str]:
    return [name for name in fields.candidate_names(results) if name not in fields.FOR_COMPARISON and fields.candidate_state(results, name) == "pass"]


def _ship(results: Results, usable: list[str], reason: str, adapters: int) -> Choice:
    """The passing candidate that decodes fastest where speeds were measured and differ, else the one nearest to the separate model."""
    best = usable[0]
    faster = [name for name in usable if _faster(_speed(results, name), _speed(results, best))]
    if faster:
        fastest = max(faster, key=lambda name: _speed(results, name)["value"])
        worst = worst_kl(results, fastest)
        reason = f"It decodes {_rate(results, fastest, ' tokens/s')}, {clean(best)} {_rate(results, best)}, and both hold the budget" + (f" (mean KL {format_value(worst[0], 'kl')} nats/token)." if worst else ".")
        best = fastest
    kind = fields.one_arm(results, best).get("kind")
    name = "merged bf16" if str(kind) in FLOAT else format_name(kind)
    more = _against_separate(results, best)
    several = f" One file per adapter: {adapters} of them." if adapters > 1 else ""
    return Choice(f"ship {name}", best, f"Ship {clean(name)}: {clean(best)}.", f"{reason or _measured(results, best)}{f' {more}' if more else ''}{several}")


def _measured(results: Results, name: str) -> str:
    worst, size = worst_kl(results, name), fields.one_arm(results, name).get("bytes")
    said = [f"its mean KL is {format_value(worst[0], 'kl')} nats/token on {clean(worst[1])}"] if worst else []
    said += [f"it takes {bytes_text(size)}"] if fields.number(size) else []
    text = "; ".join(said) or "it holds the budget"
    return text[:1].upper() + text[1:] + "."


def _against_separate(results: Results, name: str) -> str:
    ours, theirs = _speed(results, name), _speed(results, fields.REFERENCE)
    if not ours or not theirs:
        return ""
    told = _faster(ours, theirs) or _faster(theirs, ours, 1.0)
    return f"It decodes {_rate(results, name, ' tokens/s')}, separate {_rate(results, fields.REFERENCE)}" + ("." if told else ": too near to each other, or too unsteady, to tell apart.")


def _speed(results: Results, name: str) -> dict[str, Any]:
    """Measured decode tokens/s at the smallest batch, with its interval; empty where there is none."""
    sizes = batches(results)
    row = fields.as_dict(fields.as_dict(serving_rows(results).get(name, {}).get("decode_tokens_per_s")).get(sizes[0])) if sizes else {}
    return row if fields.number(row.get("value")) else {}


def _faster(one: dict[str, Any], other: dict[str, Any], ratio: float = FASTER) -> bool:
    """Is ``one`` above ``other`` by more than ``ratio`` and by more than their spread?"""
    low, high = fields.number(one.get("ci_low")), fields.number(other.get("ci_high"))
    return bool(one and other) and low is not None and high is not None and low > high and one["value"] > ratio * other["value"]


def _rate(results: Results, name: str, unit: str = "") -> str:
    row = _speed(results, name)
    low, high = fields.number(row.get("ci_low")), fields.number(row.get("ci_high"))
    return f"{row['value']:,.3g}{unit}" + ("" if low is None or high is None or low == high else f" ({low:.3g} to {high:.3g})")


def adapter_bytes(results: Results) -> tuple[float, float] | None:
    """(base, one adapter) in bytes, from the arms' sizes."""
    base, both = (fields.number(fields.one_arm(results, name).get("bytes")) for name in (fields.BASE, fields.REFERENCE))
    return (base, both - base) if base and both and both > base else None


def _several(results: Results, adapters: int, usable: list[str], engine: str | None) -> Choice | None:
    """Several adapters share one base where they stay separate: that is less to store and hold as soon as a second merged file is larger than an adapter."""
    sizes = adapter_bytes(results)
    name = usable[0] if usable else fields.MERGED
    merged = fields.number(fields.one_arm(results, name).get("bytes"))
    if sizes is None or not merged:
        return None
    apart, together = sizes[0] + adapters * sizes[1], adapters * merged
    if apart >= together:
        return None
    how = f"; {ENGINES[engine].name} picks one per request ({ENGINES[engine].several})" if engine in ENGINES else ""
    cost = _against_separate(results, name)
    reason = f"{adapters} adapters on one base take {bytes_text(apart)}, {adapters} merged files like {clean(name)} {bytes_text(together)}; nothing is lost in quality, and adapters can be swapped while it serves{how}."
    return Choice("keep separate", None, f"Keep the {adapters} adapters separate.", f"{reason}{f' The price is speed: {cost[:1].lower()}{cost[1:]}'.replace('it decodes', f'{clean(name)} decodes') if cost else ''}")


def _merged_instead(results: Results) -> Choice | None:
    """No candidate holds the budget. Float weights do where the merge itself passed; they pay where they were measured to be faster."""
    shared = [check.get("state") for check in fields.checks(results, fields.MERGED)]
    ours, theirs = _speed(results, fields.MERGED), _speed(results, fields.REFERENCE)
    if not shared or set(shared) != {"pass"} or not _faster(ours, theirs):
        return None
    size = bytes_text(fields.one_arm(results, fields.MERGED).get("bytes"))
    return Choice("ship merged bf16", fields.MERGED, "Ship merged bf16: no 4-bit candidate holds the budget.", f"Float weights lose nothing that can be measured, take {size} and decode {_rate(results, fields.MERGED, ' tokens/s')}, separate {_rate(results, fields.REFERENCE)}.")


def compared(results: Results, adapters: int = 1) -> Section | None:
    """The usual table, merged against separate, with this model's values. None where no arm is known."""
    arms = fields.arms(results)
    names = [name for name in (fields.REFERENCE, fields.MERGED) if name in arms]
    names += by_kl(results, fields.candidate_names(results))[:MAX_COLUMNS]
    if not names:
        return None
    served = serving_rows(results)
    count = adapters if adapters > 1 else SEVERAL
    rows: list[tuple[Cell, ...]] = [("time to first token", *(_or_not(seconds_parts(served.get(name, {}).get("time_to_first_token_s"))) for name in names))]
    sizes = batches(results) or ["1", "32"]
    for batch in dict.fromkeys((sizes[0], sizes[-1])):
        rows.append((f"decode tokens/s, batch {batch}", *(_or_not(metric_parts(fields.as_dict(served.get(name, {}).get("decode_tokens_per_s")).get(batch), "rate")) for name in names)))
    rows.append(("peak memory while decoding", *(_or_not(bytes_text(served.get(name, {}).get("peak_decode_bytes"))) for name in names)))
    rows.append(("swap adapters while serving", *("yes" if name == fields.REFERENCE else "no, another checkpoint" for name in names)))
    rows.append((f"{count} adapters of one base", *(_or_not(_size_of_many(results, name, count)) for name in names)))
    rows.append(("loss: mean KL where it is worst", *(_loss(results, name) for name in names)))
    rows.append(("share of the adapter's gain kept", *(_kept(results, name) for name in names)))
    rows.append(("size on disk", *(_or_not(bytes_text(arms[name].get("bytes"))) for name in names)))
    rows.append(("kernel", *(clean(served.get(name, {}).get("kernel") or NOT_MEASURED, 60) for name in names)))
    rows.append(("packages to serve it", *(_packages(served.get(name, {})) for name in names)))
    how = "Measured values of this model. Swapping and the number of files follow from the form itself; the size of several adapters is computed from the sizes here."
    return Section("Separate or merged?", how, ("", *(clean(name, 60) for name in names)), tuple(rows), notes=() if served else (HOW_TO_TIME,))


def _or_not(cell: Any) -> Cell:
    return NOT_MEASURED if (cell if isinstance(cell, str) else cell[0]) == MISSING else cell


def _size_of_many(results: Results, name: str, count: int) -> str:
    sizes = adapter_bytes(results)
    if name == fields.REFERENCE:
        return bytes_text(sizes[0] + count * sizes[1] if sizes else None)
    size = fields.number(fields.one_arm(results, name).get("bytes"))
    return bytes_text(count * size if size else None)


def _loss(results: Results, name: str) -> str:
    worst = worst_kl(results, name)
    if name == fields.REFERENCE:
        return "0 (reference)"
    return NOT_MEASURED if worst is None else f"{format_value(worst[0], 'kl')} nats/token"


def _kept(results: Results, name: str) -> str:
    if name == fields.REFERENCE:
        return "100 % (reference)"
    rows = [row for text in fields.text_names(results) if fields.number((row := fields.metric(results, name, text, "retention") or {}).get("value")) is not None]
    return format_metric(min(rows, key=lambda row: float(row["value"])), "percent") if rows else NOT_MEASURED


def _packages(row: dict[str, Any]) -> str:
    if not isinstance(row.get("packages"), list):
        return NOT_MEASURED
    return ", ".join(clean(item, 40) for item in row["packages"][:12]) or "torch and transformers alone"
