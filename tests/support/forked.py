"""Runs in forked children: torch and the libraries are imported once, in the parent, and each child is a process of its own that can be killed at any call or moment."""

from __future__ import annotations

import contextlib
import os
import signal
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

CALLS = ("rename", "replace", "mkdir", "open", "write", "fsync", "unlink", "rmdir", "close")
"""what changes a disk, and the closing of what did"""


def fork(work: Callable[[], Any], log: Path) -> int:
    """Start ``work`` in a child; its talk goes to ``log``. Exit code 0, what a `SystemExit` says, or 99 after a traceback. Returns the process id."""
    child = os.fork()
    if child:
        return child
    code = 99
    try:
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        work()
        code = 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    except BaseException:
        with contextlib.suppress(BaseException):
            os.write(2, traceback.format_exc().encode())
    finally:
        os._exit(code)


def ended(child: int) -> int:
    """Wait for a child: its exit code, or minus the signal that ended it."""
    status = os.waitpid(child, 0)[1]
    return os.waitstatus_to_exitcode(status)


def ended_within(child: int, seconds: float) -> int:
    """As `ended`, killed after ``seconds``."""
    limit = time.monotonic() + seconds
    while time.monotonic() < limit:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    return ended(child)


class Hooked:
    """Counts this process's calls that change what lies below ``place`` (and the parent folder's names), and kills it before call number ``fatal``."""

    def __init__(self, place: Path, fatal: int | None = None, tell: Path | None = None) -> None:
        self.place, self.fatal, self.tell, self.count, self.names = str(place), fatal, tell, 0, []

    def __enter__(self) -> Hooked:
        self._kept = {name: getattr(os, name) for name in CALLS}
        for name in CALLS:
            setattr(os, name, self._around(name, self._kept[name]))
        return self

    def __exit__(self, *_: object) -> None:
        for name, inner in self._kept.items():
            setattr(os, name, inner)

    def _around(self, name: str, inner: Callable[..., Any]) -> Callable[..., Any]:
        def called(*args: Any, **options: Any) -> Any:
            if self._ours(name, args):
                self.count += 1
                self.names.append(name)
                if self.count == self.fatal:
                    os.kill(os.getpid(), signal.SIGKILL)
            return inner(*args, **options)

        return called

    def _ours(self, name: str, args: tuple) -> bool:
        first = args[0] if args else None
        if isinstance(first, int):
            with contextlib.suppress(OSError):
                return os.readlink(f"/proc/self/fd/{first}").startswith(self.place)
            return False
        if name == "open" and not (len(args) > 1 and args[1] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)):
            return False
        return os.fspath(first).startswith(self.place) if isinstance(first, (str, os.PathLike)) else False
