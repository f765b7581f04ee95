"""Is progress calm: one line per step, a counter and the time that is left on a terminal alone, and no colours where NO_COLOR asks for none?"""

from __future__ import annotations

import contextlib
import io
import os
import pty
import subprocess
import sys
from collections.abc import Iterator
from itertools import count
from typing import Any

import pytest

from qmerge.cli.progress import Steps


class Terminal(io.StringIO):
    """A stream that says it is a terminal; click's own way to ask."""

    def isatty(self) -> bool:
        return True


def heard(stream: io.StringIO, words: Iterator[Any]) -> str:
    """What a run of ``words`` says on ``stream``, with ten seconds between looks at the clock."""
    ticks = count(0, 10)
    with contextlib.redirect_stderr(stream):
        steps = Steps(lambda: float(next(ticks)))
        for word in words:
            steps.step(word) if isinstance(word, str) else steps.count(*word)
    return stream.getvalue()


def test_off_a_terminal_only_lines_of_finished_steps() -> None:
    """A CI log of thousands of redrawn counters, or forecasts that differ from run to run."""
    said = heard(io.StringIO(), iter(["planned", ("text", 1, 3), ("text", 2, 3), ("text", 3, 3), "block 1/4: solved", "block 2/4: solved"]))
    assert "\r" not in said and "left" not in said and [line.split(" s  ")[1] for line in said.splitlines()] == ["planned", "text", "block 1/4: solved", "block 2/4: solved"]


def test_on_a_terminal_the_time_that_is_left_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """An hour without a word on how many more there will be."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    said = heard(Terminal(), iter(["block 1/4: solved", "block 2/4: solved", ("text", 1, 9), ("text", 2, 9)]))
    lines = said.splitlines()
    assert "left" not in lines[0] and "2/4: solved, about" in said and "text 2/9, about" in said and said.count("\r") >= 3


def test_two_bars_for_the_whole_and_for_the_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """Minutes of one block without a sign, or a bar of blocks that stays when they are done, or that a path with numbers makes."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    said = heard(Terminal(), iter(["block 1/4: solved", ("in block 2:", 0, 2), "block 2/4: solved", ("in block 3:", 1, 2), "block 4/4: solved", ("text", 1, 4), "wrote /tmp/run 1/2", ("text", 2, 4)]))
    drawn = [part.strip() for part in said.split("\r") if "[" in part]
    assert drawn[0] == "[##........] block 1/4   [..........] in block 2: 0/2"
    assert drawn[1].startswith("[#####.....] block 2/4, about ") and "left   [#####.....] in block 3: 1/2" in drawn[1]
    assert [part.split(",")[0] for part in drawn[2:]] == ["[##........] text 1/4", "[#####.....] text 2/4"]


def test_a_counter_stays_in_its_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """A label wider than the window wraps, and each redraw leaves half of it behind."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "40")
    said = heard(Terminal(), iter([("x" * 200, 1, 9)]))
    assert max(map(len, said.split("\r"))) < 40


def test_a_dumb_terminal_is_not_drawn_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Carriage returns in an editor's shell window."""
    monkeypatch.setenv("TERM", "dumb")
    assert "\r" not in heard(Terminal(), iter([("text", 1, 9), ("text", 2, 9)]))


@pytest.mark.parametrize("setting, coloured", [("", True), ("1", False)])
def test_no_color_is_respected(setting: str, coloured: bool) -> None:
    """Escape codes for somebody who has asked for none (no-color.org)."""
    ours, theirs = pty.openpty()
    subprocess.run([sys.executable, "-m", "qmerge", "inspect", "/nowhere/at/all"], stderr=theirs, stdout=subprocess.DEVNULL, env=os.environ | {"NO_COLOR": setting, "TERM": "xterm", "HF_HUB_OFFLINE": "1"})
    os.close(theirs)
    said = b""
    with contextlib.suppress(OSError):
        while part := os.read(ours, 65536):
            said += part
    os.close(ours)
    assert b"error" in said and (b"\x1b[" in said) is coloured
