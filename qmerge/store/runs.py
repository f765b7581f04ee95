"""Which runs of an output are there, alive or dead, and which one process may go on with one?

Each run works in a folder of its own beside OUT, ``.OUT.qmerge-run-XXXXXXXX``: ``out`` becomes OUT, ``journal`` is what a later process goes on from, ``lock`` is held by the process
while it lives. The lock is a hint (it lies on some network file systems). What counts is the folder's name: who goes on with a run renames its folder first, which only one process
can do, and whoever worked there before finds nothing under the old name any more.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from qmerge.errors import Interrupted, Refused
from qmerge.store.durable import room_needed, sync
from qmerge.store.journal import Journal
from qmerge.store.publish import OutputFolder

LOCK = "lock"
TRIES, PAUSE_S = 3, 0.05
"""another process that only looks holds the lock for an instant"""


@dataclass(frozen=True)
class Left:
    """The folder of a run that did not end, as found. ``alive``: another process holds its lock."""

    home: Path
    nbytes: int
    alive: bool
    foreign: bool = False
    """another user made it, as anybody can in a folder such as /tmp: what lies in it would become part of the output"""

    @property
    def journal(self) -> Journal:
        return Journal(self.home / "journal")

    @property
    def resumable(self) -> bool:
        return (self.home / "out").is_dir() and self.journal.facts("run") is not None


def find_runs(out: Path) -> list[Left]:
    """All runs of ``out`` that have a folder beside it, by name."""
    parent, form = out.parent.resolve(), re.compile(re.escape(f".{out.name}.qmerge-run-") + "[0-9a-f]{8}")
    names = sorted(os.listdir(parent)) if parent.is_dir() else []
    homes = [parent / name for name in names if form.fullmatch(name) and (parent / name).is_dir() and not (parent / name).is_symlink()]
    if not homes:
        return []
    mine = _uid_in(parent)
    return [Left(home, folder_bytes(home), is_alive(home), mine is not None and _uid_of(home) not in (mine, None)) for home in homes]


def _uid_in(parent: Path) -> int | None:
    """As whom this process writes there: a network file system may take root for somebody else. None where it cannot write."""
    try:
        with tempfile.TemporaryFile(dir=parent) as probe:
            return os.fstat(probe.fileno()).st_uid
    except OSError:
        return None


def _uid_of(home: Path) -> int | None:
    try:
        return os.lstat(home).st_uid
    except OSError:
        return None


def folder_bytes(folder: Path) -> int:
    """Of all files below ``folder``; what vanishes meanwhile does not count."""
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(root, name)).st_size
    return total


def is_alive(home: Path) -> bool:
    """Does a process hold the lock? False also where the file system knows no locks."""
    handle = _take(home, fcntl.LOCK_SH)
    if handle is not None and handle >= 0:
        os.close(handle)
    return handle is None


def _take(home: Path, kind: int) -> int | None:
    """A handle that holds the lock, None where another process does, -1 where there is none to be had."""
    try:
        handle = os.open(home / LOCK, os.O_RDWR | getattr(os, "O_CLOEXEC", 0))
    except OSError:
        return -1
    for attempt in range(TRIES):
        try:
            fcntl.flock(handle, kind | fcntl.LOCK_NB)
            return handle
        except BlockingIOError:
            time.sleep(PAUSE_S if attempt + 1 < TRIES else 0)
        except OSError:
            return handle  # no locks on this file system
    os.close(handle)
    return None


class RunFolder(OutputFolder):
    """The folder of one run: ``path`` becomes OUT by `commit`. It vanishes with the ``with`` block, unless ``keep`` was set: then a later run can go on from it."""

    def __init__(self, out: Path, inputs: Iterable[Path], overwrite: bool = False, goes_on: Left | None = None) -> None:
        """Checks only. ``goes_on``: the run to take over in the ``with`` statement; raises Refused there if another process was faster."""
        super().__init__(out, list(inputs), overwrite)
        self.home, self.keep, self._goes_on = self._sibling("run"), False, goes_on
        self._lock: int | None = -1

    @property
    def journal(self) -> Path:
        return self.home / "journal"

    def __enter__(self) -> RunFolder:
        if self._goes_on is not None:
            self._claim(self._goes_on.home)
        else:
            self._make_parents()
            with room_needed(self.out.name):
                self.home.mkdir()
                os.close(os.open(self.home / LOCK, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
                self._lock = _take(self.home, fcntl.LOCK_EX) or -1
                (self.home / "out").mkdir()
                self.journal.mkdir()
        self.path = self.home / "out"
        return self

    def _claim(self, old: Path) -> None:
        self._lock = _take(old, fcntl.LOCK_EX)
        if self._lock is None:
            raise Refused("Another process is at work on this run.", where=old.name, fix="wait for it to end")
        try:
            os.rename(old, self.home)
        except OSError:
            self._unlock()
            raise Refused("Another process has just taken this run over.", where=old.name, fix="wait for it to end") from None
        sync(self.home.parent)

    def commit(self, manifest: Mapping[str, Any], instead_of: str | None = None) -> None:
        """As `OutputFolder.commit`; what is left of the run goes afterwards."""
        super().commit(manifest, instead_of)
        self._discard()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if not self.committed and not self.keep:
            self._discard()
            self._take_parents_back()
        self._unlock()

    def _discard(self) -> None:
        """Under another name first: who takes the run over at this moment has it whole, or not at all."""
        gone = self._sibling("gone")
        with contextlib.suppress(OSError):
            os.rename(self.home, gone)
        shutil.rmtree(gone, ignore_errors=True)

    def _unlock(self) -> None:
        if self._lock is not None and self._lock >= 0:
            os.close(self._lock)
        self._lock = -1


def clear(folder: Path, but: Iterable[str]) -> None:
    """Remove all of ``folder`` that is not named in ``but``."""
    for path in list(folder.iterdir()):
        if path.name not in but:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def taken_over(home: Path) -> Interrupted:
    """What a run says whose folder is not there any more."""
    return Interrupted("This run's working folder is gone: another process goes on with it, or it was deleted.", where=home.name, found="no such folder",
                       fix="let the other one finish; qmerge verify tells when the output is there", written="nothing at the output")
