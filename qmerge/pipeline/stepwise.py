"""How does a block's forward pass wait, half-way, until the linears that it has come to are solved?

Each batch runs in a thread of its own that stops before every group of linears. Nothing is computed twice, at the price of keeping the batches'
activations alive. The threads compute one by one per core, each operation on one core, so the bits do not depend on how many there are.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import nn

from qmerge.pipeline.blocks import Call, Group, run_block, watched


class _Abandoned(BaseException):
    """Ends a waiting pass whose result nobody wants any more."""


class Walk:
    """Passes of several batches through one block, taken group by group. Use as a context manager: leaving it ends passes that still wait."""

    def __init__(self, block: nn.Module, groups: list[Group], inputs: list[tuple[torch.Tensor, Call]], threads: int) -> None:
        self.block, self.groups, self.inputs = block, groups, inputs
        self._cores = threading.Semaphore(threads)
        lock = threading.Lock()
        self._moved, self._opened = threading.Condition(lock), threading.Condition(lock)
        """a batch has come somewhere; batches may go on"""
        self._open = 0
        """groups below this number are solved"""
        self._abandoned = False
        self.stores: list[dict[str, torch.Tensor]] = [{} for _ in inputs]
        """per batch, what watched modules received, by name"""
        self._at = [-1] * len(inputs)
        """the group that each batch waits at; len(groups) where it is through"""
        self._results: list[Any] = [None] * len(inputs)
        self._me = threading.local()

    def __enter__(self) -> Walk:
        self._handles = []
        first = {group.modules[0]: number for number, group in enumerate(self.groups)}
        for name in dict.fromkeys(name for group in self.groups for name in watched(group)):
            self._handles.append(self.block.get_submodule(name).register_forward_pre_hook(self._hook(name, first.get(name)), with_kwargs=True))
        self._threads = [threading.Thread(target=self._pass, args=(number,), daemon=True) for number in range(len(self.inputs))]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._moved:
            self._abandoned = True
            self._opened.notify_all()
        for thread in self._threads:
            thread.join()
        for handle in self._handles:
            handle.remove()

    def reach(self, group: Group) -> list[dict[str, torch.Tensor]]:
        """Solved so far: every group before ``group``. Returns, per batch, what ``group`` receives, by module name (empty where the batch does not come by)."""
        number = self.groups.index(group)
        self._go_on(number)
        names = watched(group)
        found = [{name: store[name] for name in names if name in store} for store in self.stores]
        return [store if group.modules[0] in store else {} for store in found]

    def finish(self) -> list[torch.Tensor]:
        """All groups are solved: the block's outputs, per batch."""
        self._go_on(len(self.groups))
        return self._results

    def _go_on(self, number: int) -> None:
        with self._moved:
            self._open = number
            self._opened.notify_all()
            self._moved.wait_for(lambda: all(at >= number or isinstance(result, BaseException) for at, result in zip(self._at, self._results, strict=True)))
        for result in self._results:
            if isinstance(result, BaseException):
                raise result

    def _hook(self, name: str, number: int | None) -> Any:
        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            batch = getattr(self._me, "batch", None)
            if batch is None:  # somebody else runs this block
                return
            self.stores[batch].setdefault(name, args[0] if args else next(iter(kwargs.values())))
            if number is not None and self._at[batch] < number:
                self._wait(batch, number)

        return before

    def _wait(self, batch: int, number: int) -> None:
        self._cores.release()
        with self._moved:
            self._at[batch] = number
            self._moved.notify_all()
            self._opened.wait_for(lambda: self._open > number or self._abandoned)
        self._cores.acquire()
        if self._abandoned:
            raise _Abandoned

    def _pass(self, batch: int) -> None:
        self._me.batch = batch
        torch.set_num_threads(1)
        with self._cores, torch.no_grad():
            try:
                hidden, call = self.inputs[batch]
                result: Any = run_block(self.block, hidden, call)
            except _Abandoned:
                return
            except BaseException as problem:  # noqa: BLE001  handed to the caller's thread
                result = problem
        with self._moved:
            self._results[batch], self._at[batch] = result, len(self.groups)
            self._moved.notify_all()
