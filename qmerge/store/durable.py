"""How does a file reach the disk for certain, with the mode that the user's umask asks for?"""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from qmerge.errors import Interrupted

FULL = (errno.ENOSPC, errno.EDQUOT)


@contextlib.contextmanager
def room_needed(where: str) -> Iterator[None]:
    """Turns "disk full", "quota exceeded" and "file too large" inside the block into Interrupted (exit 75); other errors pass through."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.EFBIG:
            raise Interrupted("A file became larger than this file system, or this process's limit, allows.", where=where, found=error.strerror, fix="use smaller files: --shard-size",
                              written="nothing that counts: the output folder is as it was") from None
        if error.errno not in FULL:
            raise
        raise Interrupted("There is no room left on the disk.", where=where, found=error.strerror, fix="make room and run again",
                          written="nothing that counts: the output folder is as it was") from None


def write_chunks(path: Path, chunks: Iterable[Any]) -> int:
    """Create ``path`` (it must not exist) with mode 0666 & ~umask, write the bytes-like ``chunks``, fsync. Returns the byte count.

    Raises Interrupted when the disk is full, FileExistsError when ``path`` exists.
    """
    count = 0
    with room_needed(path.name), os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666), "wb", buffering=0) as file:
        for chunk in chunks:
            view = memoryview(chunk).cast("B")
            while len(view):
                written = file.write(view)
                view, count = view[written:], count + written
        os.fsync(file.fileno())
    return count


def write_json(path: Path, value: Any) -> None:
    """Create ``path`` with ``value`` as JSON: keys sorted, two spaces, a newline at the end; the same value gives the same bytes."""
    write_chunks(path, [json_bytes(value)])


def json_bytes(value: Any) -> bytes:
    """What `write_json` writes."""
    return (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=True) + "\n").encode()


def sync(path: Path) -> None:
    """fsync a file or a folder. A folder's sync makes the names in it durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        with room_needed(path.name):
            os.fsync(handle)
    finally:
        os.close(handle)


def sync_tree(folder: Path) -> None:
    """fsync every file under ``folder``, then every folder, innermost first."""
    for root, _, files in os.walk(folder, topdown=False):
        for name in files:
            sync(Path(root) / name)
        sync(Path(root))
