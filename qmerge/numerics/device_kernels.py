"""The column loops on an accelerator: rounding and coordinate descent of a block of columns in one launch each, in Triton.

The plain tensor code beside it (`gptq._round_block`, `polish._descend`) launches half a dozen kernels per column; here a program holds the block of some rows in
registers and goes through the columns itself. Rows are independent, so programs never meet. Checked against that code in Triton's interpreter; not yet run on a device, as none was lent so far.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from qmerge.device import launching_on
from qmerge.types import known

ROWS = 32
"""rows of the weight per program: with 64 columns in fp32 that is 8 KB of registers"""
LEVELS = 16


@triton.jit
def _nearest(wanted, scale, zero, levels, bounds, top, BOOK: tl.constexpr, LEVELS: tl.constexpr):  # noqa: ANN001, ANN202, N803  Triton's own types and spelling
    """(code int32, value) of the grid values nearest to ``wanted``; halves go to even, a value on a code book's bound to the lower level."""
    ratio = wanted / scale
    if BOOK:
        code = tl.zeros(wanted.shape, tl.int32)
        for index in range(LEVELS - 1):
            code += (ratio > tl.load(bounds + index)).to(tl.int32)
        return code, tl.load(levels + code) * scale
    far = tl.minimum(tl.maximum(ratio, -1048576.0), 1048576.0)
    rounded = (far + 12582912.0) - 12582912.0  # 1.5 * 2^23: what is left has no fraction
    shown = tl.minimum(tl.maximum(rounded + zero, 0.0), top)
    return shown.to(tl.int32), (shown - zero) * scale


@triton.jit
def _round(work, scale, zero, levels, bounds, upper, inverse, codes, errors, columns, rows, stride, top, BOOK: tl.constexpr, LEVELS: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr):  # noqa: ANN001, ANN202, N803
    k = tl.arange(0, BLOCK)
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    here = (k[:, None] < columns) & (r[None, :] < rows)
    tile = tl.load(work + k[:, None] * rows + r[None, :], mask=here, other=0.0)
    for j in range(columns):
        wanted = tl.sum(tl.where(k[:, None] == j, tile, 0.0), axis=0)
        s = tl.load(scale + j * rows + r, mask=r < rows, other=1.0)
        z = s if BOOK else tl.load(zero + j * rows + r, mask=r < rows, other=0.0)
        code, value = _nearest(wanted, s, z, levels, bounds, top, BOOK, LEVELS)
        error = (wanted - value) * tl.load(inverse + j)
        tl.store(codes + j * rows + r, code.to(tl.uint8), mask=r < rows)
        tl.store(errors + j * rows + r, error, mask=r < rows)
        feed = tl.load(upper + j * stride + k, mask=(k > j) & (k < columns), other=0.0)
        tile -= feed[:, None] * error[None, :]


@triton.jit
def _descend(current, gradient, scale, zero, levels, bounds, matrix, steps, codes, moved, columns, rows, stride, top, BOOK: tl.constexpr, LEVELS: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr):  # noqa: ANN001, ANN202, N803
    k = tl.arange(0, BLOCK)
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    here = (k[:, None] < columns) & (r[None, :] < rows)
    tile = tl.load(gradient + k[:, None] * rows + r[None, :], mask=here, other=0.0)
    for j in range(columns):
        slope = tl.sum(tl.where(k[:, None] == j, tile, 0.0), axis=0)
        old = tl.load(current + j * rows + r, mask=r < rows, other=0.0)
        s = tl.load(scale + j * rows + r, mask=r < rows, other=1.0)
        z = s if BOOK else tl.load(zero + j * rows + r, mask=r < rows, other=0.0)
        code, value = _nearest(old - slope * tl.load(steps + j), s, z, levels, bounds, top, BOOK, LEVELS)
        change = value - old
        tl.store(codes + j * rows + r, code.to(tl.uint8), mask=r < rows)
        tl.store(current + j * rows + r, value, mask=r < rows)
        tl.store(moved + j * rows + r, change, mask=r < rows)
        tile += tl.load(matrix + k * stride + j, mask=k < columns, other=0.0)[:, None] * change[None, :]


def round_block(
    work: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, levels: torch.Tensor | None, top: int, upper: torch.Tensor, inverse: torch.Tensor, codes: torch.Tensor, errors: torch.Tensor
) -> None:
    """Fill ``codes`` uint8 and ``errors`` fp32 ``[columns, rows]`` from ``work``, which is only read. ``scale`` and ``zero`` have its shape, ``upper`` is ``[columns, columns]``, ``inverse`` ``[columns]``.

    ``levels`` ``[16]``, sorted: a code book, else integers 0..``top``.
    """
    columns, rows, grid = _shape(work)
    work, scale, upper, inverse = (part.contiguous() for part in (work, scale, upper, inverse))
    with launching_on(work.device):
        _round[grid](work, scale, *_grid(scale, zero, levels), upper, inverse, codes, errors, columns, rows, upper.stride(0), float(top), levels is not None, LEVELS, triton.next_power_of_2(columns), ROWS)  # fmt: skip


def descend_block(
    current: torch.Tensor, gradient: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, levels: torch.Tensor | None, top: int, matrix: torch.Tensor, steps: torch.Tensor, codes: torch.Tensor, moved: torch.Tensor
) -> None:
    """Move each of the block's columns once to the grid value that is best given the others: ``codes``, ``current`` and ``moved`` (new minus old) ``[columns, rows]`` are written.

    ``gradient`` is E (H + λI) of these columns and only read, ``matrix`` ``[columns, columns]`` the block's part of H + λI, ``steps`` 1 / its diagonal.
    """
    columns, rows, grid = _shape(current)
    if not all(part.is_contiguous() for part in (current, codes, moved)):
        raise ValueError("what is written in place must be contiguous")
    gradient, scale, matrix, steps = (part.contiguous() for part in (gradient, scale, matrix, steps))
    with launching_on(current.device):
        _descend[grid](current, gradient, scale, *_grid(scale, zero, levels), matrix, steps, codes, moved, columns, rows, matrix.stride(0), float(top), levels is not None, LEVELS, triton.next_power_of_2(columns), ROWS)  # fmt: skip


def _shape(weight: torch.Tensor) -> tuple[int, int, tuple[int]]:
    columns, rows = weight.shape
    return columns, rows, (triton.cdiv(rows, ROWS),)


def _grid(scale: torch.Tensor, zero: torch.Tensor | None, levels: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(zero, levels, bounds); what a grid does not have is stood in for by ``scale``, and never read."""
    if levels is not None:
        return scale, levels.contiguous(), ((levels[:-1] + levels[1:]) / 2).contiguous()
    return known(zero).contiguous(), scale, scale
