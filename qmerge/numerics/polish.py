"""Can single codes still be moved to lower the error, once all are chosen?

GPTQ decides each column once. Coordinate descent goes back over them: each code moves to the grid value that is best with all others fixed, which
never raises the objective on the statistics it is given. Whether it helps on held-out tokens is for the caller to check.
"""

from __future__ import annotations

import torch

from qmerge.numerics.gptq import ElementGrid, values


def lean(error: torch.Tensor, delta: torch.Tensor, hessian: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """How much of the adapter's effect is lost, per row, as ``<E, ΔW>_H / <ΔW, ΔW>_H`` (-1: all of it; 0: none on balance), and that effect's size ``<ΔW, ΔW>_H``; both ``[out, 1]``.

    Rounding that starts on a grid which holds the base exactly stops early on the way from W to W + ΔW: what is left of its error points back to W.
    In one linear that is small beside the rest; over the blocks it adds up, because it has one direction.
    """
    seen = delta @ hessian
    size = (seen * delta).sum(1, keepdim=True)
    return (seen * error).sum(1, keepdim=True) / size.clamp(min=1e-30), size


def descend(codes: torch.Tensor, target: torch.Tensor, hessian: torch.Tensor, damp: float, grid: ElementGrid, sweeps: int = 3, block: int = 64) -> torch.Tensor:
    """Codes uint8 ``[out, in]`` after ``sweeps`` passes that lower ``tr(E (H + λI) Eᵀ)``, ``E = Q - target``; ``hessian`` ``[in, in]``, ``damp`` = λ / mean(diag H).

    Columns in descending order of diag(H), as the solver takes them.
    """
    diagonal = torch.diagonal(hessian)
    order = torch.argsort(diagonal, descending=True, stable=True)
    matrix = hessian[order][:, order].clone()
    matrix.diagonal().add_(damp * float(diagonal.double().mean()))
    steps = (1.0 / torch.diagonal(matrix).clamp(min=1e-30)).tolist()
    current = values(codes, grid).T[order].contiguous()
    gradient = matrix @ (current - target.T[order])
    scale = grid.scale[order]
    zero = None if grid.zero is None else grid.zero[order]
    found = codes.T[order].contiguous()
    bounds = None if grid.levels is None else (grid.levels[:-1] + grid.levels[1:]) / 2
    for _ in range(sweeps):
        for start in range(0, current.shape[0], block):
            stop = min(start + block, current.shape[0])
            moved = torch.empty(stop - start, current.shape[1], device=current.device)
            local = gradient[start:stop].clone()
            for column in range(start, stop):
                wanted, step = current[column] - local[column - start] * steps[column], scale[column]
                if grid.levels is not None:
                    code = torch.bucketize(wanted / step, bounds)
                    value = grid.levels[code] * step
                else:
                    code = (wanted / step).round_().add_(zero[column]).clamp_(0, grid.top)
                    value = (code - zero[column]) * step
                change = value - current[column]
                found[column], current[column], moved[column - start] = code.to(torch.uint8), value, change
                local.addr_(matrix[start:stop, column], change)
            gradient.addmm_(matrix[:, start:stop], moved)
    result = torch.empty_like(found)
    result[order] = found
    return result.T.contiguous()
