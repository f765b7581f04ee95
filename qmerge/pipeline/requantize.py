"""Which codes and scales does a group of linears get?

All linears of a group share their inputs, so they share the Hessian's factorization and are solved side by side. Everything that could
overfit (damping, how far to shift the target, whether to keep the base's block maxima) is chosen per linear on held-out calibration tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from qmerge.device import in_parallel
from qmerge.errors import CheckFailed
from qmerge.numerics import gptq
from qmerge.numerics.coupled import Coupling
from qmerge.numerics.distances import fit
from qmerge.numerics.grids import Search
from qmerge.numerics.hessian import STRIP, Statistics
from qmerge.numerics.lora import delta_survival
from qmerge.numerics.shift import Judge, aim, wanted
from qmerge.pipeline.candidates import BASES, FULL_RANGE, Linear, Option, options, positions
from qmerge.pipeline.known import Known
from qmerge.pipeline.rows import Rows, solve_rows
from qmerge.types import Grid, QuantizedWeight, QuantState
from qmerge.types import known as given

SHIFTS = (0.0, 0.5, 1.0)
TOGETHER = 4
"""shifts that are tried in one go by one thread"""
TRIAL_ROWS = 128
"""rows of a linear, about, on which damping, grid and shifts are chosen: rows are solved one by one, so these speak for the rest"""
STRETCH = 1 << 22
"""elements of a linear, about, that go through all turns together on a CPU, where rows do not count together: what is held beside them is some fifteen times as much in fp32"""
DEVICE_STRETCH = 1 << 25
"""the same on an accelerator, which is slow on few rows: 2 GB are held beside them"""


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
    row_damp: float
    """of the curvature that rows count together by, in means of its diagonal; 0 where each row counts for itself"""
    held_out: float

    @property
    def coupled(self) -> bool:
        return self.row_damp > 0

    def to_json(self) -> dict[str, Any]:
        return {"damp": self.damp, "own_shift": self.own_shift, "residual_shift": self.residual_shift, "scales": self.scales, "polished": self.polished, "coupled": self.coupled, "row_damp": self.row_damp}


@dataclass(frozen=True)
class Solved:
    quantized: QuantizedWeight
    weight: torch.Tensor
    """fp32 ``[out, in]``, what a loader will compute with"""
    choice: Choice
    distance: float
    slope: float
    """`fit` of ``weight`` to W + ΔW, for the manifest: `verify` derives both again"""
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
    spent: bool = False,
) -> list[Solved]:
    """Solve every linear of a group. ``train`` sums the tokens that are solved on, ``held_out`` those that choose. ``blocks``: how many the model has. ``spent``: nobody needs the sums
    afterwards, so parts of them are freed on the way.

    Some rows of each linear try every grid at every damping with the target fully shifted, then the other shifts at what won; all rows are solved with
    what the held-out tokens chose, and polished.
    """
    steps = steps or Steps()
    known = Known(train, held_out, steps.act_order, steps.chosen_damp, spent)
    device = known.hessian.device
    jobs = [_Job(linear, known) for linear in linears]
    in_parallel(lambda part: part[0].learn(part[1], known), [(job, rows) for job in jobs for rows in job.strips()], device)
    if spent:
        known.learned(all(job.apart for job in jobs))
    importance = known.factor(known.usual).costs() if steps.weighted_scales else torch.ones_like(torch.diagonal(known.hessian))
    search = Search(() if steps.scale_search else FULL_RANGE, steps.signed_scales)
    in_parallel(lambda job: job.begin(options(job.linear, grid, importance, model_dtype, nf4_like, search, steps.keep_base), steps), jobs, device)
    tried = _shifts(known, steps)
    # linear by linear: how many rows a matrix product has can change its rounding, and which linears of a group are solved together depends on the number of ranks
    trials = [(damp, [(job, number, tried[0]) for number in range(len(job.options))]) for damp in known.damps for job in jobs]
    if len(tried) == len(known.damps) == 1:  # where there is no choice, nothing is tried
        for job in (job for job in jobs if len(job.options) == 1):
            job.value, job.choice = float("nan"), (known.usual, 0, tried[0])
        trials = [(damp, some) for damp, some in trials if len(some) > 1]
    _settle(in_parallel(lambda trial: _try(*trial, known), trials, device))
    if lost := next((job.linear.name for job in jobs if job.value == float("inf")), None):
        raise _not_finite(lost)
    if len(tried) > 1:
        some = [tried[start : start + TOGETHER] for start in range(1, len(tried), TOGETHER)]
        others = [(job.choice[0], [(job, job.choice[1], shift) for shift in shifts]) for job in jobs for shifts in some]
        _settle(in_parallel(lambda trial: _try(*trial, known), others, device))
    for job in jobs:  # once, and not by each thread for itself
        known.damped(job.choice[0])
    parts = [(job, rows) for job in jobs for rows in job.stretches()]
    found = in_parallel(lambda part: solve_rows(part[0], part[1], known, steps), parts, device)
    rows_of = [[rows for (owner, _), rows in zip(parts, found, strict=True) if owner is job] for job in jobs]
    return in_parallel(lambda part: _finish(*part, known, blocks, steps), list(zip(jobs, rows_of, strict=True)), device)


class _Job:
    """A linear on its way: what its outputs should be, the grids it may be solved on, its judge, and what has been chosen so far."""

    def __init__(self, linear: Linear, known: Known) -> None:
        self.linear = linear
        self.moved = torch.empty_like(linear.merged) if known.keeps_moved(linear.merged) else None
        self.wanted = torch.empty_like(linear.merged)
        self.options: list[Option] = []
        self.coupling: Coupling | None = None
        self.rows = slice(None, None, max(1, linear.merged.shape[0] // TRIAL_ROWS))
        self.value = float("inf")
        self.choice: tuple[float, int, tuple[float, float]] = (0.0, 0, (0.0, 0.0))
        """(damping, which option, (own, residual) shift)"""
        self.shifts: dict[float, tuple[torch.Tensor | None, torch.Tensor | None]] = {}
        """of the rows that trials are made with, by damping"""

    def strips(self) -> list[slice]:
        """Rows whose products with a group's sums are taken together, by one thread."""
        outputs = self.linear.merged.shape[0]
        return [slice(start, min(start + STRIP, outputs)) for start in range(0, outputs, STRIP)]

    def learn(self, rows: slice, known: Known) -> None:
        """``W D`` of some rows, and what the judge wants of them."""
        weight = self.linear.merged[rows]
        if self.moved is not None:
            torch.mm(weight, given(known.train.drift), out=self.moved[rows])
        self.wanted[rows] = wanted(weight, known.held_out, rows)

    @property
    def apart(self) -> bool:
        """Does it do without the group's D from here on?"""
        return self.moved is not None

    def begin(self, found: list[Option], steps: Steps) -> None:
        self.options = found
        if self.linear.curvature is not None and steps.coupled:
            self.coupling = Coupling(self.linear.curvature, self.linear.merged.device)

    def judge(self, known: Known, rows: slice) -> Judge:
        """Of whole stretches of rows, which count together."""
        return Judge(self.linear.merged[rows], known.held_out, None if self.coupling is None else self.coupling.part(rows), self.wanted[rows])

    def trial(self, known: Known) -> Judge:
        """Of the rows that trials are made with, each weighted by its own curvature only."""
        each = None if self.coupling is None else self.coupling.diagonal[self.rows]
        return Judge(self.linear.merged[self.rows], known.held_out, None, self.wanted[self.rows], each)

    def stretches(self) -> list[slice]:
        """Rows that go through all turns together: whole blocks of the curvature, where there is one. Not dependent on threads or ranks, so the bits are not either."""
        outputs, inputs = self.linear.merged.shape
        least = max(1, (STRETCH if self.linear.merged.device.type == "cpu" else DEVICE_STRETCH) // inputs)
        ends = [part.span.stop for part in self.coupling.parts] if self.coupling is not None else list(range(least, outputs, least)) + [outputs]
        found, start = [], 0
        for end in ends:
            if end - start >= least or end == outputs:
                found.append(slice(start, end))
                start = end
        return found


Trial = tuple[_Job, int, tuple[float, float]]


def _shifts(known: Known, steps: Steps) -> list[tuple[float, float]]:
    """(own, residual) target shifts to try, the likeliest first."""
    own = SHIFTS if steps.own_shift and known.drifts else (0.0,)
    residual = SHIFTS if steps.residual_shift and known.residual is not None and bool(known.residual.any()) else (0.0,)
    first = (own[-1], residual[len(residual) // 2])
    return [first, *(pair for pair in ((a, b) for a in own for b in residual) if pair != first)]


def _try(damp: float, trials: list[Trial], known: Known) -> list[tuple[float, float, Trial]]:
    """Solve some rows of each trial's linear at one damping, side by side: (held-out objective, damping, trial)."""
    level = known.factor(damp)
    targets, grids = [], []
    for job, number, (own, residual) in trials:
        if damp not in job.shifts:  # by the first shift, which has all that there is of both
            job.shifts[damp] = known.shifts(job, level, job.rows, bool(own), bool(residual))
        targets.append(aim(job.linear.merged[job.rows], job.shifts[damp], own, residual))
        grids.append(job.options[number].element.some(job.rows))
    codes = gptq.solve(torch.cat(targets), level, gptq.joined(grids)).split([target.shape[0] for target in targets])
    return [(trial[0].trial(known)(gptq.values(part, grid)), damp, trial) for trial, part, grid in zip(trials, codes, grids, strict=True)]


def _settle(results: list[list[tuple[float, float, Trial]]]) -> None:
    """Each linear keeps the choice with the lowest objective, the first of equals."""
    for value, damp, (job, number, shift) in (row for rows in results for row in rows):
        if value < job.value:
            job.value, job.choice = value, (damp, number, shift)


def _finish(job: _Job, parts: list[Rows], known: Known, blocks: int, steps: Steps) -> Solved:
    """The turn whose rows together have the lowest held-out objective, the lean counted once for every block that it adds up over; the first of equals."""
    damp, number, shift = job.choice
    linear, option, best = job.linear, job.options[number], 0
    values = [_together([rows.judged[turn] for rows in parts], blocks) for turn in range(len(parts[0].codes))]
    for turn, value in enumerate(values):
        best = turn if value < values[best] else best
    codes, value = torch.cat([rows.codes[best] for rows in parts]), values[best]
    if not math.isfinite(value):
        raise _not_finite(linear.name)
    refitted = best > 0 and parts[0].scales is not None
    if refitted:
        option = option.with_scales(torch.cat([given(rows.scales) for rows in parts]))
    if steps.keep_base and (kept := _base_codes(job)) is not None:
        positions_, grid = kept
        its = _together([(job.judge(known, rows)(gptq.values(positions_[rows], grid.element.some(rows))), 0.0, 0.0) for rows in job.stretches()], blocks)
        if its < value:
            codes, option, value, best = positions_, grid, its, 0
    weight = torch.empty_like(linear.merged)
    for rows in job.stretches():
        weight[rows] = gptq.values(codes[rows], option.element.some(rows))
    choice = Choice(known.factor(damp).damp, *shift, option.label, best > 0, 0.0 if job.coupling is None else job.coupling.damp, value)
    return _solved(option.build(codes, option.scales), weight, choice, linear)


def _not_finite(name: str) -> CheckFailed:
    return CheckFailed("no candidate has a finite error on the held-out tokens", where=name, fix="check the base and the adapter for NaN or overflow")


def _together(parts: list[tuple[float, float, float]], blocks: int) -> float:
    value, lost, total = (float(sum(column)) for column in zip(*parts, strict=True))
    return value + blocks * (lost**2 / total if total > 0 else 0.0)


def _base_codes(job: _Job) -> tuple[torch.Tensor, Option] | None:
    """On the base's own grid a linear that the adapter does not touch may be best left byte for byte as it is."""
    kept = next((option for option in job.options if option.label == BASES), None)
    if kept is None or (job.linear.delta is not None and bool(job.linear.delta.any())):
        return None
    base = given(job.linear.base)
    return positions(given(base.state), base.codes).to(job.linear.merged.device), kept


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
    choice = Choice(0.0, 0.0, 0.0, "searched, round to nearest", False, 0.0, 0.0)
    return _solved(option.build(codes, option.scales), weight, choice, linear)
