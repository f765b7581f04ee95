"""How is one tensor of a base read, some rows at a time, as fp32?"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from qmerge.device import runs_triton
from qmerge.numerics import nf4
from qmerge.store.tensors import read_rows, read_tensor
from qmerge.types import CodedRows, QuantState, TensorSpec

Device = torch.device | str
BNB_BLOCK_SIZES = (32, 64, 128, 256, 512, 1024)
"""those that bitsandbytes' kernels decode themselves; its C++ for CPUs leaves larger ones to a slow path"""


@dataclass(frozen=True)
class Reader:
    """One tensor, opened: holds its small parts (block maxima, scales), reads the rest on demand. Several threads may share one.

    ``shape`` is ``[out, in]`` for linears; ``row_step`` is what every ``start`` must be a multiple of.
    """

    shape: tuple[int, ...]
    row_step: int
    read: Callable[[int, int, torch.device], torch.Tensor]
    fetch: Callable[[int, int, torch.device], CodedRows] | None = None
    """for 4-bit weights: rows as they are stored"""

    def coded(self, start: int, stop: int, device: Device = "cpu") -> CodedRows | None:
        """The rows that `rows` would decode, as they are stored; None where they are not in 4 bits."""
        self._check(start, stop)
        return None if self.fetch is None else self.fetch(start, stop, torch.device(device))

    def rows(self, start: int, stop: int, device: Device = "cpu") -> torch.Tensor:
        """Rows ``start`` to ``stop``, fp32 ``[stop - start, ...]`` on ``device``, fresh and writable. A tensor without dimensions is its own row 0 to 1."""
        self._check(start, stop)
        return self.read(start, stop, torch.device(device))

    def all(self, device: Device = "cpu") -> torch.Tensor:
        return self.rows(0, count_rows(self.shape), device)

    def _check(self, start: int, stop: int) -> None:
        if not 0 <= start <= stop <= count_rows(self.shape) or start % self.row_step:
            raise ValueError(f"rows {start} to {stop} of {self.shape}: starts must be multiples of {self.row_step}")


def count_rows(shape: tuple[int, ...]) -> int:
    return shape[0] if shape else 1


def whole_reader(shape: tuple[int, int], load: Callable[[torch.device], torch.Tensor]) -> Reader:
    """For weights whose rows do not lie together in the file: ``load`` gives fp32 ``[out, in]``."""
    return Reader(shape, max(1, shape[0]), lambda start, stop, device: load(device)[start:stop])


def float_reader(folder: Path, spec: TensorSpec, turned: bool, through: torch.dtype | None = None) -> Reader:
    """A float tensor. ``turned``: the file holds ``[in, out]``. ``through``: the dtype that it was loaded in while the adapter was trained, where it may
    differ."""

    def widen(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        there = tensor.to(device)
        return (there.to(through) if through is not None and there.is_floating_point() else there).float()

    if turned:
        return whole_reader((spec.shape[1], spec.shape[0]), lambda device: widen(read_tensor(folder, spec).T.contiguous(), device))
    if not spec.shape:
        return Reader((), 1, lambda start, stop, device: widen(read_tensor(folder, spec), device))
    return Reader(tuple(spec.shape), 1, lambda start, stop, device: widen(read_rows(folder, spec, start, stop), device))


def four_bit_step(shape: tuple[int, ...], block_size: int) -> int:
    """How many rows it takes until codes fill bytes and blocks again: ``four_bit_step((8, 96), 64) == 2``."""
    aligned = math.lcm(block_size, 2)
    return aligned // math.gcd(aligned, shape[1])


def four_bit_reader(state: QuantState, fetch: Callable[[int, int], torch.Tensor]) -> Reader:
    """Rows of a bitsandbytes weight. ``fetch`` gives bytes ``[start, stop)`` of its codes as uint8, on the CPU or wherever they are kept."""
    inputs, block_size = state.shape[1], state.block_size
    absmax, levels = nf4.effective_absmax(state).float().cpu(), state.code.float().cpu()
    table = nf4.pair_table(levels)
    known = block_size in BNB_BLOCK_SIZES and torch.equal(levels, nf4.code_book(state.quant_type))

    def coded(start: int, stop: int, device: torch.device) -> CodedRows:
        first, count = start * inputs, (stop - start) * inputs
        packed = fetch(first // 2, (first + count + 1) // 2).to(device)
        maxima = absmax[first // block_size : -(-(first + count) // block_size)].to(device)
        return CodedRows(packed, maxima, levels.to(device), block_size, stop - start, inputs)

    def read(start: int, stop: int, device: torch.device) -> torch.Tensor:
        rows = coded(start, stop, device)
        count = rows.rows * inputs
        if device.type != "cpu" and known and count and count % 2 == 0:
            return decode_flat(rows.packed, rows.absmax, state, count).view(rows.rows, inputs)
        if runs_triton(device):
            from qmerge.numerics import merge_kernels

            return merge_kernels.decode(rows)
        return nf4.decode(rows.packed, rows.absmax, table.to(device), block_size, count).view(rows.rows, inputs)

    return Reader(tuple(state.shape), four_bit_step(state.shape, block_size), read, coded)


def decode_flat(packed: torch.Tensor, absmax: torch.Tensor, state: QuantState, count: int) -> torch.Tensor:
    """fp32 ``[count]`` by bitsandbytes' kernels, where ``packed`` lies. ``absmax`` are fp32 block maxima, nesting undone.

    As one row: its AVX512 kernel (0.50) misreads weights ``[out, in]`` whose width is no multiple of the block size.
    """
    import bitsandbytes.functional as bnb

    as_row = bnb.QuantState(absmax, shape=torch.Size((1, count)), code=nf4.code_book(state.quant_type, packed.device), blocksize=state.block_size,
                            quant_type=state.quant_type, dtype=torch.float32)
    return bnb.dequantize_4bit(packed, quant_state=as_row).reshape(-1)
