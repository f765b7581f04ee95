"""Can codes and scales still be moved to lower the error, once all are chosen?

GPTQ decides each column once. Coordinate descent goes back over them: each code moves to the grid value that is best with all others fixed; then each
scale to what is best with the codes fixed. Neither ever raises the objective on the statistics it is given. Whether it helps on held-out tokens is
for the caller to check.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from qmerge.device import runs_triton
from qmerge.numerics.gptq import ElementGrid, nearest, values
from qmerge.numerics.products import times


class Lean:
    """How much of the adapter's effect an error undoes.

    Rounding that starts on a grid which holds the base exactly stops early on the way from W to W + ΔW: what is left of its error points back to W.
    In one linear that is small beside the rest; over the blocks it adds up, because it has one direction.
    """

    def __init__(self, delta: torch.Tensor, hessian: torch.Tensor, raised: float = 0.0) -> None:
        """``delta`` ΔW fp32 ``[out, in]``, ``hessian`` fp32 or bf16 ``[in, in]``, which may have λ = ``raised`` on its diagonal: that does not count."""
        self.delta, self.seen = delta, times(delta, hessian).sub_(delta, alpha=raised)
        self.size = (self.seen * delta).sum(1, keepdim=True)
        """the effect's size ``<ΔW, ΔW>_H``, ``[out, 1]``"""

    def share(self, error: torch.Tensor) -> torch.Tensor:
        """Per row ``<E, ΔW>_H / <ΔW, ΔW>_H``, ``[out, 1]``: -1 where all of the effect is lost, 0 where none is on balance."""
        return (self.seen * error).sum(1, keepdim=True) / self.size.clamp(min=1e-30)


def descend(
    codes: torch.Tensor, target: torch.Tensor, hessian: torch.Tensor, damp: float, grid: ElementGrid, sweeps: int = 3, block: int = 64, pull: torch.Tensor | None = None,
    matrix: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """Codes uint8 ``[out, in]`` after up to ``sweeps`` passes that lower ``tr(E (H + λI) Eᵀ)``, ``E = Q - target``; ``hessian`` ``[in, in]``, ``damp`` = λ / mean(diag H).

    Columns in descending order of diag(H), as the solver takes them. ``block`` is speed only, on a GPU. ``pull``: E (H + λI) of ``codes``, contiguous, where it is known; that of the
    result when this returns. ``matrix``: H + λI where it is there already.
    """
    matrix = damped(hessian, damp) if matrix is None else matrix
    order = torch.argsort(torch.diagonal(hessian), descending=True, stable=True)
    current = values(codes, grid)
    gradient = (current - target) @ matrix if pull is None else pull
    if codes.device.type == "cpu":
        return _descend_compiled(codes.clone(), current, gradient, matrix, order, grid, sweeps)
    return _descend(codes, current, gradient, matrix, order, grid, sweeps, block)


def damped(hessian: torch.Tensor, damp: float) -> torch.Tensor:
    """``H + λI`` with λ = ``damp`` × mean(diag H)."""
    matrix = hessian.clone()
    matrix.diagonal().add_(damp * float(torch.diagonal(hessian).double().mean()))
    return matrix


def _descend_compiled(
    codes: torch.Tensor,
    current: torch.Tensor,
    gradient: torch.Tensor,
    matrix: torch.Tensor,
    order: torch.Tensor,
    grid: ElementGrid,
    sweeps: int,
) -> torch.Tensor:
    from qmerge.numerics import kernels

    none = torch.empty(0)
    zero = grid.zero.T if grid.zero is not None else torch.zeros(1, 1)
    book = (none, none) if grid.levels is None else (grid.levels, grid.bounds)
    steps = 1.0 / torch.diagonal(matrix).clamp(min=1e-30)
    arrays = [part.contiguous().numpy() for part in (codes, current, gradient, matrix, steps, order, grid.scale.T, zero)]
    kernels.descend_rows(*arrays, kernels.float32(grid.top), *(part.numpy() for part in book), sweeps)
    return codes


def _descend(
    codes: torch.Tensor,
    current: torch.Tensor,
    gradient: torch.Tensor,
    matrix: torch.Tensor,
    order: torch.Tensor,
    grid: ElementGrid,
    sweeps: int,
    block: int,
) -> torch.Tensor:
    """All rows at once, column by column; the gradients outside a block follow by one matrix product. ``gradient`` ends as that of the result."""
    ordered = grid.take(order)
    steps = 1.0 / torch.diagonal(matrix)[order].clamp(min=1e-30)
    whole = gradient
    current, gradient, found = (part.T[order].contiguous() for part in (current, gradient, codes))
    sweep = _sweeper(current.device)
    for _ in range(sweeps):
        for start in range(0, current.shape[0], block):
            span = slice(start, min(start + block, current.shape[0]))
            moved = torch.empty_like(current[span])
            rows = matrix[order[span]][:, order]  # the matrix is its own transpose; no second one of its size is made
            sweep(current[span], gradient[span], ordered.columns(span), rows[:, span].contiguous(), steps[span], found[span], moved)
            gradient.addmm_(rows.T, moved)
    result, left = torch.empty_like(found), torch.empty_like(gradient)
    result[order], left[order] = found, gradient
    whole.copy_(left.T)
    return result.T.contiguous()


def _sweeper(device: torch.device) -> Callable[..., None]:
    return _sweep_triton if runs_triton(device) else _sweep


def _sweep_triton(current: torch.Tensor, gradient: torch.Tensor, grid: ElementGrid, matrix: torch.Tensor, steps: torch.Tensor, codes: torch.Tensor, moved: torch.Tensor) -> None:
    from qmerge.numerics import device_kernels

    device_kernels.descend_block(current, gradient, grid.scale, grid.zero, grid.levels, grid.top, matrix, steps, codes, moved)


def _sweep(current: torch.Tensor, gradient: torch.Tensor, grid: ElementGrid, matrix: torch.Tensor, steps: torch.Tensor, codes: torch.Tensor, moved: torch.Tensor) -> None:
    """The columns ``[columns, out]`` of a block, one after the other; ``codes``, ``current`` and ``moved`` are written."""
    local, sizes = gradient.clone(), steps.tolist()
    for column in range(current.shape[0]):
        wanted = current[column] - local[column] * sizes[column]
        codes[column], value = nearest(wanted, grid.columns(slice(column, column + 1)))
        moved[column] = value - current[column]
        current[column] = value
        local.addr_(matrix[:, column], moved[column])


def refit(
    scales: torch.Tensor,
    units: torch.Tensor,
    target: torch.Tensor,
    matrix: torch.Tensor,
    storable: Callable[[torch.Tensor], torch.Tensor],
    size: int,
    pull: torch.Tensor | None = None,
) -> torch.Tensor:
    """Scales fp32 ``[out, groups]`` that lower ``tr(E M Eᵀ)`` with codes fixed: Q = scales × ``units`` ``[out, in]`` (code - zero, or the level), group after group, ``size`` columns in each but the last.

    Each group's scale moves to its closed-form optimum given the others, rounded by ``storable`` ``[out, groups] -> [out, groups]`` to what the file holds,
    and only where that lowers the objective. ``pull``: E M where it is known; that of the result when this returns.
    """
    groups, columns = scales.shape[1], units.shape[1]
    scales = scales.clone()
    gradient = (scales.repeat_interleave(size, dim=1)[:, :columns] * units - target) @ matrix if pull is None else pull
    for group in range(groups):
        span = slice(group * size, min((group + 1) * size, columns))
        part = units[:, span]
        slope = (gradient[:, span] * part).sum(1)
        bend = ((part @ matrix[span, span]) * part).sum(1)
        wanted = scales.clone()
        wanted[:, group] -= slope / bend.clamp(min=1e-30)
        change = storable(wanted)[:, group] - scales[:, group]
        change = torch.where(change * slope + 0.5 * change.square() * bend < 0, change, torch.zeros_like(change))
        scales[:, group] += change
        if groups > 1 or pull is not None:
            gradient += (change.unsqueeze(1) * part) @ matrix[span]
    return scales
