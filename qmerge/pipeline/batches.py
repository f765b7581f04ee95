"""Which text goes through the model together, and where do its activations lie while nothing is computed with them?

On the device that computes or, where that is too small for both streams, in main memory: a batch is then brought to the device, computed with, and what comes of it laid back. Either way the
same operations see the same values in the same layout, so the bits are the same.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from qmerge.device import COMPUTE, in_parallel, to_device, to_host
from qmerge.numerics.hessian import slot_of
from qmerge.pipeline.blocks import Call, record_calls
from qmerge.pipeline.calibrate import Calibration
from qmerge.pipeline.ends import entrance
from qmerge.pipeline.merge import Merged
from qmerge.pipeline.plan import MergePlan
from qmerge.pipeline.spread import Spread
from qmerge.ranks import ALONE, Ranks

TOKENS_PER_BATCH = 4096


@dataclass(frozen=True)
class Shelf:
    """Where activations lie. ``device`` computes; ``host``: they lie in main memory (on a CPU that is the same)."""

    device: torch.device
    host: bool = False

    def put(self, tensor: torch.Tensor) -> torch.Tensor:
        """To keep it: in main memory, or where it is. Beside a CPU a view with holes is closed up either way, as a copy to main memory does: a product may add up otherwise where a matrix lies otherwise."""
        if self.device.type == "cpu":
            return tensor
        if self.host:
            return to_host(tensor)
        return tensor if torch.empty_like(tensor, device="meta").stride() == tensor.stride() else tensor.clone()

    def take(self, tensor: torch.Tensor) -> torch.Tensor:
        """To compute with it."""
        return to_device(tensor, self.device)


@dataclass
class Batch:
    """Windows that go through the model together: hidden states ``[windows, T, hidden]`` in both models, on the `Shelf`, and how each block is called."""

    teacher: torch.Tensor
    runtime: torch.Tensor
    calls: list[Call]
    held_out: bool
    slot: int = 0
    """the partial sum that it belongs to (numerics.hessian.SLOTS), among those that are, or are not, held out"""
    number: int = 0
    """among all, also those of other ranks"""


def by_slot(slots: Sequence[tuple[bool, int]]) -> Iterator[range]:
    """Numbers of consecutive batches that belong to one slot, each given as (held out, slot)."""
    starts = [number for number in range(len(slots)) if number == 0 or slots[number] != slots[number - 1]]
    yield from (range(start, stop) for start, stop in itertools.pairwise([*starts, len(slots)]))


def start(plan: MergePlan, merged: Merged, calibration: Calibration, ranks: Ranks = ALONE, batch: int | None = None, shelf: Shelf | None = None) -> tuple[list[Batch], Spread]:
    """Embed this rank's windows with the model's own code, ``batch`` tokens (``TOKENS_PER_BATCH``) at a time; the blocks are stand-ins, so only the tensors around them are loaded (`ends.entrance`). And who has which batches.
    ``shelf``: where the hidden states go; without it they stay on the device."""
    skeleton, shelf = plan.tree, shelf or Shelf(merged.device)
    batch = batch or TOKENS_PER_BATCH
    split = [ids.split(max(1, batch // ids.shape[1])) for ids in (calibration.train, calibration.held_out)]
    spread = Spread(ranks, *map(len, split))
    parts: list[tuple[torch.Tensor, bool, int, int]] = []
    for held_out, before in ((False, 0), (True, spread.train)):
        rows = [(part, held_out, slot_of(number, len(split[held_out])), before + number) for number, part in enumerate(split[held_out])]
        parts += [(part.to(merged.device), held_out, slot, number) for part, held_out, slot, number in rows if spread.mine(held_out, slot)]
    # one thread per operation, here as in the blocks: the bits must not depend on the thread count
    with entrance(plan, merged):
        hidden, calls = in_parallel(lambda ids: record_calls(skeleton.model, skeleton.blocks_name, ids, COMPUTE[plan.recipe.compute].passes, shelf.put), [[ids for ids, *_ in parts]], merged.device)[0]
    return [Batch(first, first, call, held, slot, number) for first, call, (_, held, slot, number) in zip(hidden, calls, parts, strict=True)], spread
