"""Which grid does each linear get when the user gives a budget of bits per weight?

Every group of linears that share an input gets one grid of its own (engines fuse such linears, and a fused module has one), or stays float: whatever loses least in sum.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch

from qmerge.errors import Refused
from qmerge.formats import BITS, GROUP_SIZES, registry
from qmerge.pipeline.budget_loss import sensitivities
from qmerge.pipeline.budget_split import allocate, cheapest
from qmerge.pipeline.calibrate import Calibration
from qmerge.pipeline.gradients import Curvatures
from qmerge.pipeline.merge import Merged
from qmerge.pipeline.plan import MergePlan
from qmerge.types import Grid, known, two_axes


@dataclass(frozen=True)
class Division:
    """``grids``: weight name -> its grid, None for float, of every weight of the plan's ``requantized``. ``losses``: what its group is expected to cost, nats per token (routed experts are not measured).
    ``bits_per_weight``: as stored, over all of them."""

    grids: dict[str, Grid | None]
    losses: dict[str, float]
    bits_per_weight: float

    def to_json(self) -> dict[str, Any]:
        """For the manifest."""
        linears = {}
        for name, grid in self.grids.items():
            form = {"bits": None, "group_size": None} if grid is None else {"bits": grid.bits, "group_size": grid.group_size}
            linears[name.removesuffix(".weight")] = form | (
                {"group_kl_nats": float(f"{self.losses[name]:.6g}")} if name in self.losses else {}
            )
        return {"bits_per_weight": round(self.bits_per_weight, 6), "linears": linears}


def choose_grids(
    plan: MergePlan, merged: Merged, calibration: Calibration, model_dtype: torch.dtype, progress: Callable[[str], None],
    curvatures: Curvatures | None = None,
) -> Division:
    """Spend the recipe's ``bits_per_weight``: stored bits of the weights in ``plan.requantized``, scales counted in.

    Routed experts keep the recipe's grid, one for all as engines want it, and their bytes count. Raises `Refused` for a budget that the smallest grids exceed (before anything is
    measured), and for one that leaves nothing to quantize. ``curvatures`` fills with what the gradients also told, unless the recipe wants none.
    """
    routed = {weight.name for weight in plan.routed}
    fixed = sum(_stored(plan, merged, (name,), plan.recipe.grid, model_dtype) for name in routed)
    values = sum(prod(plan.pieces.table[name].shape) for name in plan.requantized)
    budget = int(known(plan.recipe.bits_per_weight) * values / 8)
    _check_enough(plan, merged, model_dtype, [name for name in plan.requantized if name not in routed], fixed, budget, values)
    losses = sensitivities(plan, merged, calibration, model_dtype, lambda names: candidates(plan, names), progress, curvatures if plan.recipe.curvature_tokens else None)
    sizes = {names: {grid: _stored(plan, merged, names, grid, model_dtype) for grid in options} for names, options in losses.items()}
    chosen = allocate(losses, sizes, budget - fixed)
    if not routed and all(grid is None for grid in chosen.values()):
        raise Refused(
            "the budget keeps every linear float",
            where=f"--bits-per-weight {plan.recipe.bits_per_weight:g}",
            expected="a budget that quantizes something",
            found=f"{8 * budget / values:g} bits",
            fix="use --format bf16",
        )
    spent = fixed + sum(sizes[names][grid] for names, grid in chosen.items())
    each = {name: (grid, losses[names][grid]) for names, grid in chosen.items() for name in names}
    progress(
        f"budget: {8 * spent / values:.4f} of {plan.recipe.bits_per_weight:g} bits per weight, "
        + _counts([grid for grid, _ in each.values()])
    )
    order = {name: plan.recipe.grid if name in routed else each[name][0] for name in plan.requantized}
    return Division(order, {name: loss for name, (_, loss) in each.items()}, 8 * spent / values)


def candidates(plan: MergePlan, names: Sequence[str]) -> tuple[Grid | None, ...]:
    """Every symmetric grid of the format that holds all of ``names``, and float."""
    fmt, found = known(registry.of_format(plan.recipe.format)), list[Grid]()
    for grid in (
        replace(plan.recipe.grid, bits=bits, group_size=size, symmetric=True) for bits in BITS[plan.recipe.format] for size in GROUP_SIZES
    ):
        try:
            for name in names:
                fmt.check_shape(name.removesuffix(".weight"), two_axes(plan.pieces.table[name].shape), grid, plan.recipe.pad)
        except Refused:
            continue
        found.append(grid)
    return (*found, None)


def _stored(plan: MergePlan, merged: Merged, names: Sequence[str], grid: Grid | None, model_dtype: torch.dtype) -> int:
    """Bytes in the file."""
    fmt, shapes = known(registry.of_format(plan.recipe.format)), {name: plan.pieces.table[name].shape for name in names}
    return sum(
        prod(shape) * merged.out_dtype(name).itemsize if grid is None else fmt.stored_bytes(two_axes(shape), grid, model_dtype.itemsize)
        for name, shape in shapes.items()
    )


def _check_enough(
    plan: MergePlan, merged: Merged, model_dtype: torch.dtype, names: list[str], fixed: int, budget: int, values: int
) -> None:
    """The least that could do is known from shapes alone."""
    least = fixed + cheapest(
        {name: {grid: _stored(plan, merged, (name,), grid, model_dtype) for grid in candidates(plan, (name,))} for name in names}
    )
    if least > budget:
        enough = -(-8 * least * 10_000 // values) / 10_000  # rounded up: the number must do
        raise Refused(
            "the smallest grids need more than the budget",
            where=f"--bits-per-weight {plan.recipe.bits_per_weight:g}",
            expected=f"at least {enough:.4f}",
            found=f"{plan.recipe.bits_per_weight:g}",
            fix=f"--bits-per-weight {enough:.4f}",
        )


def _counts(grids: list[Grid | None]) -> str:
    """Linears by grid, for people."""
    words = [
        "float" if grid is None else f"{grid.bits} bits " + ("per row" if grid.group_size == -1 else f"g{grid.group_size}")
        for grid in grids
    ]
    return ", ".join(f"{words.count(word)} at {word}" for word in sorted(set(words)))
