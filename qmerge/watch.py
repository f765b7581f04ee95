"""Are the other ranks alive, and has one of them failed?

A thread of each process tells a shared store that it lives, and looks for what others tell. Who fails says so there before it ends; who says nothing for a minute counts as dead. The thread
that works learns of it while it waits for others, and is ended where it does not wait: an interrupted run is safe at any moment.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from qmerge.errors import CheckFailed, Interrupted, QmergeError, Refused, UsageProblem, printable
from qmerge.types import known

BEAT_S = 1.0
LOST_S = 60.0
"""without a sign of life"""
GRACE_S = 30.0
"""that the working thread has to notice by itself"""
STORE_S = 20.0
"""that the store may take to answer"""
KINDS = {2: UsageProblem, 4: Refused, 75: Interrupted}


@dataclass(frozen=True)
class Failure:
    """What ended a rank, as it told the others. ``polite``: it was asked to stop, and had finished what it was at."""

    rank: int
    code: int
    what: str
    details: dict[str, str]
    polite: bool = False

    @classmethod
    def of(cls, rank: int, problem: BaseException) -> Failure:
        if isinstance(problem, QmergeError):
            details = {key: str(value) for key in ("where", "expected", "found", "fix", "written") if (value := getattr(problem, key)) is not None}
            return cls(rank, problem.exit_code, problem.what, details, isinstance(problem, Interrupted) and problem.found == "a signal")
        if isinstance(problem, KeyboardInterrupt):
            return cls(rank, 75, "The run was interrupted.", {"found": "a signal"})
        first = (str(problem).splitlines() or [""])[0][:200]
        return cls(rank, 1, "A rank ended with an error that is not foreseen; its own output has the details.", {"found": f"{type(problem).__name__}: {first}"})

    def error(self) -> QmergeError:
        """For the other ranks: of the same kind, so that all exit alike."""
        kind: type[QmergeError] = KINDS.get(self.code, CheckFailed)
        return kind(f"rank {self.rank}: {self.what}", **self.details)


GONE = "Another rank is gone."


def is_lost(problem: BaseException) -> bool:
    """Is it `lost`'s?"""
    return isinstance(problem, Interrupted) and problem.what == GONE


def lost(found: str) -> Interrupted:
    return Interrupted(GONE, found=found, fix="see what ended it (memory? its host?), then run the same command again, with as many ranks as you like; a merge goes on with --resume")


class Watch:
    """``store``: a client of the shared store for this thread alone. ``failure``: what others told, or None; `lost_rank` in words, or None."""

    def __init__(self, store: Any, rank: int, size: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.store, self.rank, self.size, self._clock = store, rank, size, clock
        self.failure: Failure | None = None
        self.lost_rank: str | None = None
        self.noticed = False
        """the working thread knows, and is on its way out"""
        self.silent = False
        """the store does not answer; a question to it would wait for ever"""
        self._ended, self._told = threading.Event(), threading.Event()
        self._answered, self._stopped = clock(), False
        """when the store last did; whether this process stood still since"""
        self._threads = [threading.Thread(target=work, daemon=True, name="watch") for work in (self._run, self._ask)]

    def announce(self) -> None:
        """This rank is there. Before `start`, which expects the others to be."""
        self.store.set(f"beat/{self.rank}", "0")

    def start(self) -> None:
        self._answered = self._clock()
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join(timeout=2 * BEAT_S)

    def tell(self, problem: BaseException) -> None:
        """This rank fails. The first to say so is heard."""
        if self.silent:
            return
        with contextlib.suppress(Exception):
            self.store.compare_set("failed", "", json.dumps(asdict(Failure.of(self.rank, problem))))
        self.seen()

    def seen(self) -> None:
        """Tell that this rank knows."""
        with contextlib.suppress(Exception):
            self.store.set(f"seen/{self.rank}", "1")

    def all_seen(self, within_s: float) -> None:
        """Wait until the others know, but not for long: whoever keeps the store must not be the first to go."""
        if self.silent:
            return
        until = self._clock() + within_s
        keys = [f"seen/{rank}" for rank in range(self.size) if rank != self.rank]
        with contextlib.suppress(Exception):
            while self._clock() < until and not self.store.check(keys):
                time.sleep(0.05)

    def problem(self) -> QmergeError | None:
        """What the working thread should end with, if anything."""
        if self.failure is not None:
            return self.failure.error()
        return lost(self.lost_rank) if self.lost_rank is not None else None

    def wait_for_word(self, within_s: float) -> QmergeError | None:
        """A connection broke: its other end may have told why."""
        self._told.wait(within_s)
        return self.problem()

    def _run(self) -> None:
        """Decides, and asks nobody: a cable that is pulled leaves a question to the store without an answer, and without an error."""
        last, since = self._clock(), None
        while not self._ended.wait(BEAT_S):
            now = self._clock()
            if now - last > 10 * BEAT_S:  # this process itself was stopped: it can say nothing of others
                self._answered, self._stopped = now, True
            last = now
            if self.problem() is None and now - self._answered > LOST_S:
                self.silent, self.lost_rank = True, f"where the ranks meet has not answered for {LOST_S:.0f} s"
            if self.problem() is None:
                continue
            self._told.set()
            since = now if since is None else since
            if now - since > (2 if self.noticed else 1) * GRACE_S:  # also where the working thread knows, and then waits for a store that does not answer
                self._end()

    def _ask(self) -> None:
        """Gives and reads signs of life."""
        beats: dict[int, tuple[bytes, float]] = {}
        count = 0
        while not self._ended.wait(BEAT_S) and self.problem() is None:
            if self._stopped:
                beats, self._stopped = {rank: (beat, self._clock()) for rank, (beat, _) in beats.items()}, False
            count += 1
            try:
                self._look(beats, count)
            except Exception as problem:  # noqa: BLE001  whatever the store raises, it is gone
                self.lost_rank = f"where the ranks meet is gone ({(str(problem).splitlines() or [''])[0][:120]})"
            self._answered = self._clock()

    def _look(self, beats: dict[int, tuple[bytes, float]], count: int) -> None:
        self.store.set(f"beat/{self.rank}", str(count))
        if self.store.check(["failed"]):
            told = Failure(**json.loads(self.store.get("failed")))
            if told.rank != self.rank:
                self.failure = told
                self._told.set()
                self.seen()
            return
        if count % 5:
            return
        now = self._clock()
        for rank in (rank for rank in range(self.size) if rank != self.rank):
            beat = self.store.get(f"beat/{rank}")
            before = beats.get(rank)
            if before is None or before[0] != beat:
                beats[rank] = (beat, now)
            elif now - before[1] > LOST_S:
                self.lost_rank = f"no sign of life of rank {rank} for {LOST_S:.0f} s"
                self._told.set()

    def _end(self) -> None:
        problem = known(self.problem())
        if self.rank == 0:
            os.write(2, f"error: {printable(str(problem))}\n  (this rank was in the middle of a long step, and was ended)\n".encode())
        os._exit(problem.exit_code)
