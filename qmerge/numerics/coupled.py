"""How is a weight rounded when errors of its rows count together?

Row by row, as GPTQ takes column by column: what a row's rounding leaves over is fed into the rows that are still free, through G's inverse, and each row is rounded
with GPTQ's own feed-back over columns. Coordinate descent then goes over rows and columns with the same weights. With G diagonal both are the usual ones.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from qmerge.errors import CheckFailed
from qmerge.numerics import gptq
from qmerge.numerics.curvature import DAMP, Curvature
from qmerge.numerics.gptq import ElementGrid
from qmerge.numerics.hessian import Factor
from qmerge.numerics.polish import damped
from qmerge.numerics.triangles import inverse_root
from qmerge.types import known

TILE = 32
"""rows that a compiled loop takes together; it changes speed, and the result only by rounding"""
DEVICE_TILE = 128
"""rows that count as independent of one another on a device without the compiled loops"""
BLOCK = 64
ROUNDED = 2**-7
"""of G's trace, at most: what is added to its diagonal where rounding left it indefinite. G is rounded twice to bf16 (the sum's products, `Curvature.pack`), by 2⁻⁹ of each element; what that moves an eigenvalue by
is at most as much of the Frobenius norm, which is at most the trace. Twice the sum of both."""


@dataclass(frozen=True)
class Rows:
    """The coupling of one block of consecutive rows, ready for use."""

    span: slice
    metric: torch.Tensor
    """fp32 ``[n, n]``, G damped"""
    order: torch.Tensor
    """rows (within the block) as they are rounded: by descending diagonal"""
    feed: torch.Tensor
    """fp32 ``[n, n]``, strictly upper, in that order: row r's error times ``feed[r, k]`` is taken off row k's target"""
    damp: float
    """in means of G's diagonal: the usual one, and more where rounding asked for it"""


class Coupling:
    """How the rows of one linear count together, from its `Curvature`."""

    def __init__(self, curvature: Curvature, device: torch.device | str = "cpu") -> None:
        self.parts = [_rows(span, metric) for span, metric in zip(curvature.spans(), curvature.damped(device), strict=True)]

    def part(self, rows: slice) -> Coupling:
        """That of some rows, counted from their first: whole blocks."""
        found = object.__new__(Coupling)
        inside = [part for part in self.parts if rows.start <= part.span.start and part.span.stop <= rows.stop]
        found.parts = [replace(part, span=slice(part.span.start - rows.start, part.span.stop - rows.start)) for part in inside]
        return found

    def weigh(self, error: torch.Tensor) -> torch.Tensor:
        """``G E`` for ``error`` fp32 ``[out, in]``."""
        return torch.cat([part.metric @ error[part.span] for part in self.parts])

    @property
    def damp(self) -> float:
        """The largest of the blocks'."""
        return max(part.damp for part in self.parts)

    @property
    def diagonal(self) -> torch.Tensor:
        """fp32 ``[out]``."""
        return torch.cat([part.metric.diagonal() for part in self.parts])


def _rows(span: slice, metric: torch.Tensor) -> Rows:
    order = torch.argsort(metric.diagonal(), descending=True, stable=True)
    upper, damp, most = inverse_root(metric[order][:, order].double()), DAMP, ROUNDED * float(metric.diagonal().sum())
    while upper is None and damp < most:  # where one direction is most of G, as it is on few tokens
        metric.diagonal().add_(damp)
        upper, damp = inverse_root(metric[order][:, order].double()), 2 * damp
    if upper is None:
        raise CheckFailed("the curvature of a linear's outputs could not be factored", fix="--curvature-tokens 0 leaves it out")
    feed = torch.triu(upper / upper.diagonal().unsqueeze(1), 1).float()  # what row k takes over from row r
    return Rows(span, metric, order, feed, damp)


def solve(target: torch.Tensor, factor: Factor, grid: ElementGrid, coupling: Coupling, tile: int | None = None) -> torch.Tensor:
    """`gptq.solve` with coupled rows: codes uint8 ``[out, in]`` for ``target`` fp32 ``[out, in]``.

    On a CPU exact. Elsewhere, or where ``tile`` is given, plain tensor code, in which the rows of a tile do not see one another.
    """
    compiled, size = _way(target, tile)
    codes = torch.empty(target.shape, dtype=torch.uint8, device=target.device)
    for part in coupling.parts:
        rows = torch.arange(part.span.start, part.span.stop, device=target.device)[part.order]
        aims = target[rows]
        for start in range(0, len(rows), size):
            stop = min(start + size, len(rows))
            here = rows[start:stop]
            inside = part.feed[start:stop, start:stop]
            if compiled:
                found, misses = _round_tile(aims[start:stop], factor, grid.some(here), inside.contiguous())
            else:
                found = gptq.solve(aims[start:stop], factor, grid.some(here))
                misses = aims[start:stop] - gptq.values(found, grid.some(here))
            codes[here] = found
            if stop < len(rows):
                feed = part.feed[start:stop, stop:]
                if not compiled:  # what the rows of the tile together leave to the later ones
                    unit = torch.eye(stop - start, device=feed.device) + inside
                    feed = torch.linalg.solve_triangular(unit, feed, upper=True)
                aims[stop:].addmm_(feed.T, misses, alpha=-1)
    return codes


def _way(target: torch.Tensor, tile: int | None) -> tuple[bool, int]:
    """(compiled loops?, rows at a time)."""
    compiled = target.device.type == "cpu" and tile is None
    return compiled, TILE if compiled else tile or DEVICE_TILE


def _round_tile(target: torch.Tensor, factor: Factor, grid: ElementGrid, feed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes uint8, what each row's rounding missed of its target as moved by the rows before it, fp32), both ``[rows, in]``."""
    from qmerge.numerics import kernels

    order, upper = factor.order, factor.upper
    aims, ordered = target.T[order].contiguous(), grid.take(order)
    work, misses = aims.clone(), torch.empty_like(aims)
    codes = torch.empty(aims.shape, dtype=torch.uint8)
    inverse = 1.0 / torch.diagonal(upper)
    for start in range(0, len(order), BLOCK):
        span = slice(start, min(start + BLOCK, len(order)))
        errors = torch.empty_like(work[span])
        here = ordered.columns(span)
        arrays = [part.contiguous().numpy() for part in (work[span], aims[span], here.scale)]
        shared = [part.numpy() for part in (upper[span, span].contiguous(), inverse[span], feed, codes[span], errors, misses[span])]
        if ordered.levels is None:
            kernels.round_tile_int(*arrays, known(here.zero).contiguous().numpy(), kernels.float32(ordered.top), *shared)
        else:
            kernels.round_tile_book(*arrays, ordered.levels.numpy(), ordered.bounds.numpy(), *shared)
        if span.stop < len(order):
            work[span.stop :].addmm_(upper[span, span.stop :].T, errors, alpha=-1)
    found, left = torch.empty_like(codes), torch.empty_like(misses)
    found[order], left[order] = codes, misses
    return found.T.contiguous(), left.T.contiguous()


def descend(codes: torch.Tensor, target: torch.Tensor, hessian: torch.Tensor, damp: float, grid: ElementGrid, coupling: Coupling, sweeps: int = 1, tile: int | None = None, pull: torch.Tensor | None = None, matrix: torch.Tensor | None = None) -> torch.Tensor:
    """Codes uint8 ``[out, in]`` after up to ``sweeps`` passes over the rows that lower ``tr(G E (H + λI) Eᵀ)``, ``E = Q - target``; each row is swept three times.

    ``damp`` = λ / mean(diag H). Elsewhere than on a CPU, or where ``tile`` is given, the rows of a tile move together, and keep their move only where it lowers the sum.
    ``pull``: E (H + λI) of ``codes`` where it is known; that of the result when this returns. ``matrix``: H + λI where it is there already.
    """
    matrix = damped(hessian, damp) if matrix is None else matrix
    current = gptq.values(codes, grid)
    pull = (current - target) @ matrix if pull is None else pull
    codes = codes.clone()
    compiled, size = _way(target, tile)
    for part in coupling.parts:
        share = part.metric / part.metric.diagonal().unsqueeze(1)
        own = [value[part.span] for value in (codes, current, pull)]
        for _ in range(sweeps):
            moved = _sweep(own, matrix, hessian, grid.some(part.span), share) if compiled else _sweep_tiles(own, target[part.span], matrix, hessian, damp, grid.some(part.span), part.metric, size)
            if not moved:
                break
    return codes


def _sweep(own: list[torch.Tensor], matrix: torch.Tensor, hessian: torch.Tensor, grid: ElementGrid, share: torch.Tensor) -> int:
    """One pass of the compiled descent over the rows of a block; ``own``: codes, values and E (H + λI) of these rows, changed in place. Returns the codes moved."""
    from qmerge.numerics import kernels

    codes, current, pull = own
    order = torch.argsort(torch.diagonal(hessian), descending=True, stable=True).numpy()
    steps = (1.0 / torch.diagonal(matrix).clamp(min=1e-30)).numpy()
    scale = grid.scale.T.contiguous()
    zero = grid.zero.T.contiguous() if grid.zero is not None else scale
    none = torch.empty(0)
    levels, bounds = (none, none) if grid.levels is None else (grid.levels, grid.bounds)
    moved = 0
    for start in range(0, len(codes), TILE):
        tile = slice(start, min(start + TILE, len(codes)))
        outside = share[tile].clone()
        outside[:, tile] = 0
        base = outside @ pull
        parts = (codes[tile], current[tile], pull[tile], base, share[tile, tile].contiguous(), matrix)
        moved += kernels.descend_tile(*(part.numpy() for part in parts), steps, order, scale[tile].numpy(), zero[tile].numpy(), kernels.float32(grid.top), levels.numpy(), bounds.numpy())
    return moved


def _sweep_tiles(
    own: list[torch.Tensor], target: torch.Tensor, matrix: torch.Tensor, hessian: torch.Tensor, damp: float, grid: ElementGrid, metric: torch.Tensor, tile: int
) -> int:
    """`_sweep` in plain tensors: the rows of a tile move side by side, given all others."""
    from qmerge.numerics.polish import descend as descend_rows

    codes, current, pull = own
    moved = 0
    for start in range(0, len(codes), tile):
        rows = slice(start, min(start + tile, len(codes)))
        outside = metric[rows] / metric.diagonal()[rows].unsqueeze(1)
        outside.diagonal(start).zero_()
        some = grid.some(rows)
        found = descend_rows(codes[rows], target[rows] - outside @ (current - target), hessian, damp, some, matrix=matrix)
        values = gptq.values(found, some)
        change = values - current[rows]
        step = change @ matrix
        if float((change * (metric[rows] @ pull)).sum(dtype=torch.float64)) * 2 + float(((metric[rows, rows] @ change) * step).sum(dtype=torch.float64)) < 0:
            moved += int((found != codes[rows]).sum())
            codes[rows], current[rows] = found, values
            pull[rows] += step
    return moved
