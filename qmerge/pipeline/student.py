"""How do the separate model and the requantized one answer the same text, with the latter's scales and norms open to change?

The teacher runs once, one block in memory at a time; its last hidden states are kept and its own code turns them into logits again. The student is the whole
model in fp32. Both are the model's own code on real tensors; no weight of one is shared with the other.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from qmerge.device import in_parallel
from qmerge.pipeline.blocks import Call, empty_copy, record_calls, run_block
from qmerge.pipeline.merge import Merged
from qmerge.pipeline.plan import MergePlan
from qmerge.pipeline.skeleton import move_buffers, set_weight

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class _Given(nn.Module):
    """Stands in for a block: hands on the hidden states that this thread was given, or what it receives where ``last`` is False."""

    def __init__(self, block: nn.Module, given: threading.local, as_tuple: bool, last: bool) -> None:
        super().__init__()
        self.block, self.given, self.as_tuple, self.last = block, given, as_tuple, last

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("block"), name)

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        hidden = self.given.hidden if self.last else hidden_states
        return (hidden,) if self.as_tuple else hidden


class Teacher:
    """``logits(number)`` of the separate model for the windows of batch ``number``; `hidden` are its last block's outputs, one per batch."""

    def __init__(self, plan: MergePlan, merged: Merged, batches: list[torch.Tensor]) -> None:
        skeleton = plan.tree
        self.batches = batches
        self.model = copy.deepcopy(skeleton.model)
        for name, _ in list(self.model.named_parameters(remove_duplicate=False)):
            if not name.startswith(skeleton.blocks_name + "."):
                _fill(self.model, name, plan, merged, None)
        _tie(self.model, skeleton.output_embedding, merged)
        move_buffers(self.model, merged.device)
        # one thread per operation, here as in the blocks: the bits must not depend on the thread count
        hidden, calls = in_parallel(lambda ids: record_calls(self.model, skeleton.blocks_name, ids), [batches], merged.device)[0]
        as_tuple = False
        for index, empty in enumerate(skeleton.blocks):
            hidden, as_tuple = self._pass(plan, merged, index, empty, hidden, [call[index] for call in calls])
        self.hidden = hidden
        self._given = threading.local()
        blocks = self.model.get_submodule(skeleton.blocks_name)
        assert isinstance(blocks, nn.ModuleList)
        parent, _, leaf = skeleton.blocks_name.rpartition(".")
        setattr(
            self.model.get_submodule(parent),
            leaf,
            nn.ModuleList(_Given(block, self._given, as_tuple, block is blocks[-1]) for block in blocks),
        )

    @staticmethod
    def _pass(
        plan: MergePlan, merged: Merged, index: int, empty: nn.Module, hidden: list[torch.Tensor], calls: list[Call]
    ) -> tuple[list[torch.Tensor], bool]:
        block, prefix = empty_copy(empty), f"{plan.tree.blocks_name}.{index}"
        for name, _ in list(empty.named_parameters()):
            weight = merged.parameter(f"{prefix}.{name}")
            set_weight(block, name, weight.T.contiguous() if plan.tree.linears.get(f"{prefix}.{name}") else weight)
        kinds: list[bool] = []
        handle = block.register_forward_hook(lambda _, args, out: kinds.append(isinstance(out, tuple)))
        ahead = in_parallel(lambda part: run_block(block, *part), list(zip(hidden, calls, strict=True)), merged.device)
        handle.remove()
        return ahead, kinds[0]

    def logits(self, number: int) -> torch.Tensor:
        """fp32 ``[windows, T, V]``; may be asked for in several threads."""
        self._given.hidden = self.hidden[number]
        logits: torch.Tensor = self.model(input_ids=self.batches[number], use_cache=False).logits
        return logits


def student_model(plan: MergePlan, merged: Merged, solved: Mapping[str, torch.Tensor], model_dtype: torch.dtype) -> nn.Module:
    """The requantized model in fp32: weights ``[out, in]`` of ``solved`` by name, all else as a loader will hold it."""
    model, skeleton = copy.deepcopy(plan.tree.model), plan.tree
    for name, _ in list(model.named_parameters(remove_duplicate=False)):
        if name in solved:
            weight = solved[name].to(merged.device)
            set_weight(model, name, weight.T.contiguous() if skeleton.linears.get(name) else weight.clone())
        else:
            _fill(model, name, plan, merged, model_dtype)
    for routed in plan.routed:
        if routed.name in solved:
            routed.region.write(model.get_parameter(routed.parameter).data, solved[routed.name].to(merged.device))
    _tie(model, skeleton.output_embedding, merged)
    move_buffers(model, merged.device)
    return model


def _fill(model: nn.Module, name: str, plan: MergePlan, merged: Merged, model_dtype: torch.dtype | None) -> None:
    """The merged parameter, rounded as it is stored and loaded where ``model_dtype`` is given."""
    parts = merged.pieces.made_of.get(name)
    if parts is None and name not in merged.pieces.table:
        return
    weight = merged.parameter(name)
    if model_dtype is not None:
        weight = as_loaded(weight, merged.out_dtype(name if parts is None else parts[0][0]), model_dtype)
    set_weight(model, name, weight.T.contiguous() if plan.tree.linears.get(name) else weight)


def as_loaded(weight: torch.Tensor, out_dtype: torch.dtype, model_dtype: torch.dtype) -> torch.Tensor:
    """fp32 values that a file in ``out_dtype`` gives to a model in ``model_dtype``."""
    return weight.to(out_dtype).to(model_dtype).float()


def _tie(model: PreTrainedModel, head: str | None, merged: Merged) -> None:
    if head and head not in merged.pieces.table:
        set_weight(model, head, model.get_input_embeddings().get_parameter("weight"))
