"""How do a block's weights come into memory, and are those of the next one read while this one is solved?

The next block is read and merged by a thread of its own, by the operations that would else run later, and waits in main memory; so it costs the device no room, and the bits are the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import nn

from qmerge.device import side_stream, to_device, to_host
from qmerge.pipeline.blocks import empty_copy
from qmerge.pipeline.experts import receive
from qmerge.pipeline.experts_names import ExpertWeight
from qmerge.pipeline.merge import Merged
from qmerge.pipeline.plan import MergePlan
from qmerge.pipeline.skeleton import set_weight


class Loader:
    """Merged parameters of blocks, by name within the block, fp32 on the device, linears ``[out, in]``. Use as a context manager: leaving it ends what is read ahead.

    ``ahead``: whether the next block is read while one is worked on. On a CPU all cores are at work and memory is what is short, so it pays on an accelerator only."""

    def __init__(self, plan: MergePlan, merged: Merged, ahead: bool | None = None) -> None:
        self.plan, self.merged = plan, merged
        self.ahead = merged.device.type != "cpu" if ahead is None else ahead
        self._waiting: dict[int, Future[dict[str, torch.Tensor]]] = {}
        self._aside = side_stream(merged.device)
        self._left = False

    def __enter__(self) -> Loader:
        self._pool = ThreadPoolExecutor(1, "next block")
        return self

    def __exit__(self, *_: object) -> None:
        self._left = True
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._waiting.clear()

    def parameters(self, index: int) -> Iterator[tuple[str, torch.Tensor]]:
        """Of block ``index``; raises what reading it raised. The next one's are read once these have been taken."""
        early = self._waiting.pop(index).result() if index in self._waiting else {}
        for name in self._names(index):
            yield name, to_device(early.pop(name), self.merged.device) if name in early else self.merged.parameter(self._full(index, name))
        if self.ahead and index + 1 < len(self.plan.tree.blocks) and not self._waiting:
            self._waiting[index + 1] = self._pool.submit(self._read, index + 1)

    def _read(self, index: int) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = {}
        with torch.no_grad(), self._aside:
            for name in self._names(index):
                if self._left:
                    break
                found[name] = to_host(self.merged.parameter(self._full(index, name)))
        return found

    def _names(self, index: int) -> list[str]:
        return [name for name, _ in self.plan.tree.blocks[index].named_parameters()]

    def _full(self, index: int, name: str) -> str:
        return f"{self.plan.tree.blocks_name}.{index}.{name}"


def load_block(loader: Loader, index: int, model_dtype: torch.dtype, routed: Sequence[ExpertWeight]) -> tuple[nn.Module, nn.Module]:
    """(teacher, run-time) blocks in fp32. They share the linears' tensors until those are requantized; the run-time one has all else as it will be stored.
    ``routed``: the weights of routed experts that will be requantized; both blocks have a fused parameter of their own for them."""
    skeleton = loader.plan.tree
    empty, prefix, linears = skeleton.blocks[index], f"{skeleton.blocks_name}.{index}", skeleton.linears
    teacher, runtime = empty_copy(empty), empty_copy(empty)
    fused = {weight.parameter for weight in routed}
    for name, weight in loader.parameters(index):
        full = f"{prefix}.{name}"
        weight = weight.T.contiguous() if linears.get(full) else weight  # a Conv1D module holds [in, out]
        set_weight(teacher, name, weight)
        set_weight(runtime, name, weight if full in linears else weight.clone() if full in fused else weight.to(model_dtype).float())
    for block in (teacher, runtime):
        receive(block, dict.fromkeys(weight.module.removeprefix(prefix + ".") for weight in routed))
    return teacher, runtime
