"""In which part of a run do its threads spend their time? A thread that looks at the others' stacks a few times a second, in the same process.

A sample counts for the part whose function is the innermost in this table. Threads that wait for others do not count; so the seconds of a part are processor-seconds, and their sum over the
wall time is how many cores were busy.
"""

from __future__ import annotations

import sys
import threading
import time
from collections import Counter
from types import FrameType

PARTS = {
    ("gradients.py", "backwards"): "gradients", ("gradients.py", "_draw"): "gradients", ("gradients.py", "_one"): "gradients", ("gradients.py", "_forwards"): "gradients",
    ("blocks.py", "run_block"): "passes", ("block_pair.py", "_inputs"): "passes", ("hessian.py", "add_factors"): "statistics", ("hessian.py", "strip"): "statistics", ("hessian.py", "factors"): "statistics",
    ("hessian.py", "settle"): "statistics", ("hessian.py", "round_hessian"): "statistics", ("loading.py", "load_block"): "load", ("merge.py", "parameter"): "load", ("merge.py", "delta"): "load", ("hessian.py", "factor"): "factor H",
    ("requantize.py", "learn"): "W D", ("requantize.py", "begin"): "scales, curvature", ("candidates.py", "options"): "scales, curvature", ("coupled.py", "__init__"): "scales, curvature",
    ("requantize.py", "_try"): "trials", ("rows.py", "solve_rows"): "rows: rest", ("polish.py", "__init__"): "rows: lean", ("gptq.py", "solve"): "rows: columns", ("coupled.py", "solve"): "rows: columns",
    ("coupled.py", "descend"): "rows: descent", ("polish.py", "descend"): "rows: descent", ("rows.py", "_fitted"): "rows: refit", ("shift.py", "shifts"): "rows: shifts", ("rows.py", "add"): "rows: judged",
    ("requantize.py", "_finish"): "finish", ("kept.py", "commit"): "journal", ("kept.py", "save_streams"): "journal", ("writer.py", "add"): "writing", ("writer.py", "finish"): "writing",
}  # fmt: skip
"""(file, function) -> part. Within trials, columns count as trials: the outermost of the two decides"""
OUTER = {"trials", "gradients"}
"""parts that keep what they call"""
IDLE = {("threading.py", "wait"), ("threading.py", "_wait_for_tstate_lock"), ("threading.py", "wait_for"), ("threading.py", "acquire"), ("threading.py", "__enter__"), ("threading.py", "join"), ("thread.py", "shutdown"), ("_base.py", "result"), ("thread.py", "_worker"), ("queue.py", "get"), ("selectors.py", "select"), ("sampled.py", "_look")}


class Sampled:
    """``seconds``: by part, of all threads together, while the context is open."""

    def __init__(self, every_s: float = 0.2) -> None:
        self.every_s, self._counts, self._stop = every_s, Counter[str](), threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> Sampled:
        self._began = time.perf_counter()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self.wall_s = time.perf_counter() - self._began

    @property
    def seconds(self) -> dict[str, float]:
        return {part: round(self.every_s * count, 1) for part, count in self._counts.most_common()}

    def _look(self) -> None:
        own = threading.get_ident()
        while not self._stop.wait(self.every_s):
            for thread, frame in sys._current_frames().items():
                if thread != own and (part := part_of(frame)):
                    self._counts[part] += 1


def part_of(frame: FrameType | None) -> str | None:
    """The part that a stack is in; None for a thread that waits."""
    assert frame is not None
    if _place(frame) in IDLE:
        return None
    found = None
    while frame is not None:
        part = PARTS.get(_place(frame))
        if part is not None and (found is None or part in OUTER):
            found = part
        frame = frame.f_back
    return found or "rest"


def _place(frame: FrameType) -> tuple[str, str]:
    return frame.f_code.co_filename.rpartition("/")[2], frame.f_code.co_name
