"""How do tensors become safetensors files that every loader reads?

Own serializer rather than ``safetensors.torch.save_file``: that one leaves files with mode 0600 whatever the umask, and does not
fsync. The bytes follow its rules: widest dtypes first (so that all data is aligned), then by name, header padded to 8 bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qmerge.errors import Refused
from qmerge.store.checkpoint import INDEX, SINGLE
from qmerge.store.durable import sync, write_chunks, write_json
from qmerge.store.headers import MAX_HEADER_BYTES, dtype_name
from qmerge.store.pending import WAITING_BYTES, Pending, Waiting

MAX_SHARD_BYTES = 5_000_000_000


class ShardWriter:
    """Collects tensors and writes a shard whenever the next tensor would not fit. Beyond ``held_bytes`` they wait in a file without a name beside the shards, not in memory.

    The same tensors in the same order give the same bytes. Nothing has its final name before :meth:`finish`. A writer that goes on after another one
    gets its ``done`` shards (`Shard`, first to last): tensors that lie in those need not be added, and are left aside where they are.

    >>> writer = ShardWriter(folder); writer.add("lm_head.weight", tensor); writer.finish()
    {'lm_head.weight': 'model.safetensors'}
    """

    def __init__(
        self, folder: Path, max_shard_bytes: int = MAX_SHARD_BYTES, metadata: Mapping[str, str] | None = None, done: Sequence[Shard] = (), finished: Callable[[int, Shard], None] = lambda *_: None,
        held_bytes: int = WAITING_BYTES,
    ) -> None:  # fmt: skip
        """``folder`` must exist; ``max_shard_bytes`` counts tensor bytes. A tensor that is larger gets a shard of its own. ``finished`` gets the number of each shard that is on the disk."""
        if max_shard_bytes <= 0:
            raise ValueError("max_shard_bytes must be positive")
        self.folder, self.max_shard_bytes = Path(folder), max_shard_bytes
        self.metadata = {"format": "pt"} if metadata is None else dict(metadata)
        self.total_bytes = sum(shard.tensor_bytes for shard in done)
        self._shards, self._told = list(done), finished
        self._done = {name for shard in done for name in shard.names}
        self._names: set[str] = set(self._done)
        self.digests: dict[str, dict[str, Any]] = {}
        """after `finish`: file name -> ``{"sha256", "bytes"}`` of every shard"""
        self._pending = Pending(self.folder, held_bytes)
        self._finished = False

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Take ``tensor`` as it is now. Raises Refused for a name that was added before, an empty one, and dtypes without a
        safetensors spelling; Interrupted when a shard was due and the disk is full."""
        if self._finished:
            raise RuntimeError("the writer is finished")
        if name in self._done:
            return
        if not name or name == "__metadata__" or name in self._names:
            raise Refused("A tensor would be written twice." if name in self._names else "A tensor has no usable name.", where=f"tensor {name!r}", fix="this is a fault of qmerge: please report it with the command and the base's name")
        dtype_name(tensor.dtype)
        nbytes = tensor.numel() * tensor.element_size()
        if self._pending.specs and self._pending.nbytes + nbytes > self.max_shard_bytes:
            self._flush()
        self._names.add(name)
        self._pending.add(name, tensor.detach())
        self.total_bytes += nbytes

    def add_all(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """`add` for each."""
        for name, tensor in tensors:
            self.add(name, tensor)

    def finish(self) -> dict[str, str]:
        """Write the last shard, give all their final names, write the index if there are several. Returns tensor -> file name, sorted."""
        if self._finished:
            raise RuntimeError("the writer is finished")
        if not self._names:
            raise Refused("There are no tensors to write.", where=self.folder.name, fix="this is a fault of qmerge: please report it with the command and the base's name")
        self._flush()
        self._finished = True
        count = len(self._shards)
        weight_map: dict[str, str] = {}
        for index, shard in enumerate(self._shards):
            final = SINGLE if count == 1 else f"model-{index + 1:05d}-of-{count:05d}.safetensors"
            os.rename(temporary(self.folder, index), self.folder / final)
            weight_map |= dict.fromkeys(shard.names, final)
            self.digests[final] = shard.digest
        weight_map = dict(sorted(weight_map.items()))
        if count > 1:
            write_json(self.folder / INDEX, {"metadata": {"total_size": self.total_bytes}, "weight_map": weight_map})
        sync(self.folder)
        return weight_map

    def _flush(self) -> None:
        if not self._pending.specs:  # all of it was there already
            return
        digest, count = hashlib.sha256(), 0

        def hashed() -> Iterator[Any]:
            nonlocal count
            for chunk in serialize(self._pending.specs, self._pending.read, self.metadata):
                digest.update(chunk)
                count += memoryview(chunk).nbytes
                yield chunk

        number = len(self._shards)
        write_chunks(temporary(self.folder, number), hashed())
        self._shards.append(Shard(sorted(self._pending.specs), self._pending.nbytes, {"sha256": digest.hexdigest(), "bytes": count}))
        self._pending.clear()
        self._told(number, self._shards[-1])


@dataclass(frozen=True)
class Shard:
    """A finished file: the tensors in it and their bytes, and the file's own ``{"sha256", "bytes"}``."""

    names: list[str]
    tensor_bytes: int
    digest: dict[str, Any]


def temporary(folder: Path, number: int) -> Path:
    """What shard ``number``, counted from 0, is called before all are there."""
    return Path(folder) / f".shard-{number + 1:05d}.tmp"


def number_of(name: str) -> int | None:
    """The number of the shard with this final or temporary name, None where it is no shard's."""
    if name == SINGLE:
        return 0
    found = re.fullmatch(r"\.shard-(\d{5,})\.tmp|model-(\d{5,})-of-\d{5,}\.safetensors", name)
    return int(found[1] or found[2]) - 1 if found else None


def serialize(tensors: Mapping[str, Waiting], read: Callable[[str], memoryview], metadata: Mapping[str, str]) -> Iterator[Any]:
    """The bytes of one safetensors file, in pieces: length, header, then each tensor's data, which ``read`` gives by name."""
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    end = 0
    for name in order:
        tensor = tensors[name]
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": dtype_name(tensor.dtype), "shape": list(tensor.shape), "data_offsets": [start, end]}
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)
    if len(raw) > MAX_HEADER_BYTES:
        raise Refused("A shard would hold more tensors than a safetensors header can name.", found=f"{len(order)} tensors", fix="use smaller shards")
    yield len(raw).to_bytes(8, "little")
    yield raw
    for name in order:
        yield read(name)
