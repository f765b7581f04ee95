"""Which weight should the solver aim at, and how well does a candidate answer as the teacher does?

The separate model (the teacher) feeds a linear x̃; the requantized model feeds it x. Aiming at ``W x̃`` instead of ``W x`` lets each linear
undo part of the error that earlier ones made: GPTQ on a shifted target (the idea of Qronos, QEP and GPTAQ). Linears that write
into the residual stream can aim at the teacher's residual too. How much of each shift helps is chosen on held-out tokens.
"""

from __future__ import annotations

import torch

from qmerge.numerics.hessian import Factor, Statistics


def shifted(weight: torch.Tensor, statistics: Statistics, factor: Factor, own: float, residual: float) -> torch.Tensor:
    """``W + own · W D (H+λI)⁻¹ + residual · R (H+λI)⁻¹``, fp32 ``[out, in]``. 0 and 0 give ``weight`` itself."""
    right = torch.zeros_like(weight)
    if own:
        right += own * (weight @ statistics.drift)
    if residual and statistics.residual is not None:
        right += residual * statistics.residual
    return weight + factor.solve(right) if own or residual else weight


def objective(candidate: torch.Tensor, weight: torch.Tensor, held_out: Statistics) -> float:
    """Mean squared output error on held-out tokens up to a constant that all candidates of one linear share; lower is better.

    With E = Q - W it is ``tr(E H Eᵀ) - 2 tr((W D + R) Eᵀ)``, the expansion of ``E‖(W x̃ + r) - Q x‖²`` without its large constant terms.
    """
    error = candidate - weight
    aim = weight @ held_out.drift
    if held_out.residual is not None:
        aim = aim + held_out.residual
    return float((error.double() * (error @ held_out.hessian - 2 * aim).double()).sum())
