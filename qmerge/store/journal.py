"""How does work that took hours survive the process that did it?

A journal is a folder of records. A record is one file, there whole or not at all: written under another name, brought to the disk, renamed into place. It holds facts (JSON) and
tensors, and ends in the SHA-256 of all that; a record whose digest does not fit counts as absent.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from io import BufferedReader
from math import prod
from pathlib import Path
from typing import Any

import torch

from qmerge.errors import Interrupted
from qmerge.store.durable import sync, write_chunks
from qmerge.store.headers import TORCH_DTYPES, dtype_name

MAGIC = b"qmerge journal 1\n"
FRESH = ".new"
USUAL_RATE = 200e6
"""bytes per second that a disk is taken to write until that is known"""
PIECE = 1 << 22
"""bytes of a record that are digested at a time"""
ENOUGH_BYTES = 1 << 20
"""written before the measured rate counts"""


class Journal:
    """Records in ``folder``, which must exist when the first is put.

    >>> journal.put("block-7", {"codes": 3}, {"weight": tensor}); journal.get("block-7")
    ({'codes': 3}, {'weight': tensor(...)})
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self.seconds = 0.0
        """spent on putting records so far"""
        self._bytes, self._moving = 0, 0.0

    def put(self, name: str, facts: Mapping[str, Any], tensors: Mapping[str, torch.Tensor] | None = None) -> int:
        """Commit a record (one of that name is replaced) and return its bytes. ``tensors``: contiguous, on the CPU. Raises Interrupted when the disk is full, with nothing left of it."""
        began, fresh = time.perf_counter(), self.folder / (name + FRESH)
        with contextlib.suppress(FileNotFoundError):
            fresh.unlink()
        try:
            count = write_chunks(fresh, _chunks(facts, tensors or {}))
            moved = time.perf_counter()
            os.replace(fresh, self.folder / name)
            sync(self.folder)
        except BaseException:
            with contextlib.suppress(OSError):
                fresh.unlink()
            raise
        self._bytes, self._moving = self._bytes + count, self._moving + moved - began
        self.seconds += time.perf_counter() - began
        return count

    def cost(self, nbytes: int) -> float:
        """Seconds that putting ``nbytes`` is expected to take."""
        rate = self._bytes / self._moving if self._bytes >= ENOUGH_BYTES and self._moving > 0 else USUAL_RATE
        return nbytes / rate

    def get(self, name: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]] | None:
        """Facts and tensors of a record; None where there is none that is whole."""
        try:
            with (self.folder / name).open("rb") as file:
                return _read(file)
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return None

    def later(self, name: str, check: bool = True) -> tuple[dict[str, Any], dict[str, Callable[[], torch.Tensor]]] | None:
        """As `get`, with functions that read one tensor each when they are called: memory for one at a time. Not ``check``: this process put the record, so its digest is not looked at."""
        path, found = self.folder / name, dict[str, Callable[[], torch.Tensor]]()
        try:
            with path.open("rb") as file:
                digest = hashlib.sha256()
                head = _head(file, digest)
                place = file.tell()
                for key, dtype, shape in head["tensors"]:
                    found[key] = partial(_read_at, path, place, TORCH_DTYPES[dtype], tuple(shape))
                    place += prod(shape) * TORCH_DTYPES[dtype].itemsize
                if os.fstat(file.fileno()).st_size != place + digest.digest_size:
                    return None
                while check and (left := place - file.tell()) > 0:
                    digest.update(file.read(min(left, PIECE)))
                if check and file.read() != digest.digest():
                    return None
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return None
        return head["facts"], found

    def facts(self, name: str) -> dict[str, Any] | None:
        """The facts of a record alone; the tensors are not read, nor the digest checked."""
        try:
            with (self.folder / name).open("rb") as file:
                facts: dict[str, Any] = _head(file, hashlib.sha256())["facts"]
                return facts
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return None

    def names(self) -> list[str]:
        """Of all records, sorted."""
        with contextlib.suppress(FileNotFoundError):
            return sorted(name for name in os.listdir(self.folder) if not name.endswith(FRESH))
        return []

    def drop(self, name: str) -> None:
        """Forget a record; that there was none is fine."""
        (self.folder / name).unlink(missing_ok=True)

    def size(self, name: str) -> int:
        """Bytes of a record."""
        return (self.folder / name).stat().st_size


def _chunks(facts: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> Iterator[Any]:
    table = [[name, dtype_name(tensor.dtype), list(tensor.shape)] for name, tensor in tensors.items()]
    head = json.dumps({"facts": facts, "tensors": table}).encode()
    digest = hashlib.sha256()
    chunks: list[bytes | memoryview] = [MAGIC, len(head).to_bytes(8, "little"), head, *(_raw(tensor) for tensor in tensors.values() if tensor.numel())]
    for chunk in chunks:
        digest.update(chunk)
        yield chunk
    yield digest.digest()


def _read_at(path: Path, place: int, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """A tensor of a record. Raises Interrupted where it is no longer there."""
    raw = torch.empty(prod(shape) * dtype.itemsize, dtype=torch.uint8)
    try:
        with path.open("rb") as file:
            file.seek(place)
            count = file.readinto(raw.numpy().data) if len(raw) else 0
    except OSError:
        count = -1
    if count != len(raw):
        raise Interrupted("What was kept of the run cannot be read any more.", where=path.name, fix="run again without --resume")
    return raw.view(dtype).reshape(shape)


def _raw(tensor: torch.Tensor) -> memoryview:
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _head(file: BufferedReader, digest: Any) -> dict[str, Any]:
    start = file.read(len(MAGIC) + 8)
    if start[: len(MAGIC)] != MAGIC:
        raise ValueError("no record")
    left = os.fstat(file.fileno()).st_size - file.tell()
    length = int.from_bytes(start[len(MAGIC) :], "little")
    if length > left:
        raise ValueError("shorter than its own head says")
    raw = file.read(length)
    digest.update(start)
    digest.update(raw)
    found: dict[str, Any] = json.loads(raw)
    return found


def _read(file: BufferedReader) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    digest = hashlib.sha256()
    head, tensors = _head(file, digest), {}
    left = os.fstat(file.fileno()).st_size - file.tell()
    for name, dtype, shape in head["tensors"]:
        nbytes = prod(shape) * TORCH_DTYPES[dtype].itemsize
        if nbytes > left:
            raise ValueError("shorter than its own head says")
        raw = torch.empty(nbytes, dtype=torch.uint8)
        if nbytes:
            view = raw.numpy().data
            if file.readinto(view) != nbytes:
                raise ValueError("shorter than its own head says")
            digest.update(view)
        tensors[name], left = raw.view(TORCH_DTYPES[dtype]).reshape(shape), left - nbytes
    if file.read() != digest.digest():
        raise ValueError("not what was written")
    return head["facts"], tensors
