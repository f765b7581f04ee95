"""How is a solved block kept, packed and written while text passes the next one?

One thread does all that touches the journal and the output, in the order in which it is given, so the bytes are those of one thread. The next block's first linears are solved only when the block before is kept: the fullest
moment of a run holds no more than it would, and a process that dies loses no more than one solved block.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from qmerge.device import to_host
from qmerge.pipeline.experts import Traffic
from qmerge.pipeline.kept import Kept
from qmerge.pipeline.requantize import Solved


class Behind:
    """Use as a context manager: leaving it waits for what was given. After an error what has not begun is left out, and the next call raises that error. ``beside`` False: all is done at once, by the caller."""

    def __init__(self, beside: bool = True) -> None:
        self._pool = ThreadPoolExecutor(1, "writing", initializer=torch.set_num_threads, initargs=(1,)) if beside else None
        self._given: deque[Future[None]] = deque()
        self._failed = False

    def __enter__(self) -> Behind:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if self._pool is None:
            return
        self._pool.shutdown(wait=True)
        torch.set_num_threads(torch.get_num_threads())  # what a thread sets for itself is also what threads that come later begin with
        if kind is None:
            self.wait()

    def do(self, work: Callable[[], None]) -> None:
        """``work`` after all that was given before. Raises what that raised."""
        if self._pool is None:
            work()
            return
        while self._given and self._given[0].done():
            self._given.popleft().result()
        self._given.append(self._pool.submit(self._one, work))

    def wait(self) -> None:
        """Returns when all that was given is done. Raises what it raised."""
        while self._given:
            self._given.popleft().result()

    def _one(self, work: Callable[[], None]) -> None:
        if self._failed:
            return
        try:
            with torch.no_grad():  # grad mode belongs to a thread
                work()
        except BaseException:
            self._failed = True
            raise


class KeptBehind:
    """As `Kept`, for a caller that goes on meanwhile: what is to be kept is handed to ``behind``, what is asked for waits for that. Nobody else in the caller's thread may use ``kept`` while this is used."""

    def __init__(self, kept: Kept, behind: Behind) -> None:
        self._kept, self._behind = kept, behind
        self.count, self.run, self.tensors_of = kept.count, kept.run, kept.tensors_of
        """``count``: with what is on its way"""

    def wait(self) -> None:
        """Returns when all is kept that was handed over. Raises what that raised."""
        self._behind.wait()

    def expect(self, units: int) -> None:
        self._now().expect(units)

    def facts(self, number: int) -> dict[str, Any]:
        return self._now().facts(number)

    def solved(self, number: int) -> dict[str, Solved]:
        return self._now().solved(number)

    def traffic(self, number: int) -> dict[str, Traffic]:
        return self._now().traffic(number)

    def load_streams(self, batches: list[Any]) -> int:
        return self._now().load_streams(batches)

    def solving(self, number: int) -> None:
        self._kept.solving(number)

    def commit(self, number: int, solved: Mapping[str, Solved], traffic: Mapping[str, Traffic], tuned: Mapping[str, Any] | None) -> None:
        """The weights wait in main memory, so that the device has room for the next block."""
        self.wait()
        held = {name: replace(result, weight=to_host(result.weight)) for name, result in solved.items()}
        self._behind.do(partial(self._kept.commit, number, held, dict(traffic), tuned))
        self.count = number + 1

    def save_streams(self, passed: int, batches: list[Any]) -> None:
        """As the streams are now: the caller may go on with the batches."""
        now = [Streams(batch.teacher, batch.runtime) for batch in batches]
        self._behind.do(partial(self._kept.save_streams, passed, now))

    def rest(self) -> None:
        """What belongs to a unit is done; where the run is to end, it does when that unit is kept."""
        if self.run.stop.wanted:
            self.wait()
        self._kept.rest()

    def _now(self) -> Kept:
        self.wait()
        return self._kept


@dataclass(frozen=True)
class Streams:
    teacher: torch.Tensor
    runtime: torch.Tensor
