"""How does text go on from the last decoder block to the output head, and how is the head requantized?

What lies between the two (a final norm, a projection, a scaling) is run by the model's own code: its blocks are replaced by stand-ins that hand on given hidden states.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from qmerge.device import COMPUTE, in_parallel
from qmerge.errors import Refused
from qmerge.numerics.hessian import Statistics
from qmerge.pipeline.batches import Shelf, by_slot
from qmerge.pipeline.candidates import Linear
from qmerge.pipeline.merge import Merged
from qmerge.pipeline.plan import MergePlan
from qmerge.pipeline.requantize import Solved, Steps, requantize_group
from qmerge.pipeline.skeleton import Skeleton, set_weight
from qmerge.pipeline.spread import Spread, handed
from qmerge.types import Grid, QuantState, known


class _Stop(Exception):
    """Ends a pass once the head's input is there."""


class _StandIn(nn.Module):
    """In place of a block: the first one gives out what ``given`` holds for this thread, the others pass on what they get."""

    def __init__(self, block: nn.Module, first: bool, given: threading.local) -> None:
        super().__init__()
        self.block, self.first, self.given = block, first, given

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("block"), name)

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        hidden = self.given.hidden if self.first else hidden_states
        return (hidden,) if self.given.as_tuple else hidden


class Tail:
    """The model from its last block's output on. Use as a context manager; the weights from the blocks to the head must be real, the head's own too where logits are wanted; those inside may be on the meta device.

    Several threads may call it at once. Gradients flow through where they are enabled.
    """

    def __init__(self, skeleton: Skeleton) -> None:
        self.skeleton, self._here = skeleton, threading.local()

    def __enter__(self) -> Tail:
        parent, _, self._leaf = self.skeleton.blocks_name.rpartition(".")
        self._owner, self._blocks = self.skeleton.model.get_submodule(parent) if parent else self.skeleton.model, self.skeleton.blocks
        setattr(self._owner, self._leaf, nn.ModuleList(_StandIn(block, index == 0, self._here) for index, block in enumerate(self._blocks)))
        self._handle = self.skeleton.model.get_output_embeddings().register_forward_pre_hook(self._arrive)
        return self

    def __exit__(self, *_: object) -> None:
        self._handle.remove()
        setattr(self._owner, self._leaf, self._blocks)

    @property
    def vocabulary(self) -> int:
        """Logits of a token."""
        return int(self.skeleton.model.get_output_embeddings().get_parameter("weight").shape[0])

    def head_input(self, hidden: torch.Tensor) -> torch.Tensor:
        """What the head receives, ``[windows, T, in]``, for the last block's output ``[windows, T, hidden]``."""
        return self._pass(hidden, stop=True)[0]

    def logits(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(what the head receives, the model's logits ``[windows, T, vocabulary]``)."""
        return self._pass(hidden, stop=False)

    def _arrive(self, _: nn.Module, args: tuple[Any, ...]) -> None:
        self._here.arrived = args[0]
        if self._here.stop:
            raise _Stop

    def _pass(self, hidden: torch.Tensor, stop: bool) -> tuple[torch.Tensor, Any]:
        here, out = self._here, None
        ids = torch.zeros(hidden.shape[:2], dtype=torch.int64, device=hidden.device)  # what is embedded goes nowhere
        for as_tuple in (False, True):  # some models take a tuple's first item; of a tensor that would be its first window
            here.hidden, here.stop, here.as_tuple, here.arrived = hidden, stop, as_tuple, None
            try:
                out = self.skeleton.model(input_ids=ids, use_cache=False)
            except _Stop:
                pass
            if here.arrived is not None and here.arrived.shape[:-1] == hidden.shape[:-1]:
                return here.arrived, None if out is None else out.logits
        found = None if here.arrived is None else list(here.arrived.shape)
        raise Refused(
            "the output head does not receive one vector per token",
            where=self.skeleton.output_embedding,
            expected=f"{[*hidden.shape[:-1], 'in']}",
            found=str(found),
            fix="leave --quantize-head and --bits-per-weight out",
        )


def wants_head(plan: MergePlan) -> bool:
    """Is the output head among the weights that are requantized?"""
    return plan.tree.output_embedding in plan.requantized


def solve_head(
    plan: MergePlan,
    merged: Merged,
    ends: Sequence[tuple[torch.Tensor, torch.Tensor, bool, int]],
    grid: Grid,
    model_dtype: torch.dtype,
    nf4_like: QuantState | None = None,
    steps: Steps | None = None,
    spread: Spread | None = None,
    shelf: Shelf | None = None,
) -> dict[str, Solved]:
    """The head, solved as a group of its own so that it answers run-time inputs as the teacher's answers the teacher's.

    ``ends``: per batch the teacher's and the run-time hidden states ``[windows, T, hidden]`` after the last block, whether the batch is held out to choose with, and its slot.
    The head is the largest matrix: the solver holds some eight copies of it in fp32. ``spread``: ``ends`` are of this rank's batches; the last rank solves. ``shelf``: where they lie.
    """
    skeleton, device, shelf = plan.tree, merged.device, shelf or Shelf(merged.device)
    name, quick = known(skeleton.output_embedding), plan.recipe.quick
    with torch.no_grad(), Tail(skeleton) as tail:
        aims = [] if quick else in_parallel(lambda end: shelf.put(tail.head_input(shelf.take(end[0]))), ends, device)
        _as_stored(skeleton, model_dtype)
        inputs = in_parallel(lambda end: shelf.put(tail.head_input(shelf.take(end[1]))), ends, device)
        aims = aims or inputs
    weight, spread = merged.weight(name), spread or Spread()
    owner, sums = spread.ranks.size - 1, list[Statistics | None]()
    for held_out in (False, True):
        here = [(x.flatten(0, -2), aim.flatten(0, -2), slot) for x, aim, (_, _, held, slot) in zip(inputs, aims, ends, strict=True) if held is held_out]
        if not spread.ranks.alone:
            parts = (((shelf.take(x), shelf.take(aim), None), slot) for x, aim, slot in here)
            sums.append(spread.sums(held_out, parts, weight.shape[1], 0, device, [owner], COMPUTE[plan.recipe.compute].sums, not quick))
            continue
        own = Statistics(weight.shape[1], device, compute=COMPUTE[plan.recipe.compute].sums, drifts=not quick)
        slots = [slot for *_, slot in here]
        for numbers in [range(len(here))] if device.type == "cpu" else by_slot([(held_out, slot) for slot in slots]):
            own.add_all([(shelf.take(here[number][0]), shelf.take(here[number][1]), None) for number in numbers], [slots[number] for number in numbers], complete=True)
        if shelf.host:
            own.park()
        sums.append(own)
    found = {}
    if spread.ranks.rank == owner:
        linear = Linear(name, weight, merged.four_bit(name, grid), merged.delta(name))
        found = {name: requantize_group([linear], grid, known(sums[0]), known(sums[1]), model_dtype, nf4_like, len(skeleton.blocks), steps, spent=True)[0]}
    return {name: handed(spread.ranks, [owner], [name], found, model_dtype, device)[0]}


def _as_stored(skeleton: Skeleton, model_dtype: torch.dtype) -> None:
    """Round what lies around the blocks to what the file will hold; the head itself is not run."""
    for name, weight in list(skeleton.model.named_parameters()):
        if not weight.is_meta and name not in (skeleton.input_embedding, skeleton.output_embedding):
            set_weight(skeleton.model, name, weight.to(model_dtype).float())
