"""Where do the tensors of a shard wait until it is complete?"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

import torch

from qmerge.errors import Interrupted
from qmerge.store.durable import room_needed

WAITING_BYTES = 256 << 20
PLACE = "what a shard is collected in"


@dataclass(frozen=True)
class Waiting:
    """``place``: of its first byte in the file; None where ``data`` holds it."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    data: torch.Tensor | None
    place: int | None

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class Pending:
    """Tensors by name, up to ``held_bytes`` of them in memory, all others in a file of ``folder`` that has no name, so that nothing is left of it whatever ends the process."""

    def __init__(self, folder: Path, held_bytes: int = WAITING_BYTES) -> None:
        self.folder, self.held_bytes = folder, held_bytes
        self.specs: dict[str, Waiting] = {}
        self.nbytes = self._held = self._end = 0
        self._file: FileIO | None = None

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Take ``tensor`` as it is now. Raises Interrupted where the disk is full."""
        nbytes = tensor.numel() * tensor.element_size()
        shape = tuple(tensor.shape)
        if self._held + nbytes <= self.held_bytes:
            self.specs[name] = Waiting(tensor.dtype, shape, tensor.to("cpu", copy=True, memory_format=torch.contiguous_format), None)
            self._held += nbytes
        else:
            self.specs[name] = Waiting(tensor.dtype, shape, None, self._end)
            with room_needed(PLACE):
                if self._file is None:
                    self._file = tempfile.TemporaryFile(dir=self.folder, buffering=0)
                self._file.seek(self._end)
                view = _bytes(tensor.to("cpu").contiguous())
                while len(view):
                    view = view[self._file.write(view) :]
            self._end += nbytes
        self.nbytes += nbytes

    def read(self, name: str) -> memoryview:
        """The bytes of a tensor."""
        waiting = self.specs[name]
        if waiting.data is not None:
            return _bytes(waiting.data)
        raw = memoryview(bytearray(waiting.nbytes))
        count = 0
        if self._file is not None and waiting.place is not None:
            self._file.seek(waiting.place)
            while count < len(raw) and (more := self._file.readinto(raw[count:])):
                count += more
        if count != len(raw):
            raise Interrupted("What was collected for a shard cannot be read again.", where=name, expected=f"{len(raw)} bytes", found=f"{count} bytes", fix="run again with --resume; check the disk")
        return raw

    def clear(self) -> None:
        """All of it is written."""
        if self._file is not None:
            self._file.close()
        self.specs, self.nbytes, self._held, self._end, self._file = {}, 0, 0, 0, None


def _bytes(tensor: torch.Tensor) -> memoryview:
    return tensor.reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else memoryview(b"")

