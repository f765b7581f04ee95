"""How does a person see that work goes on, and for how long? One line per finished step; on a terminal bars that run in place, for the whole and for the part under way, and the time that is left.

Off a terminal nothing is drawn in place and no time is foretold: a log gets the lines of finished steps alone.
"""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Callable

from qmerge.cli.output import say, streams, talk
from qmerge.errors import printable
from qmerge.units import format_seconds

INDENT = 11
"""columns that a line's time takes"""
REDRAW_S = 0.1
"""bars are drawn no more often"""
BAR = 10
"""signs of a bar"""


class Steps:
    """Calm progress on stderr, each line with the seconds since the start. ``clock``: seconds."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.clock, self.began = clock, clock()
        self.live = streams()[1].isatty() and os.environ.get("TERM") != "dumb"
        self.label, self.drawn = "", -REDRAW_S
        self.whole = ""
        """the bar of what the last counted line was a part of; nothing where that is done"""
        self._first: dict[str, tuple[int, float]] = {}

    def step(self, text: str) -> None:
        """``text`` is done. Where it counts (``block 3/32: …``), the time that the rest will take is told too, on a terminal."""
        self._clear()
        counted = re.match(r"([a-z: ]*)(\d+)/(\d+)(?=\W|$)", text)
        left = self.whole = ""
        if counted and self.live:
            what, done, total = counted[1], int(counted[2]), int(counted[3])
            left = self._left(what, done, total)
            self.whole = f"{_bar(done, total)} {printable(what).strip()} {done}/{total}{left}   " if done < total else ""
        say(f"{self.clock() - self.began:7.1f} s  {text}{left}")

    def count(self, label: str, done: int, total: int) -> None:
        """``done`` of ``total`` parts of a step. The last one is a line."""
        if done >= total:
            self.step(label)
        elif self.live:
            text = f"{self.whole}{_bar(done, total)} {printable(label)} {done}/{total}{self._left(label, done, total)}"
            if (now := self.clock()) - self.drawn >= REDRAW_S:
                self._clear()
                self.label, self.drawn = text[: max(shutil.get_terminal_size().columns - INDENT - 1, 1)], now
                talk(f"\r{' ' * INDENT}{self.label}", newline=False)

    def _left(self, what: str, done: int, total: int) -> str:
        """In words, from the pace since ``what`` was first heard of; nothing where there is no pace yet."""
        before, since = self._first.setdefault(what, (done, self.clock()))
        if done < before:  # the same words for another part
            self._first[what] = before, since = done, self.clock()
        left_s = (self.clock() - since) / (done - before) * (total - done) if done > before else 0.0
        return f", about {format_seconds(left_s)} left" if left_s >= 1 else ""

    def _clear(self) -> None:
        """Take the bars off the terminal."""
        if self.live and self.label:
            talk("\r" + " " * (len(self.label) + INDENT) + "\r", newline=False)
            self.label = ""


def _bar(done: int, total: int) -> str:
    """``[####......]``: letters that every terminal has."""
    full = BAR * done // max(total, 1)
    return f"[{'#' * full}{'.' * (BAR - full)}]"
