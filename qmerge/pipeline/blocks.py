"""How does text flow through a decoder, one block at a time, and which linears see the same input?

The model's own forward runs once per batch with every block replaced by a recorder, which gives the first block's inputs and every block's
keyword arguments (masks, position embeddings) just as the model passes them. After that only one block is alive at a time.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from qmerge.device import products_in
from qmerge.errors import Refused

if TYPE_CHECKING:
    from transformers import PreTrainedModel


TURNS = "position_embeddings"
"""how names of blocks' arguments begin that hold (cos, sin) of rotary positions in transformers"""


@dataclass(frozen=True)
class Call:
    """The arguments of one block call besides the hidden states, and in what its matrix products are taken."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    compute: torch.dtype = torch.float32


@dataclass(frozen=True)
class Group:
    """Linears (names within the block) that receive one and the same tensor. ``residual`` tells, for a linear that is added straight into the
    residual stream, where that stream can be read before the addition: ``"<in>"`` or the name of the module that receives it."""

    modules: tuple[str, ...]
    residual: str | None = None


class _Stop(Exception):
    """Ends a forward pass once what was wanted has been captured."""


class _Recorder(nn.Module):
    """Stands in for a block: keeps what it is called with and passes the hidden states on."""

    def __init__(self, block: nn.Module, log: list[Any], as_tuple: bool) -> None:
        super().__init__()
        self.block, self.log, self.as_tuple = block, log, as_tuple

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("block"), name)

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        self.log.append((hidden_states, args, kwargs))
        return (hidden_states,) if self.as_tuple else hidden_states


def record_calls(
    model: PreTrainedModel, blocks_name: str, batches: list[torch.Tensor], compute: torch.dtype = torch.float32, keep: Callable[[torch.Tensor], torch.Tensor] = torch.Tensor.detach
) -> tuple[list[torch.Tensor], list[list[Call]]]:
    """First block's inputs per batch ``[windows, T, hidden]`` and, per batch, the `Call` of each block.

    ``batches`` are token ids int64 ``[windows, T]``, ``compute`` is for the calls, ``keep`` lays inputs where they wait. The weights before the head must be real, those inside the blocks may be on the meta device.
    """
    blocks = model.get_submodule(blocks_name)
    assert isinstance(blocks, nn.ModuleList)
    hidden: list[torch.Tensor] = []
    calls: list[list[Call]] = []
    for ids in batches:
        log = _record(model, blocks_name, blocks, ids, as_tuple=False)
        if any(entry[0].shape != log[0][0].shape for entry in log):
            log = _record(model, blocks_name, blocks, ids, as_tuple=True)  # this model's blocks return tuples
        if len(log) != len(blocks):
            raise Refused("the decoder does not call its blocks once each in order", where=blocks_name, expected=f"{len(blocks)} calls", found=f"{len(log)}", fix="use --rtn or --format bf16, which do not run the model")
        hidden.append(keep(log[0][0].detach()))
        calls.append([_share(Call(args, _turned_in(compute, kwargs), compute), calls[0][index] if calls else None) for index, (_, args, kwargs) in enumerate(log)])
    return hidden, calls


def _record(model: PreTrainedModel, blocks_name: str, blocks: nn.ModuleList, ids: torch.Tensor, as_tuple: bool) -> list[tuple[torch.Tensor, tuple[Any, ...], dict[str, Any]]]:
    log: list[tuple[torch.Tensor, tuple[Any, ...], dict[str, Any]]] = []
    parent, _, leaf = blocks_name.rpartition(".")
    owner = model.get_submodule(parent) if parent else model
    setattr(owner, leaf, nn.ModuleList(_Recorder(block, log, as_tuple) for block in blocks))
    head = model.get_output_embeddings()
    handle = head.register_forward_pre_hook(_stop) if head is not None else None
    try:
        with torch.no_grad(), suppress(_Stop):  # the head's output is not used, and its weight need not be there
            model(input_ids=ids, use_cache=False)
    finally:
        setattr(owner, leaf, blocks)
        if handle is not None:
            handle.remove()
    return log


def _turned_in(compute: torch.dtype, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments with the cosines and sines of positions in ``compute``, as a model of that dtype makes them: heads that come out of a product in bf16 are else turned in fp32 and rounded back,
    which takes longer."""
    if compute == torch.float32:
        return kwargs
    return {name: _as_dtype(value, compute) if name.startswith(TURNS) else value for name, value in kwargs.items()}


def _as_dtype(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    return tuple(_as_dtype(item, dtype) for item in value) if isinstance(value, tuple) else value


def _stop(*_: Any) -> None:
    raise _Stop


def _share(call: Call, first: Call | None) -> Call:
    """Use the first batch's tensors where this batch's are equal, so that masks are kept once and not once per batch."""
    if first is None:
        return call

    def same(a: Any, b: Any) -> Any:
        if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b):
            return b
        if isinstance(a, tuple) and isinstance(b, tuple) and len(a) == len(b):
            return tuple(same(x, y) for x, y in zip(a, b, strict=True))
        return a

    return Call(same(call.args, first.args), {key: same(value, first.kwargs.get(key)) for key, value in call.kwargs.items()}, call.compute)


def first_row(call: Call, windows: int) -> Call:
    """The call for the first window of a batch only."""

    def cut(value: Any) -> Any:
        if isinstance(value, torch.Tensor) and value.dim() and value.shape[0] == windows and windows > 1:
            return value[:1]
        return tuple(cut(item) for item in value) if isinstance(value, tuple) else value

    return Call(cut(call.args), {key: cut(value) for key, value in call.kwargs.items()}, call.compute)


def run_block(block: nn.Module, hidden: torch.Tensor, call: Call) -> torch.Tensor:
    """The block's output hidden states ``[windows, T, hidden]``."""
    with torch.no_grad(), products_in(call.compute, hidden.device):
        out = block(hidden, *call.args, **call.kwargs)
    found: torch.Tensor = out[0] if isinstance(out, tuple) else out
    return found


def empty_copy(block: nn.Module) -> nn.Module:
    """A second block with the same structure, its parameters still to be set."""
    return copy.deepcopy(block)


def find_groups(block: nn.Module, linears: list[str], hidden: torch.Tensor, call: Call, residuals: bool = True) -> list[Group]:
    """Linears in the order in which they run, grouped by the identity of the tensor that they receive; and, with ``residuals``, where that is told of those that have one.

    Raises `Refused` for a linear that is never called (a routed expert, say), naming it.
    """
    inputs: dict[str, torch.Tensor] = {}
    outputs: dict[str, torch.Tensor] = {}
    seen: list[tuple[str, torch.Tensor]] = []
    handles = []
    for name, module in block.named_modules():
        if not name:
            continue

        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], name: str = name) -> None:
            tensor = args[0] if args else next(iter(kwargs.values()), None)
            if isinstance(tensor, torch.Tensor):
                seen.append((name, tensor))
                if name in linears:
                    inputs.setdefault(name, tensor)

        def after(_: nn.Module, args: tuple[Any, ...], out: Any, name: str = name) -> None:
            if name in linears:
                outputs.setdefault(name, out)

        handles += [module.register_forward_pre_hook(before, with_kwargs=True), module.register_forward_hook(after)]
    try:
        result = run_block(block, hidden, replace(call, compute=torch.float32))  # sums are recognised by their values
    finally:
        for handle in handles:
            handle.remove()
    idle = [name for name in linears if name not in inputs]
    if idle:
        raise Refused("a linear saw no calibration tokens", where=idle[0], expected="every linear of a block is called", found=f"{len(idle)} were not", fix="use --rtn or --format bf16")
    writers = _find_writers(hidden, result, seen, {name: outputs[name] for name in inputs}) if residuals else {}
    grouped: dict[int, list[str]] = {}
    for name, tensor in inputs.items():
        grouped.setdefault(id(tensor), []).append(name)
    return [Group(tuple(names), writers.get(names[0]) if len(names) == 1 else None) for names in grouped.values()]


def _find_writers(hidden: torch.Tensor, result: torch.Tensor, seen: list[tuple[str, torch.Tensor]], outputs: dict[str, torch.Tensor]) -> dict[str, str]:
    """Which linears' outputs are added straight to the residual stream: ``stream + output`` then turns up as a module's input or as the block's output."""
    streams = [("<in>", hidden)]
    writers: dict[str, str] = {}
    candidates = [(name, tensor) for name, tensor in seen if tensor.shape == hidden.shape] + [("<out>", result)]
    for linear, out in outputs.items():
        if out.shape != hidden.shape:
            continue
        for where, stream in reversed(streams):
            total = stream + out
            match = next((pair for pair in candidates if torch.allclose(pair[1], total, rtol=1e-5, atol=1e-6 * float(total.abs().max()))), None)
            if match is not None:
                writers[linear] = where
                streams.append(match)
                break
    return writers


@contextmanager
def _capturing(block: nn.Module, names: list[str], store: dict[str, torch.Tensor], stop: bool) -> Iterator[None]:
    """Keep the first argument of each named module; with ``stop``, end the pass once all are there. Passes in other threads are none of its business."""
    me = threading.get_ident()

    def hook(name: str) -> Any:
        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if threading.get_ident() != me:
                return
            store.setdefault(name, args[0] if args else next(iter(kwargs.values())))
            if stop and len(store) == len(names):
                raise _Stop

        return before

    handles = [block.get_submodule(name).register_forward_pre_hook(hook(name), with_kwargs=True) for name in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def watched(group: Group) -> list[str]:
    """The modules whose first argument tells what the group receives and, where it has a residual, that stream."""
    return [group.modules[0]] + ([group.residual] if group.residual not in (None, "<in>") else [])


def group_inputs(block: nn.Module, group: Group, hidden: torch.Tensor, call: Call) -> dict[str, torch.Tensor]:
    """What the group's linears receive and, where it has a residual, that stream before the addition, by module name; the pass ends there."""
    store: dict[str, torch.Tensor] = {}
    names = watched(group)
    with _capturing(block, names, store, stop=True):
        try:
            run_block(block, hidden, call)
        except _Stop:
            pass
    return store


def all_inputs(block: nn.Module, groups: list[Group], hidden: torch.Tensor, call: Call) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """`group_inputs` of every group, and the block's output, from one pass."""
    store: dict[str, torch.Tensor] = {}
    names = list(dict.fromkeys(name for group in groups for name in watched(group)))
    with _capturing(block, names, store, stop=False):
        out = run_block(block, hidden, call)
    return store, out


def activation_bytes(block: nn.Module, hidden: torch.Tensor, call: Call) -> int:
    """About what one pass of ``hidden`` keeps alive: every module's output, in fp32."""
    sizes: list[int] = []

    def after(_: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        parts = out if isinstance(out, tuple) else (out,)
        sizes.extend(4 * part.numel() for part in parts if isinstance(part, torch.Tensor))

    handles = [module.register_forward_hook(after) for module in block.modules()]
    try:
        run_block(block, hidden, call)
    finally:
        for handle in handles:
            handle.remove()
    return sum(sizes)


def split_inputs(group: Group, store: dict[str, torch.Tensor], hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(linear inputs ``[tokens, in]``, residual stream ``[tokens, hidden]`` or None) of one group from what was captured."""
    x = store[group.modules[0]]
    residual = None if group.residual is None else hidden if group.residual == "<in>" else store[group.residual]
    return x.reshape(-1, x.shape[-1]), None if residual is None else residual.reshape(-1, residual.shape[-1])
