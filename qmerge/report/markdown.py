"""How do results read as Markdown, small and inert enough for a CI job summary?"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence

from qmerge.report import fields, tables
from qmerge.report.advice import recommend
from qmerge.report.choice import choose, compared
from qmerge.report.clean import clean, show_path
from qmerge.report.clean import markdown_text as md
from qmerge.report.fields import Results
from qmerge.report.numbers import format_metric
from qmerge.report.sections import Section, sections, text_of
from qmerge.units import format_seconds

VERDICTS = {"pass": "✅ Pass", "fail": "❌ Fail", "inconclusive": "❔ Inconclusive", None: "No verdict"}
MAX_BYTES = 95_000  # a job summary is refused beyond 1 MiB, and unread long before
MAX_ARMS, MAX_TEXTS, MAX_CHECKS, MAX_SETTINGS = 40, 12, 80, 40
HOW_ARMS = (
    "An arm is one way to run the model; every arm reads the same tokens as separate, the reference: the 4-bit base with its adapter kept apart. KL is how far an arm's next-token probabilities are from the "
    "reference's (0: identical), top-1 agreement how often both would choose the same token, retention the share of the adapter's gain in loss that is left (base 0 %, separate 100 %). Brackets and small "
    "figures are 95 % intervals. merged is W + ΔW in fp32; rtn, where it is there, is that rounded to the nearest NF4 values."
)
HOW_LINEARS = (
    "Delta survival is the share of the adapter's change that is still in the stored weight, along its own direction: 1 is kept, 0 is erased. The error is what rounding left between the stored weight and "
    "W + ΔW; it may exceed ΔW and cost nothing, since rounding is aimed at what the linears put out, and that is what the KL of the arms measures."
)


def table(heads: Sequence[str], rows: Iterable[Sequence[str]], right: Sequence[int] = ()) -> str:
    """A pipe table; every cell is escaped here and nowhere else. ``right`` lists the columns to align right."""
    marks = ["---:" if column in right else "---" for column in range(len(heads))]
    lines = [list(map(md, heads)), marks] + [[md(cell) or " " for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def verdict_sentence(results: Results) -> str:
    """Why the verdict is what it is: the decisive check, or that all of them passed. Plain text."""
    stated, rows = fields.reasons(results), fields.checks(results)
    skipped = sum(row.get("state") == "skipped" for row in rows)
    if fields.verdict_state(results) == "pass" and len(rows) > skipped:
        name = fields.as_dict(results.get("verdict")).get("budget")
        budget = f"the budget {clean(name)}" if name else "the budget"
        return f"all {len(rows) - skipped} checks are inside {budget}" + (f"; {skipped} could not be made." if skipped else ".")
    if stated:
        return clean(stated[0], 400)
    return f"{len(rows)} checks against the budget." if rows else "Nothing was checked against a budget."


def fingerprint_digest(results: Results) -> str:
    """The first 12 hex digits of the fingerprint's SHA-256: equal digests mean comparable results."""
    text = json.dumps(fields.as_dict(results.get("fingerprint")), sort_keys=True, default=str)
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:12]


def floor_sentence(results: Results, text: str) -> str | None:
    """What the noise floor is and how large, as plain text."""
    floor = fields.noise_floor(results, text)
    if fields.number(floor.get("value")) is None:
        return None
    source = clean(floor.get("source") or "the reference run twice, in two arithmetics", 200)
    return (
        f"Noise floor on {clean(text)}: {format_metric(floor, 'kl')} nats/token. This is how far the reference is from itself "
        f"({source}); a KL at or below it is rounding, not a loss."
    )


def summary_markdown(results: Results) -> str:
    """Verdict, advice and one table per text: what a notebook shows first."""
    return "\n\n".join([*_head(results), *_arms(results)])


def _head(results: Results) -> list[str]:
    advice = recommend(results)
    more = [f"- also: {md(reason, 400)}" for reason in fields.other_reasons(results)[:8]]
    return [
        f"**{VERDICTS[fields.verdict_state(results)]}**: {md(verdict_sentence(results), 400)}",
        *(["\n".join(more)] if more else []),
        f"**Recommendation: {md(advice.sentence, 300)}** {md(advice.reason, 600)}",
    ]


def _gate(results: Results) -> list[str]:
    rows = tables.check_rows(results)
    if not rows:
        return []
    shown = [[row[key] for key in ("state", "arm", "text", "metric", "measured", "limit")] for row in rows[:MAX_CHECKS]]
    parts = ["## Gate", table(("state", "arm", "text", "metric", "measured (95 % interval)", "limit"), shown, right=(4, 5))]
    parts += [f"{len(rows) - MAX_CHECKS} more checks are in results.json."] if len(rows) > MAX_CHECKS else []
    return parts + (["\n".join(f"- skipped: {md(reason, 300)}" for reason in said)] if (said := tables.skipped(results)) else [])


def _arms(results: Results) -> list[str]:
    parts = []
    keys, heads = zip(*tables.SUMMARY, strict=True)
    for text in fields.text_names(results)[:MAX_TEXTS]:
        rows = [[row[key] for key in keys] for row in tables.summary_rows(results, text)[:MAX_ARMS]]
        parts += [f"## Arms on {md(text)}", table(heads, rows, right=(1, 2, 3, 4, 5))]
        if said := tables.notes(results, text):
            parts.append("\n".join(f"- note: {md(line, 400)}" for line in said[:20]))
        if sentence := floor_sentence(results, text):
            parts.append(md(sentence, 500))
    return parts


def _section(section: Section) -> list[str]:
    rows = [[text_of(cell) for cell in row] for row in section.rows]
    parts = [f"## {section.title}", md(section.how, 500), table(section.heads, rows, section.right)]
    return parts + (["\n".join(f"- note: {md(note, 400)}" for note in section.notes)] if section.notes else [])


def choice_markdown(results: Results) -> str:
    """What to ship, and the usual table with this model's values: what a notebook ends with."""
    return "\n\n".join(_choice(results))


def _choice(results: Results) -> list[str]:
    found = choose(results)
    comparison = compared(results)
    said = " ".join(filter(None, (f"**{md(found.sentence, 300)}**", md(found.reason, 900), md(found.alternative, 300))))
    return ["## Separate or merged?", said, *(_section(comparison)[2:] if comparison else [])]


def _linears(results: Results) -> list[str]:
    parts = []
    for name in fields.candidate_names(results)[:4]:
        rows = [list(row.values()) for row in tables.linear_rows(results, name)]
        if rows:
            heads = ("linear", "delta survival", "‖ΔW‖/‖W‖", "‖error‖/‖ΔW‖")
            parts += [f"### {md(name)}", table(heads, rows, right=(1, 2, 3))]
    if not parts:
        return []
    return ["## Linears that kept least of the adapter", HOW_LINEARS, *parts]


def _environment(results: Results) -> list[str]:
    rows = tables.fingerprint_rows(results)
    elapsed = fields.number(results.get("elapsed_s"))
    facts = [f"Fingerprint `{fingerprint_digest(results)}`" + (f", measured in {format_seconds(elapsed)}." if elapsed is not None else ".")]
    return ["## Environment", facts[0], *([table(("setting", "value"), rows[:MAX_SETTINGS])] if rows else []), *([f"{len(rows) - MAX_SETTINGS} more settings are in report.html."] if len(rows) > MAX_SETTINGS else [])]


def reproduction_steps(results: Results) -> list[str]:
    """Sentences, plain text. They name files relative to the run, since a report holds no absolute path."""
    paths = [show_path(arm["path"]) for name, arm in fields.arms(results).items() if name in fields.candidate_names(results) and arm.get("path")]
    files = ", ".join(paths[:6]) or "each candidate"
    return [
        "Install the versions listed in the fingerprint.",
        f"Check that the files are the ones measured: run qmerge verify on {files}; the manifest in each folder names inputs, recipe and seed.",
        f"Evaluate again with the protocol of the fingerprint. Results are comparable only where its digest is {fingerprint_digest(results)}.",
    ]


def _reproduce(results: Results) -> list[str]:
    return ["## How to reproduce", "\n".join(f"{index}. {md(step, 900)}" for index, step in enumerate(reproduction_steps(results), 1))]


def render_markdown(results: Results) -> str:
    """report.md: verdict, gate, arms, what else was measured, worst linears, environment, reproduction, advice; below 100 kB, later parts give way."""
    arms = _arms(results)
    parts = [_head(results), _gate(results), [md(HOW_ARMS, 900), *arms] if arms else [], *map(_section, sections(results)), _linears(results), _environment(results), _reproduce(results), _choice(results)]
    kept: list[str] = []
    size = 0
    for position, part in enumerate(parts):
        block = "\n\n".join(part)
        size += len(block.encode("utf-8", "replace")) + 2
        if position and size > MAX_BYTES:
            kept.append("Further sections are left out for size; report.html holds them.")
            break
        kept.append(block)
    return "\n\n".join(block for block in kept if block) + "\n"
