"""Which four pictures show what merging cost? Results in, SVG text out; an empty string where the results hold nothing to draw."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from qmerge.report import fields, svg
from qmerge.report.fields import Results
from qmerge.report.numbers import metric_parts
from qmerge.report.svg import Axis, Look, SignedLog
from qmerge.units import format_bytes

MAX_CANDIDATES = 6  # colours and shapes that stay apart; tables show the rest
MAX_DOTS = 1500
LEFT, RIGHT = 56, svg.WIDTH - 14
FLOOR = Look("noise floor", "m", "1.5 3", "bar")


def looks(results: Results) -> dict[str, Look]:
    """One look per drawn arm, the same in every plot."""
    found = {fields.BASE: Look(fields.BASE, "b", "1.5 3.5", "cross"), fields.MERGED: Look(fields.MERGED, "m", "13 4", "bar")}
    names = [name for name in found if name in fields.arms(results)]
    for index, name in enumerate(fields.candidate_names(results)[:MAX_CANDIDATES]):
        found[name] = Look(name, str(index), svg.DASHES[index], svg.SHAPES[index % 4])
        names.append(name)
    return {name: found[name] for name in names}


def _first_text(results: Results, text: str | None) -> str:
    names = fields.text_names(results)
    return text if text is not None else (names[0] if names else "")


def kl_distribution(results: Results, text: str | None = None, style: bool = True) -> str:
    """(a) Share of tokens whose KL to the separate model is at most x, per arm, with each arm's mean and the noise floor."""
    text = _first_text(results, text)
    drawn = {name: look for name, look in looks(results).items() if len(fields.numbers(fields.cell(results, name, text).get("kl_quantiles"))) > 1}
    if not drawn:
        return ""
    curves = {name: fields.numbers(fields.cell(results, name, text)["kl_quantiles"]) for name in drawn}
    means = {name: mean for name in drawn if (mean := fields.value(results, name, text, "kl_mean")) is not None and mean > 0}
    floor = fields.number(fields.noise_floor(results, text).get("value"))
    # the lowest twentieth of tokens is rounding dust over many decades; it would squeeze what matters
    seen = [value for curve in curves.values() for value in curve[len(curve) // 20 :]] + [*means.values()] + ([floor] if floor else [])
    key, top = svg.legend([*drawn.values(), *([FLOOR] if floor and floor > 0 else [])], 8, 44, RIGHT, lines=True)
    x, y = svg.log_axis(seen, LEFT, RIGHT), Axis(0, 100, top + 236, top + 26)
    body = [key, svg.frame(x, y, "KL of one token (nats, log scale)", "share of tokens at or below, %")]
    if floor and floor > 0:
        body.append(svg.line([(x(floor), y.start), (x(floor), y.end)], "mark", FLOOR.dash))
    for name, curve in curves.items():
        points = [(x(max(value, x.low)), y(100 * index / (len(curve) - 1))) for index, value in enumerate(curve)]
        body.append(svg.line(points, f"line l{drawn[name].tone}", drawn[name].dash))
    for name, mean in means.items():
        share = 100 * sum(value <= mean for value in curves[name]) / len(curves[name])
        body.append(svg.marks([(x(mean), y(share))], drawn[name], 5, "solid"))
    return svg.document(f"KL to the separate model, {text}", "Cumulative distribution of per-token KL", top + 280, body, style)


def layer_of(module: str) -> int | None:
    """The first number in a module's path: ``layer_of("model.layers.3.mlp.up_proj") == 3``."""
    found = re.search(r"(?:^|\.)(\d{1,5})(?:\.|$)", module)
    return int(found[1]) if found else None


def _survivals(results: Results, name: str) -> dict[int, list[float]]:
    """Delta survival by layer; linears outside the layers count as one layer after the last."""
    known = {
        module: kept for module, row in fields.linears(results, name).items() if (kept := fields.number(row.get("delta_survival"))) is not None
    }
    last = max((layer for module in known if (layer := layer_of(module)) is not None), default=-1)
    by_layer: dict[int, list[float]] = {}
    for module, kept in known.items():
        layer = layer_of(module)
        by_layer.setdefault(last + 1 if layer is None else layer, []).append(kept)
    return by_layer


def _layer_marks(values: Sequence[float], at: float, step: float, y: Axis, look: Look, few: bool) -> str:
    """Every linear as a dot while they are few, else the middle 90 % as a bar; the layer's median as a tick."""
    if few:
        spread = [at + step * 0.5 * ((index + 0.5) / len(values) - 0.5) for index in range(len(values))]
        dots = svg.marks([(dx, y(value)) for dx, value in zip(spread, values, strict=True)], look, 3.1)
    else:
        ordered = sorted(values)
        low, high = ordered[len(ordered) // 20], ordered[-1 - len(ordered) // 20]
        dots = svg.line([(at, y(low)), (at, y(high))], f"wide l{look.tone}")
    middle = y(statistics.median(values))
    half = max(2.0, step * 0.36)
    return dots + svg.line([(at - half, middle), (at + half, middle)], f"line l{look.tone}")


def delta_survival(results: Results, style: bool = True) -> str:
    """(b) How much of the adapter's change each stored weight holds, by layer: 1 kept, 0 erased."""
    drawn = {name: found for name in looks(results) if (found := _survivals(results, name))}
    if not drawn:
        return ""
    values = [value for found in drawn.values() for layer in found.values() for value in layer]
    layers = sorted({layer for found in drawn.values() for layer in found})
    bounds = [max(min([0.0, *values]), -1.0), min(max([1.0, *values]), 2.0)]
    x = Axis(layers[0] - 0.5, layers[-1] + 0.5, LEFT, RIGHT)
    slot = 0.86 * (RIGHT - LEFT) / (layers[-1] - layers[0] + 1)
    together = slot / len(drawn) >= 9  # else the arms would cover each other: one panel each
    groups = [list(drawn)] if together else [[name] for name in drawn]
    key, top = svg.legend([looks(results)[name] for name in drawn], 8, 44, RIGHT, lines=False)
    body, tall = [key, svg.text(8, top + 16, "delta survival (1 = kept, 0 = erased)")], 210 if len(groups) == 1 else 110
    for row, group in enumerate(groups):
        y = svg.linear_axis(bounds, top + 26 + (tall + 12) * row + tall, top + 26 + (tall + 12) * row, margin=0.05)
        body.append(_kept_lines(x, y))
        for index, name in enumerate(group):
            step = slot / len(group)
            for layer, kept in sorted(drawn[name].items()):
                at = x(layer) + (index - (len(group) - 1) / 2) * step
                body.append(_layer_marks(kept, at, step, y, looks(results)[name], step >= 9 and len(values) <= MAX_DOTS))
    bottom = top + 26 + (tall + 12) * len(groups) - 12
    return svg.document("Delta survival per linear", "Share of the adapter's change kept, by layer", bottom + 44, [*body, _layer_ticks(x, bottom, layers)], style)


def _kept_lines(x: Axis, y: Axis) -> str:
    """One panel's grid, with the lines "kept" and "erased"."""
    label = svg.axis_label(y)
    grid = [svg.line([(x.start, y(tick)), (x.end, y(tick))], "grid") + svg.text(x.start - 7, y(tick) + 4, label(tick), "end", "quiet") for tick in y.ticks(4)]
    return "".join(grid) + "".join(svg.line([(x.start, y(kept)), (x.end, y(kept))], "mark", "" if kept else "1.5 3") for kept in (0.0, 1.0))


def _layer_ticks(x: Axis, bottom: float, layers: Sequence[int]) -> str:
    step = max(1, round(svg.nice_step(max(1.0, (layers[-1] - layers[0]) / 10))))
    ticks = [svg.text(x(layer), bottom + 17, layer, "middle", "quiet") for layer in range(layers[0], layers[-1] + 1, step)]
    return "".join(ticks) + svg.text((x.start + x.end) / 2, bottom + 36, "layer", "middle")


def window_nll(results: Results, text: str | None = None, style: bool = True) -> str:
    """(c) ΔNLL to the separate model per window or document, as dots, with the mean and its 95 % interval; one strip per arm."""
    text = _first_text(results, text)
    known = {name: fields.numbers(fields.cell(results, name, text).get("window_nll_delta")) for name in looks(results)}
    drawn = {name: found for name, found in known.items() if found and name != fields.BASE}  # base is off by so much that the rest would be a line
    if not drawn:
        return ""
    rows = 58
    height = 44 + rows * len(drawn)
    x = _loss_axis(list(drawn.values()))
    y = Axis(0, 1, height, 40)
    body = [_strip_frame(x, y)]
    for index, (name, found) in enumerate(drawn.items()):
        body.append(_strip(fields.metric(results, name, text, "nll_delta"), looks(results)[name], found, x, 58 + rows * index))
    return svg.document(f"ΔNLL per window, {text}", "Change of the loss per window against the separate model", height + 46, body, style)


def _loss_axis(groups: list[list[float]]) -> Axis | SignedLog:
    """Straight while all arms can be seen on one scale; where one is far worse than another, logarithmic on both sides of 0."""
    plain = svg.linear_axis([0.0, *_core([value for found in groups for value in found])], 20, RIGHT, margin=0.05)
    sizes = [size for found in groups if (size := statistics.median(abs(value) for value in found)) > 0]
    if not sizes or max(sizes) < 8 * min(sizes):
        return plain
    knee = min(max(min(sizes), max(sizes) / 1000), svg.LONGEST / 4)  # a median of two numbers may be beyond them
    return SignedLog(min(plain.low, -2 * knee), max(plain.high, 2 * knee), 20, RIGHT, knee)


def _core(values: list[float]) -> list[float]:
    """The values without the outermost hundredth on either side, which is drawn at the edge instead of setting the scale."""
    ordered = sorted(values)
    cut = len(ordered) // 100
    return ordered[cut : len(ordered) - cut]


def _strip_frame(x: Axis | SignedLog, y: Axis) -> str:
    label = svg.axis_label(x)
    parts = [svg.line([(x(tick), y.start), (x(tick), y.end)], "grid") + svg.text(x(tick), y.start + 17, label(tick), "middle", "quiet") for tick in x.ticks()]
    parts.append(svg.line([(x(0), y.start), (x(0), y.end)], "mark", "1.5 3") + svg.line([(x.start, y.start), (x.end, y.start)], "axis"))
    scale = ", log on both sides" if isinstance(x, SignedLog) else ""
    return "".join(parts) + svg.text((x.start + x.end) / 2, y.start + 36, f"ΔNLL to separate (nats/token{scale}), worse to the right", "middle")


def _strip(metric: dict[str, Any] | None, look: Look, found: list[float], x: Axis | SignedLog, top: float) -> str:
    stride = -(-len(found) // (MAX_DOTS // 4))
    # the golden ratio spreads neighbours in height without chance, so that the same results give the same bytes
    dots = [(x(value), top + 17 + 17 * (index * 0.618034 % 1)) for index, value in enumerate(found[::stride])]
    parts = [svg.marks(dots, look, 2.6)]
    shown, interval = metric_parts(metric, "signed")
    mean, low, high = (fields.number((metric or {}).get(key)) for key in ("value", "ci_low", "ci_high"))
    if low is not None and high is not None:
        parts.append(svg.line([(x(low), top + 25), (x(high), top + 25)], "line mark"))
    if mean is not None:
        parts.append(svg.line([(x(mean), top + 14), (x(mean), top + 37)], "line mark"))
    words = f"{svg.shorten(look.name, 26)}: " + (f"{shown} ({interval})" if interval else shown)
    return "".join(parts) + svg.text(20, top + 8, words, cls="halo")


def size_against_kl(results: Results, text: str | None = None, style: bool = True) -> str:
    """(d) Bytes on disk against mean KL, one mark per arm; low and left is better. The separate model, KL 0, stands on the lower edge."""
    text = _first_text(results, text)
    found = {name: (fields.number(arm.get("bytes")), fields.value(results, name, text, "kl_mean")) for name, arm in fields.arms(results).items()}
    points = {name: (size, kl) for name, (size, kl) in found.items() if name in looks(results) and size and kl and kl > 0 and size > 0}
    if not points:
        return ""
    floor = fields.number(fields.noise_floor(results, text).get("value"))
    reference = found.get(fields.REFERENCE, (None, None))[0]
    largest = max([size for size, _ in points.values()] + [reference or 0.0])
    unit, scale = _byte_unit(largest)
    x = Axis(0, largest / scale * 1.12, LEFT, RIGHT)
    y = svg.log_axis([kl for _, kl in points.values()] + ([floor] if floor else []), 302, 66)
    body = [svg.frame(x, y, f"size on disk ({unit})", "mean KL to separate (nats/token, log scale)")]
    if floor and floor > 0:
        body.append(svg.line([(x.start, y(floor)), (x.end, y(floor))], "mark", FLOOR.dash))
        body.append(svg.text(x.start + 5, y(floor) - 6, "noise floor", cls="quiet halo"))
    placed = [(x(size / scale), y(kl), looks(results)[name]) for name, (size, kl) in points.items()]
    body += [svg.marks([(px, py)], look, 6, "solid") for px, py, look in placed]
    body += _labels([(px, py, look.name) for px, py, look in placed], x)
    if reference:
        at = x(reference / scale)
        body.append(svg.line([(at, y.start), (at, y.start - 12)], "line mark"))
        body.append(svg.text(at - 5, y.start - 6, "separate, KL 0", "end", "halo"))
    return svg.document(f"Size against KL, {text}", f"Arms by size and mean KL, up to {format_bytes(int(largest))}", 344, body, style)


def _byte_unit(largest: float) -> tuple[str, float]:
    return next((unit, scale) for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3), ("B", 1.0)) if largest >= scale or scale == 1.0)


def _labels(points: list[tuple[float, float, str]], x: Axis) -> Iterator[str]:
    """Names beside their marks, on the roomier side, pushed down where two would overlap."""
    taken: list[tuple[float, float, float]] = []
    for px, py, name in sorted(points, key=lambda point: point[1]):
        left, words, at = px > (x.start + x.end) / 2, svg.shorten(name, 24), py + 4
        near = px + (-11 if left else 11)
        low, high = sorted((near, near + svg.text_width(words) * (-1 if left else 1)))
        while clash := [y for y, start, end in taken if abs(y - at) < 15 and start < high and low < end]:
            at = max(clash) + 15.1
        taken.append((at, low, high))
        yield svg.text(near, at, words, "end" if left else "start", "halo")


def per_text(results: Results, draw: Callable[[Results, str], str]) -> list[str]:
    """``draw`` for every text that has something to draw."""
    return [image for text in fields.text_names(results) if (image := draw(results, text))]


def captions() -> dict[str, str]:
    """One sentence per plot that tells how to read it."""
    return {
        "kl": "The farther left a curve, the closer the arm is to the separate model; marks show each arm's mean, and left of the noise floor, itself a mean, differences are rounding.",
        "windows": "Each dot is one window or document; an interval that crosses 0 means that the loss is not measurably different from the separate model's.",
        "survival": "Each mark is one linear: at 1 the stored weight holds the adapter's whole change, at 0 rounding has erased it; ticks are medians per layer.",
        "size": "Low and left is better: as small as the base, as close to the separate model as the noise floor allows.",
        "tasks": "Each mark is the paired difference on one benchmark; an interval that covers 0 is no measured change. Below the tasks, their mean.",
        "speed": "Longer bars are faster; brackets hold the spread over repeats.",
    }
