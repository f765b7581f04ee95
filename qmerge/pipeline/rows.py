"""What do some rows of a linear go through from their target to their last code?"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import torch

from qmerge.numerics import coupled, gptq
from qmerge.numerics.polish import Lean, descend, refit
from qmerge.numerics.shift import Judge, aim
from qmerge.pipeline.candidates import Option
from qmerge.pipeline.known import Known
from qmerge.types import known as given

if TYPE_CHECKING:
    from qmerge.pipeline.requantize import Steps, _Job

LEAN_ROUNDS, LEAN_ALONE = 3, 1
"""how often the target is moved against the lean; and where no teacher runs beside (quick), which is to save time"""


@dataclass
class Rows:
    """After each turn, the solver's first: codes uint8 ``[rows, in]``, and (held-out error, what of the adapter's effect is lost, its size). ``scales`` where they were refitted."""

    codes: list[torch.Tensor] = field(default_factory=list)
    judged: list[tuple[float, float, float]] = field(default_factory=list)
    scales: torch.Tensor | None = None

    def add(self, codes: torch.Tensor, option: Option, judge: Judge, lean: Lean | None) -> None:
        weight = gptq.values(codes, option.element)
        value, lost, total = judge(weight), 0.0, 0.0
        if lean is not None:
            lost, total = float((lean.share(weight - judge.weight) * lean.size).sum()), float(lean.size.sum())
        self.codes.append(codes)
        self.judged.append((value, lost, total))


def solve_rows(job: _Job, rows: slice, known: Known, steps: Steps) -> Rows:
    """With what was chosen for their linear; then scales refitted and codes swept by coordinate descent, the target moved against the lean of what is left, and the descent again.

    Which turn is kept is decided for the whole linear. Block maxima of code books are not refitted: that lowered KL and cost retention on a small adapter, and lowered neither on a strong one.
    """
    damp, number, shift = job.choice
    level, option = known.factor(damp), job.options[number].some(rows)
    matrix, raised = known.damped(damp)
    weight, judge = job.linear.merged[rows], job.judge(known, rows)
    coupling = None if job.coupling is None else job.coupling.part(rows)
    delta = job.linear.delta[rows] if job.linear.delta is not None and steps.lean else None
    there, judged = (None, None) if delta is None else (Lean(delta, matrix, raised), Lean(delta, known.seen))
    target = aim(weight, known.shifts(job, level, rows, bool(shift[0]), bool(shift[1])), *shift)
    codes = gptq.solve(target, level, option.element) if coupling is None else coupled.solve(target, level, option.element, coupling)
    found = Rows()
    found.add(codes, option, judge, judged)
    goal = target
    pull: torch.Tensor | None = None
    fitting = steps.refit and option.storable is not None and option.element.levels is None
    way = descend if coupling is None else partial(coupled.descend, coupling=coupling)
    rounds = LEAN_ROUNDS if known.train.drifts else LEAN_ALONE
    for turn in range(1 + (rounds if delta is not None and (steps.descent or fitting) else 0)):
        if fitting and turn == 0:
            pull = (gptq.values(codes, option.element) - goal) @ matrix
            option, pull = _fitted(option, codes, goal, matrix, pull, coupling)
            found.scales = option.scales
        if steps.descent:
            pull = (gptq.values(codes, option.element) - goal) @ matrix if pull is None else pull
            codes = way(codes, goal, known.hessian, level.damp, option.element, pull=pull, matrix=matrix)
        found.add(codes, option, judge, judged)
        if there is not None and delta is not None:
            share = there.share(gptq.values(codes, option.element) - target)
            goal = goal - share * delta
            if pull is not None:  # the error grows by what the goal loses
                pull += share * (there.seen + raised * delta)
    return found


def _fitted(option: Option, codes: torch.Tensor, goal: torch.Tensor, matrix: torch.Tensor, pull: torch.Tensor, coupling: coupled.Coupling | None) -> tuple[Option, torch.Tensor]:
    """Scales refitted, and E M of what then is; ``pull`` is that of what was. A row answers what the others' errors ask of it too: its own E M, where rows count together, is that of all, weighed by G / G_ii."""
    if coupling is None:
        asked = pull
    else:
        asked = coupling.weigh(pull).div_(coupling.diagonal.unsqueeze(1))
        pull -= asked
    fitted = option.with_scales(refit(option.scales, option.units(codes), goal, matrix, given(option.storable), option.size, asked))
    return fitted, asked if coupling is None else pull.add_(asked)
