"""How are the shards of a checkpoint written while its tensors are still being computed?

All names, shapes and dtypes are known beforehand, so each file's header is written first and the data follow in order, rows at a time: nothing is held, each byte is
hashed on its way out, and threads of their own hash and write while the next bytes are computed.
The order is one for the whole checkpoint, widest dtypes first and then by name, and is cut into shards: it does not depend on the shard size.
"""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from qmerge.errors import Refused
from qmerge.store.checkpoint import INDEX, SINGLE
from qmerge.store.direct import DirectWriter
from qmerge.store.durable import room_needed, sync, write_json
from qmerge.store.headers import MAX_HEADER_BYTES, dtype_name

MAX_SHARD_BYTES = 5_000_000_000
MOST_WAITING = 8
METADATA = {"format": "pt"}


@dataclass(frozen=True)
class OutTensor:
    """One tensor of the output: its dtype and its shape as the file holds it."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


def in_order(tensors: Sequence[OutTensor]) -> list[OutTensor]:
    """The order in which `ShardStream` takes them: widest dtypes first, so that all data is aligned, then by name."""
    return sorted(tensors, key=order_key)


def order_key(tensor: OutTensor) -> tuple[int, str]:
    return -tensor.dtype.itemsize, tensor.name


def cut(tensors: Sequence[OutTensor], max_shard_bytes: int) -> list[list[OutTensor]]:
    """Shards of at most ``max_shard_bytes`` of data each; a tensor that is larger gets one of its own."""
    shards: list[list[OutTensor]] = []
    room = 0
    for tensor in tensors:
        if not shards or tensor.nbytes > room:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(tensor)
        room -= tensor.nbytes
    return shards


def header(tensors: Sequence[OutTensor], metadata: Mapping[str, str]) -> bytes:
    """Length and JSON header of a file that holds ``tensors`` in this order."""
    table: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for tensor in tensors:
        start, end = end, end + tensor.nbytes
        table[tensor.name] = {"dtype": dtype_name(tensor.dtype), "shape": list(tensor.shape), "data_offsets": [start, end]}
    raw = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)
    if len(raw) > MAX_HEADER_BYTES:
        raise Refused("A shard would hold more tensors than a safetensors header can name.", found=f"{len(table)} tensors", fix="use smaller shards")
    return len(raw).to_bytes(8, "little") + raw


class ShardStream:
    """Writes a checkpoint front to back, or some of its shards. Their tensors come in ``order``; each may come in pieces, rows first to last.

    >>> with ShardStream(folder, tensors) as stream:
    ...     for tensor in stream.order:
    ...         stream.write(values(tensor.name))
    ...     weight_map = stream.finish()
    """

    def __init__(
        self, folder: Path, tensors: Sequence[OutTensor], max_shard_bytes: int = MAX_SHARD_BYTES, metadata: Mapping[str, str] = METADATA, done: Mapping[int, Mapping[str, Any]] | None = None,
        own: Collection[int] | None = None,
    ) -> None:  # fmt: skip
        """``done``: shard number, from 0 -> digest, of the shards that another stream has left finished in ``folder``. ``own``: numbers of those that this stream writes (where they are not
        done), when others write the rest meanwhile; all of them without it."""
        if not tensors:
            raise Refused("There are no tensors to write.", where=Path(folder).name, fix="this is a fault of qmerge: please report it with the command and the base's name")
        names = [tensor.name for tensor in tensors]
        if len(set(names)) != len(names):
            raise Refused("A tensor would be written twice.", where=next(name for name in names if names.count(name) > 1), fix="this is a fault of qmerge: please report it with the command and the base's name")
        self.folder, self.metadata = Path(folder), metadata
        self.order = in_order(tensors)
        self.shards = cut(self.order, max_shard_bytes)
        self.digests: dict[str, dict[str, Any]] = {}
        """file name -> ``{"sha256", "bytes"}`` of every finished file"""
        done = done or {}
        self.todo = [number for number in range(len(self.shards)) if number not in done and (own is None or number in own)]
        """the shards that this stream writes, in order"""
        self._place, self._left, self._writer = -1, 0, DirectWriter()
        self.digests |= {self.name_of(number): dict(digest) for number, digest in done.items()}
        self._begun, self._closed = len(done), list[Future[None]]()
        self._hasher = ThreadPoolExecutor(1)
        self._hash, self._count = hashlib.sha256(), 0
        self._hashing: deque[Future[None]] = deque()

    def __enter__(self) -> ShardStream:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._writer.stop()
        self._hasher.shutdown(wait=True)

    def name_of(self, number: int) -> str:
        return SINGLE if len(self.shards) == 1 else f"model-{number + 1:05d}-of-{len(self.shards):05d}.safetensors"

    def write(self, rows: torch.Tensor) -> None:
        """The next rows of the current tensor: contiguous, on the CPU, in the file's order. Raises Interrupted when the disk is full."""
        if not rows.numel():
            return
        view = rows.reshape(-1).view(torch.uint8).numpy().data
        while not self._left:
            self._open_next()
            if not self._left:  # a shard of empty tensors
                self._close()
        if len(view) > self._left:
            raise ValueError("more bytes than the shard holds")
        self._put(view)
        self._left -= len(view)
        if not self._left:
            self._close()

    @property
    def closed(self) -> int:
        """How many shards have all their bytes, on the disk or still on the way there."""
        return self._begun + len(self._closed)

    @property
    def inside(self) -> bool:
        """Is a shard begun and not yet closed?"""
        return self._left > 0

    @property
    def durable(self) -> list[int]:
        """The shards that this stream has brought to the disk, and hashed."""
        found = []
        for number, written in zip(self.todo, self._closed, strict=False):
            if not written.done() or written.exception() is not None or self.name_of(number) not in self.digests:
                break
            found.append(number)
        return found

    def settle(self) -> None:
        """Wait until all closed shards are `durable`. Raises Interrupted when the disk is full."""
        with room_needed(self.folder.name):
            self._writer.settle()
        while self._hashing:
            self._hashing.popleft().result()

    def finish(self, index: bool = True) -> dict[str, str]:
        """Write the ``index`` if there are several shards. Returns tensor -> file name, sorted. A tensor that was not written whole is a bug and raises."""
        while self._place + 1 < len(self.todo) and not self._left and not sum(tensor.nbytes for tensor in self.shards[self.todo[self._place + 1]]):
            self._open_next()  # a shard of empty tensors has a header all the same
            self._close()
        if self._left or self._place != len(self.todo) - 1:
            raise RuntimeError("the checkpoint was not written to its end")
        weight_map = {tensor.name: self.name_of(number) for number, shard in enumerate(self.shards) for tensor in shard}
        weight_map = dict(sorted(weight_map.items()))
        if len(self.shards) > 1 and index:
            write_json(self.folder / INDEX, {"metadata": {"total_size": sum(tensor.nbytes for tensor in self.order)}, "weight_map": weight_map})
        self.settle()
        sync(self.folder)
        return weight_map

    @property
    def _number(self) -> int:
        return self.todo[self._place]

    def _open_next(self) -> None:
        self._place += 1
        path, first = self.folder / self.name_of(self._number), header(self.shards[self._number], self.metadata)
        self._left, self._hash, self._count = sum(tensor.nbytes for tensor in self.shards[self._number]), hashlib.sha256(), 0
        with room_needed(path.name):
            self._writer.open(path, len(first) + self._left)
        self._put(memoryview(first))

    def _put(self, view: memoryview) -> None:
        """Hash and write, each in a thread of its own; the bytes must stay as they are."""
        self._hashing.append(self._hasher.submit(self._hash.update, view))
        self._count += len(view)
        with room_needed(self.name_of(self._number)):
            self._writer.write(view)
        while len(self._hashing) > MOST_WAITING:
            self._hashing.popleft().result()

    def _close(self) -> None:
        with room_needed(self.name_of(self._number)):
            self._closed.append(self._writer.close())
        self._hashing.append(self._hasher.submit(self._note, self.name_of(self._number), self._hash, self._count))

    def _note(self, name: str, digest: Any, count: int) -> None:
        self.digests[name] = {"sha256": digest.hexdigest(), "bytes": count}
