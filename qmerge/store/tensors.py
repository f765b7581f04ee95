"""How do one tensor's bytes get from a file into memory?

Plain ``pread`` into a fresh tensor: no memory map (a file that changes underneath would crash the process, not raise), no
other bytes than the tensor's own, and the result is writable and shares memory with nothing.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch

from qmerge.errors import Refused
from qmerge.store.headers import TORCH_DTYPES
from qmerge.types import TensorSpec

_CHUNK = 1 << 30  # Linux reads at most 2 GiB at a time


def read_tensor(folder: Path, spec: TensorSpec) -> torch.Tensor:
    """The tensor that ``spec`` describes, from ``folder / spec.file``: its shape and dtype, contiguous, on the CPU.

    Raises Refused when the file cannot be read or has become shorter than its header said.
    """
    where = f"tensor {spec.name!r} in {spec.file}"
    dtype = TORCH_DTYPES[spec.dtype]
    if spec.nbytes == 0:
        return torch.empty(spec.shape, dtype=dtype)
    raw = torch.empty(spec.nbytes, dtype=torch.uint8)
    view = memoryview(raw.numpy())
    try:
        handle = os.open(folder / spec.file, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        try:
            done = 0
            while done < spec.nbytes:
                count = os.preadv(handle, [view[done : done + _CHUNK]], spec.start + done)
                if count == 0:
                    raise Refused("A weight file became shorter while it was being read.", where=where,
                                  expected=f"{spec.nbytes} bytes", found=f"{done} bytes", fix="leave the inputs alone and run again")
                done += count
        finally:
            os.close(handle)
    except OSError as error:
        raise Refused("A weight file cannot be read.", where=where, found=error.strerror) from None
    return raw.view(dtype).reshape(spec.shape)
