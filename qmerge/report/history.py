"""How did a metric go from run to run? Reads the results.json files below a folder; runs that were not measured alike never share a line.

Left out: any judgement. `qmerge compare --baseline` holds two runs against each other.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from qmerge.errors import QmergeError, UsageProblem
from qmerge.report import fields, svg
from qmerge.report.clean import clean
from qmerge.report.load import load_results
from qmerge.report.markdown import table
from qmerge.report.numbers import METRICS, format_metric, metric_kind, metric_label
from qmerge.report.svg import Axis, Look

MAX_FILES, MAX_BYTES, MAX_DEPTH = 2000, 64 * 2**20, 12
MAX_SERIES, MAX_ROWS, MAX_PLOTS = 6, 400, 24
LEFT, RIGHT = 64, svg.WIDTH - 14
NOT_DRAWN = (fields.BASE, fields.REFERENCE)


@dataclass(frozen=True)
class Point:
    """One run. ``when`` is UTC; ``source`` the file below the folder; ``metric`` as in results.json."""

    when: datetime
    source: str
    metric: dict[str, Any]


@dataclass(frozen=True)
class History:
    """``series``: (text, arm, fingerprint digest) -> points by time. ``unread``: (file, why)."""

    metric: str
    series: dict[tuple[str, str, str], list[Point]]
    unread: list[tuple[str, str]]
    files: int


def collect(folder: str | Path, metric: str, ignore_versions: bool = False) -> History:
    """All points of ``metric`` below ``folder``. Links are not followed; files that are not results are named in ``unread``."""
    if metric not in METRICS:
        raise UsageProblem("there is no such metric", where="--metric", expected=", ".join(name for name in METRICS if not name.endswith("_vs_baseline")), found=metric)
    if not Path(folder).is_dir():
        raise UsageProblem("there is no such folder", where=str(folder), expected="a folder with results.json files below it", found="nothing")
    series: dict[tuple[str, str, str], list[Point]] = {}
    unread, count = [], 0
    for path in _files(Path(folder)):
        name = path.relative_to(folder).as_posix()
        count += 1
        if count > MAX_FILES:
            unread.append((name, f"only the first {MAX_FILES} files are read"))
            break
        try:
            if path.stat().st_size > MAX_BYTES:
                raise UsageProblem(f"larger than {MAX_BYTES} bytes")
            results = load_results(path.resolve())
        except (QmergeError, OSError) as error:
            unread.append((clean(name), clean(str(error).splitlines()[0])))
            continue
        when, digest = _when(results, path), comparable_digest(results, ignore_versions)
        for text, arm, found in _metrics(results, metric):
            series.setdefault((text, arm, digest), []).append(Point(when, name, found))
    return History(metric, {key: sorted(points, key=lambda point: (point.when, point.source)) for key, points in series.items()}, unread, count)


def comparable_digest(results: fields.Results, ignore_versions: bool = False) -> str:
    """12 hex digits; equal where two results were measured alike."""
    print_ = {key: item for key, item in fields.as_dict(results.get("fingerprint")).items() if not (ignore_versions and key == "versions")}
    return hashlib.sha256(json.dumps(print_, sort_keys=True, default=str).encode("utf-8", "replace")).hexdigest()[:12]


def _files(folder: Path) -> Iterator[Path]:
    for root, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and len(Path(root).relative_to(folder).parts) < MAX_DEPTH)
        yield from (Path(root) / name for name in sorted(names) if name.endswith("results.json") and not os.path.islink(os.path.join(root, name)))


def _when(results: fields.Results, path: Path) -> datetime:
    """When it was measured, as the file says, else when the file was written."""
    try:
        stated = datetime.fromisoformat(str(results.get("measured_at")))
        return stated.astimezone(timezone.utc) if stated.tzinfo else stated.replace(tzinfo=timezone.utc)
    except (ValueError, OverflowError):
        return datetime.fromtimestamp(path.stat().st_mtime, timezone.utc)


def _metrics(results: fields.Results, metric: str) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for arm, row in fields.arms(results).items():
        if arm in NOT_DRAWN:
            continue
        for text in fields.as_dict(row.get("texts")):
            found = fields.metric(results, arm, text, metric)
            if found and fields.number(found.get("value")) is not None:
                yield text, arm, found
        for task, found in fields.as_dict(row.get("tasks")).items():
            found = fields.as_dict(found)
            found = found if task == metric else fields.as_dict(found.get(metric))
            if fields.number(found.get("value")) is not None:
                yield ("tasks" if task == metric else task), arm, found


def _texts(history: History) -> list[str]:
    return list(dict.fromkeys(text for text, _, _ in history.series))


def _lines(history: History, text: str) -> dict[tuple[str, str], list[Point]]:
    """The series of one text, the longest first, so that what is drawn is what has a history."""
    found = {(arm, digest): points for (where, arm, digest), points in history.series.items() if where == text}
    return dict(sorted(found.items(), key=lambda item: (item[0][0] == fields.MERGED, -len(item[1]), item[0])))


def plot(history: History, text: str, style: bool = True) -> str:
    """One text's runs from left to right in the order of time, a line per arm and fingerprint, with 95 % intervals."""
    lines = dict(list(_lines(history, text).items())[:MAX_SERIES])
    runs = sorted({(point.when, point.source) for points in lines.values() for point in points})
    if not runs:
        return ""
    place = {run: index for index, run in enumerate(runs)}
    ends = [end for points in lines.values() for point in points for key in ("value", "ci_low", "ci_high") if (end := fields.number(point.metric.get(key))) is not None]
    looks = {key: Look(f"{clean(key[0], 18)} · {key[1][:6]}", str(index), svg.DASHES[index], svg.SHAPES[index % 4]) for index, key in enumerate(lines)}
    key, top = svg.legend(list(looks.values()), 8, 44, RIGHT, lines=True)
    log = min(ends) > 0 and max(ends) > 20 * min(ends)
    x = Axis(-0.5, len(runs) - 0.5, LEFT, RIGHT)
    y = svg.log_axis(ends, top + 226, top + 26) if log else svg.linear_axis(ends, top + 226, top + 26)
    body = [key, *_grid(x, y, runs, metric_label(history.metric) + (", log scale" if log else ""))]
    for name, points in lines.items():
        placed = [(x(place[point.when, point.source]), point) for point in points]
        for at, point in placed:
            low, high = (fields.number(point.metric.get(key)) for key in ("ci_low", "ci_high"))
            if low is not None and high is not None:
                body.append(svg.line([(at, y(low)), (at, y(high))], f"thin l{looks[name].tone}"))
        values = [(at, y(float(point.metric["value"]))) for at, point in placed]
        body.append(svg.line(values, f"line l{looks[name].tone}", looks[name].dash) if len(values) > 1 else "")
        body.append(svg.marks(values, looks[name], 4, "solid"))
    return svg.document(f"{metric_label(history.metric)}, {text}", "One mark per run, in the order of time", top + 280, body, style)


def _grid(x: Axis, y: Axis, runs: list[tuple[datetime, str]], title: str) -> Iterator[str]:
    label = svg.axis_label(y)
    for tick in y.ticks():
        yield svg.line([(x.start, y(tick)), (x.end, y(tick))], "grid") + svg.text(x.start - 7, y(tick) + 4, label(tick), "end", "quiet")
    yield svg.line([(x.start, y.start), (x.end, y.start)], "axis")
    shown = dict.fromkeys([0, len(runs) // 2, len(runs) - 1] if len(runs) > 2 else range(len(runs)))
    for index in shown:
        anchor = "middle" if len(runs) == 1 or 0 < index < len(runs) - 1 else "start" if index == 0 else "end"
        at = x(index) if anchor == "middle" else x.start if anchor == "start" else x.end
        yield svg.text(at, y.start + 17, f"{runs[index][0]:%Y-%m-%d}", anchor, "quiet")
    yield svg.text((x.start + x.end) / 2, y.start + 36, "runs, by time", "middle") + svg.text(8, y.end - 10, title)


def rows(history: History, text: str) -> list[tuple[str, ...]]:
    """Time, arm, fingerprint, value, file: the newest first, at most ``MAX_ROWS``."""
    found = [(point, arm, digest) for (arm, digest), points in _lines(history, text).items() for point in points]
    found.sort(key=lambda row: (row[0].when, row[0].source), reverse=True)
    kind = metric_kind(history.metric)
    return [(f"{point.when:%Y-%m-%d %H:%M}", clean(arm), digest, format_metric(point.metric, kind), clean(point.source)) for point, arm, digest in found[:MAX_ROWS]]


HEADS = ("measured (UTC)", "arm", "fingerprint", "value (95 % interval)", "file")
HOW = "Runs that were not measured alike (text, protocol, versions) have another fingerprint and another line; their values do not compare."


def render_history_markdown(history: History) -> str:
    from qmerge.report.clean import markdown_text as md

    parts = [f"# {md(metric_label(history.metric))} over {history.files} results files", HOW]
    for text in _texts(history)[:MAX_PLOTS]:
        parts += [f"## {md(text)}", table(HEADS, rows(history, text)[:60], right=(3,))]
    return "\n\n".join(parts) + "\n"


def render_history_html(history: History) -> str:
    """history.html: one file, no script, no network, as report.html."""
    asset = {name: files("qmerge.report").joinpath(name).read_text("utf-8") for name in ("history.html", "report.css")}
    texts = [{"name": clean(text), "svg": Markup(plot(history, text, style=False)), "rows": rows(history, text), "more": max(0, len(_lines(history, text)) - MAX_SERIES)} for text in _texts(history)[:MAX_PLOTS]]
    template = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True).from_string(asset["history.html"])
    return template.render(css=Markup(asset["report.css"] + svg.style_sheet()), metric=clean(metric_label(history.metric)), how=HOW, heads=HEADS, texts=texts, count=history.files,
                           unread=[(clean(name), clean(why)) for name, why in history.unread[:50]])
