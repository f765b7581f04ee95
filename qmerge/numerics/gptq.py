"""How is a weight rounded onto a grid so that the layer's output moves least?

GPTQ (Frantar et al., 2022): columns are rounded one at a time, in descending order of diag(H), and each column's error is
fed into the columns that are still free, through the inverse Hessian. The order is the solver's own affair: scales belong to the original
column order, so the file needs no activation order. The grid is a parameter; the same loop serves integers and NF4.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from qmerge.device import runs_triton
from qmerge.numerics.hessian import Factor
from qmerge.types import Grid, known


@dataclass(frozen=True)
class ElementGrid:
    """The grid of every element, ready for the column loop.

    int: value = ``scale * (code - zero)``, code 0..top. Code book: value = ``scale * levels[code]`` with sorted levels, ``zero`` is None.
    """

    scales: torch.Tensor
    """fp32 ``[in, out]`` (transposed, so that a column is contiguous); ``[groups, out]`` where there is a ``group``"""
    zeros: torch.Tensor | None = None
    """as ``scales``"""
    top: int = 15
    levels: torch.Tensor | None = None
    group: torch.Tensor | None = None
    """int64 ``[in]``: the row of ``scales`` that each column has"""
    size: int = 0
    """where columns are in the file's order and groups have as many of them each"""

    @property
    def scale(self) -> torch.Tensor:
        """``[in, out]``; made when it is asked for, where columns share it."""
        return self.scales if self.group is None else self.scales[self.group]

    @property
    def zero(self) -> torch.Tensor | None:
        return self.zeros if self.zeros is None or self.group is None else self.zeros[self.group]

    @property
    def bounds(self) -> torch.Tensor:
        """Midpoints between the levels of a code book; a value on one goes to the lower level, as in bitsandbytes."""
        levels = known(self.levels)
        return (levels[:-1] + levels[1:]) / 2

    def take(self, order: torch.Tensor) -> ElementGrid:
        """The grid with its columns in another order."""
        if self.group is not None:
            return replace(self, group=self.group[order], size=0)
        return replace(self, scales=self.scales[order].contiguous(), zeros=None if self.zeros is None else self.zeros[order].contiguous())

    def columns(self, span: slice) -> ElementGrid:
        """Some columns of the weight."""
        if self.group is not None:
            return replace(self, group=self.group[span], size=0)
        return replace(self, scales=self.scales[span], zeros=None if self.zeros is None else self.zeros[span])

    def some(self, rows: slice | torch.Tensor) -> ElementGrid:
        """The grid of some of the weight's rows."""
        return replace(self, scales=self.scales[:, rows], zeros=None if self.zeros is None else self.zeros[:, rows])

    def with_scales(self, scales: torch.Tensor, size: int) -> ElementGrid:
        """Other scales: fp32 ``[out, groups]``, for ``size`` columns each."""
        found = scales.T.contiguous() if self.group is not None else scales.T.repeat_interleave(size, dim=0)[: len(self.scales)].contiguous()
        return replace(self, scales=torch.where(found == 0, torch.full_like(found, 1e-30), found))  # an empty block: nothing is divided by zero

    def whole(self) -> ElementGrid:
        """With a scale of its own for every element."""
        return self if self.group is None else replace(self, scales=self.scale, zeros=self.zero, group=None, size=0)


def joined(grids: list[ElementGrid]) -> ElementGrid:
    """One grid for several weights that are solved side by side, row under row."""
    first = grids[0]
    if any(grid.group is None or first.group is None or not torch.equal(grid.group, first.group) for grid in grids):
        grids = [grid.whole() for grid in grids]
    zeros = None if first.zeros is None else torch.cat([known(grid.zeros) for grid in grids], dim=1)
    return replace(grids[0], scales=torch.cat([grid.scales for grid in grids], dim=1), zeros=zeros)


def int_grid(scales: torch.Tensor, zeros: torch.Tensor, columns: int, grid: Grid) -> ElementGrid:
    """From ``[out, groups]`` scales and zeros; the last group may be short."""
    size = columns if grid.group_size == -1 else grid.group_size
    group = torch.arange(columns, device=scales.device) // size
    return ElementGrid(scales.T.contiguous(), zeros.T.contiguous(), 2**grid.bits - 1, group=group, size=0 if columns % size else size)


def book_grid(absmax: torch.Tensor, shape: tuple[int, int], block_size: int, levels: torch.Tensor) -> ElementGrid:
    """From fp32 block maxima ``[blocks]`` over the flattened ``[out, in]`` weight. Blocks may straddle rows."""
    wide = absmax.repeat_interleave(block_size)[: shape[0] * shape[1]].reshape(shape)
    safe = torch.where(wide == 0, torch.full_like(wide, 1e-30), wide)
    return ElementGrid(safe.T.contiguous(), None, 15, levels)


def solve(target: torch.Tensor, factor: Factor, grid: ElementGrid, block: int = 64) -> torch.Tensor:
    """Codes uint8 ``[out, in]`` for ``target`` fp32 ``[out, in]``. ``grid`` is in the original column order.

    ``block`` columns are updated eagerly, the rest once a block by one matrix product; it changes speed, and the result only by rounding.
    """
    order, upper = factor.order, factor.upper
    work, ordered = target.T[order].contiguous(), grid.take(order)
    codes = torch.empty(work.shape, dtype=torch.uint8, device=work.device)
    inverse = 1.0 / torch.diagonal(upper)
    columns = work.shape[0]
    round_block = _rounder(work.device)
    for start in range(0, columns, block):
        stop = min(start + block, columns)
        span = slice(start, stop)
        errors = torch.empty(stop - start, work.shape[1], device=work.device)
        round_block(work[span], ordered.columns(span), upper[span, span], inverse[span], codes[span], errors)
        if stop < columns:
            work[stop:].addmm_(upper[span, stop:].T, errors, alpha=-1)
    result = torch.empty_like(codes)
    result[order] = codes
    return result.T.contiguous()


def _rounder(device: torch.device) -> Callable[..., None]:
    """How a block's columns are rounded there; all ways give the same codes up to ties within rounding."""
    if device.type == "cpu":
        return _round_block_compiled
    return _round_block_triton if runs_triton(device) else _round_block


def _round_block_triton(work: torch.Tensor, grid: ElementGrid, upper: torch.Tensor, inverse: torch.Tensor, codes: torch.Tensor, errors: torch.Tensor) -> None:
    from qmerge.numerics import device_kernels

    device_kernels.round_block(work, grid.scale, grid.zero, grid.levels, grid.top, upper, inverse, codes, errors)


def _round_block_compiled(work: torch.Tensor, grid: ElementGrid, upper: torch.Tensor, inverse: torch.Tensor, codes: torch.Tensor, errors: torch.Tensor) -> None:
    from qmerge.numerics import kernels

    shared = [part.numpy() for part in (upper.contiguous(), inverse.contiguous(), codes, errors)]
    if grid.levels is None:
        kernels.round_block_int(work.numpy(), grid.scale.numpy(), known(grid.zero).numpy(), kernels.float32(grid.top), *shared)
    else:
        kernels.round_block_book(work.numpy(), grid.scale.numpy(), grid.levels.numpy(), grid.bounds.numpy(), *shared)


def _round_block(work: torch.Tensor, grid: ElementGrid, upper: torch.Tensor, inverse: torch.Tensor, codes: torch.Tensor, errors: torch.Tensor) -> None:
    """Fill ``codes`` and ``errors`` ``[columns, out]`` of a block; ``work`` is changed. One column after the other, all rows at once."""
    factors = inverse.tolist()
    for column in range(work.shape[0]):
        codes[column], value = nearest(work[column], grid.columns(slice(column, column + 1)))
        errors[column] = (work[column] - value).mul_(factors[column])
        if column + 1 < work.shape[0]:
            work[column + 1 :].addr_(upper[column, column + 1 :], errors[column], alpha=-1)


def nearest(weight: torch.Tensor, grid: ElementGrid) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes uint8, values fp32) of the grid values nearest to ``weight``; ``grid`` broadcasts against it, both transposed. One row of the grid gives one row."""
    scale = grid.scale.reshape(weight.shape)
    if grid.levels is not None:
        code = torch.bucketize(weight / scale, grid.bounds)
        return code.to(torch.uint8), grid.levels[code].mul_(scale)
    zero = known(grid.zero).reshape(weight.shape)
    code = (weight / scale).round_().add_(zero).clamp_(0, grid.top)
    return code.to(torch.uint8), (code - zero).mul_(scale)


def units(codes: torch.Tensor, grid: ElementGrid) -> torch.Tensor:
    """fp32 ``[out, in]``: what the scales of codes ``[out, in]`` multiply."""
    if grid.levels is not None:
        return grid.levels[codes.long()]
    if not grid.size:
        return codes.float() - known(grid.zero).T
    return (codes.float().view(len(codes), -1, grid.size) - known(grid.zeros).T.unsqueeze(2)).view(codes.shape)


def values(codes: torch.Tensor, grid: ElementGrid) -> torch.Tensor:
    """fp32 weights ``[out, in]`` of codes ``[out, in]``."""
    found = units(codes, grid)
    if not grid.size:
        return found.mul_(grid.scale.T)
    return found.view(len(codes), -1, grid.size).mul_(grid.scales.T.unsqueeze(2)).view(codes.shape)
