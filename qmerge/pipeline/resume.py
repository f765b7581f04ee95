"""On what does a run go on that another process began, and what becomes of one that ends before it is done?"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qmerge.errors import Interrupted, QmergeError, Refused
from qmerge.pipeline.calibrate import Calibration
from qmerge.pipeline.identity import differences, identity
from qmerge.pipeline.inputs import Steady
from qmerge.pipeline.plan import MergePlan
from qmerge.pipeline.requantize import Steps
from qmerge.pipeline.stop import Stop
from qmerge.store.durable import FULL
from qmerge.store.journal import Journal
from qmerge.store.runs import Left, RunFolder, find_runs, folder_bytes, taken_over
from qmerge.types import known
from qmerge.units import format_bytes


@dataclass(frozen=True)
class Resume:
    """``--resume`` as it was asked for. ``overwrite``: may a whole OUT that is not what is wanted be replaced?"""

    overwrite: bool


@dataclass
class Run:
    """A run under way. ``place``: what it has come to, for people; `began` is False until it has something that a later run can go on from."""

    folder: RunFolder | None
    journal: Journal
    stop: Stop
    facts: Callable[[], dict[str, Any]] | None
    """what the run is of; None where another rank notes that"""
    resumed: bool
    say: Callable[[str], None]
    steady: Steady | None = None
    """None where this process keeps nothing of its own"""
    place: str = "the beginning"
    began: bool = False

    def begin(self) -> None:
        """Note what the run is of, before the first thing is kept of it. Raises Refused, each time, where an input has changed: nothing that was made of it is kept."""
        if self.steady is not None:
            self.steady.check()
        if not self.began and self.facts is not None:
            self.journal.put("run", self.facts())
            self.began = True


def joined(home: Path, stop: Stop) -> Run:
    """The run that another rank has begun, for one that adds to it."""
    journal = Journal(home / "journal")
    return Run(None, journal, stop, None, False, lambda _: None, began=journal.facts("run") is not None)


@contextlib.contextmanager
def working(
    plan: MergePlan, calibration: Calibration | None, steps: Steps | None, inputs: Callable[[], Mapping[str, Any]], resume: Resume | None, stop: Stop, say: Callable[[str], None],
) -> Iterator[Run]:  # fmt: skip
    """The working folder of a run of ``plan``: a new one or, with ``resume``, that of an interrupted run. An interruption inside leaves it, and becomes an `Interrupted` that says how to
    go on; bad inputs remove it. ``inputs`` gives the inputs' digests and may take long."""
    out = Path(plan.recipe.out)
    sources = [plan.checkpoint.path, *(adapter.path for adapter in plan.adapters)]
    left, chosen, facts = find_runs(out), None, None
    if resume is not None:
        facts = _Facts(lambda: identity(plan, calibration, steps, inputs()))
        chosen = _choose(left, out, facts, say)
    elif left:
        _tell(left, say, "; --resume would continue it")
    folder = RunFolder(out, sources, plan.recipe.overwrite if resume is None else resume.overwrite, chosen)
    with folder:
        run = Run(folder, Journal(folder.journal), stop, facts or _Facts(lambda: identity(plan, calibration, steps, inputs())), chosen is not None, say, steady=Steady(plan, inputs), began=chosen is not None)
        try:
            if run.resumed:
                _renew(run)
            yield run
        except BaseException as problem:
            raise _ended(run, problem) from (problem if _is_bug(problem) else None)
    if others := [one for one in find_runs(out) if not one.alive]:
        _tell(others, say, "; the output is whole without it: delete it")


class _Facts:
    """A value that is found once, when first asked for."""

    def __init__(self, find: Callable[[], dict[str, Any]]) -> None:
        self._find = find
        self._found: dict[str, Any] | None = None

    def __call__(self) -> dict[str, Any]:
        if self._found is None:
            self._found = self._find()
        return self._found


def _tell(left: list[Left], say: Callable[[str], None], then: str) -> None:
    for one in left:
        if one.alive:
            say(f"note: another run of this output is at work in {one.home.name}; the first to finish wins")
        else:
            what = "an interrupted run" if one.resumable else "what a dead run has left"
            say(f"note: {what} lies in {one.home.name} ({format_bytes(one.nbytes)})" + (then if one.resumable or "delete" in then else "; it holds nothing to go on from: delete it"))


def _choose(left: list[Left], out: Path, facts: _Facts, say: Callable[[str], None]) -> Left | None:
    """The interrupted run to go on with, the one that holds most of those that fit; None where there is none. Raises Refused where a process is at work on one, or none fits."""
    if alive := [one for one in left if one.alive]:
        raise Refused("A run of this output is at work.", where=alive[0].home.name, found="a process that holds its lock", fix="wait for it to end, or stop it; it will say how to go on")
    for one in (one for one in left if one.foreign):
        say(f"note: {one.home.name} was made by another user; it is not gone on with, as what lies in it would become part of the output")
    there = sorted((one for one in left if one.resumable and not one.foreign), key=lambda one: (-len(one.journal.names()), -one.nbytes))
    if not there:
        say(f"--resume: no interrupted run of {out.name} to go on with; starting from the beginning")
        return None
    reasons = []
    for one in there:
        before, now = one.journal.facts("run"), facts()
        if before is None or not _is_record(before):
            reasons.append(["its record of what it is of is malformed"])
            continue
        cut = _other_shards(one, before["fixed"], now["fixed"])
        if not (wrong := differences(before["fixed"] | cut, now["fixed"] | cut)):
            if changed := differences(before["free"], now["free"]) + (["shard size"] if cut else []):
                say(f"--resume: not what it was: {'; '.join(changed)}" + (". Another device or processor may round otherwise: the bytes may not be those of an uninterrupted run" if _rounds(changed) else ""))
            say(f"--resume: goes on with {one.home.name} ({format_bytes(one.nbytes)})")
            return one
        reasons.append(wrong)
    raise Refused("The interrupted run is of something else, so it cannot be continued.", where=there[0].home.name, found="\n              ".join(reasons[0][:8]),
                  fix="run with what it was begun with, or without --resume to start anew (and delete that folder)", written="nothing; the interrupted run is as it was")


def _is_record(found: Any) -> bool:
    """Has it the fields of `identity`?"""
    return isinstance(found, dict) and all(isinstance(found.get(part), dict) for part in ("fixed", "free")) and isinstance(found["fixed"].get("recipe"), dict) and "shard_size" in found["fixed"]["recipe"]


def _other_shards(one: Left, before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """What to take for both recipes where they differ in the size of shards alone, and everything is there to write all shards again; else nothing."""
    sizes = [side["recipe"]["shard_size"] for side in (before, now)]
    units = [one.journal.facts(name) for name in one.journal.names() if name.startswith("unit-")]
    if sizes[0] == sizes[1] or not units or any(unit is None or unit["dropped"] for unit in units):
        return {}
    return {"recipe": now["recipe"]} if before["recipe"] | {"shard_size": sizes[1]} == now["recipe"] else {}


def _renew(run: Run) -> None:
    """The run is now what this process was asked for."""
    before, now = known(run.journal.facts("run")), known(run.facts)()
    if before == now:
        return
    if before["fixed"]["recipe"] != now["fixed"]["recipe"]:
        for name in run.journal.names():
            if name.startswith("shard-"):
                run.journal.drop(name)
    run.journal.put("run", now)


def _rounds(changed: list[str]) -> bool:
    return any(phrase.startswith(("device", "processor")) for phrase in changed)


def _ended(run: Run, problem: BaseException) -> BaseException:
    """What to raise for ``problem``; decides whether the folder is kept."""
    folder = known(run.folder)
    if not folder.home.exists() and not folder.committed:
        folder.keep = True
        return taken_over(folder.home)
    folder.keep = not (isinstance(problem, QmergeError) and not isinstance(problem, Interrupted)) and run.began
    if (why := _interruption(problem)) is None:
        return problem
    again = "run the same command again"
    if _full(problem):
        again = "make room and " + again
    elif isinstance(problem, Interrupted) and "--shard-size" in (problem.fix or ""):
        again = "run the same command again with smaller files (--shard-size)"
    if not folder.keep:
        return Interrupted(why[0], where=folder.out.name, found=why[1], fix=again, written="nothing")
    return Interrupted(why[0], where=f"{folder.out.name}, at {run.place}", found=why[1], fix=again + (" and" if "with" in again else " with") + " --resume: it goes on from there",
                       written=f"nothing at the output; {format_bytes(folder_bytes(folder.home))} in {folder.home.name}")


def interrupted(problem: BaseException) -> BaseException:
    """What to raise for ``problem`` where nothing is to be kept: `Interrupted` where the run could go on after it."""
    if isinstance(problem, QmergeError) or (why := _interruption(problem)) is None:
        return problem
    return Interrupted(why[0], found=why[1], fix="run the same command again with --resume")


def _is_bug(problem: BaseException) -> bool:
    return _interruption(problem) is None and not isinstance(problem, QmergeError)


def _full(problem: BaseException) -> bool:
    return isinstance(problem, OSError) and problem.errno in FULL or isinstance(problem, Interrupted) and "room" in problem.what


def _interruption(problem: BaseException) -> tuple[str, str | None] | None:
    """(what happened, a detail) where the run could go on after it, else None."""
    detail = str(problem).splitlines()[0][:160] if str(problem) else None
    if isinstance(problem, Interrupted):
        return problem.what, None if problem.found is None else str(problem.found)
    if isinstance(problem, KeyboardInterrupt):
        return "The run was interrupted.", "a signal"
    if isinstance(problem, (MemoryError, torch.OutOfMemoryError)) or (isinstance(problem, RuntimeError) and "can't allocate memory" in str(problem)):
        return "There is not enough memory.", detail
    if isinstance(problem, RuntimeError) and ("CUDA error" in str(problem) or type(problem).__name__ == "AcceleratorError"):
        return "The accelerator failed.", detail
    if isinstance(problem, OSError) and problem.errno in FULL:
        return "There is no room left on the disk.", problem.strerror
    if isinstance(problem, OSError) and problem.errno in (errno.EIO, errno.EROFS, errno.ESTALE, errno.ENODEV, errno.ENXIO, errno.ETIMEDOUT, errno.EMFILE, errno.ENFILE, errno.ENOMEM):
        return "A disk or the system failed.", problem.strerror
    return None
