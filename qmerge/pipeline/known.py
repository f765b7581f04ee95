"""What do the linears of a group share while they are solved?"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from qmerge.numerics.hessian import STRIP, Factor, Statistics, factor
from qmerge.numerics.polish import damped
from qmerge.numerics.shift import shifts
from qmerge.types import known

if TYPE_CHECKING:
    from qmerge.pipeline.requantize import _Job

LEAST_DAMP, MOST_DAMP = 0.01, 0.3
"""λ of H + λI, in means of diag(H): features over tokens, within these. H is less certain the fewer tokens it was summed over."""
DAMPS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3)
"""those that `Steps.chosen_damp` tries"""
FACTOR_BYTES = 2**30
"""factors of all dampings are kept while a group is solved where they fit into this"""


class Known:
    """The statistics of a group as matrices, and H factored at each damping that is asked for, once where a few factors fit."""

    def __init__(self, train: Statistics, held_out: Statistics, by_activation: bool, chosen_damp: bool, spent: bool = False) -> None:
        """``spent``: nobody needs the sums afterwards."""
        self.train, self.held_out, self.by_activation = train, held_out, by_activation
        if spent:  # the judge sums over it
            held_out.round_hessian()
        self.hessian, self.residual = train.hessian, train.residual  # asked for here, before threads do: this turns sums into means
        held_out.settle()
        self.drifts = train.drift is not None and any(bool(rows.any()) for rows in train.drift.split(STRIP))
        """do the teacher's inputs differ from the run-time ones?"""
        self.usual = min(MOST_DAMP, max(LEAST_DAMP, len(self.hessian) / max(1, train.tokens)))
        self.damps = DAMPS if chosen_damp else (self.usual,)
        self._keep = len(self.damps) == 1 or len(self.damps) * self.hessian.numel() * 4 <= FACTOR_BYTES
        self._factors: dict[float, Factor] = {}
        self._damped: tuple[float, torch.Tensor, float] | None = None
        self._in_place = spent and len(self.damps) == 1

    @property
    def seen(self) -> torch.Tensor:
        """H of the tokens that choose; where it waits in main memory it comes when it is first asked for."""
        return self.held_out.hessian

    def factor(self, damp: float) -> Factor:
        if damp in self._factors:
            return self._factors[damp]
        found = factor(self.hessian, damp, self.by_activation)
        if self._keep:
            self._factors[damp] = found
        return found

    def damped(self, damp: float) -> tuple[torch.Tensor, float]:
        """(H + λI as it was factored, λ); the last one is kept. Where nobody needs H any more, H becomes it."""
        if self._damped is None or self._damped[0] != damp:
            self._damped = None
            level = self.factor(damp).damp
            raised = level * float(torch.diagonal(self.hessian).double().mean())
            if self._in_place:
                self.hessian.diagonal().add_(raised)
            self._damped = damp, self.hessian if self._in_place else damped(self.hessian, level), raised
        return self._damped[1:]

    def keeps_moved(self, weight: torch.Tensor) -> bool:
        """Is ``W D`` ``[out, in]`` kept, as it is no larger than D itself? Once all linears have theirs, D can go. Decided linear by linear, so it is the same for any number of ranks."""
        return self.drifts and weight.shape[0] <= weight.shape[1]

    def learned(self, apart: bool) -> None:
        """Every linear has what is multiplied with the sums of the windows to choose with; ``apart``: and W D, so that D is needed no more."""
        self.held_out.forget(residual=True)
        if apart:
            self.train.forget(residual=False)

    def shifts(self, job: _Job, level: Factor, rows: slice, own: bool, residual: bool) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """`numerics.shift.shifts` of some rows of a linear."""
        moved = None
        if own and self.drifts:
            moved = job.moved[rows] if job.moved is not None else job.linear.merged[rows] @ known(self.train.drift)
        return shifts(moved, self.residual[rows] if self.residual is not None and residual else None, level)
