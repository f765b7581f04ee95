"""Where a run's time goes (scripts/sampled.py) is told by the names of functions: those must be the code's."""

from __future__ import annotations

import ast
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

from sampled import PARTS, Sampled  # noqa: E402


def test_every_function_of_the_table_is_there():
    """A function that was renamed: its time would turn up as the rest's, and the page would say so."""
    there = {(path.name, node.name) for path in (ROOT / "qmerge").rglob("*.py") for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.FunctionDef)}
    assert not [place for place in PARTS if place not in there]


def test_a_thread_that_works_counts_and_one_that_waits_does_not():
    """Seconds of threads that sum to more than there were cores."""

    def learn() -> None:
        end = time.perf_counter() + 0.5
        while time.perf_counter() < end:
            sum(range(1000))

    learn.__code__ = learn.__code__.replace(co_filename="requantize.py")
    with Sampled(every_s=0.02) as found:
        learn()
        time.sleep(0.2)
    assert 0.2 < found.seconds["W D"] < 0.7 and set(found.seconds) <= {"W D", "rest"}
