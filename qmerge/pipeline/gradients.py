"""What do the gradients of the model's own likelihood say about each linear's outputs?

Two passes through the merged model, one block alive at a time: forwards, then backwards with gradients of the log-likelihood of tokens drawn from the model's own distribution. Their
second moment is the Fisher information, which is the curvature of the KL. Same inputs, same bits on a CPU, whatever the thread count.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from qmerge.device import COMPUTE, in_parallel, products_in, worker_threads
from qmerge.numerics.curvature import Curvature, Distant
from qmerge.numerics.draws import drawn
from qmerge.numerics.hessian import SLOTS, Statistics
from qmerge.pipeline import ends
from qmerge.pipeline.batches import Batch, start
from qmerge.pipeline.blocks import Call, Group, empty_copy, find_groups, first_row, run_block
from qmerge.pipeline.calibrate import Calibration
from qmerge.pipeline.gradients_spread import Summed, everywhere
from qmerge.pipeline.head import Tail, wants_head
from qmerge.pipeline.merge import Merged
from qmerge.pipeline.plan import MergePlan
from qmerge.pipeline.skeleton import set_weight
from qmerge.pipeline.spread import Spread
from qmerge.ranks import ALONE, Ranks
from qmerge.types import known

TOKENS = 8192
"""calibration tokens that gradients are taken on, about"""
BATCH = 1024
"""tokens that go backwards together"""
HELD_BYTES = 8 * 2**30
"""main memory for the hidden states between blocks"""
LEAST_WINDOWS, LEAST_QUICK = 8, 4
"""windows that gradients are taken on, at least, however long they are; and with ``quick``"""
LOGITS = 1 << 24
"""logits that are formed together: some 0.4 GB with what their gradients take"""
CURVATURE_BYTES = 4 * 2**30
"""main memory for the curvatures of all linears; they are kept in narrower blocks where they need more"""
Names = tuple[str, ...]


@dataclass
class Seen:
    """Of one group (where ranks share the work, of those of its linears that this one owns): sums of its inputs over the windows to solve on and over those that judge (where asked for), and per linear the sum of ``g gᵀ`` over all tokens."""

    names: Names
    train: Statistics | None
    held_out: Statistics | None
    curvature: dict[str, Curvature]
    tokens: int

    def fisher(self, name: str) -> torch.Tensor:
        """``E[g²]`` fp32 ``[out]``."""
        return self.curvature[name].squares() / self.tokens


class Gradients:
    """The passes of one run. ``tokens``: how many calibration tokens to use, about."""

    def __init__(self, plan: MergePlan, merged: Merged, calibration: Calibration, tokens: int = TOKENS, ranks: Ranks = ALONE) -> None:
        """``ranks`` share the batches, each owning some linears' curvatures, where every batch is a slot of its own; else each rank passes all of them."""
        self.plan, self.merged = plan, merged
        self.few = _few(plan, calibration, tokens)
        self.width = curvature_width(plan)
        self.tokens = self.few.train.numel() + self.few.held_out.numel()
        self.sizes = [len(part) for ids in (self.few.train, self.few.held_out) for part in ids.split(max(1, BATCH // ids.shape[1]))]
        self.ranks = ranks if len(self.sizes) <= SLOTS else ALONE

    def run(self, visit: Callable[[Seen], None], progress: Callable[[str], None], inputs: bool, missing: Callable[[str], None]) -> None:
        """``visit`` gets every group of ``plan.requantized`` (routed experts apart), the head first, then from the last block to the first; with the sums of their ``inputs`` where
        asked for. ``missing`` gets the name of a linear whose output does not reach the loss through its own block; its group is not visited."""
        plan, merged = self.plan, self.merged
        batches, self.spread = start(plan, merged, self.few, self.ranks, BATCH)
        entered = _forwards(plan, merged, batches, progress)
        gradients = self._end(batches, visit, inputs)
        apart = {weight.name for weight in plan.routed}
        for index in reversed(range(len(entered))):
            prefix = f"{plan.tree.blocks_name}.{index}"
            wanted = [name.removeprefix(prefix + ".").removesuffix(".weight") for name in plan.requantized if name.startswith(prefix + ".") and name not in apart]
            block = _Block(plan, merged, index, wanted, batches, self.width, inputs, self.spread, self.tokens)
            seen, gradients = block.backwards(entered.pop(), gradients, missing)
            for group in seen:
                visit(group)
            progress(f"gradients: block {len(plan.tree.blocks) - index}/{len(plan.tree.blocks)} from the end")

    def _end(self, batches: list[Batch], visit: Callable[[Seen], None], inputs: bool) -> list[torch.Tensor]:
        """Per batch the gradient by the last block's output; and the head is visited, where it is to be requantized."""
        plan = self.plan
        seed = torch.Generator().manual_seed(plan.recipe.seed)
        seeds = [torch.randint(2**62, (size,), generator=seed).tolist() for size in self.sizes]  # also for those of other ranks
        compute = COMPUTE[plan.recipe.compute].sums
        with ends.head(plan, self.merged), Tail(plan.tree) as tail:
            parts = in_parallel(lambda number: _draw(tail, batches[number].teacher, seeds[batches[number].number], compute), range(len(batches)), self.merged.device)
        if inputs and wants_head(plan):
            name = known(plan.tree.output_embedding)
            squares = parts[0][2]
            for _, _, found in parts[1:]:
                squares = squares + found
            curvature = Curvature(len(squares), 1, list(squares.reshape(-1, 1, 1)))
            train, judge = (_statistics([(batch.held_out, x) for batch, (_, x, _) in zip(batches, parts, strict=True)], held, self.merged.device, compute) for held in (False, True))
            visit(Seen((name,), train, judge, {name: curvature}, train.tokens + judge.tokens))
        return [gradient for gradient, _, _ in parts]


@dataclass
class Curvatures:
    """``by_name``: of every linear whose output reaches the loss through its own block; not of routed experts, and not of the head (one row per word). ``tokens``: that gradients were taken on."""

    by_name: dict[str, Curvature | Distant] = field(default_factory=dict)
    tokens: int = 0
    rows: int = 0
    """of a linear that count together, at most"""
    linears: int = 0
    order: list[str] = field(default_factory=list, repr=False)

    def add(self, seen: Seen) -> None:
        for name, curvature in seen.curvature.items():
            self.by_name[name] = curvature.pack()
        self.order += seen.names
        self.tokens = seen.tokens

    def gather(self, ranks: Ranks) -> None:
        """All blocks are through: those of linears that other ranks own too."""
        self.by_name = everywhere(self.by_name, self.order, ranks)
        self.linears = len(self.by_name)
        self.rows = max((len(block) for curvature in self.by_name.values() for block in curvature.blocks), default=0)

    def to_json(self) -> dict[str, int]:
        """For the manifest."""
        return {"tokens": self.tokens, "rows_together": self.rows, "linears": self.linears}


def curvatures(plan: MergePlan, merged: Merged, calibration: Calibration, tokens: int, progress: Callable[[str], None], ranks: Ranks = ALONE) -> Curvatures:
    """One pass for them alone; on all ``ranks`` the same."""
    found, lost = Curvatures(), list[str]()
    with torch.no_grad():
        passes = Gradients(plan, merged, calibration, tokens, ranks)
        passes.run(found.add, progress, False, lost.append)
        found.gather(passes.ranks)
    if lost:
        progress(f"gradients: {len(lost)} groups of linears do not reach the loss through their own block; their rows are solved one by one, e.g. of {lost[0]}")
    progress(f"gradients: {passes.tokens} tokens; up to {found.rows} rows of a linear count together")
    return found


def _few(plan: MergePlan, calibration: Calibration, tokens: int) -> Calibration:
    """The first windows of both parts, in their proportion: as many as ``tokens`` and ``HELD_BYTES`` allow, at least ``LEAST_WINDOWS`` or ``LEAST_QUICK``."""
    length = calibration.train.shape[1]
    embedding = plan.pieces.table.get(plan.tree.input_embedding or "")
    width = 1 if embedding is None else embedding.shape[-1]
    windows = max(LEAST_QUICK if plan.recipe.quick else LEAST_WINDOWS, min(tokens // length, HELD_BYTES // (4 * length * width * len(plan.tree.blocks))))
    share = min(1.0, windows / (len(calibration.train) + len(calibration.held_out)))
    few = [part[: max(1, round(len(part) * share))] for part in (calibration.train, calibration.held_out)]
    return replace(calibration, train=few[0], held_out=few[1])


def curvature_width(plan: MergePlan) -> int:
    """Rows of a block of a curvature."""
    return width_for([plan.pieces.table[name].shape[1 if plan.tree.linears.get(name) else 0] for name in plan.requantized])


def width_for(rows: Sequence[int]) -> int:
    """Rows of a block of a curvature, where linears have ``rows``: as many as let all curvatures together fit into ``CURVATURE_BYTES``, a power of two."""
    width = 2**14
    while width > 64 and sum(2 * count * min(count, width) for count in rows) > CURVATURE_BYTES:
        width //= 2
    return width


def _forwards(plan: MergePlan, merged: Merged, batches: list[Batch], progress: Callable[[str], None]) -> list[list[torch.Tensor]]:
    """What enters each block, per batch, in main memory; the batches end behind the last one."""
    entered = []
    for index in range(len(plan.tree.blocks)):
        entered.append([batch.teacher.cpu() for batch in batches])
        block = _teacher(plan, merged, index)
        ahead = in_parallel(lambda part: run_block(*part), [(block, batch.teacher, batch.calls[index]) for batch in batches], merged.device)
        for batch, out in zip(batches, ahead, strict=True):
            batch.teacher = out
    progress("gradients: forwards done")
    return entered


def _teacher(plan: MergePlan, merged: Merged, index: int) -> nn.Module:
    """A block of the merged model in fp32."""
    empty = plan.tree.blocks[index]
    block = empty_copy(empty)
    for name, _ in list(empty.named_parameters()):
        full = f"{plan.tree.blocks_name}.{index}.{name}"
        weight = merged.parameter(full)
        set_weight(block, name, weight.T.contiguous() if plan.tree.linears.get(full) else weight)
    return block


def _draw(tail: Tail, hidden: torch.Tensor, seeds: list[int], compute: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(gradient by ``hidden`` of the log-likelihood of tokens drawn from the model's distribution, the head's inputs, Σ over tokens of the squared gradient by the logits).

    A few tokens of one window at a time: logits are large, and what follows the blocks takes each token by itself.
    """
    gradients, inputs, step = [], [], max(1, LOGITS // tail.vocabulary)
    squares: torch.Tensor | None = None
    for window, seed in zip(hidden, seeds, strict=True):
        dice, parts = torch.Generator().manual_seed(seed), []
        for tokens in window.split(step):
            with torch.enable_grad():
                leaf = tokens.unsqueeze(0).detach().requires_grad_()
                with products_in(compute, leaf.device):
                    x, logits = tail.logits(leaf)
                logs = logits[0].float().log_softmax(-1)
                words = drawn(logs.detach().exp(), torch.rand(len(logs), generator=dice, dtype=torch.float64)).unsqueeze(1)
                by_logits, by_hidden = torch.autograd.grad(logs.gather(1, words).sum(), (logits, leaf))
            parts.append((by_hidden[0], x[0].detach()))
            found = by_logits[0].float().square().sum(0)
            squares = found if squares is None else squares + found
        gradients.append(torch.cat([part for part, _ in parts]))
        inputs.append(torch.cat([part for _, part in parts]))
    return torch.stack(gradients), torch.stack(inputs), known(squares)


class _Block:
    """One block of the merged model on the way back."""

    def __init__(self, plan: MergePlan, merged: Merged, index: int, linears: list[str], batches: list[Batch], width: int, inputs: bool, spread: Spread, tokens: int) -> None:
        self.spread, self.tokens = spread, tokens
        self.prefix, self.batches, self.device, self.width, self.inputs = f"{plan.tree.blocks_name}.{index}", batches, merged.device, width, inputs
        self.compute = COMPUTE[plan.recipe.compute].sums
        self.calls: list[Call] = [batch.calls[index] for batch in batches]
        self.module = _teacher(plan, merged, index)
        groups: list[Group] = []
        if linears and spread.ranks.first:
            first = batches[0].runtime  # the shape is what matters here; `start` left the embeddings in it
            groups = find_groups(self.module, linears, first[:1], first_row(self.calls[0], first.shape[0]), residuals=False)
        self.groups = [Group(tuple(modules), residual) for modules, residual in spread.ranks.tell([[group.modules, group.residual] for group in groups])]
        self._here = threading.local()

    def full(self, module: str) -> str:
        return f"{self.prefix}.{module}.weight"

    def backwards(self, entered: list[torch.Tensor], gradients: list[torch.Tensor], missing: Callable[[str], None]) -> tuple[list[Seen], list[torch.Tensor]]:
        """What each group saw, and per batch the gradient by the block's input from that by its output."""
        handles = [self.module.get_submodule(group.modules[0]).register_forward_pre_hook(self._keep_input(group), with_kwargs=True) for group in self.groups if self.inputs]
        handles += [self.module.get_submodule(module).register_forward_hook(self._keep_gradient(module)) for group in self.groups for module in group.modules]
        summed = Summed(self.spread, self.device)
        inputs, back, together = [], [], worker_threads(self.device)
        try:
            for first in range(0, len(self.batches), together):  # a few batches' sums at a time
                numbers = range(first, min(first + together, len(self.batches)))
                for number, (kept, found, gradient) in zip(numbers, in_parallel(lambda n: self._one(entered[n], n, gradients[n]), numbers, self.device), strict=True):
                    inputs.append((self.batches[number].held_out, kept))
                    back.append(gradient)
                    summed.add(found)
            summed.end()
        finally:
            for handle in handles:
                handle.remove()
        seen = []
        for group in self.groups:
            names = tuple(self.full(module) for module in group.modules)
            if idle := [name for name in names if name not in summed.names]:
                missing(idle[0])
                continue
            train, judge = (_statistics([(held, kept[group]) for held, kept in inputs], held_out, self.device, self.compute) if self.inputs else None for held_out in (False, True))
            seen.append(Seen(names, train, judge, {name: summed.sums[name] for name in names if name in summed.sums}, self.tokens))
        return seen, back

    def _one(self, entered: torch.Tensor, number: int, gradient: torch.Tensor) -> tuple[dict[Group, torch.Tensor], dict[str, Curvature], torch.Tensor]:
        self._here.inputs, self._here.sums = {}, {}
        with torch.enable_grad(), _repeatable(self.device), products_in(self.compute, self.device):
            leaf = entered.to(self.device).detach().requires_grad_()
            out = self.module(leaf, *self.calls[number].args, **self.calls[number].kwargs)
            (found,) = torch.autograd.grad(out[0] if isinstance(out, tuple) else out, leaf, gradient)
        return self._here.inputs, self._here.sums, found

    def _keep_input(self, group: Group) -> Callable[..., None]:
        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._here.inputs.setdefault(group, (args[0] if args else next(iter(kwargs.values()))).detach())

        return before

    def _keep_gradient(self, module: str) -> Callable[..., None]:
        def after(_: nn.Module, args: tuple[Any, ...], out: torch.Tensor) -> None:
            sums, name = self._here.sums, self.full(module)

            def keep(gradient: torch.Tensor) -> None:
                sums.setdefault(name, Curvature(gradient.shape[-1], self.width)).add(gradient.reshape(-1, gradient.shape[-1]))

            if out.requires_grad:  # not so for what only side inputs of the block feed
                out.register_hook(keep)

        return after


def _repeatable(device: torch.device) -> Any:
    """On an accelerator the fused attention kernels add gradients up in no fixed order."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    return nullcontext() if device.type == "cpu" else sdpa_kernel(SDPBackend.MATH)


def _statistics(rows: list[tuple[bool, torch.Tensor]], held_out: bool, device: torch.device, compute: torch.dtype) -> Statistics:
    """Sums of one group's inputs over the batches that are ``held_out`` or not."""
    sums = Statistics(rows[0][1].shape[-1], device, compute=compute)
    sums.add_all([(x, x, None) for held, inputs in rows if held is held_out for x in (inputs.flatten(0, -2),)], complete=True)
    return sums
