"""What do the calibration tokens say about a linear's inputs?

Notation (the whole numerics layer): ``x`` a linear's inputs at run time, ``x̃`` its inputs in the separate model (the teacher),
``r`` the teacher's residual minus the run-time residual. All means are over T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from qmerge.errors import CheckFailed


@dataclass
class Statistics:
    """Running sums of one group of linears that share an input; ``hessian`` etc. return means.

    ``hessian`` ``E[x xᵀ]`` ``[in, in]``, ``drift`` ``E[(x̃ - x) xᵀ]`` ``[in, in]``, ``residual[module]`` ``E[r xᵀ]`` ``[out, in]``. fp32.
    Call `add` in a fixed order: the same order gives the same bits.
    """

    features: int
    device: torch.device | str = "cpu"
    tokens: int = 0
    _hessian: torch.Tensor = field(init=False, repr=False)
    _drift: torch.Tensor = field(init=False, repr=False)
    _residual: torch.Tensor | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        self._hessian = torch.zeros(self.features, self.features, device=self.device)
        self._drift = torch.zeros_like(self._hessian)

    def add(self, runtime: torch.Tensor, teacher: torch.Tensor, residual: torch.Tensor | None = None) -> None:
        """``runtime`` and ``teacher`` are ``[tokens, in]``; ``residual`` is ``[tokens, out]`` or None."""
        x, difference = runtime.float(), teacher.float() - runtime.float()
        self._hessian.addmm_(x.T, x)
        self._drift.addmm_(difference.T, x)
        if residual is not None:
            if self._residual is None:
                self._residual = torch.zeros(residual.shape[1], self.features, device=self.device)
            self._residual.addmm_(residual.float().T, x)
        self.tokens += x.shape[0]

    @property
    def hessian(self) -> torch.Tensor:
        return self._hessian / max(self.tokens, 1)

    @property
    def drift(self) -> torch.Tensor:
        return self._drift / max(self.tokens, 1)

    @property
    def residual(self) -> torch.Tensor | None:
        return None if self._residual is None else self._residual / max(self.tokens, 1)


@dataclass(frozen=True)
class Factor:
    """A damped Hessian, factored. ``upper`` is U with ``UᵀU = (H + λI)⁻¹`` in the solver's column order; ``damp`` is λ / mean(diag H)."""

    order: torch.Tensor
    upper: torch.Tensor
    cholesky: torch.Tensor
    damp: float

    def solve(self, right: torch.Tensor) -> torch.Tensor:
        """``right @ (H + λI)⁻¹`` for ``right`` ``[rows, in]``, in the original column order."""
        permuted = right[:, self.order].to(self.cholesky.dtype)
        solved = torch.cholesky_solve(permuted.T, self.cholesky).T
        result = torch.empty_like(solved)
        result[:, self.order] = solved
        return result.float()


def factor(hessian: torch.Tensor, damp: float) -> Factor:
    """Factor ``H + λI`` with columns in descending order of diag(H), in fp64. A failure raises λ tenfold, and the result says so in ``damp``.

    Raises `CheckFailed` for a Hessian that is not finite.
    """
    if not torch.isfinite(hessian).all():
        raise CheckFailed("the calibration activations are not finite", fix="check the base and the adapter for NaN or overflow")
    diagonal = torch.diagonal(hessian)
    order = torch.argsort(diagonal, descending=True, stable=True)
    mean = float(diagonal.double().mean())
    matrix = hessian[order][:, order].double()
    for attempt in range(8):
        level = damp * 10**attempt
        damped = matrix.clone()
        damped.diagonal().add_(level * mean if mean > 0 else 1.0)
        cholesky, info = torch.linalg.cholesky_ex(damped)
        if int(info) == 0:
            upper = torch.linalg.cholesky(torch.cholesky_inverse(cholesky), upper=True)
            return Factor(order, upper.float(), cholesky, level)
    raise CheckFailed("the calibration Hessian could not be factored", found=f"damping up to {damp * 10**7:g} × mean(diag)")
