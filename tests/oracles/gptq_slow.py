"""GPTQ as one would write it on a blackboard: fp64, one column at a time, no blocks, no Cholesky factor of the inverse.

After a column is rounded, the inverse Hessian loses that column by one step of Gaussian elimination, and the columns still free take the error up:
``w_rest -= error / G[q, q] * G[q, rest]``, ``G -= G[:, q] G[q, :] / G[q, q]`` (Frantar et al., 2022, equations 2 and 3).
"""

from __future__ import annotations

from collections.abc import Callable

import torch


def solve(target: torch.Tensor, hessian: torch.Tensor, damp: float, round_column: Callable[[int, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """Codes ``[out, in]``. ``round_column(column, weights [out])`` gives (codes, values) of that column on its grid. Columns go in descending diag(H)."""
    work = target.double().clone()
    diagonal = hessian.diagonal()
    order = torch.argsort(diagonal, descending=True, stable=True).tolist()
    damped = hessian.double() + damp * float(diagonal.double().mean()) * torch.eye(hessian.shape[0], dtype=torch.float64)
    inverse = torch.linalg.inv(damped)
    codes = torch.zeros(target.shape, dtype=torch.uint8)
    free = list(order)
    for column in order:
        free.remove(column)
        code, value = round_column(column, work[:, column])
        codes[:, column] = code.to(torch.uint8)
        error = (work[:, column] - value) / inverse[column, column]
        for other in free:
            work[:, other] -= error * inverse[column, other]
        inverse = inverse - torch.outer(inverse[:, column], inverse[column]) / inverse[column, column]
    return codes


def int_columns(scales: torch.Tensor, zeros: torch.Tensor, columns: int, top: int) -> Callable[[int, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """The rounding of an int grid with ``[out, groups]`` scales and zeros."""
    size = columns // scales.shape[1]

    def round_column(column: int, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scale, zero = scales[:, column // size].double(), zeros[:, column // size].double()
        code = (torch.round(weights / scale) + zero).clamp(0, top)
        return code, (code - zero) * scale

    return round_column


def book_columns(absmax: torch.Tensor, shape: tuple[int, int], block_size: int, levels: torch.Tensor) -> Callable[[int, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """The rounding of a code book whose blocks run over the flattened weight: element (row, column) belongs to block (row * in + column) // block_size."""

    def round_column(column: int, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        block = torch.tensor([(row * shape[1] + column) // block_size for row in range(shape[0])])
        scale = absmax.double()[block]
        code = (weights[:, None] - scale[:, None] * levels.double()[None, :]).abs().argmin(dim=1)
        return code, levels.double()[code] * scale

    return round_column
