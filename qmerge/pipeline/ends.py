"""When are the weights around the blocks in memory?

Embedding and head are the largest tensors of many models. Each is there while something is computed with it: the embedding while text enters, the head while gradients are taken of its logits.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from qmerge.pipeline.merge import Merged
from qmerge.pipeline.plan import MergePlan
from qmerge.pipeline.skeleton import Skeleton, move_buffers, set_weight
from qmerge.types import known


@contextmanager
def entrance(plan: MergePlan, merged: Merged) -> Iterator[None]:
    """All that text meets before the blocks, and what lies behind them but for the head. The embedding is let go at the end; the rest, which is small, stays."""
    skeleton = plan.tree
    for name, _ in list(skeleton.model.named_parameters(remove_duplicate=False)):
        if not name.startswith(skeleton.blocks_name + ".") and name in merged.pieces.table and name != skeleton.output_embedding:
            _load(skeleton, merged, name, name)  # no routed experts out here, so nothing is in pieces
    move_buffers(skeleton.model, merged.device)
    try:
        yield
    finally:
        _leave_one_row(skeleton)


@contextmanager
def head(plan: MergePlan, merged: Merged) -> Iterator[None]:
    """The head's weight, tied or its own."""
    skeleton = plan.tree
    name = known(skeleton.output_embedding)
    _load(skeleton, merged, name, name if name in merged.pieces.table else known(skeleton.input_embedding))
    try:
        yield
    finally:
        set_weight(skeleton.model, name, torch.empty_like(skeleton.model.get_parameter(name), device="meta"))


def _load(skeleton: Skeleton, merged: Merged, name: str, source: str) -> None:
    set_weight(skeleton.model, name, merged.in_file_order(source, merged.weight(source)))


def _leave_one_row(skeleton: Skeleton) -> None:
    """Zeros in the embedding's shape and the memory of one of its rows: the model still runs from the last block on (`head.Tail`), where what is embedded goes nowhere."""
    name = skeleton.input_embedding
    weight = None if name is None else skeleton.model.get_parameter(name)
    if name is not None and weight is not None and not weight.is_meta:
        set_weight(skeleton.model, name, torch.zeros_like(weight[:1]).expand(weight.shape))
