"""What does the model lose when one group of linears alone is rounded onto a grid?

To second order a change δy of a linear's outputs costs ½ E[(g · δy)²] nats per token, g the gradient of the log-likelihood of tokens drawn from the model's own distribution (the Fisher
information, which is the curvature of the KL). Taken row by row: ½ Σ_o E[g_o²] (E H Eᵀ)_oo, with E the rounding error of a quick solve and H = E[x xᵀ] of held-out tokens.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from qmerge.device import in_parallel
from qmerge.errors import Refused
from qmerge.numerics import gptq, grids
from qmerge.numerics.hessian import Statistics, factor
from qmerge.pipeline.blocks import Call, Group, empty_copy, find_groups, run_block
from qmerge.pipeline.calibrate import Calibration
from qmerge.pipeline.head import Tail, wants_head
from qmerge.pipeline.merge import Merged
from qmerge.pipeline.plan import MergePlan
from qmerge.pipeline.skeleton import set_weight
from qmerge.pipeline.streams import _first_row, _start
from qmerge.types import Grid

TOKENS = 16_384
"""calibration tokens that the loss is measured on, about; the held-out windows' share of them judges"""
HELD_BYTES = 8 * 2**30
"""main memory for the hidden states between blocks"""
LEAST_WINDOWS = 8
DAMP = 0.01
Names = tuple[str, ...]
Losses = dict[Names, dict[Grid | None, float]]
"""nats per token by grid (None: as a float in the file), per group of weights that must share one"""


@dataclass
class _Seen:
    """Of one group: sums of its inputs over the windows to solve on and over those that judge, and per linear Σ g² ``[out]`` over all tokens."""

    train: Statistics
    held_out: Statistics
    squares: dict[str, torch.Tensor]

    def fisher(self, name: str) -> torch.Tensor:
        return self.squares[name] / (self.train.tokens + self.held_out.tokens)


@torch.no_grad()
def sensitivities(
    plan: MergePlan,
    merged: Merged,
    calibration: Calibration,
    model_dtype: torch.dtype,
    candidates: Callable[[Names], Sequence[Grid | None]],
    progress: Callable[[str], None],
) -> Losses:
    """The expected KL, nats per token, of every group of ``plan.requantized`` (routed experts apart) when it alone is stored as each of ``candidates(names)``.

    Two passes through the merged model, one block alive at a time: forwards, then backwards with gradients. Same inputs, same bits on a CPU, whatever the thread count.
    """
    batches = _start(plan, merged, _few(plan, calibration))
    entered = _forwards(plan, merged, batches, progress)
    gradients, found = _backwards_to_the_last_block(plan, merged, batches, model_dtype, candidates)
    apart = {weight.name for weight in plan.routed}
    for index in reversed(range(len(entered))):
        prefix = f"{plan.skeleton.blocks_name}.{index}"
        wanted = [
            name.removeprefix(prefix + ".").removesuffix(".weight")
            for name in plan.requantized
            if name.startswith(prefix + ".") and name not in apart
        ]
        block = _Block(plan, merged, index, wanted, batches)
        seen, gradients = block.backwards(entered.pop(), gradients)
        for group in block.groups:
            names = tuple(block.full(module) for module in group.modules)
            found[names] = _losses(names, seen[group], merged, model_dtype, candidates(names))
        progress(f"measured what rounding costs: block {index + 1}/{len(plan.skeleton.blocks)}")
    return found


def _few(plan: MergePlan, calibration: Calibration) -> Calibration:
    """The first windows of both parts, in their proportion: as many as ``TOKENS`` and ``HELD_BYTES`` allow, at least ``LEAST_WINDOWS``."""
    tokens = calibration.train.shape[1]
    width = plan.pieces.table[plan.skeleton.input_embedding].shape[-1] if plan.skeleton.input_embedding in plan.pieces.table else 1
    windows = max(LEAST_WINDOWS, min(TOKENS // tokens, HELD_BYTES // (4 * tokens * width * len(plan.skeleton.blocks))))
    share = min(1.0, windows / (len(calibration.train) + len(calibration.held_out)))
    few = [part[: max(1, round(len(part) * share))] for part in (calibration.train, calibration.held_out)]
    return replace(calibration, train=few[0], held_out=few[1])


def _forwards(plan: MergePlan, merged: Merged, batches: list, progress: Callable[[str], None]) -> list[list[torch.Tensor]]:
    """What enters each block, per batch, in main memory; the batches end behind the last one."""
    entered = []
    for index in range(len(plan.skeleton.blocks)):
        entered.append([batch.teacher.cpu() for batch in batches])
        block = _teacher(plan, merged, index)
        ahead = in_parallel(lambda part: run_block(*part), [(block, batch.teacher, batch.calls[index]) for batch in batches], merged.device)
        for batch, out in zip(batches, ahead, strict=True):
            batch.teacher = out
    progress("measuring what rounding costs: forwards done")
    return entered


def _teacher(plan: MergePlan, merged: Merged, index: int) -> nn.Module:
    """A block of the merged model in fp32."""
    empty = plan.skeleton.blocks[index]
    block = empty_copy(empty)
    for name, _ in list(empty.named_parameters()):
        full = f"{plan.skeleton.blocks_name}.{index}.{name}"
        weight = merged.parameter(full)
        set_weight(block, name, weight.T.contiguous() if plan.skeleton.linears.get(full) else weight)
    return block


def _backwards_to_the_last_block(
    plan: MergePlan, merged: Merged, batches: list, model_dtype: torch.dtype, candidates: Callable[[Names], Sequence[Grid | None]]
) -> tuple[list[torch.Tensor], Losses]:
    """Per batch the gradient by the last block's output; and the head's losses, where it is to be requantized."""
    seed = torch.Generator().manual_seed(plan.recipe.seed)
    seeds = [torch.randint(2**62, (len(batch.teacher),), generator=seed).tolist() for batch in batches]
    with Tail(plan.skeleton) as tail:
        parts = in_parallel(lambda number: _draw(tail, batches[number].teacher, seeds[number]), range(len(batches)), merged.device)
    found: Losses = {}
    if wants_head(plan):
        names = (plan.skeleton.output_embedding,)
        seen = _sums(
            [(batch.held_out, {names[0]: x}, {names[0]: squares}) for batch, (_, x, squares) in zip(batches, parts, strict=True)],
            {names[0]: names},
            merged.device,
        )
        found[names] = _losses(names, seen[names[0]], merged, model_dtype, candidates(names))
    return [gradient for gradient, _, _ in parts], found


def _draw(tail: Tail, hidden: torch.Tensor, seeds: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(gradient by ``hidden`` of the log-likelihood of tokens drawn from the model's distribution, the head's inputs, Σ over tokens of the squared gradient by the logits).

    One window at a time: logits are large.
    """
    gradients, inputs, squares = [], [], 0
    for window, seed in zip(hidden, seeds, strict=True):
        with torch.enable_grad():
            leaf = window.unsqueeze(0).detach().requires_grad_()
            x, logits = tail.logits(leaf)
            logs = logits[0].float().log_softmax(-1)
            drawn = torch.multinomial(logs.detach().exp().cpu(), 1, generator=torch.Generator().manual_seed(seed)).to(logs.device)
            by_logits, by_hidden = torch.autograd.grad(logs.gather(1, drawn).sum(), (logits, leaf))
        gradients.append(by_hidden[0])
        inputs.append(x[0].detach())
        squares = squares + by_logits[0].square().sum(0)
    return torch.stack(gradients), torch.stack(inputs), squares


class _Block:
    """One block of the merged model on the way back."""

    def __init__(self, plan: MergePlan, merged: Merged, index: int, linears: list[str], batches: list) -> None:
        self.prefix, self.batches, self.device = f"{plan.skeleton.blocks_name}.{index}", batches, merged.device
        self.calls: list[Call] = [batch.calls[index] for batch in batches]
        self.module = _teacher(plan, merged, index)
        first = batches[0].runtime  # the shape is what matters here; `_start` left the embeddings in it
        self.groups: list[Group] = (
            find_groups(self.module, linears, first[:1], _first_row(self.calls[0], first.shape[0])) if linears else []
        )
        self._here = threading.local()

    def full(self, module: str) -> str:
        return f"{self.prefix}.{module}.weight"

    def backwards(self, entered: list[torch.Tensor], gradients: list[torch.Tensor]) -> tuple[dict[Group, _Seen], list[torch.Tensor]]:
        """What each group saw, and per batch the gradient by the block's input from that by its output."""
        handles = [
            self.module.get_submodule(group.modules[0]).register_forward_pre_hook(self._keep_input(group), with_kwargs=True)
            for group in self.groups
        ]
        handles += [
            self.module.get_submodule(module).register_forward_hook(self._keep_gradient(module))
            for group in self.groups
            for module in group.modules
        ]
        try:
            parts = in_parallel(lambda number: self._one(entered[number], number, gradients[number]), range(len(self.batches)), self.device)
        finally:
            for handle in handles:
                handle.remove()
        idle = next(
            (
                self.full(module)
                for group in self.groups
                for module in group.modules
                if any(self.full(module) not in squares for _, squares, _ in parts)
            ),
            None,
        )
        if idle is not None:
            raise Refused(
                "what a linear computes does not reach the output through its own block, so its share of the loss cannot be measured",
                where=idle,
                fix="leave --bits-per-weight out",
            )
        rows = [(batch.held_out, inputs, squares) for batch, (inputs, squares, _) in zip(self.batches, parts, strict=True)]
        return _sums(rows, {group: tuple(self.full(module) for module in group.modules) for group in self.groups}, self.device), [
            gradient for _, _, gradient in parts
        ]

    def _one(
        self, entered: torch.Tensor, number: int, gradient: torch.Tensor
    ) -> tuple[dict[Group, torch.Tensor], dict[str, torch.Tensor], torch.Tensor]:
        self._here.inputs, self._here.squares = {}, {}
        with torch.enable_grad(), _repeatable(self.device):
            leaf = entered.to(self.device).detach().requires_grad_()
            out = self.module(leaf, *self.calls[number].args, **self.calls[number].kwargs)
            (found,) = torch.autograd.grad(out[0] if isinstance(out, tuple) else out, leaf, gradient)
        return self._here.inputs, self._here.squares, found

    def _keep_input(self, group: Group) -> Callable:
        def before(_: nn.Module, args: tuple, kwargs: dict) -> None:
            self._here.inputs.setdefault(group, (args[0] if args else next(iter(kwargs.values()))).detach())

        return before

    def _keep_gradient(self, module: str) -> Callable:
        def after(_: nn.Module, args: tuple, out: torch.Tensor) -> None:
            squares, name = self._here.squares, self.full(module)

            def keep(gradient: torch.Tensor) -> None:
                squares[name] = squares.get(name, 0) + gradient.reshape(-1, gradient.shape[-1]).square().sum(0)

            out.register_hook(keep)

        return after


def _repeatable(device: torch.device) -> Any:
    """On an accelerator the fused attention kernels add gradients up in no fixed order."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    return nullcontext() if device.type == "cpu" else sdpa_kernel(SDPBackend.MATH)


def _sums(rows: list[tuple[bool, dict[Any, torch.Tensor], Any]], groups: dict[Any, Names], device: torch.device) -> dict[Any, _Seen]:
    """``rows``: per batch whether it is held out, the inputs by group, and Σ g² by weight name."""
    found = {}
    for group, names in groups.items():
        sums = {held_out: Statistics(rows[0][1][group].shape[-1], device) for held_out in (False, True)}
        for held_out, statistics in sums.items():
            statistics.add_all([(x, x, None) for held, inputs, _ in rows if held is held_out for x in (inputs[group].flatten(0, -2),)])
        found[group] = _Seen(sums[False], sums[True], {name: sum(squares[name] for _, _, squares in rows) for name in names})
    return found


def _losses(
    names: Names, seen: _Seen, merged: Merged, model_dtype: torch.dtype, candidates: Iterable[Grid | None]
) -> dict[Grid | None, float]:
    hessian, judge = seen.train.hessian, seen.held_out.hessian
    level, importance = factor(hessian, DAMP), torch.diagonal(hessian)
    weights = {name: merged.weight(name) for name in names}

    def loss(grid: Grid | None) -> float:
        total = 0.0
        for name, weight in weights.items():
            if grid is None:
                error = weight.to(merged.out_dtype(name)).float() - weight
            else:
                scales, zeros = grids.search_int(weight, importance, grid, model_dtype)
                element = gptq.int_grid(scales, zeros, weight.shape[1], grid.bits)
                error = gptq.values(gptq.solve(weight, level, element), element) - weight
            total += 0.5 * float(((error @ judge).mul_(error).sum(1) * seen.fisher(name)).sum())
        return total

    choices = list(candidates)
    return dict(zip(choices, in_parallel(loss, choices, hessian.device), strict=True))
