"""What do the calibration tokens say about a linear's inputs?

Notation (the whole numerics layer): ``x`` a linear's inputs at run time, ``x̃`` its inputs in the separate model (the teacher),
``r`` the teacher's residual minus the run-time residual. All means are over T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch

from qmerge.device import in_parallel, to_device, to_host
from qmerge.errors import CheckFailed
from qmerge.numerics.products import add_in_pieces, add_product
from qmerge.numerics.triangles import invert_flipped_
from qmerge.types import known

STRIP = 512
"""rows of a sum that are formed together, at most: a product of few rows spends its time on bringing the other factor into shape"""
NARROW, NARROW_STRIP = 2048, 128
"""up to this many features that takes no time, and fewer rows leave less of the upper half to be formed, and more strips for threads to share"""
NEAR_ROWS = 512
"""rows of activations of which a difference is taken at a time"""
SLOTS = 16
"""A sum over batches is formed in at most so many partial sums of consecutive batches, which are then added in order. So the bits do not depend on how many processes share the batches:
each forms whole partial sums, up to ``SLOTS`` of them at work. More would cost communication, one matrix each."""

Factors = tuple[torch.Tensor, "torch.Tensor | None", "torch.Tensor | None"]
"""of a batch's products: (x, x̃ - x, r), the latter None for zeros"""


@dataclass(frozen=True)
class Strip:
    """``work``: how long it takes, beside other strips; H is had from two products where factors are bf16."""

    work: int
    add: Callable[[], None]


def summed_together(sums: Sequence[list[Strip]], device: torch.device) -> None:
    """Strips of several sums side by side, the longest first, so that threads end together. Each is formed by one thread: the bits are those of one after the other."""
    in_parallel(lambda strip: strip.add(), sorted((strip for strips in sums for strip in strips), key=lambda strip: -strip.work), device)


def slot_of(batch: int, batches: int) -> int:
    """The partial sum that a batch belongs to, 0 … ``SLOTS`` - 1; fewer batches than that have one each."""
    return batch if batches <= SLOTS else batch * SLOTS // batches


@dataclass
class Statistics:
    """Running sums of one group of linears that share an input; ``hessian`` etc. return means.

    ``hessian`` ``E[x xᵀ]`` ``[in, in]``, ``drift`` ``E[(x̃ - x) xᵀ]`` ``[in, in]``, ``residual[module]`` ``E[r xᵀ]`` ``[out, in]``. fp32.
    Call `add` in a fixed order: the same order gives the same bits. The first mean that is asked for turns the sums into means where they lie; nothing can be added from then on.
    """

    features: int
    device: torch.device | str = "cpu"
    tokens: int = 0
    outputs: int = 0
    """rows of the residual's product, where that is summed"""
    compute: torch.dtype = torch.float32
    """what factors are rounded to before they are multiplied; products are summed in fp32"""
    drifts: bool = True
    """is D summed? Not where there is no teacher; it is None then, and H is had for half the time (`add_in_pieces`)"""
    _open: list[torch.Tensor | None] = field(default_factory=lambda: [None] * 3, init=False, repr=False)
    """H (its lower half), D and R of a slot that is not complete; None while there is none"""
    _closed: list[torch.Tensor | None] = field(default_factory=lambda: [None] * 3, init=False, repr=False)
    """those of the slots before it"""
    _slot: int | None = field(default=None, init=False, repr=False)
    _means: bool = field(default=False, init=False, repr=False)

    def add(self, runtime: torch.Tensor, teacher: torch.Tensor, residual: torch.Tensor | None = None) -> None:
        """``runtime`` and ``teacher`` are ``[tokens, in]``; ``residual`` is ``[tokens, out]`` or None."""
        self.add_all([(runtime, teacher, residual)])

    def add_all(self, parts: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]], slots: Sequence[int] | None = None, complete: bool = False) -> None:
        """`add` for several batches at once: strips of the sums side by side, each by one thread, the batches in their order, so the bits are those of one after the other.
        ``slots``: that each batch belongs to, never falling; without them all are summed in one go. ``complete``: the last slot gets no more batches, so none of it needs to be held beside
        the sum of those before it."""
        self.add_factors(in_parallel(lambda part: self.factors(*part), parts, torch.device(self.device)), slots, complete)

    def add_factors(self, batches: list[Factors], slots: Sequence[int] | None = None, complete: bool = False) -> None:
        """`add_all` of what `factors` gives."""
        summed_together([self.adding(batches, slots, complete)], torch.device(self.device))

    def adding(self, batches: list[Factors], slots: Sequence[int] | None = None, complete: bool = False) -> list[Strip]:
        """`add_factors` as jobs that do not depend on each other. Nothing else may be asked of these sums before they are done."""
        if not batches:
            return []
        if self._means:
            raise ValueError("sums that were turned into means take no more batches")
        slots = slots if slots is not None else [0] * len(batches)
        began = slots[0] if self._slot is None else self._slot
        self.outputs = self.outputs or (0 if batches[0][2] is None else batches[0][2].shape[1])
        if complete or slots[-1] != began:
            self._closed = self._filled(self._closed)
        if not complete:
            self._open = self._filled(self._open)
        closed, under_way = self._closed, self._open

        def strip(which: int, rows: slice, columns: slice) -> None:
            here, before, slot = under_way[which], closed[which], began
            total = here[rows, columns] if here is not None else torch.zeros(rows.stop - rows.start, columns.stop, device=self.device)
            for batch, its in zip(batches, slots, strict=True):
                if its != slot:
                    known(before)[rows, columns].add_(total)
                    total.zero_()
                    slot = its
                if (left := batch[which]) is not None:
                    factors = left[:, rows].T, batch[0][:, columns]
                    add_in_pieces(total, *factors) if not self.drifts else add_product(total, *factors, exact=which == 0)
            if complete:
                known(before)[rows, columns].add_(total)

        self._slot = slots[-1]
        if complete:
            self._open, self._slot = [None] * 3, None
        self.tokens += sum(batch[0].shape[0] for batch in batches)
        return [Strip((rows.stop - rows.start) * columns.stop * len(batches) * (2 if which == 0 else 1), partial(strip, which, rows, columns)) for which, rows, columns in self._strips()]

    def factors(self, runtime: torch.Tensor, teacher: torch.Tensor, residual: torch.Tensor | None) -> Factors:
        """(x, x̃ - x, r) as they are multiplied; None for zeros. Differences are taken before anything is rounded."""
        same = not self.drifts or runtime is teacher or torch.equal(runtime, teacher)
        moved = None if same else _difference(teacher, runtime, self.compute)
        return runtime.to(self.compute), moved, None if residual is None else residual.to(self.compute)

    def _filled(self, sums: list[torch.Tensor | None]) -> list[torch.Tensor | None]:
        """Zeros where nothing is yet."""
        rows = (self.features, self.features if self.drifts else 0, self.outputs)
        return [torch.zeros(count, self.features, device=self.device) if total is None and count else total for total, count in zip(sums, rows, strict=True)]

    def _strips(self) -> list[tuple[int, slice, slice]]:
        """(which sum, rows, columns) of what has to be summed."""
        found, step = [], NARROW_STRIP if self.features <= NARROW else STRIP
        for which, count in enumerate((self.features, self.features if self.drifts else 0, self.outputs)):
            for start in range(0, count, step):
                rows = slice(start, min(start + step, count))
                found.append((which, rows, slice(0, rows.stop if which == 0 else self.features)))  # H is symmetric
        return found

    def strips(self) -> list[torch.Tensor]:
        """Views of all that is summed, always in the same order: two sums are added by adding these."""
        self.close()
        return [known(self._closed[which])[rows, columns] for which, rows, columns in self._strips()]

    def close(self) -> None:
        """All batches are there: the last slot is added to those before it, which frees half of the memory. Means do this themselves."""
        pairs = zip(self._open, self._closed, strict=True)
        self._closed = [total if closed is None else closed if total is None else closed.add_(total) for total, closed in pairs]
        self._open, self._slot = [None] * 3, None
        if not self._means:
            self._closed = self._filled(self._closed)

    def settle(self) -> None:
        """All batches are there: sums become means where they lie."""
        if not self._means:
            self.close()
            count = max(self.tokens, 1)
            for total in self._closed:
                if total is not None:
                    total.div_(count)
            _mirror_(known(self._closed[0]))
            self._means = True

    def _mean(self, which: int) -> torch.Tensor | None:
        self.settle()
        if (found := self._closed[which]) is not None:
            self._closed[which] = to_device(found, torch.device(self.device))  # where it was parked
        return self._closed[which]

    def park(self) -> None:
        """All batches are there, and each mean waits in main memory until it is asked for."""
        self.settle()
        self._closed = [None if total is None else to_host(total) for total in self._closed]

    @property
    def hessian(self) -> torch.Tensor:
        """Both halves, from the lower one."""
        return known(self._mean(0))

    @property
    def drift(self) -> torch.Tensor | None:
        """None once it is forgotten, or where it is not summed."""
        return self._mean(1)

    @property
    def residual(self) -> torch.Tensor | None:
        return self._mean(2)

    def round_hessian(self) -> None:
        """H in what factors are multiplied in, from now on: in bf16 half as large. For those who sum over all that they multiply it with. Where it lies: rounding to nearest is the same on either side."""
        self.settle()
        self._closed[0] = known(self._closed[0]).to(self.compute)

    def forget(self, residual: bool) -> None:
        """Free D, and R where ``residual``, once all that is needed of them has been multiplied."""
        self.settle()
        self._closed[1:] = [None, None if residual else self._closed[2]]


def _difference(one: torch.Tensor, other: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``one - other`` taken in fp32, then rounded to ``dtype``. On a CPU some rows at a time: what is between lies near a core."""
    if one.dtype == other.dtype == dtype:  # one operation, which computes in fp32
        return one - other
    found = torch.empty(one.shape, dtype=dtype, device=one.device)
    step = NEAR_ROWS if one.device.type == "cpu" else len(one)
    for a, b, out in zip(one.split(step), other.split(step), found.split(step), strict=True):
        out.copy_(a.float() - b.float())
    return found


def _mirror_(lower: torch.Tensor) -> None:
    """The upper half becomes the lower one's, a strip at a time."""
    for start in range(0, lower.shape[0], STRIP):
        rows = slice(start, min(start + STRIP, lower.shape[0]))
        lower[:start, rows] = lower[rows, :start].T
        square = torch.tril(lower[rows, rows])
        lower[rows, rows] = square + torch.tril(square, -1).T


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

    One matrix in fp64 and the result are all that is held. Raises `CheckFailed` for a Hessian that is not finite.
    """
    if not all(bool(torch.isfinite(rows).all()) for rows in hessian.split(STRIP)):
        raise CheckFailed("the calibration activations are not finite", fix="check the base and the adapter for NaN or overflow")
    diagonal = torch.diagonal(hessian)
    order = torch.argsort(diagonal, descending=True, stable=True) if by_activation else torch.arange(len(diagonal), device=diagonal.device)
    mean, back = float(diagonal.double().mean()), order.flip(0)
    work = torch.empty(hessian.shape, dtype=torch.float64, device=hessian.device)
    for attempt in range(8):
        level = damp * 10**attempt
        for rows, part in zip(back.split(STRIP), work.split(STRIP), strict=True):
            part.copy_(hessian[rows][:, back])
        work.diagonal().add_(level * mean if mean > 0 else 1.0)
        if invert_flipped_(work):
            upper = torch.empty_like(hessian)
            for start in range(0, len(upper), STRIP):
                stop = min(start + STRIP, len(upper))
                upper[start:stop] = work[:, len(upper) - stop : len(upper) - start].T.flip(0, 1)  # what flip gives is a copy
            return Factor(order, upper, level)
    raise CheckFailed("the calibration Hessian could not be factored", found=f"damping up to {damp * 10**7:g} × mean(diag)", fix="give more, and more varied, --calibration text; or use --rtn")
