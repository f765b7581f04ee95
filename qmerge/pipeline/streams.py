"""How do the teacher's and the run-time activations go through the model, block by block, while it is requantized?

Two streams start at the embeddings. The teacher stream runs through the separate model (in fp32 the same function as the merged one), the run-time
stream through the model as requantized so far. Within a block the groups of linears are requantized in the order in which they run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from qmerge.numerics.hessian import Statistics
from qmerge.pipeline.blocks import Call, Group, all_inputs, empty_copy, find_groups, group_inputs, record_calls, run_block, split_inputs
from qmerge.pipeline.calibrate import Calibration
from qmerge.pipeline.merge import Merged
from qmerge.pipeline.plan import MergePlan
from qmerge.pipeline.requantize import Linear, Solved, requantize_group
from qmerge.pipeline.skeleton import set_weight
from qmerge.types import QuantState

TOKENS_PER_BATCH = 4096
TAPE_BYTES = 2 * 2**30


@dataclass
class _Batch:
    teacher: torch.Tensor
    runtime: torch.Tensor
    calls: list[Call]
    held_out: bool


def requantize_blocks(
    plan: MergePlan, merged: Merged, calibration: Calibration, model_dtype: torch.dtype, nf4_like: QuantState | None, progress: Callable[[str], None]
) -> Iterator[tuple[int, dict[str, Solved]]]:
    """Yields, per block, its number and the solved linears by weight name. One block's weights and two streams are alive at a time."""
    skeleton = plan.skeleton
    batches = _start(plan, merged, calibration)
    for index, empty in enumerate(skeleton.blocks):
        prefix = f"{skeleton.blocks_name}.{index}"
        wanted = [name.removeprefix(prefix + ".").removesuffix(".weight") for name in plan.requantized if name.startswith(prefix + ".")]
        pair = _BlockPair(*_load_block(empty, prefix, merged, skeleton.linears, model_dtype), batches, index, wanted)
        solved: dict[str, Solved] = {}
        for group in pair.groups:
            names = [f"{prefix}.{module}.weight" for module in group.modules]
            conv = [skeleton.linears[name] for name in names]
            linears = [Linear(name, pair.weight(module, turned), merged.four_bit(name), merged.delta(name)) for name, module, turned in zip(names, group.modules, conv, strict=True)]
            found = requantize_group(linears, plan.recipe.grid, *pair.statistics(group), model_dtype, nf4_like, len(skeleton.blocks))
            for module, turned, result in zip(group.modules, conv, found, strict=True):
                set_weight(pair.runtime, f"{module}.weight", result.weight.T.contiguous() if turned else result.weight)
            solved |= dict(zip(names, found, strict=True))
        pair.advance()
        progress(_line(index, len(skeleton.blocks), batches))
        yield index, solved


class _BlockPair:
    """One block as the teacher has it and as requantized so far, with the batches that flow through both.

    The teacher's activations within the block do not change while it is requantized: where they fit into ``TAPE_BYTES`` one pass records them all.
    """

    def __init__(self, teacher: nn.Module, runtime: nn.Module, batches: list[_Batch], index: int, linears: list[str]) -> None:
        self.teacher, self.runtime, self.batches, self.index = teacher, runtime, batches, index
        probe = batches[0]
        call = _first_row(probe.calls[index], probe.runtime.shape[0])
        self.groups = find_groups(runtime, linears, probe.runtime[:1], call) if linears else []
        sample, _ = all_inputs(runtime, self.groups, probe.runtime[:1], call)
        windows = sum(batch.runtime.shape[0] for batch in batches)
        self.taped = sum(tensor.numel() for tensor in sample.values()) * 4 * windows <= TAPE_BYTES
        self.tape = [all_inputs(teacher, self.groups, batch.teacher, batch.calls[index]) for batch in batches] if self.taped else []

    def weight(self, module: str, turned: bool) -> torch.Tensor:
        """The merged weight ``[out, in]`` of a linear; ``turned`` where the module holds ``[in, out]``."""
        weight = self.teacher.get_submodule(module).weight
        return weight.T.contiguous() if turned else weight

    def statistics(self, group: Group) -> tuple[Statistics, Statistics]:
        """Sums over the windows to solve on and over those to choose with, in the order of the batches."""
        sums: dict[bool, Statistics] = {}
        for number, batch in enumerate(self.batches):
            call = batch.calls[self.index]
            aims = self.tape[number][0] if self.taped else group_inputs(self.teacher, group, batch.teacher, call)
            aim, aim_residual = split_inputs(group, aims, batch.teacher)
            x, residual = split_inputs(group, group_inputs(self.runtime, group, batch.runtime, call), batch.runtime)
            if batch.held_out not in sums:
                sums[batch.held_out] = Statistics(x.shape[1], x.device)
            sums[batch.held_out].add(x, aim, None if residual is None else aim_residual - residual)
        return sums[False], sums[True]

    def advance(self) -> None:
        """Both streams go on to the next block."""
        for number, batch in enumerate(self.batches):
            call = batch.calls[self.index]
            batch.teacher = self.tape[number][1] if self.taped else run_block(self.teacher, batch.teacher, call)
            batch.runtime = run_block(self.runtime, batch.runtime, call)


def _start(plan: MergePlan, merged: Merged, calibration: Calibration) -> list[_Batch]:
    """Embed every window with the model's own code; the blocks are stand-ins, so only the tensors around them are loaded."""
    skeleton = plan.skeleton
    model = skeleton.model
    for name, _ in list(model.named_parameters(remove_duplicate=False)):
        if not name.startswith(skeleton.blocks_name + ".") and name in merged.pieces.table:
            set_weight(model, name, merged.in_file_order(name, merged.weight(name)))
    head = skeleton.output_embedding
    if head and head not in merged.pieces.table:  # tied: the recorder's forward ends in the head, so it needs some weight
        set_weight(model, head, model.get_input_embeddings().weight)
    _move_buffers(model, merged.device)
    parts: list[tuple[torch.Tensor, bool]] = []
    for ids, held_out in ((calibration.train, False), (calibration.held_out, True)):
        size = max(1, TOKENS_PER_BATCH // ids.shape[1])
        parts += [(part.to(merged.device), held_out) for part in ids.split(size)]
    hidden, calls = record_calls(model, skeleton.blocks_name, [part for part, _ in parts])
    return [_Batch(first, first, call, held) for first, call, (_, held) in zip(hidden, calls, parts, strict=True)]


def _move_buffers(model: nn.Module, device: torch.device) -> None:
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.device.type != "meta":
                module._buffers[name] = buffer.to(device)


def _load_block(empty: nn.Module, prefix: str, merged: Merged, linears: dict[str, bool], model_dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
    """(teacher, run-time) blocks in fp32. They share the linears' tensors until those are requantized; the run-time one has all else as it will be stored."""
    teacher, runtime = empty_copy(empty), empty_copy(empty)
    for name, _ in list(empty.named_parameters()):
        full = f"{prefix}.{name}"
        weight = merged.weight(full)
        weight = weight.T.contiguous() if linears.get(full) else weight  # a Conv1D module holds [in, out]
        set_weight(teacher, name, weight)
        set_weight(runtime, name, weight if full in linears else weight.to(model_dtype).float())
    return teacher, runtime


def _first_row(call: Call, windows: int) -> Call:
    """The call for the first window of a batch only."""

    def cut(value: object) -> object:
        if isinstance(value, torch.Tensor) and value.dim() and value.shape[0] == windows and windows > 1:
            return value[:1]
        return tuple(cut(item) for item in value) if isinstance(value, tuple) else value

    return Call(cut(call.args), {key: cut(value) for key, value in call.kwargs.items()})


def _line(index: int, count: int, batches: list[_Batch]) -> str:
    error = sum(float((batch.runtime - batch.teacher).square().sum()) for batch in batches if batch.held_out)
    size = sum(float(batch.teacher.square().sum()) for batch in batches if batch.held_out)
    return f"block {index + 1}/{count}: held-out error of the hidden states {error / max(size, 1e-30):.2e} of their power"
