"""What do the linears of one block receive, in the teacher and as requantized so far, and what do both streams become behind it?"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from qmerge.device import in_parallel, to_device, to_host, worker_threads
from qmerge.numerics.hessian import Statistics, summed_together
from qmerge.pipeline.batches import Batch, Shelf, by_slot
from qmerge.pipeline.blocks import (
    Group,
    activation_bytes,
    all_inputs,
    find_groups,
    first_row,
    group_inputs,
    run_block,
    split_inputs,
    watched,
)
from qmerge.pipeline.candidates import Linear
from qmerge.pipeline.experts import Arrived, ExpertSolver, everywhere
from qmerge.pipeline.experts_names import ExpertWeight
from qmerge.pipeline.merge import Merged
from qmerge.pipeline.plan import MergePlan
from qmerge.pipeline.requantize import Solved
from qmerge.pipeline.skeleton import set_weight
from qmerge.pipeline.spread import Part, Spread
from qmerge.pipeline.stepwise import Walk
from qmerge.pipeline.tune_blocks import Passage, tune_block
from qmerge.types import known

TAPE_BYTES = 2 * 2**30


class BlockPair:
    """One block as the teacher has it and as requantized so far, with the batches that flow through both. Use as a context manager.

    The teacher's activations within the block do not change while it is requantized, and the run-time pass can wait at each group until that is solved: where
    the activations fit into ``TAPE_BYTES`` each stream passes the block once. Else passes are repeated up to each group, to the same bits.

    Where streams lie in main memory, so do what was captured within the block, sums that wait for their turn and, while a group is solved, the block itself (`aside`): the device holds one block
    while text passes it, and what is being solved while that is done.
    """

    def __init__(self, teacher: nn.Module, runtime: nn.Module, batches: list[Batch], index: int, linears: list[str], spread: Spread, shelf: Shelf, compute: torch.dtype, quick: bool = False) -> None:
        """``linears``: those to find groups of; ``compute``: in what sums are taken; ``quick``: no teacher runs beside."""
        self.teacher, self.runtime, self.batches, self.index, self.spread, self.shelf, self.compute, self.quick = teacher, runtime, batches, index, spread, shelf, compute, quick
        self.device = shelf.device
        inside, groups = 0, []
        if batches:
            probe = batches[0]
            call, first = first_row(probe.calls[index], probe.runtime.shape[0]), shelf.take(probe.runtime[:1])
            groups = find_groups(runtime, linears, first, call, residuals=not quick) if linears and spread.ranks.first else []
            inside = activation_bytes(runtime, first, call) * sum(batch.runtime.shape[0] for batch in batches)
        told = spread.ranks.tell([[group.modules, group.residual] for group in groups])  # the first rank has the first batch
        self.groups = [Group(tuple(modules), residual) for modules, residual in told]
        self.taped, self.walked = inside <= TAPE_BYTES, inside <= TAPE_BYTES and self.device.type == "cpu"

    def __enter__(self) -> BlockPair:
        self.tape = in_parallel(self._taped, range(len(self.batches)), self.device) if self.taped and not self.quick else []
        self.walk = Walk(self.runtime, self.groups, [(batch.runtime, batch.calls[self.index]) for batch in self.batches], worker_threads(self.device)) if self.walked else None
        if self.walk is not None:
            self.walk.__enter__()
        return self

    def __exit__(self, *found: object) -> None:
        if self.walk is not None:
            self.walk.__exit__(*found)

    def weight(self, module: str, turned: bool) -> torch.Tensor:
        """The merged weight ``[out, in]`` of a linear; ``turned`` where the module holds ``[in, out]``."""
        weight = self.teacher.get_submodule(module).get_parameter("weight")
        return weight.T.contiguous() if turned else weight

    def statistics(self, group: Group, solvers: Sequence[int] = (0,), turned: bool = False) -> tuple[Statistics | None, Statistics | None]:
        """Sums over the windows to solve on and over those to choose with, in the order of the batches. On the ``solvers`` among the ranks, None on others.
        ``turned``: the group's modules hold ``[in, out]``."""
        reached = self.walk.reach(group) if self.walk is not None else None
        rows, columns = self.teacher.get_submodule(group.modules[0]).get_parameter("weight").shape
        features, outputs = (rows, columns) if turned else (columns, rows)
        if not self.spread.ranks.alone:
            here = []
            for held_out in (False, True):
                here.append(self.spread.sums(held_out, self._parts(group, held_out, reached), features, outputs if group.residual and not self.quick else 0, self.device, solvers, self.compute, not self.quick))
                if self.shelf.host and (own := here[-1]) is not None:
                    own.park()
            return here[0], here[1]
        sums = {held_out: Statistics(features, self.device, compute=self.compute, drifts=not self.quick) for held_out in (False, True)}
        for numbers in self._together(reached is not None):
            if self.device.type == "cpu":
                found = in_parallel(lambda number: sums[self.batches[number].held_out].factors(*self._inputs(group, number, reached)), numbers, self.device)
                strips = []
                for held_out in (False, True):
                    chosen = [(part, self.batches[number].slot) for number, part in zip(numbers, found, strict=True) if self.batches[number].held_out is held_out]
                    complete = bool(chosen) and all((batch.held_out, batch.slot) != (held_out, chosen[-1][1]) for batch in self.batches[numbers.stop :])
                    strips.append(sums[held_out].adding([part for part, _ in chosen], [slot for _, slot in chosen], complete))
                summed_together(strips, self.device)
                if self.batches[numbers[-1]].held_out:  # the windows to solve on come first, and are through
                    sums[False].close()
                continue
            held_out = self.batches[numbers[0]].held_out
            factors = [sums[held_out].factors(*self._inputs(group, number, reached)) for number in numbers]
            sums[held_out].add_factors(factors, [self.batches[number].slot for number in numbers], complete=True)
            if self.shelf.host and (numbers.stop == len(self.batches) or self.batches[numbers.stop].held_out is not held_out):
                sums[held_out].park()
        return sums[False], sums[True]

    def _together(self, reached: bool) -> Iterator[range]:
        """Batches whose inputs are there at a time: a few on a CPU, or all where they lie there anyway; on an accelerator a slot's, so that no slot's sum has to wait for the rest of its batches beside
        the sum of those before it."""
        if self.device.type == "cpu":
            count = len(self.batches)
            step = count if reached else worker_threads(self.device)
            yield from (range(start, min(start + step, count)) for start in range(0, count, max(step, 1)))
            return
        yield from by_slot([(batch.held_out, batch.slot) for batch in self.batches])

    def leave(self, group: Group, weights: bool) -> None:
        """The group is solved. What it received, and the teacher's ``weights``, are let go where each stream passes the block once."""
        if not self.taped:
            return
        later = self.groups[self.groups.index(group) + 1 :]
        names = set(watched(group)) - {name for other in later for name in watched(other)}
        for store in [store for store, _ in self.tape] + (self.walk.stores if self.walk is not None else []):
            for name in names:
                store.pop(name, None)
        for module in group.modules if weights else ():
            set_weight(self.teacher, f"{module}.weight", torch.empty(0))

    def aside(self) -> None:
        """The block's weights lie in main memory until `back`, where streams do. Whoever holds one of them keeps it on the device."""
        if self.shelf.host:
            self._move(to_host)

    def back(self) -> None:
        if self.shelf.host:
            self._move(self.shelf.take)

    def _move(self, where: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Both blocks; what they share is moved once, and still shared."""
        for name, weight in list(self.teacher.named_parameters()):
            other = self.runtime.get_parameter(name)
            shared = weight.device == other.device and weight.is_set_to(other)
            there = where(weight.data)
            set_weight(self.teacher, name, there)
            set_weight(self.runtime, name, there if shared else where(other.data))

    def _taped(self, number: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        batch = self.batches[number]
        store, out = all_inputs(self.teacher, self.groups, self.shelf.take(batch.teacher), batch.calls[self.index])
        return {name: self.shelf.put(found) for name, found in store.items()}, self.shelf.put(out)

    def _parts(self, group: Group, held_out: bool, reached: list[dict[str, torch.Tensor]] | None) -> Iterator[tuple[Part, int]]:
        """The inputs of this rank's batches that are, or are not, held out, with their slots; a few at a time."""
        numbers = [number for number, batch in enumerate(self.batches) if batch.held_out is held_out]
        together = worker_threads(self.device)
        for start in range(0, len(numbers), together):
            here = numbers[start : start + together]
            parts = in_parallel(lambda number: self._inputs(group, number, reached), here, self.device)
            yield from zip(parts, [self.batches[number].slot for number in here], strict=True)

    def _inputs(self, group: Group, number: int, reached: list[dict[str, torch.Tensor]] | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """(run-time inputs, the teacher's, the teacher's residual minus the run-time one) of one batch, on the device; where no teacher runs, its inputs are the run-time ones."""
        batch, names = self.batches[number], watched(group)
        call, entering = batch.calls[self.index], group.residual == "<in>"
        hidden = self.shelf.take(batch.runtime) if entering or reached is None else batch.runtime
        found = reached[number] if reached is not None else group_inputs(self.runtime, group, hidden, call)
        x, residual = split_inputs(group, found, hidden)
        if self.quick:
            return x, x, None
        hidden = self.shelf.take(batch.teacher) if entering or not self.taped else batch.teacher
        aims = {name: self.shelf.take(self.tape[number][0][name]) for name in names} if self.taped else group_inputs(self.teacher, group, hidden, call)
        aim, aim_residual = split_inputs(group, aims, hidden)
        return x, aim, None if residual is None else known(aim_residual) - residual

    def experts(self, group: Group, weights: list[ExpertWeight], merged: Merged, plan: MergePlan, model_dtype: torch.dtype, solve: Callable[..., Any], nearest: Callable[..., Any]) -> ExpertSolver:
        """For the routed experts that ``group`` receives the tokens of."""
        reached = self.walk.reach(group) if self.walk is not None else None

        def arrived(number: int) -> Arrived:
            runtime, teacher, _ = self._inputs(group, number, reached)
            return Arrived(self.shelf.put(runtime), self.shelf.put(teacher), self.batches[number].held_out)

        numbers = range(len(self.batches))
        own = {self.batches[number].number: found for number, found in zip(numbers, in_parallel(arrived, numbers, self.device), strict=True)}
        module = group.modules[0].rpartition(".")[0]
        inner = self.teacher.get_submodule(module), self.runtime.get_submodule(module)
        return ExpertSolver(weights, *inner, everywhere(self.spread, own, self.shelf), merged, solve, nearest, plan.recipe.low_traffic, self.spread.ranks, model_dtype)

    def tune(self, solved: dict[str, Solved], linears: dict[str, Linear], conv: Mapping[str, bool], model_dtype: torch.dtype) -> dict[str, Any]:
        """``--polish blocks``: move codes and scales of ``linears`` (by module name) towards the teacher's block output; ``solved`` is renewed. Returns a record."""
        self._answer()
        passages = [Passage(batch.runtime, answer, batch.calls[self.index], batch.held_out) for batch, (_, answer) in zip(self.batches, self.tape, strict=True)]
        turned = {module: conv[linear.name] for module, linear in linears.items()}
        found = tune_block(self.runtime, {module: solved[linear.name] for module, linear in linears.items()}, linears, turned, passages, model_dtype, device=self.device)
        for module, result in found.solved.items():
            weight = to_device(result.weight, self.device)
            set_weight(self.runtime, f"{module}.weight", weight.T.contiguous() if turned[module] else weight)
            solved[linears[module].name] = result
        return {"held_out_error_before": found.error_before, "held_out_error": found.error_after, "codes_moved": found.moved}

    def _answer(self) -> None:
        """The teacher's outputs, where the tape does not have them."""
        if not self.tape:
            self.tape = in_parallel(lambda batch: ({}, self._out(self.teacher, batch.teacher, batch)), self.batches, self.device)

    def _out(self, block: nn.Module, hidden: torch.Tensor, batch: Batch) -> torch.Tensor:
        return self.shelf.put(run_block(block, self.shelf.take(hidden), batch.calls[self.index]))

    def advance(self, again: bool = False) -> None:
        """Both streams go on to the next block. ``again``: weights changed after the waiting pass had gone by them."""
        ahead = self.walk.finish() if self.walk is not None and not again else None

        def go_on(number: int) -> None:  # batch by batch, so that what entered goes as what comes out comes
            batch = self.batches[number]
            batch.runtime = ahead[number] if ahead is not None else self._out(self.runtime, batch.runtime, batch)
            batch.teacher = batch.runtime if self.quick else self.tape[number][1] if self.tape else self._out(self.teacher, batch.teacher, batch)

        in_parallel(go_on, range(len(self.batches)), self.device)
        self.tape = []
