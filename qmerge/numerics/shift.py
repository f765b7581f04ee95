"""Which weight should the solver aim at, and how well does a candidate answer as the teacher does?

The separate model (the teacher) feeds a linear x̃; the requantized model feeds it x. Aiming at ``W x̃`` instead of ``W x`` lets each linear
undo part of the error that earlier ones made: GPTQ on a shifted target (the idea of Qronos, QEP and GPTAQ). Linears that write
into the residual stream can aim at the teacher's residual too. How much of each shift helps is chosen on held-out tokens.
"""

from __future__ import annotations

import torch

from qmerge.numerics.coupled import Coupling
from qmerge.numerics.hessian import Factor, Statistics
from qmerge.numerics.products import times


def shifts(moved: torch.Tensor | None, residual: torch.Tensor | None, factor: Factor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """``(W D (H+λI)⁻¹, R (H+λI)⁻¹)``, each fp32 ``[rows, in]``, or None where not given. ``moved`` W D and ``residual`` R are of the same rows."""
    return None if moved is None else factor.solve(moved), None if residual is None else factor.solve(residual)


def aim(weight: torch.Tensor, found: tuple[torch.Tensor | None, torch.Tensor | None], own: float, residual: float) -> torch.Tensor:
    """``weight`` with shares of its `shifts` added."""
    for share, part in zip((own, residual), found, strict=True):
        if share and part is not None:
            weight = weight.add(part, alpha=share)
    return weight


class Judge:
    """Mean squared output error of candidates of one linear on held-out tokens, up to a constant that all share; lower is better.

    With E = Q - W it is ``tr(E H Eᵀ) - 2 tr((W D + R) Eᵀ)``, the expansion of ``E‖(W x̃ + r) - Q x‖²`` without its large constant terms; where the rows count together
    by G, ``tr(G E H Eᵀ) - 2 tr(G (W D + R) Eᵀ)``.
    """

    def __init__(self, weight: torch.Tensor, held_out: Statistics, coupling: Coupling | None = None, aims: torch.Tensor | None = None, each: torch.Tensor | None = None) -> None:
        """``aims``: `wanted` of these rows, where it is known. ``each`` fp32 ``[out]``: rows weighted one by one."""
        self.weight, self.hessian = weight, held_out.hessian
        self._aim, self._coupling, self._each = wanted(weight, held_out) if aims is None else aims, coupling, each

    def __call__(self, candidate: torch.Tensor) -> float:
        """``candidate`` fp32 ``[out, in]``."""
        error = candidate - self.weight
        gap = times(error, self.hessian).sub_(self._aim, alpha=2)
        weighed = error if self._coupling is None else self._coupling.weigh(error)
        if self._each is not None:
            weighed = weighed * self._each.unsqueeze(1)
        return float((weighed * gap).sum(dtype=torch.float64))


def wanted(weight: torch.Tensor, held_out: Statistics, rows: slice | None = None) -> torch.Tensor:
    """``W D + R`` fp32 ``[out, in]``, for the `Judge`; ``rows``: those of the linear that ``weight`` has, where not all."""
    found = torch.zeros_like(weight) if held_out.drift is None else weight @ held_out.drift
    return found if held_out.residual is None else found.add_(held_out.residual if rows is None else held_out.residual[rows])
