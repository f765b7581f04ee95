"""How much of an accelerator may a run take, and do the two streams of activations lie there or in main memory?

Decided once, by the formulas: where the run fits with the streams on the device they stay there. It changes where things lie and never the bytes that come out, so fewer tokens to a batch is not
among the ways out: sums would be formed otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from qmerge.device import device_room
from qmerge.pipeline import memory
from qmerge.pipeline.plan import MergePlan
from qmerge.pipeline.recipe import Recipe
from qmerge.pipeline.workload import Workload, measure_plan
from qmerge.room import Room

ASKED = "allowed by --device-memory"


def device_limit(recipe: Recipe, device: torch.device) -> Room | None:
    """What may be taken of ``device``: what was asked for, and no more than is free. None on a CPU."""
    if device.type == "cpu":
        return None
    asked, free = recipe.device_memory_bytes, device_room(device)
    if asked is None or (free is not None and free.free < asked):
        return free
    return Room(asked, ASKED)


def phases_of(plans: Sequence[MergePlan], work: Workload) -> tuple[memory.Phase, ...]:
    """Every moment of a run of ``plans``, of which ``work`` is measured."""
    recipe = plans[0].recipe
    return memory.phases(work, recipe.shard_bytes, max(plan.bytes_out for plan in plans), recipe.polish, recipe.bits_per_weight is not None, len(plans))


def device_peak(phases: Sequence[memory.Phase]) -> int:
    """Most that an accelerator holds in any of them."""
    return max(phase.on_device(True) for phase in phases)


def settled(plans: Sequence[MergePlan], device: torch.device, windows: tuple[int, int] | None = None, limit: Room | None = None) -> Workload:
    """The work of ``plans``, with where its streams lie. ``windows`` as for `measure_plan`; ``limit``: `device_limit` of the device, asked for where it is not given."""
    work = measure_plan(plans[0], device, windows)
    limit = device_limit(plans[0].recipe, device) if limit is None else limit
    if not work.accelerator or not work.train or limit is None or device_peak(phases_of(plans, work)) <= limit.free:
        return work
    return replace(work, streams_on_host=True)
