"""Which codes and scales does a group of linears get?

All linears of a group share their inputs, so they share the Hessian's factorization and are solved side by side. Everything that could
overfit (damping, how far to shift the target, whether to keep the base's block maxima) is chosen per linear on held-out calibration tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from qmerge.device import in_parallel
from qmerge.numerics import gptq, grids, nf4
from qmerge.numerics.distances import weight_fit
from qmerge.numerics.gptq import ElementGrid
from qmerge.numerics.hessian import Factor, Statistics, factor
from qmerge.numerics.lora import delta_survival
from qmerge.numerics.polish import descend, lean
from qmerge.numerics.shift import objective, shifted
from qmerge.types import Grid, QuantizedWeight, QuantState

DAMPS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3)
SHIFTS = (0.0, 0.5, 1.0)
BASES = "base's"
LEAN_ROUNDS = 2


@dataclass(frozen=True)
class Linear:
    """One linear to requantize. ``merged`` fp32 ``[out, in]``; ``base`` is its NF4 form before the merge, where it had one; ``delta`` what the adapter added."""

    name: str
    merged: torch.Tensor
    base: QuantizedWeight | None
    delta: torch.Tensor | None = None


@dataclass(frozen=True)
class Choice:
    """What was chosen for one linear, for the manifest. ``held_out`` is the objective that decided; it compares candidates of this linear only."""

    damp: float
    own_shift: float
    residual_shift: float
    scales: str
    polished: bool
    held_out: float

    def to_json(self) -> dict[str, Any]:
        return {"damp": self.damp, "own_shift": self.own_shift, "residual_shift": self.residual_shift, "scales": self.scales, "polished": self.polished}


@dataclass(frozen=True)
class Option:
    """A grid that a linear may be solved on, and how to make the result of the codes."""

    label: str
    element: ElementGrid
    build: Callable[[torch.Tensor], QuantizedWeight]


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

    def to_json(self) -> dict[str, Any]:
        kept = {} if self.survival is None else {"delta_survival": round(self.survival, 6)}
        return self.choice.to_json() | {"distance": round(self.distance, 6), "slope": round(self.slope, 6)} | kept


def options(linear: Linear, grid: Grid, importance: torch.Tensor, model_dtype: torch.dtype, nf4_like: QuantState | None) -> list[Option]:
    """The grids to try. int: searched scales. NF4: searched maxima, and the base's own ones where it has any."""
    weight = linear.merged
    if grid.kind == "int":
        scales, zeros = grids.search_int(weight, importance, grid, model_dtype)
        g_idx = torch.arange(weight.shape[1], dtype=torch.int32) // (weight.shape[1] if grid.group_size == -1 else grid.group_size)

        def build(codes: torch.Tensor) -> QuantizedWeight:
            return QuantizedWeight(codes.cpu(), grid, scales=scales.cpu(), zeros=zeros.cpu(), g_idx=g_idx)

        return [Option("searched", gptq.int_grid(scales, zeros, weight.shape[1], grid.bits), build)]
    like = linear.base.state if linear.base is not None else nf4_like
    like = replace(like, shape=tuple(weight.shape))
    levels = like.code.to(weight.device)
    searched = nf4.with_absmax(like, grids.search_absmax(weight, importance, levels, like.block_size).cpu())
    states = [("searched", searched)] + ([(BASES, linear.base.state)] if linear.base is not None else [])
    found = []
    for label, state in states:
        element = gptq.book_grid(nf4.effective_absmax(state).to(weight.device), tuple(weight.shape), state.block_size, levels)
        found.append(Option(label, element, lambda codes, state=state: QuantizedWeight(codes.cpu(), grid, state=state)))
    return found


def requantize_group(
    linears: list[Linear], grid: Grid, train: Statistics, held_out: Statistics, model_dtype: torch.dtype, nf4_like: QuantState | None = None, blocks: int = 1
) -> list[Solved]:
    """Solve every linear of a group. ``train`` sums the tokens that are solved on, ``held_out`` those that choose. ``blocks``: how many the model has.

    Two rounds: every grid at every damping with the target fully shifted; then the other shifts at what won. Then polish.
    """
    device = train.hessian.device
    importance = torch.diagonal(train.hessian)
    factors = in_parallel(lambda damp: factor(train.hessian, damp), DAMPS, device)
    tables = in_parallel(lambda linear: options(linear, grid, importance, model_dtype, nf4_like), linears, device)
    best = [_Best() for _ in linears]
    first = (1.0, 0.5 if train.residual is not None else 0.0)
    everyone = range(len(linears))
    rounds = [(level, [(index, tables[index][number], first) for index in everyone]) for number in range(len(tables[0])) for level in factors]
    _try(rounds, linears, train, held_out, best, device)
    _try(_other_shifts(first, factors, best, train), linears, train, held_out, best, device)
    in_parallel(lambda index: _polish(linears[index], train, held_out, best[index], blocks), list(everyone), device)
    for index, linear in enumerate(linears):
        _keep_base_codes(linear, tables[index], factors[0], held_out, best[index], blocks)
    return [_finish(linear, found) for linear, found in zip(linears, best, strict=True)]


@dataclass
class _Best:
    value: float = float("inf")
    option: Option | None = None
    level: Factor | None = None
    shift: tuple[float, float] = (0.0, 0.0)
    codes: torch.Tensor | None = None
    polished: bool = False


Plan = tuple[int, Option, tuple[float, float]]
"""(which linear, on which grid, with which target shifts)"""


def _other_shifts(done: tuple[float, float], factors: list[Factor], best: list[_Best], train: Statistics) -> list[tuple[Factor, list[Plan]]]:
    """The target shifts not tried yet, each linear at the damping and on the grid that it has chosen."""
    residuals = SHIFTS if train.residual is not None else (0.0,)
    shifts = [(own, residual) for own in SHIFTS for residual in residuals if (own, residual) != done]
    rounds = []
    for level in factors:
        here = [(index, found.option) for index, found in enumerate(best) if found.level is level]
        rounds += [(level, [(index, option, shift) for index, option in here]) for shift in shifts if here]
    return rounds


def _try(rounds: list[tuple[Factor, list[Plan]]], linears: list[Linear], train: Statistics, held_out: Statistics, best: list[_Best], device: torch.device) -> None:
    """Solve each round's linears side by side at its damping, and keep every result that lowers its linear's held-out objective."""

    def attempt(item: tuple[Factor, list[Plan]]) -> list[tuple[float, torch.Tensor]]:
        level, plans = item
        targets = [shifted(linears[index].merged, train, level, *shift) for index, _, shift in plans]
        joined = _join([option.element for _, option, _ in plans])
        codes = gptq.solve(torch.cat(targets), level, joined).split([target.shape[0] for target in targets])
        return [
            (objective(gptq.values(found, option.element), linears[index].merged, held_out), found)
            for (index, option, _), found in zip(plans, codes, strict=True)
        ]

    for (level, plans), results in zip(rounds, in_parallel(attempt, rounds, device), strict=True):
        for (index, option, shift), (value, codes) in zip(plans, results, strict=True):
            if value < best[index].value:
                found = best[index]
                found.value, found.option, found.level, found.shift, found.codes = value, option, level, shift, codes


def _polish(linear: Linear, train: Statistics, held_out: Statistics, best: _Best, blocks: int) -> None:
    """Coordinate descent from the winner's codes; then the target is moved against the lean of what is left, and the descent goes on.

    Each result is kept only where the held-out objective falls, the lean counted once for every block that it adds up over.
    """
    element = best.option.element
    target = shifted(linear.merged, train, best.level, *best.shift)
    best.value = _with_lean(best.codes, linear, held_out, element, blocks)
    codes, aim = best.codes, target
    for _ in range(1 + (LEAN_ROUNDS if linear.delta is not None else 0)):
        codes = descend(codes, aim, train.hessian, best.level.damp, element)
        value = _with_lean(codes, linear, held_out, element, blocks)
        if value < best.value:
            best.value, best.codes, best.polished = value, codes, True
        if linear.delta is not None:
            aim = aim - lean(gptq.values(codes, element) - target, linear.delta, train.hessian)[0] * linear.delta


def _with_lean(codes: torch.Tensor, linear: Linear, held_out: Statistics, element: ElementGrid, blocks: int) -> float:
    weight = gptq.values(codes, element)
    value = objective(weight, linear.merged, held_out)
    if linear.delta is None:
        return value
    share, size = lean(weight - linear.merged, linear.delta, held_out.hessian)
    total = float(size.sum())
    return value + blocks * (float((share * size).sum()) ** 2 / total if total > 0 else 0.0)


def _keep_base_codes(linear: Linear, table: list[Option], level: Factor, held_out: Statistics, best: _Best, blocks: int) -> None:
    """On the NF4 grid a linear that the adapter does not touch may be best left byte for byte as it is."""
    kept = next((option for option in table if option.label == BASES), None)
    if kept is None or (linear.delta is not None and bool(linear.delta.any())):
        return
    codes = linear.base.codes.to(linear.merged.device)
    value = _with_lean(codes, linear, held_out, kept.element, blocks)
    if value < best.value:
        best.value, best.option, best.level, best.shift, best.codes, best.polished = value, kept, level, (0.0, 0.0), codes, False


def _join(elements: list[ElementGrid]) -> ElementGrid:
    if len(elements) == 1:
        return elements[0]
    zero = None if elements[0].zero is None else torch.cat([element.zero for element in elements], dim=1)
    return ElementGrid(torch.cat([element.scale for element in elements], dim=1), zero, elements[0].top, elements[0].levels)


def _finish(linear: Linear, found: _Best) -> Solved:
    quantized = found.option.build(found.codes)
    weight = gptq.values(found.codes, found.option.element)
    choice = Choice(found.level.damp, *found.shift, found.option.label, found.polished, found.value)
    return Solved(quantized, weight, choice, *weight_fit(weight, linear.merged), _survival(linear, weight))


def _survival(linear: Linear, weight: torch.Tensor) -> float | None:
    if linear.delta is None:
        return None
    found = delta_survival(weight, linear.merged - linear.delta, linear.delta)
    return None if found != found else found


def round_to_nearest(linear: Linear, grid: Grid, model_dtype: torch.dtype, nf4_like: QuantState | None = None) -> Solved:
    """No calibration (``--rtn``): scales searched with equal weights, every element to its nearest value."""
    option = options(linear, grid, torch.ones(linear.merged.shape[1], device=linear.merged.device), model_dtype, nf4_like)[0]
    element, work = option.element, linear.merged.T.contiguous()
    if element.levels is not None:
        codes = torch.bucketize(work / element.scale, (element.levels[:-1] + element.levels[1:]) / 2)
    else:
        codes = (work / element.scale).round_().add_(element.zero).clamp_(0, element.top)
    codes = codes.to(torch.uint8).T.contiguous()
    weight = gptq.values(codes, element)
    return Solved(option.build(codes), weight, Choice(0.0, 0.0, 0.0, "searched, round to nearest", False, 0.0), *weight_fit(weight, linear.merged), _survival(linear, weight))
