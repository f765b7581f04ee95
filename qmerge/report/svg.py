"""How is a small chart drawn as SVG text: scales, ticks, axes, legend, marks? No data, no files but the style sheet.

Made by hand instead of by matplotlib because the charts then follow light and dark mode through classes, take a tenth of the bytes,
and are the same bytes on every machine.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files

from qmerge.report.clean import clean

WIDTH = 480  # close to a phone's width and to half a desktop's, so that text stays near its nominal size on both
DASHES = ("", "6 2.5", "3 2", "9 3 2 3", "5 4", "9 3 2 3 2 3")  # none of them the dash of base, merged or the floor
SHAPES = ("circle", "square", "triangle", "diamond", "cross", "bar")


@dataclass(frozen=True)
class Look:
    """How one arm is drawn everywhere: colour class, dash and shape, so that grey print tells arms apart too."""

    name: str
    tone: str
    dash: str
    shape: str


@dataclass(frozen=True)
class Axis:
    """Maps values to pixels. ``low`` and ``high`` are shown at ``start`` and ``end``; values outside are drawn at the edge."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high = (math.log10(self.low), math.log10(self.high)) if self.log else (self.low, self.high)
        value = min(max(value, self.low), self.high)
        at = math.log10(value) if self.log else value
        return self.start + (at - low) / (high - low) * (self.end - self.start)

    def ticks(self, count: int = 5) -> list[float]:
        if self.log:
            first, last = math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9)
            return [10.0**power for power in range(first, last + 1, max(1, math.ceil((last - first) / count)))]
        span = self.high - self.low
        if not (math.isfinite(span) and span > 1e-12 * max(abs(self.low), abs(self.high)) and span > 1e-300):  # numbers that nothing measures
            return [self.low]
        step = nice_step(span / count)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [index * step for index in range(first, last + 1)]


@dataclass(frozen=True)
class SignedLog:
    """A symmetric axis, straight within ``±knee`` and logarithmic beyond, for values of both signs over several decades."""

    low: float
    high: float
    start: float
    end: float
    knee: float

    def __call__(self, value: float) -> float:
        low, high, at = (math.asinh(v / self.knee) for v in (self.low, self.high, min(max(value, self.low), self.high)))
        return self.start + (at - low) / (high - low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        first, last = math.ceil(math.log10(self.knee)), math.floor(math.log10(max(-self.low, self.high)))
        powers = [tick for power in range(first, last + 1) if self(tick := 10.0**power) - self(0.0) > 26]  # clear of the 0
        return [tick for tick in [-power for power in reversed(powers)] + [0.0, *powers] if self.low <= tick <= self.high]


def nice_step(rough: float) -> float:
    """The next 1, 2 or 5 times a power of ten that is at least ``rough``."""
    power = 10.0 ** math.floor(math.log10(rough))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))


def log_axis(values: Iterable[float], start: float, end: float, decades: int = 8) -> Axis:
    """A logarithmic axis over whole decades around the positive ``values``, at most ``decades`` below the largest."""
    positive = [value for value in values if value > 0]
    high = min(math.ceil(math.log10(max(positive)) + 1e-9), 308) if positive else 0  # 1e309 is no number
    low = math.floor(math.log10(min(positive)) - 1e-9) if positive else -3
    low = min(max(low, high - decades), high - 1)
    return Axis(10.0**low, 10.0**high, start, end, log=True)


LONGEST = 8e307
"""what an axis goes up to: twice it is a number still"""


def linear_axis(values: Iterable[float], start: float, end: float, margin: float = 0.06) -> Axis:
    found = list(values) or [0.0, 1.0]
    low, high = min(found), max(found)
    pad = (high - low) * margin or max(abs(high) * 0.1, 1e-9)
    return Axis(max(low - pad, -LONGEST), min(high + pad, LONGEST), start, end)


def power_label(value: float, plain: bool = True) -> str:
    """``"0.01"`` or ``"10⁻²"``; an axis uses one of the two throughout."""
    power = round(math.log10(value))
    if plain or power == 0:
        return f"{value:.{max(0, -power)}f}"
    return "10" + str(power).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def plain_label(value: float, step: float) -> str:
    if not step < 1e15:  # also where a step is infinite
        return f"{value:.1e}".replace("-", "−")
    decimals = max(0, -math.floor(math.log10(step) + 1e-9)) if step > 0 else 0
    if decimals > 5:
        return f"{value:.1e}".replace("-", "−") if value else "0"
    return f"{value:.{decimals}f}".replace("-", "−") if abs(value) > step * 1e-6 else "0"


def axis_label(axis: Axis | SignedLog) -> Callable[[float], str]:
    plain = all(1e-3 <= abs(tick) <= 1e3 for tick in axis.ticks() if tick)
    if isinstance(axis, SignedLog):
        return lambda value: ("−" if value < 0 else "") + (power_label(abs(value), plain) if value else "0")
    if axis.log:
        return lambda value: power_label(value, plain)
    ticks = axis.ticks()
    step = ticks[1] - ticks[0] if len(ticks) > 1 else (axis.high - axis.low)
    return lambda value: plain_label(value, step)


def num(value: float) -> str:
    """A coordinate with one decimal: finer is invisible and only adds bytes."""
    return f"{value:.1f}".removesuffix(".0")


def text(x: float, y: float, words: object, anchor: str = "start", cls: str = "", limit: int = 90) -> str:
    attributes = (f' class="{cls}"' if cls else "") + (f' text-anchor="{anchor}"' if anchor != "start" else "")
    return f'<text x="{num(x)}" y="{num(y)}"{attributes}>{escape(clean(words, limit))}</text>'


def text_width(words: str, size: float = 13) -> float:
    """A cautious estimate, without fonts."""
    return sum(1.0 if ord(char) > 0x2E80 else 0.62 for char in words) * size


def shorten(name: str, limit: int) -> str:
    return clean(name, limit)


def line(points: Sequence[tuple[float, float]], cls: str, dash: str = "") -> str:
    path = "M" + "L".join(f"{num(x)} {num(y)}" for x, y in points)
    return f'<path class="{cls}" d="{path}"{_dash(dash)}/>' if points else ""


def _dash(dash: str) -> str:
    return f' stroke-dasharray="{dash}"' if dash else ""


def shape_path(shape: str, x: float, y: float, r: float) -> str:
    """A closed path around (x, y), about ``r`` in radius."""
    at, d = f"M{num(x)} {num(y)}", num(2 * r)
    if shape == "circle":
        return f"M{num(x - r)} {num(y)}a{num(r)} {num(r)} 0 1 0 {d} 0a{num(r)} {num(r)} 0 1 0-{d} 0z"
    if shape == "square":
        return f"M{num(x - r * 0.9)} {num(y - r * 0.9)}h{num(1.8 * r)}v{num(1.8 * r)}h{num(-1.8 * r)}z"
    if shape == "triangle":
        return f"M{num(x)} {num(y - 1.15 * r)}l{num(1.1 * r)} {num(1.95 * r)}h{num(-2.2 * r)}z"
    if shape == "diamond":
        return f"M{num(x)} {num(y - 1.25 * r)}l{num(1.1 * r)} {num(1.25 * r)}l{num(-1.1 * r)} {num(1.25 * r)}l{num(-1.1 * r)} {num(-1.25 * r)}z"
    if shape == "cross":
        a, b = num(0.4 * r), num(0.8 * r)
        return f"{at}m-{a}-{num(1.2 * r)}h{b}v{b}h{b}v{b}h-{b}v{b}h-{b}v-{b}h-{b}v-{b}h{b}z"
    return f"M{num(x - 0.5 * r)} {num(y - 1.2 * r)}h{num(r)}v{num(2.4 * r)}h{num(-r)}z"


def marks(points: Iterable[tuple[float, float]], look: Look, r: float, cls: str = "dots") -> str:
    path = "".join(shape_path(look.shape, x, y, r) for x, y in points)
    return f'<path class="{cls} f{look.tone}" d="{path}"/>' if path else ""


def legend(looks: Sequence[Look], left: float, y: float, right: float, lines: bool) -> tuple[str, float]:
    """Entries in rows from ``y`` down; returns the drawing and the y below it."""
    parts, x = [], left
    for look in looks:
        name = shorten(look.name, 30)
        width = 28 + text_width(name) + 14
        if x > left and x + width > right:
            x, y = left, y + 19
        if lines:
            parts.append(line([(x, y - 4), (x + 22, y - 4)], f"line l{look.tone}", look.dash))
        else:
            parts.append(marks([(x + 11, y - 4)], look, 4.2, "solid"))
        parts.append(text(x + 28, y, name))
        x += width
    return "".join(parts), y + 10


def frame(x: Axis, y: Axis, x_title: str, y_title: str, y_label: Callable[[float], str] | None = None) -> str:
    """Grid, tick labels and titles: x below the plot, y as a line of text above it, where it needs no turned head."""
    parts = []
    x_label, y_words = axis_label(x), y_label or axis_label(y)
    for tick in y.ticks():
        parts.append(line([(x.start, y(tick)), (x.end, y(tick))], "grid"))
        parts.append(text(x.start - 7, y(tick) + 4, y_words(tick), "end", "quiet"))
    for tick in x.ticks():
        parts.append(line([(x(tick), y.start), (x(tick), y.end)], "grid"))
        parts.append(text(x(tick), y.start + 17, x_label(tick), "middle", "quiet"))
    parts.append(line([(x.start, y.start), (x.end, y.start)], "axis"))
    parts.append(text((x.start + x.end) / 2, y.start + 36, x_title, "middle"))
    parts.append(text(8, y.end - 10, y_title))
    return "".join(parts)


def style_sheet() -> str:
    return files("qmerge.report").joinpath("plot.css").read_text("utf-8")


def document(title: str, description: str, height: float, body: Sequence[str], style: bool) -> str:
    """A whole ``<svg>``. ``style=True`` carries the style sheet along, for a notebook; a page that holds several carries it once itself."""
    sheet = f"<style>{style_sheet()}</style>" if style else ""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="qmp" viewBox="0 0 {WIDTH} {num(height)}" width="100%" role="img" '
        f'aria-label="{escape(clean(title, 200))}" style="max-width:{WIDTH * 5 // 4}px;height:auto">{sheet}<desc>{escape(clean(description, 400))}</desc>'
        f'<rect class="paper" width="{WIDTH}" height="{num(height)}"/>{text(8, 22, title, cls="title", limit=44)}{"".join(body)}</svg>'
    )
