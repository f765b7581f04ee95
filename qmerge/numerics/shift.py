"""Which weight should the solver aim at, and how well does a candidate answer as the teacher does?

The separate model (the teacher) feeds a linear x̃; the requantized model feeds it x. Aiming at ``W x̃`` instead of ``W x`` lets each linear
undo part of the error that earlier ones made: GPTQ on a shifted target (the idea of Qronos, QEP and GPTAQ). Linears that write
into the residual stream can aim at the teacher's residual too. How much of each shift helps is chosen on held-out tokens.
"""

from __future__ import annotations

import torch

from qmerge.numerics.coupled import Coupling
from qmerge.numerics.hessian import Factor, Statistics


def shifts(weight: torch.Tensor, drift: torch.Tensor | None, residual: torch.Tensor | None, factor: Factor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """``(W D (H+λI)⁻¹, R (H+λI)⁻¹)``, each fp32 ``[rows, in]``, or None where not asked for or zero. ``weight`` ``[rows, in]`` and ``residual`` R are of the same rows, ``drift`` D ``[in, in]``."""
    first = factor.solve(weight @ drift) if drift is not None and bool(drift.any()) else None
    return first, factor.solve(residual) if residual is not None else None


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

    def __init__(
        self, weight: torch.Tensor, held_out: Statistics, hessian: torch.Tensor | None = None, drift: torch.Tensor | None = None, coupling: Coupling | None = None
    ) -> None:
        self.weight = weight
        self.hessian = held_out.hessian if hessian is None else hessian
        self._aim = weight @ (held_out.drift if drift is None else drift)
        if held_out.residual is not None:
            self._aim = self._aim + held_out.residual
        self._coupling = coupling
        self._each: torch.Tensor | None = None

    def __call__(self, candidate: torch.Tensor) -> float:
        """``candidate`` fp32 ``[out, in]``."""
        error = candidate - self.weight
        gap = (error @ self.hessian).sub_(self._aim, alpha=2)
        weighed = error if self._coupling is None else self._coupling.weigh(error)
        if self._each is not None:
            weighed = weighed * self._each
        return float((weighed * gap).sum(dtype=torch.float64))

    def some(self, rows: slice) -> Judge:
        """The judge of some rows of the linear, each weighted by its own curvature only."""
        part = object.__new__(Judge)
        part.weight, part.hessian, part._aim, part._coupling = self.weight[rows], self.hessian, self._aim[rows], None
        part._each = None if self._coupling is None else self._coupling.diagonal[rows].unsqueeze(1)
        return part


def objective(candidate: torch.Tensor, weight: torch.Tensor, held_out: Statistics) -> float:
    """`Judge` for a single candidate."""
    return Judge(weight, held_out)(candidate)
