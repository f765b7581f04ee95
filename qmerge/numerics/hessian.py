"""What do the calibration tokens say about a linear's inputs?

Notation (the whole numerics layer): ``x`` a linear's inputs at run time, ``x̃`` its inputs in the separate model (the teacher),
``r`` the teacher's residual minus the run-time residual. All means are over T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from qmerge.device import in_parallel
from qmerge.errors import CheckFailed
from qmerge.numerics.products import add_product

STRIP = 512
"""rows of a sum that are formed together: a product of few rows spends its time on bringing the other factor into shape"""
LEAF = 128
"""columns of a triangular matrix that are inverted by substitution"""
SLOTS = 16
"""A sum over batches is formed in at most so many partial sums of consecutive batches, which are then added in order. So the bits do not depend on how many processes share the batches:
each forms whole partial sums, up to ``SLOTS`` of them at work. More would cost communication, one matrix each."""


def slot_of(batch: int, batches: int) -> int:
    """The partial sum that a batch belongs to, 0 … ``SLOTS`` - 1; fewer batches than that have one each."""
    return batch if batches <= SLOTS else batch * SLOTS // batches


@dataclass
class Statistics:
    """Running sums of one group of linears that share an input; ``hessian`` etc. return means.

    ``hessian`` ``E[x xᵀ]`` ``[in, in]``, ``drift`` ``E[(x̃ - x) xᵀ]`` ``[in, in]``, ``residual[module]`` ``E[r xᵀ]`` ``[out, in]``. fp32.
    Call `add` in a fixed order: the same order gives the same bits.
    """

    features: int
    device: torch.device | str = "cpu"
    tokens: int = 0
    outputs: int = 0
    """rows of the residual's product, where that is known to be summed"""
    compute: torch.dtype = torch.float32
    """what factors are rounded to before they are multiplied; products are summed in fp32"""
    _open: list[torch.Tensor | None] = field(init=False, repr=False)
    """H (its lower half), D and R of the slot that is being summed"""
    _closed: list[torch.Tensor | None] = field(init=False, repr=False)
    """those of the slots before it; None where there was none yet"""
    _slot: int | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        self._open = [torch.zeros(self.features, self.features, device=self.device), torch.zeros(self.features, self.features, device=self.device), None]
        if self.outputs:
            self._open[2] = torch.zeros(self.outputs, self.features, device=self.device)
        self._closed = [None, None, None]

    def add(self, runtime: torch.Tensor, teacher: torch.Tensor, residual: torch.Tensor | None = None) -> None:
        """``runtime`` and ``teacher`` are ``[tokens, in]``; ``residual`` is ``[tokens, out]`` or None."""
        self.add_all([(runtime, teacher, residual)])

    def add_all(self, parts: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]], slots: Sequence[int] | None = None) -> None:
        """`add` for several batches at once: strips of the sums side by side, each by one thread, the batches in their order, so the bits are those of one after the other.
        ``slots``: that each batch belongs to, never falling; without them all are summed in one go."""
        if not parts:
            return
        slots = slots if slots is not None else [0] * len(parts)
        self._slot = slots[0] if self._slot is None else self._slot
        batches = in_parallel(lambda part: self._factors(*part), parts, self._open[0].device)
        if batches[0][2] is not None and self._open[2] is None:
            self._open[2] = torch.zeros(batches[0][2].shape[1], self.features, device=self.device)
        if slots[-1] != self._slot:
            self._closed = [torch.zeros_like(total) if total is not None and closed is None else closed for total, closed in zip(self._open, self._closed, strict=True)]

        def strip(job: tuple[int, slice, slice]) -> None:
            which, rows, columns = job
            total, closed, slot = self._open[which], self._closed[which], self._slot
            for batch, its in zip(batches, slots, strict=True):
                if its != slot:
                    closed[rows, columns].add_(total[rows, columns])
                    total[rows, columns].zero_()
                    slot = its
                if batch[which] is not None:
                    add_product(total[rows, columns], batch[which][:, rows].T, batch[0][:, columns], exact=which == 0)

        in_parallel(strip, self._strips(), self._open[0].device)
        self._slot = slots[-1]
        self.tokens += sum(batch[0].shape[0] for batch in batches)

    def _factors(self, runtime: torch.Tensor, teacher: torch.Tensor, residual: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """(x, x̃ - x, r) as they are multiplied; None for zeros. Differences are taken before anything is rounded."""
        same = runtime is teacher or torch.equal(runtime, teacher)
        rows = runtime, None if same else teacher.float() - runtime.float(), residual
        return tuple(None if row is None else row.to(self.compute) for row in rows)

    def _strips(self) -> list[tuple[int, slice, slice]]:
        """(which sum, rows, columns) of what has to be summed."""
        found = []
        for which, total in enumerate(self._open):
            for start in range(0, 0 if total is None else total.shape[0], STRIP):
                rows = slice(start, min(start + STRIP, total.shape[0]))
                found.append((which, rows, slice(0, rows.stop) if which == 0 else slice(None)))  # H is symmetric
        return found

    def strips(self) -> list[torch.Tensor]:
        """Views of all that is summed, always in the same order: two sums are added by adding these."""
        self.close()
        return [self._open[which][rows, columns] for which, rows, columns in self._strips()]

    def close(self) -> None:
        """All batches are there: the last slot is added to those before it, which frees half of the memory. Means do this themselves."""
        if self._closed[0] is not None:
            self._open = [total if closed is None else closed.add_(total) for total, closed in zip(self._open, self._closed, strict=True)]
            self._closed = [None, None, None]

    @property
    def hessian(self) -> torch.Tensor:
        """Both halves, from the lower one."""
        self.close()
        lower = torch.tril(self._open[0]) / max(self.tokens, 1)
        return lower + torch.tril(lower, -1).T

    @property
    def drift(self) -> torch.Tensor:
        self.close()
        return self._open[1] / max(self.tokens, 1)

    @property
    def residual(self) -> torch.Tensor | None:
        self.close()
        return None if self._open[2] is None else self._open[2] / max(self.tokens, 1)


@dataclass(frozen=True)
class Factor:
    """A damped Hessian, factored. ``upper`` fp32 is U with ``UᵀU = (H + λI)⁻¹`` in the solver's column order; ``damp`` is λ / mean(diag H)."""

    order: torch.Tensor
    upper: torch.Tensor
    damp: float

    def costs(self) -> torch.Tensor:
        """What an error of 1 in each column costs once the columns that follow have made up for it as well as they can: ``1 / U_jj²`` fp32 ``[in]``, in the original column order.

        GPTQ's loss is the sum of these times the squared errors (Frantar et al. 2022; optimal brain surgeon), so scales are searched with them as weights.
        """
        result = torch.empty_like(self.upper[0])
        result[self.order] = torch.diagonal(self.upper).square().reciprocal()
        return result

    def solve(self, right: torch.Tensor) -> torch.Tensor:
        """``right @ (H + λI)⁻¹`` for ``right`` ``[rows, in]``, in the original column order."""
        result = torch.empty_like(right)
        result[:, self.order] = (right[:, self.order] @ self.upper.T) @ self.upper
        return result


def factor(hessian: torch.Tensor, damp: float, by_activation: bool = True) -> Factor:
    """Factor ``H + λI`` with columns in descending order of diag(H) (or, not ``by_activation``, as they are), in fp64. A failure raises λ tenfold, and
    the result says so in ``damp``.

    H is taken apart from its last column to its first (H = R Rᵀ, R upper triangular), so U is R⁻¹ and no inverse of H is formed. Raises `CheckFailed`
    for a Hessian that is not finite.
    """
    if not torch.isfinite(hessian).all():
        raise CheckFailed("the calibration activations are not finite", fix="check the base and the adapter for NaN or overflow")
    diagonal = torch.diagonal(hessian)
    order = torch.argsort(diagonal, descending=True, stable=True) if by_activation else torch.arange(len(diagonal), device=diagonal.device)
    mean = float(diagonal.double().mean())
    matrix = hessian[order][:, order].double()
    for attempt in range(8):
        level = damp * 10**attempt
        damped = matrix.clone()
        damped.diagonal().add_(level * mean if mean > 0 else 1.0)
        upper = inverse_root(damped)
        if upper is not None:
            return Factor(order, upper.float(), level)
    raise CheckFailed("the calibration Hessian could not be factored", found=f"damping up to {damp * 10**7:g} × mean(diag)")


def inverse_root(matrix: torch.Tensor) -> torch.Tensor | None:
    """Upper triangular U with ``UᵀU = M⁻¹`` for symmetric ``matrix`` M ``[n, n]``, in its dtype; None where M is not positive definite."""
    cholesky, info = torch.linalg.cholesky_ex(matrix.flip(0, 1))
    return _inverse_upper(cholesky.flip(0, 1).contiguous()) if int(info) == 0 else None


def _inverse_upper(upper: torch.Tensor) -> torch.Tensor:
    """The inverse of an upper triangular matrix, by halves: two products a level, and no work on zeros."""
    size = upper.shape[0]
    if size <= LEAF:
        return torch.linalg.solve_triangular(upper, torch.eye(size, dtype=upper.dtype, device=upper.device), upper=True)
    half = size // 2
    first, last = _inverse_upper(upper[:half, :half]), _inverse_upper(upper[half:, half:])
    result = torch.zeros_like(upper)
    result[:half, :half], result[half:, half:] = first, last
    result[:half, half:] = -(first @ upper[:half, half:]) @ last
    return result
