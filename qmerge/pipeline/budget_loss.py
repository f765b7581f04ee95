"""What does the model lose when one group of linears alone is rounded onto a grid?

To second order a change δy of a linear's outputs costs ½ E[(g · δy)²] nats per token, g the gradient of the log-likelihood of tokens drawn from the model's own distribution (`pipeline.gradients`).
Taken row by row: ½ Σ_o E[g_o²] (E H Eᵀ)_oo, with E the rounding error of a quick solve and H = E[x xᵀ] of held-out tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch

from qmerge.device import in_parallel
from qmerge.errors import Refused
from qmerge.numerics import gptq, grids
from qmerge.numerics.hessian import factor
from qmerge.pipeline.calibrate import Calibration
from qmerge.pipeline.gradients import Curvatures, Gradients, Names, Seen
from qmerge.pipeline.merge import Merged
from qmerge.pipeline.plan import MergePlan
from qmerge.types import Grid, known

TOKENS = 16_384
"""calibration tokens that the loss is measured on, about; the held-out windows' share of them judges"""
DAMP = 0.01
Losses = dict[Names, dict[Grid | None, float]]
"""nats per token by grid (None: as a float in the file), per group of weights that must share one"""


@torch.no_grad()
def sensitivities(
    plan: MergePlan, merged: Merged, calibration: Calibration, model_dtype: torch.dtype, candidates: Callable[[Names], Sequence[Grid | None]], progress: Callable[[str], None],
    curvatures: Curvatures | None = None,
) -> Losses:  # fmt: skip
    """The expected KL, nats per token, of every group of ``plan.requantized`` (routed experts apart) when it alone is stored as each of ``candidates(names)``.

    ``curvatures`` fills with what `gradients.curvatures` would find. Raises `Refused` for a linear whose output does not reach the loss through its own block.
    """
    found: Losses = {}

    def visit(seen: Seen) -> None:
        found[seen.names] = _losses(seen.names, seen, merged, model_dtype, candidates(seen.names))
        if curvatures is not None and seen.names != (plan.tree.output_embedding,):
            curvatures.add(seen)

    Gradients(plan, merged, calibration, TOKENS).run(visit, progress, True, _unreached)
    return found


def _unreached(name: str) -> None:
    raise Refused(
        "what a linear computes does not reach the output through its own block, so its share of the loss cannot be measured",
        where=name,
        fix="leave --bits-per-weight out",
    )


def _losses(
    names: Names, seen: Seen, merged: Merged, model_dtype: torch.dtype, candidates: Iterable[Grid | None]
) -> dict[Grid | None, float]:
    hessian, judge = known(seen.train).hessian, known(seen.held_out).hessian
    level, importance = factor(hessian, DAMP), torch.diagonal(hessian)
    weights = {name: merged.weight(name) for name in names}

    def loss(grid: Grid | None) -> float:
        total = 0.0
        for name, weight in weights.items():
            if grid is None:
                error = weight.to(merged.out_dtype(name)).float() - weight
            else:
                scales, zeros = grids.search_int(weight, importance, grid, model_dtype)
                element = gptq.int_grid(scales, zeros, weight.shape[1], grid)
                error = gptq.values(gptq.solve(weight, level, element), element) - weight
            total += 0.5 * float(((error @ judge).mul_(error).sum(1) * seen.fisher(name)).sum())
        return total

    choices = list(candidates)
    return dict(zip(choices, in_parallel(loss, choices, hessian.device), strict=True))
