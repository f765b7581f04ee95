"""What does a quantizing run find out before its first block, and what does it learn on its way?"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from qmerge.pipeline import outputs
from qmerge.pipeline.budget import Division, choose_grids
from qmerge.pipeline.calibrate import Calibration
from qmerge.pipeline.experts import Traffic
from qmerge.pipeline.gradients import Curvatures, curvatures
from qmerge.pipeline.kept import Kept
from qmerge.pipeline.kept_together import KeptTogether
from qmerge.pipeline.merge import Merged
from qmerge.pipeline.plan import MergePlan
from qmerge.pipeline.requantize import Steps
from qmerge.ranks import ALONE, Ranks
from qmerge.types import Grid, known


@dataclass
class Work:
    """What a quantizing run learns on its way, for config and manifest: choices per linear, what each was solved on, what routed experts saw, what polishing did."""

    records: dict[str, dict[str, Any]] = field(default_factory=dict)
    grids: dict[str, Grid] = field(default_factory=dict)
    traffic: dict[str, Traffic] = field(default_factory=dict)
    tuned: list[dict[str, Any]] = field(default_factory=list)
    distilled: dict[str, Any] | None = None
    curvatures: Curvatures = field(default_factory=Curvatures)
    division: Division | None = None

    def polish(self) -> dict[str, Any]:
        """For the manifest."""
        return ({"blocks": self.tuned} if self.tuned else {}) | ({"distill": self.distilled} if self.distilled else {})


def before_the_blocks(
    plan: MergePlan, merged: Merged, calibration: Calibration | None, work: Work, kept: Kept | KeptTogether, progress: Callable[[str], None], steps: Steps | None,
    ranks: Ranks = ALONE,
) -> None:  # fmt: skip
    """What gradients tell, and how a budget of bits is divided: found, or found by an earlier process. ``ranks`` share the gradients; a budget each of them divides by itself."""
    recipe, began = plan.recipe, time.perf_counter()
    coupled = calibration is not None and recipe.curvature_tokens and (steps is None or steps.coupled)
    if recipe.bits_per_weight is None and not coupled:
        return
    if (found := kept.phase()) is not None:
        work.curvatures, work.division = found
        return
    if recipe.bits_per_weight is not None:
        work.division = choose_grids(plan, merged, known(calibration), outputs.model_dtype(plan), progress, work.curvatures)
    else:
        work.curvatures = curvatures(plan, merged, known(calibration), recipe.curvature_tokens, progress, ranks)
    kept.keep_phase(work.curvatures, work.division, time.perf_counter() - began)
