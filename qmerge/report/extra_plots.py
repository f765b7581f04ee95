"""Do benchmarks move, and how fast is each arm? Plots of what is measured only on request; an empty string where there is nothing to draw."""

from __future__ import annotations

from qmerge.report import fields, svg
from qmerge.report.fields import Results
from qmerge.report.numbers import fraction, metric_parts
from qmerge.report.plots import LEFT, RIGHT, looks
from qmerge.report.sections import batches, by_batch, serving_rows
from qmerge.report.svg import Axis, Look

MAX_TASKS = 24
ROW = 22.0


def task_forest(results: Results, style: bool = True) -> str:
    """Accuracy difference to separate per task, a mark and a 95 % interval per candidate; an interval that covers 0 is no measured change."""
    drawn = {name: look for name, look in looks(results).items() if name != fields.BASE and _deltas(results, name)}
    tasks = list(dict.fromkeys(task for name in drawn for task in _deltas(results, name)))
    if not tasks:
        return ""
    total, tasks = "mean over tasks" in tasks, [task for task in tasks if task != "mean over tasks"][:MAX_TASKS]
    tasks += ["mean over tasks"] * total
    ends = [100 * end for name in drawn for task in tasks for end in _deltas(results, name).get(task, ())]
    key, top = svg.legend(list(drawn.values()), 8, 44, RIGHT, lines=False)
    step = max(9.0, ROW / len(drawn) if len(drawn) < 3 else 9.0)
    tall = step * len(drawn) + 24
    bottom = top + 12 + tall * len(tasks)
    x = svg.linear_axis([0.0, *ends], 20, RIGHT, margin=0.06)
    label = svg.axis_label(x)
    body = [key]
    for tick in x.ticks(5):
        body.append(svg.line([(x(tick), bottom), (x(tick), top + 8)], "grid") + svg.text(x(tick), bottom + 17, label(tick), "middle", "quiet"))
    body.append(svg.line([(x(0), bottom), (x(0), top + 8)], "mark", "1.5 3") + svg.line([(x.start, bottom), (x.end, bottom)], "axis"))
    for row, task in enumerate(tasks):
        at = top + 12 + tall * row
        body.append(svg.text(20, at + 11, svg.shorten(task, 48), cls="halo"))
        for index, (name, look) in enumerate(drawn.items()):
            if found := _deltas(results, name).get(task):
                body.append(_interval([100 * value for value in found], x, at + 20 + step * index, look))
    body.append(svg.text((x.start + x.end) / 2, bottom + 36, "accuracy difference to separate (points), worse to the left", "middle"))
    return svg.document("Benchmarks against the separate model", "Paired accuracy difference per task with 95 % intervals", bottom + 46, body, style)


def _interval(found: list[float], x: Axis, y: float, look: Look) -> str:
    low, middle, high = found
    return svg.line([(x(low), y), (x(high), y)], f"line l{look.tone}") + svg.marks([(x(middle), y)], look, 4.2, "solid")


def _deltas(results: Results, name: str) -> dict[str, tuple[float, float, float]]:
    """Task -> (low, difference, high) as shares; the mean over tasks last, under its words."""
    found = {}
    for task, row in fields.as_dict(fields.one_arm(results, name).get("tasks")).items():
        row = fields.as_dict(row)
        if task == "macro_bootstrap":
            continue
        metric = row if task == "macro_accuracy_delta" else fields.as_dict(row.get("delta"))
        value, low, high = (fraction(fields.number(metric.get(key)), metric.get("unit")) for key in ("value", "ci_low", "ci_high"))
        if value is None or name == fields.REFERENCE:
            continue
        ends = (value if low is None else low, value, value if high is None else high)
        found["mean over tasks" if task == "macro_accuracy_delta" else task] = ends
    return found


def decode_speed(results: Results, style: bool = True) -> str:
    """Decode tokens per second by batch size, one bar per arm, from the serving measurements; longer is better."""
    rows = serving_rows(results)
    known = looks(results) | {fields.REFERENCE: Look(fields.REFERENCE, "s", "", "square")}
    names = [name for name in rows if name in known]
    sizes = [batch for batch in batches(results) if any(by_batch(rows[name], "decode_tokens_per_s", batch) for name in names)]
    if not sizes:
        return ""
    top, tall = 50.0, 38.0
    height = top + sum(20 + tall * len(names) for _ in sizes)
    most = max(by_batch(rows[name], "decode_tokens_per_s", batch) or 0.0 for name in names for batch in sizes)
    x = Axis(0.0, min(most * 1.02, svg.LONGEST), LEFT - 36, RIGHT)
    label = svg.axis_label(x)
    body = [svg.line([(x(tick), height), (x(tick), top - 8)], "grid") + svg.text(x(tick), height + 17, label(tick), "middle", "quiet") for tick in x.ticks(5)]
    at = top
    for batch in sizes:
        body.append(svg.text(8, at + 8, f"batch {batch}", cls="quiet halo"))
        at += 20
        for name in names:
            metric = fields.as_dict(fields.as_dict(rows[name].get("decode_tokens_per_s")).get(batch))
            value = fields.number(metric.get("value"))
            shown, interval = metric_parts(metric, "rate")
            words = f"{svg.shorten(name, 26)}: {shown}" + (f" ({interval})" if interval else "")
            if value is not None and value > 0:
                body.append(svg.line([(x(0.0), at + 22), (x(value), at + 22)], f"bar l{known[name].tone}"))
            body.append(svg.text(x.start, at + 10, words, cls="halo"))
            at += tall
    body.append(svg.text((x.start + x.end) / 2, height + 36, "decode tokens per second", "middle"))
    device = fields.as_dict(results.get("serving")).get("device")
    return svg.document("Decode speed", f"Tokens per second by batch size on {device}", height + 46, body, style)
