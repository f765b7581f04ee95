"""A solved tiny model, ready to be polished, and its distillation for a process that may be killed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from qmerge.pipeline import outputs
from qmerge.pipeline.calibrate import Calibration
from qmerge.pipeline.distill import Distilled, DistillSettings, distill
from qmerge.pipeline.merge import Merged
from qmerge.pipeline.plan import MergePlan, plan
from qmerge.pipeline.recipe import Recipe
from qmerge.pipeline.requantize import Linear, Solved, round_to_nearest
from qmerge.pipeline.run import calibration_for

SETTINGS = DistillSettings(steps=12, windows=4, lr=2e-3, norm_lr=1e-3, check_every=4, save_every=2)


class Case(NamedTuple):
    plan: MergePlan
    merged: Merged
    calibration: Calibration
    solved: dict[str, Solved]
    dtype: torch.dtype


def solve(base: str, adapter: str, calibration: str, fmt: str, **recipe: Any) -> Case:
    """Codes from round to nearest: they leave more to gain than the solver's, and are quickly there."""
    job = plan(
        Recipe(
            base=base, adapter=(adapter,), calibration=calibration, format=fmt, samples=28, tokens=64, device="cpu", out="unused", **recipe
        )
    )
    merged, dtype, like = (
        Merged(job.base, job.pieces, job.adapters, torch.device("cpu")),
        outputs.model_dtype(job),
        outputs.nf4_template(job),
    )
    with torch.no_grad():
        linears = [Linear(name, merged.weight(name), merged.four_bit(name), merged.delta(name)) for name in job.requantized]
        solved = {linear.name: round_to_nearest(linear, job.recipe.grid, dtype, like) for linear in linears}
    return Case(job, merged, calibration_for(job), solved, dtype)


def digest(found: Distilled) -> str:
    """Of everything that would be stored, and of the record."""
    total = hashlib.sha256(repr(sorted(found.record.items())).encode())
    for name, result in sorted(found.solved.items()):
        held = result.quantized
        parts = [held.codes, result.weight, *((held.scales, held.zeros) if held.state is None else (held.state.absmax,))]
        for part in parts:
            total.update(name.encode() + part.contiguous().view(torch.uint8).numpy().tobytes())
    for name, value in sorted(found.floats.items()):
        total.update(name.encode() + value.contiguous().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def distilled(base: str, adapter: str, calibration: str, fmt: str, workdir: str, out: str, say: Callable[[str], None]) -> None:
    """On one thread; ``say`` gets a line per step. At the end the digest of the result is written to ``out``."""
    torch.set_num_threads(1)
    found = distill(*solve(base, adapter, calibration, fmt), SETTINGS, Path(workdir), say)
    Path(out).write_text(digest(found))
