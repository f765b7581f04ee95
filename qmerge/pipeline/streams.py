"""How do the teacher's and the run-time activations go through the model, block by block, while it is requantized?

Two streams start at the embeddings. The teacher stream runs through the separate model (in fp32 the same function as the merged one), the run-time
stream through the model as requantized so far (``quick``: it alone). Within a block the groups of linears are requantized in the order in which they run.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from qmerge.device import COMPUTE, in_parallel, tidy_heap, worker_threads
from qmerge.numerics.curvature import Curvature, Distant
from qmerge.numerics.hessian import Statistics, slot_of
from qmerge.pipeline.blocks import (
    Call,
    Group,
    activation_bytes,
    all_inputs,
    empty_copy,
    find_groups,
    first_row,
    group_inputs,
    record_calls,
    run_block,
    split_inputs,
    watched,
)
from qmerge.pipeline.calibrate import Calibration
from qmerge.pipeline.candidates import Linear
from qmerge.pipeline.ends import entrance
from qmerge.pipeline.experts import ARRIVALS, Arrived, ExpertSolver, Traffic, everywhere, receive
from qmerge.pipeline.experts_names import ExpertWeight
from qmerge.pipeline.head import solve_head, wants_head
from qmerge.pipeline.merge import Merged
from qmerge.pipeline.plan import MergePlan
from qmerge.pipeline.requantize import Solved, Steps, requantize_group, round_to_nearest
from qmerge.pipeline.skeleton import set_weight
from qmerge.pipeline.spread import Part, Spread, handed, share_out
from qmerge.pipeline.stepwise import Walk
from qmerge.pipeline.tune_blocks import Passage, tune_block
from qmerge.ranks import ALONE, Ranks
from qmerge.types import Grid, QuantState, known

if TYPE_CHECKING:
    from qmerge.pipeline.kept import Kept
    from qmerge.pipeline.kept_together import KeptTogether

TOKENS_PER_BATCH = 4096
TAPE_BYTES = 2 * 2**30


@dataclass
class Batch:
    """Windows that go through the model together: hidden states ``[windows, T, hidden]`` in both models, and how each block is called."""

    teacher: torch.Tensor
    runtime: torch.Tensor
    calls: list[Call]
    held_out: bool
    slot: int = 0
    """the partial sum that it belongs to (numerics.hessian.SLOTS), among those that are, or are not, held out"""
    number: int = 0
    """among all, also those of other ranks"""


def requantize_blocks(
    plan: MergePlan, merged: Merged, calibration: Calibration, model_dtype: torch.dtype, nf4_like: QuantState | None, progress: Callable[[str], None], steps: Steps | None = None,
    traffic: dict[str, Traffic] | None = None, grids: Mapping[str, Grid | None] | None = None, tuned: list[dict[str, Any]] | None = None,
    curvatures: dict[str, Curvature | Distant] | None = None, kept: Kept | KeptTogether | None = None,
    ranks: Ranks = ALONE,
) -> Iterator[tuple[int, dict[str, Solved]]]:
    """Yields, per block, its number and the solved linears by weight name; the head comes last, where it is requantized. One block's weights and two streams are alive at a time.
    ``traffic`` fills with what routed experts saw. ``grids``: by weight name where it is not the recipe's, None for what stays float. ``tuned`` fills with what ``--polish blocks`` did.
    ``curvatures``: by weight name how rows count together; each is taken out as it is used. ``kept``: what an earlier process has solved is not solved again (without the linears whose
    tensors are in the output already), and what is solved here is kept. ``ranks``: each passes its own batches and solves its share; all of them yield the same."""
    skeleton, grids, curvatures, traffic = plan.tree, grids or {}, curvatures if curvatures is not None else {}, traffic if traffic is not None else {}
    head = grids.get(known(skeleton.output_embedding), plan.recipe.grid) if wants_head(plan) else None
    units = len(skeleton.blocks) + (head is not None)
    if kept is not None:
        kept.expect(units)
        if kept.count >= units:  # nothing is left that text has to go through
            for index in range(units):
                yield index, _recall(kept, index, traffic, tuned)
            return
    batches, spread = start(plan, merged, calibration, ranks)
    passed, tidied = kept.load_streams(batches) if kept is not None else 0, time.monotonic()
    for index, empty in enumerate(skeleton.blocks):
        solved: dict[str, Solved] = {}
        if kept is not None and index < kept.count:
            solved = _recall(kept, index, traffic, tuned)
            if index >= passed:
                _run_forwards(plan, merged, index, solved, batches, model_dtype)
                progress(f"block {index + 1}/{len(skeleton.blocks)}: as it was solved before")
            yield index, solved
            continue
        if kept is not None:
            kept.solving(index)
        prefix = f"{skeleton.blocks_name}.{index}"
        routed = [weight for weight in plan.routed if weight.name.startswith(prefix + ".")]
        apart = {weight.name for weight in routed}
        wanted = [name.removeprefix(prefix + ".").removesuffix(".weight") for name in plan.requantized if name.startswith(prefix + ".") and name not in apart]
        experts = {f"{weight.module.removeprefix(prefix + '.')}.{ARRIVALS}": weight.module for weight in routed}
        record: dict[str, Any] | None = None
        alone: dict[str, Linear] = {}
        with _BlockPair(*_load_block(empty, prefix, merged, skeleton.linears, model_dtype, routed), batches, index, [*wanted, *experts], spread, merged.device, COMPUTE[plan.recipe.compute].sums, plan.recipe.quick) as pair:
            for group in pair.groups:
                if group.modules[0] in experts:
                    here = [weight for weight in routed if weight.module == experts[group.modules[0]]]
                    solver = pair.experts(group, here, merged, plan, model_dtype, lambda linears, train, judge: requantize_group(linears, plan.recipe.grid, train, judge, model_dtype, nf4_like, len(skeleton.blocks), steps),
                                          lambda linear: round_to_nearest(linear, plan.recipe.grid, model_dtype, nf4_like))  # fmt: skip
                    solver.run()
                    solved |= solver.solved
                    traffic |= solver.traffic
                    continue
                names = [f"{prefix}.{module}.weight" for module in group.modules]
                conv = [skeleton.linears[name] for name in names]
                grid = grids.get(names[0], plan.recipe.grid)
                if grid is None:
                    for module in group.modules:
                        set_weight(pair.runtime, f"{module}.weight", pair.teacher.get_submodule(module).get_parameter("weight").to(model_dtype).float())
                    continue
                owners = share_out([pair.teacher.get_submodule(module).get_parameter("weight").numel() for module in group.modules], ranks)
                rows = list(zip(names, group.modules, conv, [curvatures.pop(name, None) for name in names], owners, strict=True))
                linears = [Linear(name, pair.weight(module, turned), merged.four_bit(name), merged.delta(name), curvature.near() if curvature is not None else None) for name, module, turned, curvature, owner in rows if owner == ranks.rank]
                sums = pair.statistics(group, owners, conv[0])
                own = requantize_group(linears, grid, known(sums[0]), known(sums[1]), model_dtype, nf4_like, len(skeleton.blocks), steps, spent=True) if linears else []
                del sums
                found = handed(ranks, owners, names, {linear.name: result for linear, result in zip(linears, own, strict=True)}, model_dtype, merged.device)
                for module, turned, result in zip(group.modules, conv, found, strict=True):
                    set_weight(pair.runtime, f"{module}.weight", result.weight.T.contiguous() if turned else result.weight)
                solved |= dict(zip(names, found, strict=True))
                pair.leave(group, weights=not experts)
                tidied = tidy_heap(tidied)
                if "blocks" in plan.recipe.polish:
                    alone |= {module: linear for linear in linears for name, module, *_ in rows if name == linear.name}
            if again := bool(alone):
                record = {"block": index} | pair.tune(solved, alone, skeleton.linears, model_dtype)
                if tuned is not None:
                    tuned.append(record)
            pair.advance(again)
        progress(_line(index, len(skeleton.blocks), batches, ranks, plan.recipe.quick))
        if kept is not None:
            kept.commit(index, solved, traffic, record)
            if index + 1 < units:
                kept.save_streams(index + 1, batches)
            kept.rest()
        yield index, solved
    if head is not None:
        if kept is not None:
            kept.solving(units - 1)
        solved = solve_head(plan, merged, [(batch.teacher, batch.runtime, batch.held_out, batch.slot) for batch in batches], head, model_dtype, nf4_like, steps, spread)
        if kept is not None:
            kept.commit(units - 1, solved, traffic, None)
            kept.rest()
        yield units - 1, solved


def _recall(kept: Kept | KeptTogether, index: int, traffic: dict[str, Traffic], tuned: list[dict[str, Any]] | None) -> dict[str, Solved]:
    """A unit that was solved before, with what was noted of it."""
    traffic |= kept.traffic(index)
    if (record := kept.facts(index)["tuned"]) is not None and tuned is not None:
        tuned.append(record)
    return kept.solved(index)


def _run_forwards(plan: MergePlan, merged: Merged, index: int, solved: Mapping[str, Solved], batches: list[Batch], model_dtype: torch.dtype) -> None:
    """Both streams through a block whose linears are solved, to the bits that they had when that was done."""
    skeleton, prefix = plan.tree, f"{plan.tree.blocks_name}.{index}"
    routed = [weight for weight in plan.routed if weight.name.startswith(prefix + ".")]
    teacher, runtime = _load_block(skeleton.blocks[index], prefix, merged, skeleton.linears, model_dtype, routed)
    apart = {weight.name: weight for weight in routed}
    for name in (name for name in plan.requantized if name.startswith(prefix + ".")):
        inner = name.removeprefix(prefix + ".")
        if name in apart:
            apart[name].region.write(runtime.get_parameter(apart[name].parameter.removeprefix(prefix + ".")).data, solved[name].weight)
        elif name in solved:
            set_weight(runtime, inner, solved[name].weight.T.contiguous() if skeleton.linears[name] else solved[name].weight)
        else:  # a budget left it float
            set_weight(runtime, inner, teacher.get_parameter(inner).to(model_dtype).float())
    calls = [batch.calls[index] for batch in batches]
    ahead = in_parallel(lambda part: run_block(runtime, part[0].runtime, part[1]), list(zip(batches, calls, strict=True)), merged.device)
    aims = ahead if plan.recipe.quick else in_parallel(lambda part: run_block(teacher, part[0].teacher, part[1]), list(zip(batches, calls, strict=True)), merged.device)
    for batch, aim, found in zip(batches, aims, ahead, strict=True):
        batch.teacher, batch.runtime = aim, found


class _BlockPair:
    """One block as the teacher has it and as requantized so far, with the batches that flow through both.

    The teacher's activations within the block do not change while it is requantized, and the run-time pass can wait at each group until that is solved: where
    the activations fit into ``TAPE_BYTES`` each stream passes the block once. Else passes are repeated up to each group, to the same bits.
    """

    def __init__(self, teacher: nn.Module, runtime: nn.Module, batches: list[Batch], index: int, linears: list[str], spread: Spread, device: torch.device, compute: torch.dtype, quick: bool) -> None:  # compute: of the sums
        self.teacher, self.runtime, self.batches, self.index, self.spread, self.device, self.compute, self.quick = teacher, runtime, batches, index, spread, device, compute, quick
        inside, groups = 0, []
        if batches:
            probe = batches[0]
            call = first_row(probe.calls[index], probe.runtime.shape[0])
            groups = find_groups(runtime, linears, probe.runtime[:1], call) if linears and spread.ranks.first else []
            inside = activation_bytes(runtime, probe.runtime[:1], call) * sum(batch.runtime.shape[0] for batch in batches)
        told = spread.ranks.tell([[group.modules, group.residual] for group in groups])  # the first rank has the first batch
        self.groups = [Group(tuple(modules), residual) for modules, residual in told]
        self.taped, self.walked = inside <= TAPE_BYTES, inside <= TAPE_BYTES and self.device.type == "cpu"

    def __enter__(self) -> _BlockPair:
        calls = [batch.calls[self.index] for batch in self.batches]
        teachers = list(zip(self.batches, calls, strict=True))
        self.tape = in_parallel(lambda part: all_inputs(self.teacher, self.groups, part[0].teacher, part[1]), teachers, self.device) if self.taped and not self.quick else []
        self.walk = Walk(self.runtime, self.groups, [(batch.runtime, call) for batch, call in teachers], worker_threads(self.device)) if self.walked else None
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
        sums: dict[bool, Statistics] = {}
        reached = self.walk.reach(group) if self.walk is not None else None
        if not self.spread.ranks.alone:
            rows, columns = self.teacher.get_submodule(group.modules[0]).get_parameter("weight").shape
            features, outputs = (rows, columns) if turned else (columns, rows)
            here = [self.spread.sums(held_out, self._parts(group, held_out, reached), features, outputs if group.residual and not self.quick else 0, self.device, solvers, self.compute, not self.quick) for held_out in (False, True)]
            return here[0], here[1]
        together = len(self.batches) if reached is not None else worker_threads(self.device)
        for start in range(0, len(self.batches), together):  # a few batches' inputs at a time
            numbers = range(start, min(start + together, len(self.batches)))
            parts = in_parallel(lambda number: self._inputs(group, number, reached), numbers, self.device)
            for held_out in (False, True):
                chosen = [(part, self.batches[number].slot) for number, part in zip(numbers, parts, strict=True) if self.batches[number].held_out is held_out]
                if chosen:
                    complete = all((batch.held_out, batch.slot) != (held_out, chosen[-1][1]) for batch in self.batches[numbers.stop :])
                    sums.setdefault(held_out, Statistics(chosen[0][0][0].shape[1], self.device, compute=self.compute, drifts=not self.quick)).add_all([part for part, _ in chosen], [slot for _, slot in chosen], complete)
            if held_out in sums:  # the windows to solve on come first, and are through
                sums[False].close()
        return sums[False], sums[True]

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

    def _parts(self, group: Group, held_out: bool, reached: list[dict[str, torch.Tensor]] | None) -> Iterator[tuple[Part, int]]:
        """The inputs of this rank's batches that are, or are not, held out, with their slots; a few at a time."""
        numbers = [number for number, batch in enumerate(self.batches) if batch.held_out is held_out]
        together = worker_threads(self.device)
        for start in range(0, len(numbers), together):
            here = numbers[start : start + together]
            parts = in_parallel(lambda number: self._inputs(group, number, reached), here, self.device)
            yield from zip(parts, [self.batches[number].slot for number in here], strict=True)

    def _inputs(self, group: Group, number: int, reached: list[dict[str, torch.Tensor]] | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """(run-time inputs, the teacher's, the teacher's residual minus the run-time one) of one batch; where no teacher runs, its inputs are the run-time ones."""
        batch = self.batches[number]
        call = batch.calls[self.index]
        found = reached[number] if reached is not None else group_inputs(self.runtime, group, batch.runtime, call)
        x, residual = split_inputs(group, found, batch.runtime)
        if self.quick:
            return x, x, None
        aims = self.tape[number][0] if self.taped else group_inputs(self.teacher, group, batch.teacher, call)
        aim, aim_residual = split_inputs(group, aims, batch.teacher)
        return x, aim, None if residual is None else known(aim_residual) - residual

    def experts(self, group: Group, weights: list[ExpertWeight], merged: Merged, plan: MergePlan, model_dtype: torch.dtype, solve: Callable[..., Any], nearest: Callable[..., Any]) -> ExpertSolver:
        """For the routed experts that ``group`` receives the tokens of."""
        reached = self.walk.reach(group) if self.walk is not None else None
        numbers = range(len(self.batches))
        parts = in_parallel(lambda number: self._inputs(group, number, reached), numbers, self.device)
        own = {self.batches[number].number: Arrived(runtime, teacher, self.batches[number].held_out) for number, (runtime, teacher, _) in zip(numbers, parts, strict=True)}
        arrived = everywhere(self.spread, own, self.device)
        module = group.modules[0].rpartition(".")[0]
        return ExpertSolver(weights, self.teacher.get_submodule(module), self.runtime.get_submodule(module), arrived, merged, solve, nearest, plan.recipe.low_traffic, self.spread.ranks, model_dtype)

    def tune(self, solved: dict[str, Solved], linears: dict[str, Linear], conv: Mapping[str, bool], model_dtype: torch.dtype) -> dict[str, Any]:
        """``--polish blocks``: move codes and scales of ``linears`` (by module name) towards the teacher's block output; ``solved`` is renewed. Returns a record."""
        self._answer()
        passages = [Passage(batch.runtime, answer, batch.calls[self.index], batch.held_out) for batch, (_, answer) in zip(self.batches, self.tape, strict=True)]
        turned = {module: conv[linear.name] for module, linear in linears.items()}
        found = tune_block(self.runtime, {module: solved[linear.name] for module, linear in linears.items()}, linears, turned, passages, model_dtype)
        for module, result in found.solved.items():
            set_weight(self.runtime, f"{module}.weight", result.weight.T.contiguous() if turned[module] else result.weight)
            solved[linears[module].name] = result
        return {"held_out_error_before": found.error_before, "held_out_error": found.error_after, "codes_moved": found.moved}

    def _answer(self) -> None:
        """The teacher's outputs, where the tape does not have them."""
        if not self.tape:
            parts = [(batch, batch.calls[self.index]) for batch in self.batches]
            self.tape = in_parallel(lambda part: ({}, run_block(self.teacher, part[0].teacher, part[1])), parts, self.device)

    def advance(self, again: bool = False) -> None:
        """Both streams go on to the next block. ``again``: weights changed after the waiting pass had gone by them."""
        parts = [(batch, batch.calls[self.index]) for batch in self.batches]
        if not self.quick:
            self._answer()
        ahead = self.walk.finish() if self.walk is not None and not again else in_parallel(lambda part: run_block(self.runtime, part[0].runtime, part[1]), parts, self.device)
        answers = ahead if self.quick else [answer for _, answer in self.tape]
        for batch, teacher, runtime in zip(self.batches, answers, ahead, strict=True):
            batch.teacher, batch.runtime = teacher, runtime
        self.tape = []


def start(plan: MergePlan, merged: Merged, calibration: Calibration, ranks: Ranks = ALONE, batch: int | None = None) -> tuple[list[Batch], Spread]:
    """Embed this rank's windows with the model's own code, ``batch`` tokens (``TOKENS_PER_BATCH``) at a time; the blocks are stand-ins, so only the tensors around them are loaded (`ends.entrance`). And who has which batches."""
    skeleton = plan.tree
    batch = batch or TOKENS_PER_BATCH
    split = [ids.split(max(1, batch // ids.shape[1])) for ids in (calibration.train, calibration.held_out)]
    spread = Spread(ranks, *map(len, split))
    parts: list[tuple[torch.Tensor, bool, int, int]] = []
    for held_out, before in ((False, 0), (True, spread.train)):
        rows = [(part, held_out, slot_of(number, len(split[held_out])), before + number) for number, part in enumerate(split[held_out])]
        parts += [(part.to(merged.device), held_out, slot, number) for part, held_out, slot, number in rows if spread.mine(held_out, slot)]
    # one thread per operation, here as in the blocks: the bits must not depend on the thread count
    with entrance(plan, merged):
        hidden, calls = in_parallel(lambda ids: record_calls(skeleton.model, skeleton.blocks_name, ids, COMPUTE[plan.recipe.compute].passes), [[ids for ids, *_ in parts]], merged.device)[0]
    return [Batch(first, first, call, held, slot, number) for first, call, (_, held, slot, number) in zip(hidden, calls, parts, strict=True)], spread


def _load_block(empty: nn.Module, prefix: str, merged: Merged, linears: dict[str, bool], model_dtype: torch.dtype, routed: list[ExpertWeight]) -> tuple[nn.Module, nn.Module]:
    """(teacher, run-time) blocks in fp32. They share the linears' tensors until those are requantized; the run-time one has all else as it will be stored.
    ``routed``: the weights of routed experts that will be requantized; both blocks have a fused parameter of their own for them."""
    teacher, runtime = empty_copy(empty), empty_copy(empty)
    fused = {weight.parameter for weight in routed}
    for name, _ in list(empty.named_parameters()):
        full = f"{prefix}.{name}"
        weight = merged.parameter(full)
        weight = weight.T.contiguous() if linears.get(full) else weight  # a Conv1D module holds [in, out]
        set_weight(teacher, name, weight)
        set_weight(runtime, name, weight if full in linears else weight.clone() if full in fused else weight.to(model_dtype).float())
    for block in (teacher, runtime):
        receive(block, dict.fromkeys(weight.module.removeprefix(prefix + ".") for weight in routed))
    return teacher, runtime


def _line(index: int, count: int, batches: list[Batch], ranks: Ranks, quick: bool) -> str:
    if quick:
        return f"block {index + 1}/{count}"
    own = [(batch.number, float((batch.runtime - batch.teacher).square().sum()), float(batch.teacher.square().sum())) for batch in batches if batch.held_out]
    rows = sorted(tuple(row) for rows in ranks.hear(own) for row in rows)
    error, size = sum(row[1] for row in rows), sum(row[2] for row in rows)
    return f"block {index + 1}/{count}: held-out error of the hidden states {error / max(size, 1e-30):.2e} of their power"
