"""How do one tensor's bytes get from a file into memory?

Plain ``pread`` into a fresh tensor: no memory map (a file that changes underneath would crash the process, not raise), no
other bytes than those asked for, and the result is writable and shares memory with nothing. Threads may read one file at once.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

import torch

from qmerge.errors import Interrupted, Refused
from qmerge.store.headers import TORCH_DTYPES
from qmerge.store.regular import open_plain
from qmerge.types import TensorSpec

GONE = (errno.ENOENT, errno.EIO, errno.ESTALE, errno.ENODEV, errno.ENXIO, errno.ETIMEDOUT, errno.ENOTCONN, errno.EMFILE, errno.ENFILE, errno.ENOMEM)
"""the file was there when its header was read: a disk that fails, is unmounted or out of reach may come back, and hours of work with it"""
_CHUNK = 1 << 30  # Linux reads at most 2 GiB at a time


def read_tensor(folder: Path, spec: TensorSpec) -> torch.Tensor:
    """The tensor that ``spec`` describes, from ``folder / spec.file``: its shape and dtype, contiguous, on the CPU.

    Raises Refused when the file cannot be read or has become shorter than its header said, Interrupted when its disk has failed or gone away.
    """
    return read_bytes(folder, spec, 0, spec.nbytes).view(TORCH_DTYPES[spec.dtype]).reshape(spec.shape)


def read_rows(folder: Path, spec: TensorSpec, start: int, stop: int) -> torch.Tensor:
    """Rows ``start`` to ``stop`` of the first dimension, ``[stop - start, ...]``, as `read_tensor` gives them. Raises ValueError outside of the tensor."""
    if not spec.shape or not 0 <= start <= stop <= spec.shape[0]:
        raise ValueError(f"{spec.name}: rows {start} to {stop} of shape {spec.shape}")
    width = spec.nbytes // spec.shape[0] if spec.shape[0] else 0
    return read_bytes(folder, spec, start * width, stop * width).view(TORCH_DTYPES[spec.dtype]).reshape(stop - start, *spec.shape[1:])


def read_bytes(folder: Path, spec: TensorSpec, start: int, stop: int) -> torch.Tensor:
    """Bytes ``start`` to ``stop`` of a tensor's data as uint8 ``[stop - start]``, whatever its dtype. Raises as `read_tensor`; ValueError outside of the
    tensor."""
    if not 0 <= start <= stop <= spec.nbytes:
        raise ValueError(f"{spec.name}: bytes {start} to {stop} of {spec.nbytes}")
    where, wanted = f"tensor {spec.name!r} in {spec.file}", stop - start
    raw = torch.empty(wanted, dtype=torch.uint8)
    if not wanted:
        return raw
    view = raw.numpy().data
    try:
        with open_plain(folder / spec.file) as file:
            handle, done = file.fileno(), 0
            while done < wanted:
                count = os.preadv(handle, [view[done : done + _CHUNK]], spec.start + start + done)
                if count == 0:
                    raise Refused("A weight file became shorter while it was being read.", where=where,
                                  expected=f"{wanted} bytes", found=f"{done} bytes", fix="leave the inputs alone and run again")
                done += count
    except OSError as error:
        if error.errno in GONE:
            raise Interrupted("A weight file cannot be read any more.", where=where, found=error.strerror, fix="see that the disk is there and works, then run the same command again") from None
        raise Refused("A weight file cannot be read.", where=where, found=error.strerror, fix="see that it may be read (ls -l), then run the same command again") from None
    return raw
