"""Which codes and scales does a group of linears get?

All linears of a group share their inputs, so they share the Hessian's factorization and are solved side by side. Everything that could
overfit (damping, how far to shift the target, whether to keep the base's block maxima) is chosen per linear on held-out calibration tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from qmerge.device import in_parallel
from qmerge.errors import CheckFailed
from qmerge.numerics import coupled, gptq
from qmerge.numerics.coupled import Coupling
from qmerge.numerics.distances import fit
from qmerge.numerics.grids import Search
from qmerge.numerics.hessian import Factor, Statistics, factor
from qmerge.numerics.lora import delta_survival
from qmerge.numerics.polish import Lean, damped, descend, refit
from qmerge.numerics.shift import Judge, aim, shifts
from qmerge.pipeline.candidates import BASES, FULL_RANGE, Linear, Option, options, positions
from qmerge.types import Grid, QuantizedWeight, QuantState

LEAST_DAMP, MOST_DAMP = 0.01, 0.3
"""λ of H + λI, in means of diag(H): features over tokens, within these. H is less certain the fewer tokens it was summed over."""
DAMPS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3)
"""those that `Steps.chosen_damp` tries"""
SHIFTS = (0.0, 0.5, 1.0)
LEAN_ROUNDS = 3
TRIAL_ROWS = 128
"""rows of a linear, about, on which damping, grid and shifts are chosen: rows are solved one by one, so these speak for the rest"""
FACTOR_BYTES = 2**30
"""factors of all dampings are kept while a group is solved where they fit into this"""


@dataclass(frozen=True)
class Steps:
    """What the solver does, each a switch, so that each step's gain can be measured (`scripts/bench_quality.py --ablations`). What earns its time is on."""

    weighted_scales: bool = True
    """scales searched with what an error of each column will cost (`Factor.costs`) as weights, not all alike"""
    scale_search: bool = True
    """shrink factors tried, not the full range taken"""
    signed_scales: bool = True
    act_order: bool = True
    chosen_damp: bool = False
    """damping chosen per linear on held-out tokens, not by the number of tokens: slower, and no better (docs/measurements/quality.md)"""
    own_shift: bool = True
    """the target answers run-time inputs as the teacher answers its own"""
    residual_shift: bool = True
    """projections into the residual stream aim at the teacher's residual"""
    keep_base: bool = True
    """NF4: the base's own maxima, and its codes where nothing changed, are candidates"""
    descent: bool = True
    refit: bool = True
    coupled: bool = True
    """errors of a linear's rows count together, as the loss's curvature says (where it was measured)"""
    lean: bool = True
    """what is left of the adapter's effect is given back"""


@dataclass(frozen=True)
class Choice:
    """What was chosen for one linear, for the manifest. ``held_out`` is the objective that decided; it compares candidates of this linear only."""

    damp: float
    own_shift: float
    residual_shift: float
    scales: str
    polished: bool
    coupled: bool
    held_out: float

    def to_json(self) -> dict[str, Any]:
        return {"damp": self.damp, "own_shift": self.own_shift, "residual_shift": self.residual_shift, "scales": self.scales, "polished": self.polished, "coupled": self.coupled}


@dataclass(frozen=True)
class Solved:
    quantized: QuantizedWeight
    weight: torch.Tensor
    """fp32 ``[out, in]``, what a loader will compute with"""
    choice: Choice
    distance: float
    slope: float
    """`weight_fit` of ``weight`` to W + ΔW, for the manifest: `verify` derives both again"""
    survival: float | None = None
    """``<W_out - W, ΔW> / <ΔW, ΔW>``, where the adapter changes the linear"""
    bands: str = ""
    """the same fit, band by band of the rows (`qmerge.numerics.distances.Fit`)"""

    def to_json(self) -> dict[str, Any]:
        kept = {} if self.survival is None else {"delta_survival": round(self.survival, 6)}
        return self.choice.to_json() | {"distance": round(self.distance, 6), "slope": round(self.slope, 6), "bands": self.bands} | kept


def requantize_group(
    linears: list[Linear],
    grid: Grid,
    train: Statistics,
    held_out: Statistics,
    model_dtype: torch.dtype,
    nf4_like: QuantState | None = None,
    blocks: int = 1,
    steps: Steps | None = None,
) -> list[Solved]:
    """Solve every linear of a group. ``train`` sums the tokens that are solved on, ``held_out`` those that choose. ``blocks``: how many the model has.

    Some rows of each linear try every grid at every damping with the target fully shifted, then the other shifts at what won; all rows are solved with
    what the held-out tokens chose, and polished.
    """
    steps = steps or Steps()
    known = _Known(train, held_out, steps)
    device = known.hessian.device
    importance = known.factor(known.usual).costs() if steps.weighted_scales else torch.ones_like(torch.diagonal(known.hessian))
    search = Search(() if steps.scale_search else FULL_RANGE, steps.signed_scales)
    jobs = in_parallel(lambda linear: _Job(linear, options(linear, grid, importance, model_dtype, nf4_like, search, steps.keep_base), known, steps), linears, device)
    tried = _shifts(known, steps)
    # linear by linear: how many rows a matrix product has can change its rounding, and which linears of a group are solved together depends on the number of ranks
    trials = [(damp, [(job, number, tried[0]) for number in range(len(job.options))]) for damp in known.damps for job in jobs]
    _settle(in_parallel(lambda trial: _try(*trial, known), trials, device))
    if lost := next((job.linear.name for job in jobs if job.value == float("inf")), None):
        raise CheckFailed("no candidate has a finite error on the held-out tokens", where=lost, fix="check the base and the adapter for NaN or overflow")
    if len(tried) > 1:
        others = [(job.choice[0], [(job, job.choice[1], shift) for shift in tried[1:]]) for job in jobs]
        _settle(in_parallel(lambda trial: _try(*trial, known), others, device))
    return in_parallel(lambda job: _solve(job, known, blocks, steps), jobs, device)


class _Known:
    """The statistics of a group as matrices, and H factored at each damping that is asked for, once where a few factors fit."""

    def __init__(self, train: Statistics, held_out: Statistics, steps: Steps) -> None:
        self.train, self.held_out, self.by_activation = train, held_out, steps.act_order
        self.hessian, self.drift, self.residual = train.hessian, train.drift, train.residual
        self.seen, self.seen_drift = held_out.hessian, held_out.drift
        self.usual = min(MOST_DAMP, max(LEAST_DAMP, len(train.hessian) / max(1, train.tokens)))
        self.damps = DAMPS if steps.chosen_damp else (self.usual,)
        self._keep = len(self.damps) == 1 or len(self.damps) * self.hessian.numel() * 4 <= FACTOR_BYTES
        self._factors: dict[float, Factor] = {}

    def factor(self, damp: float) -> Factor:
        if damp in self._factors:
            return self._factors[damp]
        found = factor(self.hessian, damp, self.by_activation)
        if self._keep:
            self._factors[damp] = found
        return found

    def shifts(self, weight: torch.Tensor, level: Factor, rows: slice, own: bool, residual: bool) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """`numerics.shift.shifts` of some rows of a linear."""
        return shifts(weight[rows], self.drift if own else None, self.residual[rows] if self.residual is not None and residual else None, level)


class _Job:
    """A linear on its way: the grids it may be solved on, its judge, and what has been chosen so far."""

    def __init__(self, linear: Linear, found: list[Option], known: _Known, steps: Steps) -> None:
        self.linear, self.options = linear, found
        self.coupling = Coupling(linear.curvature, linear.merged.device) if linear.curvature is not None and steps.coupled else None
        self.judge = Judge(linear.merged, known.held_out, known.seen, known.seen_drift, self.coupling)
        self.rows = slice(None, None, max(1, linear.merged.shape[0] // TRIAL_ROWS))
        self.some = self.judge.some(self.rows)
        self.value = float("inf")
        self.choice: tuple[float, int, tuple[float, float]] = (0.0, 0, (0.0, 0.0))
        """(damping, which option, (own, residual) shift)"""


Trial = tuple[_Job, int, tuple[float, float]]


def _shifts(known: _Known, steps: Steps) -> list[tuple[float, float]]:
    """(own, residual) target shifts to try, the likeliest first."""
    own = SHIFTS if steps.own_shift and bool(known.drift.any()) else (0.0,)
    residual = SHIFTS if steps.residual_shift and known.residual is not None and bool(known.residual.any()) else (0.0,)
    first = (own[-1], residual[len(residual) // 2])
    return [first, *(pair for pair in ((a, b) for a in own for b in residual) if pair != first)]


def _try(damp: float, trials: list[Trial], known: _Known) -> list[tuple[float, float, Trial]]:
    """Solve some rows of each trial's linear at one damping, side by side: (held-out objective, damping, trial)."""
    level = known.factor(damp)
    found: dict[int, tuple[torch.Tensor | None, torch.Tensor | None]] = {}
    targets, grids = [], []
    for job, number, (own, residual) in trials:
        if id(job) not in found:
            wanted = [shift for other, _, shift in trials if other is job]
            found[id(job)] = known.shifts(job.linear.merged, level, job.rows, any(a for a, _ in wanted), any(b for _, b in wanted))
        targets.append(aim(job.linear.merged[job.rows], found[id(job)], own, residual))
        grids.append(job.options[number].element.some(job.rows))
    codes = gptq.solve(torch.cat(targets), level, gptq.joined(grids)).split([target.shape[0] for target in targets])
    return [(trial[0].some(gptq.values(part, grid)), damp, trial) for trial, part, grid in zip(trials, codes, grids, strict=True)]


def _settle(results: list[list[tuple[float, float, Trial]]]) -> None:
    """Each linear keeps the choice with the lowest objective, the first of equals."""
    for value, damp, (job, number, shift) in (row for rows in results for row in rows):
        if value < job.value:
            job.value, job.choice = value, (damp, number, shift)


@dataclass
class _Best:
    """The best so far of one linear, by the held-out objective with the lean counted in."""

    value: float
    option: Option
    codes: torch.Tensor
    polished: bool = False


def _solve(job: _Job, known: _Known, blocks: int, steps: Steps) -> Solved:
    """All rows with what was chosen; then scales refitted and codes swept by coordinate descent, the target moved against the lean of what is left, and the descent again.

    Each result is kept only where the held-out objective falls, the lean counted once for every block that it adds up over. Block maxima of code books are
    not refitted: that lowered KL and cost retention on a small adapter, and lowered neither on a strong one.
    """
    damp, number, shift = job.choice
    linear, level, option, coupling = job.linear, known.factor(damp), job.options[number], job.coupling
    delta = linear.delta if steps.lean else None
    there, judged = (None, None) if delta is None else (Lean(delta, known.hessian), Lean(delta, known.seen))
    target = aim(linear.merged, known.shifts(linear.merged, level, slice(None), bool(shift[0]), bool(shift[1])), *shift)
    codes = gptq.solve(target, level, option.element) if coupling is None else coupled.solve(target, level, option.element, coupling)
    best = _Best(_with_lean(codes, option, job, blocks, judged), option, codes)
    goal, matrix = target, damped(known.hessian, level.damp)
    raised = level.damp * float(torch.diagonal(known.hessian).double().mean())
    pull: torch.Tensor | None = None
    fitting = steps.refit and option.storable is not None and option.element.levels is None
    for turn in range(1 + (LEAN_ROUNDS if delta is not None and (steps.descent or fitting) else 0)):
        if fitting and turn == 0:
            wanted = goal if coupling is None else goal - coupling.pulled(gptq.values(codes, option.element) - goal)
            option = option.with_scales(refit(option.scales, option.units(codes), wanted, matrix, option.storable, option.size))
        if steps.descent:
            pull = (gptq.values(codes, option.element) - goal) @ matrix if pull is None else pull
            way = descend if coupling is None else partial(coupled.descend, coupling=coupling)
            codes = way(codes, goal, known.hessian, level.damp, option.element, pull=pull)
        value = _with_lean(codes, option, job, blocks, judged)
        if value < best.value:
            best = _Best(value, option, codes, True)
        if there is not None:
            share = there.share(gptq.values(codes, option.element) - target)
            goal = goal - share * delta
            if pull is not None:  # the error grows by what the goal loses
                pull += share * (there.seen + raised * delta)
    if steps.keep_base:
        best = _keep_base_codes(job, blocks, best)
    return _finish(linear, best, Choice(level.damp, *shift, best.option.label, best.polished, coupling is not None, best.value))


def _with_lean(codes: torch.Tensor, option: Option, job: _Job, blocks: int, judged: Lean | None) -> float:
    weight = gptq.values(codes, option.element)
    value = job.judge(weight)
    if judged is None:
        return value
    lost, total = float((judged.share(weight - job.linear.merged) * judged.size).sum()), float(judged.size.sum())
    return value + blocks * (lost**2 / total if total > 0 else 0.0)


def _keep_base_codes(job: _Job, blocks: int, best: _Best) -> _Best:
    """On the base's own grid a linear that the adapter does not touch may be best left byte for byte as it is."""
    kept = next((option for option in job.options if option.label == BASES), None)
    if kept is None or (job.linear.delta is not None and bool(job.linear.delta.any())):
        return best
    codes = positions(job.linear.base.state, job.linear.base.codes).to(job.linear.merged.device)
    value = _with_lean(codes, kept, job, blocks, None)
    return _Best(value, kept, codes) if value < best.value else best


def _finish(linear: Linear, found: _Best, choice: Choice) -> Solved:
    weight = gptq.values(found.codes, found.option.element)
    return _solved(found.option.build(found.codes, found.option.scales), weight, choice, linear)


def _solved(quantized: QuantizedWeight, weight: torch.Tensor, choice: Choice, linear: Linear) -> Solved:
    near = fit(weight, linear.merged)
    return Solved(quantized, weight, choice, near.distance, near.slope, _survival(linear, weight), near.bands)


def _survival(linear: Linear, weight: torch.Tensor) -> float | None:
    if linear.delta is None:
        return None
    found = delta_survival(weight, linear.merged - linear.delta, linear.delta)
    return None if found != found else found


def round_to_nearest(linear: Linear, grid: Grid, model_dtype: torch.dtype, nf4_like: QuantState | None = None) -> Solved:
    """No calibration (``--rtn``): scales searched with equal weights, every element to its nearest value."""
    option = options(linear, grid, torch.ones(linear.merged.shape[1], device=linear.merged.device), model_dtype, nf4_like)[0]
    codes = gptq.nearest(linear.merged.T.contiguous(), option.element)[0].T.contiguous()
    weight = gptq.values(codes, option.element)
    choice = Choice(0.0, 0.0, 0.0, "searched, round to nearest", False, False, 0.0)
    return _solved(option.build(codes, option.scales), weight, choice, linear)
