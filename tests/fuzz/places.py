"""Where do harnesses put the files that they give to readers, and what may a reader never do?"""

from __future__ import annotations

import atexit
import os
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qmerge.errors import QmergeError

SHARED_MEMORY = "/dev/shm"
_MADE: list[tuple[int, Path]] = []
"""with the process that made it"""


@dataclass(frozen=True)
class Seeds:
    """Inputs that fuzzing starts from: what the reader has to accept, and what it has to refuse."""

    accepted: tuple[bytes, ...]
    refused: tuple[bytes, ...]


class Broken(Exception):
    """A reader did not keep its contract; the fuzzer reports this as a crash."""


def folder(name: str) -> Path:
    """A fresh folder in memory where the system has one, gone when the process ends."""
    parent = SHARED_MEMORY if os.access(SHARED_MEMORY, os.W_OK) else None
    made = Path(tempfile.mkdtemp(prefix=f"qmerge-fuzz-{name}-", dir=parent))
    _MADE.append((os.getpid(), made))
    return made


@atexit.register
def clean() -> None:
    """Remove this process's folders; a fork of it that ends has the list too."""
    while _MADE:
        maker, made = _MADE.pop()
        if maker == os.getpid():
            shutil.rmtree(made, ignore_errors=True)


def refused(error: QmergeError) -> bool:
    """False, after a look at the message: it can be made, and says something."""
    if not str(error).strip():
        raise Broken("a refusal without words")
    return False


class Opened:
    """Every path that Python code opens while this is entered."""

    _watching: list[Opened] = []
    _hooked = False

    def __enter__(self) -> Opened:
        if not Opened._hooked:
            sys.addaudithook(_note)
            Opened._hooked = True
        self.paths: list[Any] = []
        Opened._watching.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        Opened._watching.remove(self)


def _note(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and Opened._watching:
        for watcher in Opened._watching:
            watcher.paths.append(arguments[0])
