"""Where does each element of a disk tensor lie in a parameter of the model, according to transformers' own conversion?

Index tensors, in which each element holds the number of its row or of its column, go through the conversion's operations: what comes out says where every
element went. One disk tensor that becomes parameters is traced forwards, as in loading; several that become one are traced backwards, as in saving, because
they stay views of few numbers that way. Left out: conversions that compute (they are refused) and names (`names.py`).
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from qmerge.errors import Refused

Shape = tuple[int, ...]
Slot = tuple[str, int]
"""a disk tensor within its group: source pattern, position"""
Selectors = dict[str, Any]
"""``rows``, ``cols``, ``turned``: the fields of a `Region` that say where"""
Entry = tuple[Slot, int, Selectors]
"""a disk tensor, the number of the parameter within the group, where"""
FAILURES = (RuntimeError, ValueError, KeyError, IndexError, AttributeError, TypeError)
"""what a conversion raises that does not fit the tensors it gets"""


@dataclass(frozen=True, eq=False)
class Region:
    """``D2[into_rows][:, into_cols] == P2[rows][:, cols]``; None means all, in order.

    P2 is the parameter as ``[-1, last axis]``, D2 is the disk tensor as ``[-1, last axis]``, after its last two axes are swapped if ``turned``. Selectors are
    int64; ``into_*`` are None unless several parameters share the disk tensor. ``shape`` is the disk tensor's, ``parameter_shape`` the parameter's.
    """

    disk: str
    parameter: str
    shape: Shape
    parameter_shape: Shape
    rows: torch.Tensor | None = None
    cols: torch.Tensor | None = None
    turned: bool = False
    into_rows: torch.Tensor | None = None
    into_cols: torch.Tensor | None = None

    @property
    def same(self) -> bool:
        """is the disk tensor the parameter, element by element?"""
        return self.whole and not self.turned and self.rows is None and self.cols is None

    @property
    def whole(self) -> bool:
        """does this parameter make all of the disk tensor?"""
        return self.into_rows is None and self.into_cols is None

    def write(self, parameter: torch.Tensor, disk: torch.Tensor) -> None:
        """Put the values of the whole ``disk`` tensor where they belong in contiguous ``parameter``, in place; its other elements stay."""
        if not self.shape:
            parameter.copy_(disk)
            return
        values = disk.transpose(-1, -2) if self.turned else disk
        _put(parameter.view(-1, parameter.shape[-1]), self.rows, self.cols, _select(values, self.into_rows, self.into_cols))

    def write_disk(self, disk: torch.Tensor, parameter: torch.Tensor) -> None:
        """Put the values of the whole ``parameter`` where they belong in contiguous ``disk``, in place; its other elements stay."""
        if not self.shape:
            disk.copy_(parameter)
            return
        target = disk.transpose(-1, -2).contiguous() if self.turned else disk
        _put(target.view(-1, target.shape[-1]), self.into_rows, self.into_cols, _select(parameter, self.rows, self.cols))
        if self.turned:
            disk.copy_(target.transpose(-1, -2))

    def read(self, parameter: torch.Tensor) -> torch.Tensor:
        """The disk tensor, out of the whole ``parameter``; for regions that are all of a disk tensor."""
        disk = torch.empty(self.shape, dtype=parameter.dtype, device=parameter.device)
        self.write_disk(disk, parameter)
        return disk


def _select(tensor: torch.Tensor, rows: torch.Tensor | None, cols: torch.Tensor | None) -> torch.Tensor:
    matrix = tensor.reshape(-1, tensor.shape[-1])
    matrix = matrix if rows is None else matrix[rows.to(matrix.device)]
    return matrix if cols is None else matrix[:, cols.to(matrix.device)]


def _put(matrix: torch.Tensor, rows: torch.Tensor | None, cols: torch.Tensor | None, values: torch.Tensor) -> None:
    down: Any = slice(None) if rows is None else rows.to(matrix.device)
    along: Any = slice(None) if cols is None else cols.to(matrix.device)
    if rows is not None and cols is not None:
        down = down[:, None]
    matrix[down, along] = values.to(matrix).reshape(matrix[down, along].shape)


@dataclass(frozen=True)
class Group:
    """The disk tensors that one conversion takes together. ``sources``: pattern -> disk names, in the order in which the loader stacks them."""

    converter: Any
    target: str
    """the (first) parameter"""
    sources: dict[str, list[str]] = field(default_factory=dict)

    @property
    def slots(self) -> dict[Slot, str]:
        return {(pattern, index): disk for pattern, names in self.sources.items() for index, disk in enumerate(names)}


class Views(TorchFunctionMode):
    """Within it ``contiguous`` makes no copy, so that a rearranged index tensor of gigabytes stays a view of its few numbers."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return args[0] if func is torch.Tensor.contiguous else func(*args, **(kwargs or {}))


def trace(group: Group, parameters: tuple[str, ...], targets: Mapping[str, Shape], shapes: Mapping[str, Shape], model: nn.Module) -> list[Entry]:
    """How ``group`` makes ``parameters`` (shapes in ``targets``) of its disk tensors (in ``shapes``). Refused where it is no exact rearrangement."""
    slots = group.slots
    follow = _forwards if len(slots) == 1 else _backwards
    try:
        with Views(), torch.no_grad():
            return follow(group, [targets[name] for name in parameters], {slot: shapes[disk] for slot, disk in slots.items()}, parameters, model)
    except (_NoRearrangement, *FAILURES) as problem:
        found = str(problem) if isinstance(problem, _NoRearrangement) else f"{type(problem).__name__}: {problem}"
        where = f"{', '.join(list(slots.values())[:3])} -> {', '.join(parameters)}"
        raise Refused("transformers' conversion between file and model cannot be followed.", where=where,
                      expected="a rearrangement of rows and columns, each element once", found=found[:300],
                      fix="let transformers write the base as it holds it: save_pretrained(…, save_original_format=False)") from problem  # fmt: skip


class _NoRearrangement(Exception):
    pass


def _indices(shape: Shape) -> tuple[torch.Tensor, torch.Tensor]:
    """``(row number, column number)`` of each element of a tensor seen as ``[-1, last axis]``: int32 views of ``shape``."""
    if not shape:
        raise _NoRearrangement("a tensor without axes")
    *front, last = shape
    rows = torch.arange(torch.Size(front).numel(), dtype=torch.int32).view(*front, 1)
    return rows.expand(shape), torch.arange(last, dtype=torch.int32).expand(shape)


def _convert(converter: Any, tensors: dict[str, list[torch.Tensor]], layer: str, model: nn.Module) -> dict[str, torch.Tensor]:
    """The operations of a conversion. The result is keyed by its target patterns, not by full names: patterns lead back to the slots."""
    for operation in converter.operations:
        tensors = operation.convert(tensors, source_patterns=converter.source_patterns, target_patterns=converter.target_patterns, full_layer_name=layer,
                                    model=model, config=model.config, missing_keys=None)  # fmt: skip
    return {key: value[0] if isinstance(value, list) else value for key, value in tensors.items()}


def _forwards(group: Group, made: list[Shape], shapes: dict[Slot, Shape], _names: tuple[str, ...], model: nn.Module) -> list[Entry]:
    (slot, shape), = shapes.items()
    rows, cols = (_convert(deepcopy(group.converter), {slot[0]: [index]}, group.target, model) for index in _indices(shape))
    if len(rows) != len(made):
        raise _NoRearrangement(f"{len(rows)} tensors for {len(made)} parameters")
    found = [_selectors(rows[key], cols[key], shape, made[number]) for number, key in enumerate(rows)]
    _check_once(found, shape)
    if any(where["turned"] and (len(found) > 1 or where["rows"] is not None or where["cols"] is not None) for where in found):
        raise _NoRearrangement("a transposition that also splits or reorders")
    if len(found) > 1:
        return [(slot, number, {"into_rows": where["rows"], "into_cols": where["cols"]}) for number, where in enumerate(found)]
    return [(slot, 0, {name: torch.argsort(part) if isinstance(part, torch.Tensor) else part for name, part in found[0].items()})]


def _backwards(group: Group, sources: list[Shape], shapes: dict[Slot, Shape], names: tuple[str, ...], model: nn.Module) -> list[Entry]:
    reverse = deepcopy(group.converter).reverse_transform()
    indices = [(*_indices(shape), torch.tensor(number).expand(shape)) for number, shape in enumerate(sources)]
    layer = reverse.rename_source_key(names[0])[0]
    rows, cols, owners = (_convert(reverse, {pattern: [index[side]] for pattern, index in zip(reverse.source_patterns, indices, strict=True)}, layer, model)
                          for side in range(3))  # fmt: skip
    patterns = dict(zip(group.converter.source_patterns, reverse.target_patterns, strict=True))
    keys = {slot: patterns[slot[0]].replace("*", str(slot[1])) for slot in shapes}
    if odd := sorted(set(keys.values()) ^ set(rows)):
        raise _NoRearrangement(f"{len(keys)} tensors in the file where the model needs {len(rows)}; {len(odd)} do not match, e.g. {odd[0]}")
    entries = []
    for slot, key in keys.items():
        owner = int(owners[key].flatten()[0])
        if len(sources) > 1 and not bool((owners[key] == owner).all()):
            raise _NoRearrangement("a tensor that is made of several parameters")
        entries.append((slot, owner, _selectors(rows[key], cols[key], sources[owner], shapes[slot])))
    for number, shape in enumerate(sources):
        _check_once([where for _, owner, where in entries if owner == number], shape)
    return entries


def _selectors(rows: torch.Tensor, cols: torch.Tensor, source: Shape, made: Shape) -> Selectors:
    """Which rows and columns of a tensor of shape ``source`` make the tensor of shape ``made`` that the index tensors have become."""
    if rows.dtype != torch.int32 or cols.dtype != torch.int32:
        raise _NoRearrangement(f"values that are computed (int32 became {rows.dtype})")
    if tuple(rows.shape) != made:
        raise _NoRearrangement(f"shape {list(made)} where the conversion gives {list(rows.shape)}")
    for turned in (False, True) if len(made) > 1 else (False,):
        r, c = (index.transpose(-1, -2) if turned else index for index in (rows, cols))
        if _constant(r, along_last=True) and _constant(c, along_last=False):
            down, along = r[..., 0].reshape(-1).long(), c[(0,) * (c.dim() - 1)].long()
            return {"rows": _unless_all(down, torch.Size(source[:-1]).numel()), "cols": _unless_all(along, source[-1]), "turned": turned}
    raise _NoRearrangement("rows that are torn apart")


def _constant(index: torch.Tensor, along_last: bool) -> bool:
    axes = [index.dim() - 1] if along_last else list(range(index.dim() - 1))
    if all(index.stride(axis) == 0 or index.shape[axis] == 1 for axis in axes):
        return True
    first = index[..., :1] if along_last else index[(slice(0, 1),) * (index.dim() - 1)]
    return bool((index == first).all())


def _unless_all(selector: torch.Tensor, count: int) -> torch.Tensor | None:
    if int(selector.min()) < 0 or int(selector.max()) >= count:
        raise _NoRearrangement("values that are computed (an index outside the tensor)")
    return None if torch.equal(selector, torch.arange(count)) else selector


def _check_once(parts: list[Selectors], shape: Shape) -> None:
    """Each element of a tensor of ``shape`` must be in exactly one of the rectangles ``parts``.

    With random weights u of rows and v of columns, sum over parts of (sum of their u) * (sum of their v) is (sum u) * (sum v), exactly, in integers;
    where an element is missing or doubled, equality would be a coincidence of one in about 2^30.
    """
    dice = random.Random(0)
    down, along = (torch.tensor([dice.getrandbits(30) for _ in range(count)], dtype=torch.int64) for count in (torch.Size(shape[:-1]).numel(), shape[-1]))
    total = sum(_weight(down, part["rows"]) * _weight(along, part["cols"]) for part in parts)
    if total != _weight(down, None) * _weight(along, None):
        raise _NoRearrangement("elements that are lost or doubled")


def _weight(weights: torch.Tensor, selector: torch.Tensor | None) -> int:
    return int((weights if selector is None else weights[selector]).sum())
