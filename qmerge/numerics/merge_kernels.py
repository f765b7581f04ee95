"""Rows of a weight on an accelerator, decoded from 4 bits and merged with a low-rank product in one pass over what comes out, in Triton.

`W + s · B A` is summed as a CPU's library sums it for the ranks of usual adapters: over the rank from first to last, each step one fused multiply-add in fp32 (no TF32, no other order
for other sizes), then times s, then plus W, each rounded once. So the bytes of a merge do not depend on where it ran, nor on how its rows were cut. Checked in Triton's interpreter
and by Triton's compiler for two generations of devices; not yet run on one, as none was lent so far.
"""

from __future__ import annotations

import threading

import torch
import triton
import triton.language as tl

from qmerge.device import launching_on
from qmerge.types import CodedRows, two_axes

ROWS, COLUMNS = 16, 128
"""of the tile that a program merges: 16 fp32 sums for each of its 128 threads"""
BYTES, RUN = 1024, 4
"""of codes that a program decodes where nothing is added, and how many of them share one look at the block's maximum (fewer where a block is no multiple of that)"""
EXACT = {"enable_fp_fusion": False}
"""else the compiler joins ``level · absmax + …`` and ``… · s + W`` into one rounding, which no CPU does"""

_ONE_AT_A_TIME = threading.Lock()
"""stretches are merged by several threads, and Triton compiles for the first of them; a launch takes microseconds"""


@triton.jit
def _pairs(byte, levels, scale):  # noqa: ANN001, ANN202  Triton's own types
    """Bytes ``[…, n]`` and their blocks' maxima to fp32 ``[…, 2 n]``; the even element sits in the high nibble."""
    code = byte.to(tl.int32)
    return tl.interleave(tl.load(levels + (code >> 4)) * scale, tl.load(levels + (code & 15)) * scale)


@triton.jit
def _decode(packed, absmax, levels, out, count, nbytes, BLOCK: tl.constexpr, WIDE: tl.constexpr, RUN: tl.constexpr, RUNS: tl.constexpr):  # noqa: ANN001, ANN202, N803
    program = tl.program_id(0).to(tl.int64) if WIDE else tl.program_id(0)
    first = (program * RUNS + tl.arange(0, RUNS)) * RUN
    at = first[:, None] + tl.arange(0, RUN)[None, :]
    byte = tl.load(packed + at, mask=at < nbytes, other=0)
    scale = tl.load(absmax + first // (BLOCK // 2), mask=first < nbytes, other=0.0)  # a block is whole bytes, and a run of them lies in one
    to = 2 * first[:, None] + tl.arange(0, 2 * RUN)[None, :]
    tl.store(out + to, _pairs(byte, levels, scale[:, None]), mask=to < count)


@triton.jit
def _merge(source, absmax, levels, left, right, before, out, rows, columns, high, half, across, rank, factor, CODED: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # noqa: ANN001, ANN202, N803
    down, over = tl.program_id(0) // across, tl.program_id(0) % across
    r = down * ROWS + tl.arange(0, ROWS)
    c = over * COLUMNS + tl.arange(0, COLUMNS)
    first = r.to(tl.int64) if WIDE else r
    at = first[:, None] * columns + c[None, :]
    here = (r < rows)[:, None] & (c < columns)[None, :]
    if CODED == "pairs":  # rows begin with a byte: each is read once
        b = over * (COLUMNS // 2) + tl.arange(0, COLUMNS // 2)
        byte_at = first[:, None] * half + b[None, :]
        there = (r < rows)[:, None] & (b < half)[None, :]
        byte = tl.load(source + byte_at, mask=there, other=0)
        base = _pairs(byte, levels, tl.load(absmax + byte_at // (BLOCK // 2), mask=there, other=0.0))
    elif CODED == "nibbles":  # odd rows of an odd width begin within one
        byte = tl.load(source + (at >> 1), mask=here, other=0).to(tl.int32)
        base = tl.load(levels + tl.where(at & 1 == 0, byte >> 4, byte & 15)) * tl.load(absmax + at // BLOCK, mask=here, other=0.0)
    else:
        base = tl.load(source + at, mask=here, other=0.0)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for k in range(rank):
        one = tl.load(left + k * high + r)  # padded to whole tiles: without a mask four rows are one load
        two = tl.load(right + k * columns + c, mask=c < columns, other=0.0)
        total = tl.fma(tl.broadcast_to(one[:, None], (ROWS, COLUMNS)), tl.broadcast_to(two[None, :], (ROWS, COLUMNS)), total)
    if CODED != "floats":
        tl.store(before + at, base, mask=here)
    tl.store(out + at, total * factor + base, mask=here)


def decode(coded: CodedRows, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Weights ``[rows, columns]`` in ``dtype``, computed in fp32 and rounded once: the bits of `nf4.decode`."""
    out = torch.empty(coded.rows, coded.columns, dtype=dtype, device=coded.packed.device)
    count, half_block = out.numel(), coded.block_size // 2
    run = min(RUN, half_block & -half_block)
    if count:
        with launching_on(out.device), _ONE_AT_A_TIME:
            _decode[(triton.cdiv(count, 2 * BYTES),)](coded.packed, coded.absmax, coded.levels, out, count, coded.packed.numel(), coded.block_size, _wide(count), run, BYTES // run, **EXACT)
    return out


def merge(source: CodedRows | torch.Tensor, left: torch.Tensor, right: torch.Tensor, scaling: float, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """``(W, W + scaling · left @ right)``, W in fp32 and the sum in ``dtype``, both ``[rows, columns]``. ``source``: W's codes, or W itself in fp32, which then comes back as it is.

    ``left`` ``[rows, rank]`` and ``right`` ``[rank, columns]`` are fp32, all tensors on one device. Raises ValueError where shapes or dtypes do not fit: a kernel would read past their ends.
    """
    stored = source if isinstance(source, CodedRows) else None
    rows, columns = (source.rows, source.columns) if isinstance(source, CodedRows) else two_axes(source.shape)
    rank = right.shape[0]
    if tuple(left.shape) != (rows, rank) or right.shape[1] != columns or {left.dtype, right.dtype} != {torch.float32}:
        raise ValueError(f"fp32 [{rows}, {rank}] and [{rank}, {columns}] are wanted, not {left.dtype} {list(left.shape)} and {right.dtype} {list(right.shape)}")
    before = source.contiguous() if isinstance(source, torch.Tensor) else torch.empty(rows, columns, device=left.device)
    out = torch.empty(rows, columns, dtype=dtype, device=left.device)
    if out.numel():
        parts = (before, before, before) if stored is None else (stored.packed, stored.absmax, stored.levels)  # what is not there is never read
        kind = "floats" if stored is None else "nibbles" if columns % 2 else "pairs"
        down, across = triton.cdiv(rows, ROWS), triton.cdiv(columns, COLUMNS)
        turned = torch.nn.functional.pad(left.T, (0, down * ROWS - rows)).contiguous()
        with launching_on(out.device), _ONE_AT_A_TIME:
            _merge[down * across,](*parts, turned, right.contiguous(), before, out, rows, columns, turned.shape[1], columns // 2, across, rank, float(scaling), kind, stored.block_size if stored else 2, _wide(out.numel()), ROWS, COLUMNS, **EXACT)
    return before, out


def _wide(count: int) -> bool:
    """Do 32 bits not number the elements, those past the edges of the last tiles among them?"""
    return count >= 2**31 - 2**24
