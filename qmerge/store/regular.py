"""How is a file opened that a stranger may have put there?

Never a pipe, a device or a socket (opening one can hang for ever, reading one need not end), never more bytes than a cap, and never through a link that leads out
of the folder: what it leads to would end up in an output that people publish. A snapshot of the hub's cache may link to the blobs of its own repository.
"""

from __future__ import annotations

import os
import stat
from io import FileIO
from pathlib import Path

from qmerge.errors import Refused


class NotPlain(OSError):
    """A pipe, a device, a socket or a folder where a file was expected; ``strerror`` says which."""


def open_plain(path: Path | str) -> FileIO:
    """The regular file at ``path``, to read; unbuffered. Raises NotPlain for anything else, OSError as ``open`` does. Does not wait for a pipe's other end."""
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0))
    try:
        mode = os.fstat(handle).st_mode
        if not stat.S_ISREG(mode):
            raise NotPlain(None, f"it is {_kind(mode)}, not a file")
        return FileIO(handle, "rb")
    except BaseException:
        os.close(handle)
        raise


def read_plain(path: Path | str, most_bytes: int) -> bytes:
    """All of the regular file at ``path``. Raises ValueError, with the sizes, where it holds more than ``most_bytes``; else as `open_plain`."""
    with open_plain(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > most_bytes:
            raise ValueError(f"{size} bytes, at most {most_bytes} are read")
        parts, left = [], most_bytes + 1
        while left and (part := file.read(left)):
            parts.append(part)
            left -= len(part)
    if not left:
        raise ValueError(f"more than {most_bytes} bytes")
    return b"".join(parts)


def check_contained(folder: Path, name: str, purpose: str = "it is not read") -> None:
    """Refused where ``folder / name`` leads out of the folder by a link. In a snapshot of the hub's cache it may lead to the repository's own blobs."""
    home, target = folder.resolve(), Path(os.path.realpath(folder / name))
    if target.is_relative_to(home) or (repository := _repository(home)) is not None and target.is_relative_to(repository):
        return
    raise Refused(f"A file of an input is a link that leads out of its folder; {purpose}.", where=f"{name} in {home.name}", expected="a file inside the folder", found="a link",
                  fix="replace the link by a copy of the file, or name the folder that it leads to")


def _repository(home: Path) -> Path | None:
    """``models--org--name`` where ``home`` lies in its ``snapshots``."""
    return next((parent.parent for parent in (home, *home.parents) if parent.name == "snapshots" and parent.parent.name.startswith(("models--", "datasets--"))), None)


def _kind(mode: int) -> str:
    for test, name in ((stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a pipe"), (stat.S_ISSOCK, "a socket"), (stat.S_ISCHR, "a device"), (stat.S_ISBLK, "a device")):
        if test(mode):
            return name
    return "something else"
