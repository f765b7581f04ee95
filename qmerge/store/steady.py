"""Are an input's files still those that were planned with and hashed?

A run reads its inputs for hours: headers first, each tensor when it is needed, and all bytes once for the digests in the manifest. A file that somebody replaces in between would give an
output whose manifest names other bytes than it was made of. A stamp costs nothing; where one has changed, files are read again.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from qmerge.errors import Refused


class Stamp(NamedTuple):
    """What a file system says of a file that changes when its bytes do. The clock of the status cannot be set back by its owner."""

    nbytes: int
    changed_ns: int
    status_changed_ns: int
    inode: int
    device: int


def stamps_of(paths: Iterable[Path]) -> dict[Path, Stamp | None]:
    """Of each file, links followed; None where there is none."""
    return {path: _stamp(path) for path in paths}


def _stamp(path: Path) -> Stamp | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return Stamp(found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino, found.st_dev)


def moved(before: Mapping[Path, Stamp | None]) -> list[Path]:
    """Files whose stamp is another one now: their bytes may have changed, or only their links, mode or dates."""
    return [path for path, stamp in before.items() if _stamp(path) != stamp]


def check_steady(name: str, changed: Iterable[str], while_what: str) -> None:
    """Raises Refused where ``changed`` names a file."""
    if found := sorted(changed):
        raise Refused("An input changed while the run was at work, so what was computed is of no one version of it.", where=f"{found[0]} in {name}", expected=f"the file as it was {while_what}",
                      found="other bytes, or none", fix="let nothing write to the inputs (a download, a training run), and run again")


def differing(recorded: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Names of files whose digests differ, or that are in one of the two alone."""
    return [key for key in sorted({*recorded, *now}) if recorded.get(key) != now.get(key)]
