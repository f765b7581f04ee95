"""Where does one rank's time go? Runs a merge in this process with clocks around its parts, and prints them as one line of JSON. `bench_ranks.py` starts it."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import torch

from qmerge.launch import launched
from qmerge.pipeline import dense, head, run, streams
from qmerge.pipeline.plan import plan
from qmerge.pipeline.recipe import Recipe
from qmerge.pipeline.stepwise import Walk
from qmerge.ranks import together
from qmerge.store import direct

PARTS = "gradients", "load", "forward", "statistics", "solve", "hand on", "write", "wait and send"


class Clock:
    """Seconds by part, each moment counted once: a part stops while another runs inside it. Of the clock, and of the processor: those say what a part takes where others use the machine too."""

    def __init__(self) -> None:
        self.seconds, self.cpu = dict.fromkeys(PARTS, 0.0), dict.fromkeys(PARTS, 0.0)
        self._inside: list[str] = []
        self._since = 0.0, 0.0

    def _switch(self) -> None:
        now = time.perf_counter(), time.process_time()
        if self._inside:
            self.seconds[self._inside[-1]] += now[0] - self._since[0]
            self.cpu[self._inside[-1]] += now[1] - self._since[1]
        self._since = now

    def around(self, part: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **options: Any) -> Any:
            if threading.current_thread() is not threading.main_thread():
                return work(*args, **options)
            self._switch()
            self._inside.append(part)
            try:
                return work(*args, **options)
            finally:
                self._switch()
                self._inside.pop()

        return timed

    def watch(self, owner: Any, name: str, part: str) -> None:
        setattr(owner, name, self.around(part, getattr(owner, name)))


def instrumented() -> Clock:
    from qmerge.ranks import Ranks

    clock = Clock()
    clock.watch(run, "before_the_blocks", "gradients")
    clock.watch(streams, "load_block", "load")
    clock.watch(streams, "start", "load")
    for name in ("__enter__", "advance"):
        clock.watch(streams.BlockPair, name, "forward")
    for name in ("reach", "finish"):
        clock.watch(Walk, name, "forward")
    clock.watch(streams.BlockPair, "statistics", "statistics")
    clock.watch(streams, "requantize_group", "solve")
    clock.watch(head, "requantize_group", "solve")
    clock.watch(streams, "handed", "hand on")
    clock.watch(dense, "write_dense", "write")
    clock.watch(Ranks, "_wait", "wait and send")
    return clock


def slow_disk(rate: float) -> None:
    """As if every process had a disk of its own that takes so many bytes a second."""
    inner = direct._write

    def write(handle: int, view: memoryview) -> int:
        count = inner(handle, view)
        time.sleep(count / rate)
        return count

    direct._write = write


def main() -> None:
    wish = json.loads(sys.argv[1])
    if wish["slow_disk"]:
        slow_disk(wish["slow_disk"])
    recipe = Recipe(**wish["recipe"] | {"adapter": tuple(wish["recipe"]["adapter"])})
    torch.set_num_threads(wish["threads"])
    with together(launched(os.environ), "cpu") as ranks:
        ranks.barrier()
        clock, began, before = instrumented(), time.perf_counter(), time.process_time()
        run.run(plan(recipe, ranks.first), ranks=ranks)
        took = time.perf_counter() - began
        print(json.dumps({"rank": ranks.rank, "elapsed_s": took, "cpu_s": time.process_time() - before, "parts_s": clock.seconds, "cpu_parts_s": clock.cpu}), flush=True)


if __name__ == "__main__":
    main()
