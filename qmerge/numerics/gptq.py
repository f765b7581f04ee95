"""How is a weight rounded onto a grid so that the layer's output moves least?

GPTQ (Frantar et al., 2022): columns are rounded one at a time, in descending order of diag(H), and each column's error is
fed into the columns that are still free, through the inverse Hessian. The order is the solver's own affair: scales belong to the original
column order, so the file needs no activation order. The grid is a parameter; the same loop serves integers and NF4.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qmerge.numerics.hessian import Factor


@dataclass(frozen=True)
class ElementGrid:
    """The grid of every element, ready for the column loop. All ``[in, out]`` (transposed, so that a column is contiguous).

    int: value = ``scale * (code - zero)``, code 0..top. Code book: value = ``scale * levels[code]``, ``zero`` is None.
    """

    scale: torch.Tensor
    zero: torch.Tensor | None = None
    top: int = 15
    levels: torch.Tensor | None = None

    def stacked(self, copies: int) -> ElementGrid:
        """The same grid for ``copies`` weights that are solved side by side."""
        zero = None if self.zero is None else self.zero.repeat(1, copies)
        return ElementGrid(self.scale.repeat(1, copies), zero, self.top, self.levels)


def int_grid(scales: torch.Tensor, zeros: torch.Tensor, columns: int, bits: int) -> ElementGrid:
    """From ``[out, groups]`` scales and zeros."""
    size = columns // scales.shape[1]
    widen = [value.T.repeat_interleave(size, dim=0).contiguous() for value in (scales, zeros)]
    return ElementGrid(widen[0], widen[1], 2**bits - 1)


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
    work = target.T[order].contiguous()
    scale = grid.scale[order]
    zero = None if grid.zero is None else grid.zero[order]
    bounds = None if grid.levels is None else (grid.levels[:-1] + grid.levels[1:]) / 2
    codes = torch.empty(work.shape, dtype=torch.uint8, device=work.device)
    inverse = (1.0 / torch.diagonal(upper)).tolist()
    columns = work.shape[0]
    for start in range(0, columns, block):
        stop = min(start + block, columns)
        errors = torch.empty(stop - start, work.shape[1], device=work.device)
        for column in range(start, stop):
            weight, step = work[column], scale[column]
            if grid.levels is not None:
                code = torch.bucketize(weight / step, bounds)
                value = grid.levels[code].mul_(step)
            else:
                code = (weight / step).round_().add_(zero[column]).clamp_(0, grid.top)
                value = (code - zero[column]).mul_(step)
            codes[column] = code.to(torch.uint8)
            error = (weight - value).mul_(inverse[column])
            errors[column - start] = error
            if column + 1 < stop:
                work[column + 1 : stop].addr_(upper[column, column + 1 : stop], error, alpha=-1)
        if stop < columns:
            work[stop:].addmm_(upper[start:stop, stop:].T, errors, alpha=-1)
    result = torch.empty_like(codes)
    result[order] = codes
    return result.T.contiguous()


def values(codes: torch.Tensor, grid: ElementGrid) -> torch.Tensor:
    """fp32 weights ``[out, in]`` of codes ``[out, in]``."""
    if grid.levels is not None:
        return grid.levels[codes.long()] * grid.scale.T
    return (codes.float() - grid.zero.T) * grid.scale.T
