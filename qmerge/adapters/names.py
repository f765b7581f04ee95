"""Which tensors of a file feed which parameter of the model?

The only source is transformers: names go through the renamings that its loader applies, in its order, and whatever more than one tensor or a rearrangement
takes part in goes to `regions.py`. Left out: quantized containers. Shapes on disk are those of the float weights.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from qmerge.adapters.regions import FAILURES, Entry, Group, Region, Shape, Slot, Views, trace
from qmerge.errors import Refused

Namer = Callable[[str], tuple[str, str | None]]
"""name -> name in the module tree, pattern of the conversion that the tensor goes through (None: it is only renamed)"""


@dataclass(frozen=True)
class Tied:
    """A group and all parameters that it makes. Layers that are the same but for their number have equal ``kind``."""

    group: Group
    parameters: tuple[str, ...]
    kind: Any
    disks: Mapping[Slot, str]


@dataclass(frozen=True)
class NameMap:
    """Between a file and a module tree. ``missing``: parameters and saved buffers that no disk tensor feeds (tied ones among them); ``unused``: disk tensors
    that feed nothing. Where each element lies is found when asked for, once per kind of layer."""

    missing: tuple[str, ...]
    unused: tuple[str, ...]
    _model: nn.Module = field(repr=False)
    _shapes: Mapping[str, Shape] = field(repr=False)
    _targets: Mapping[str, Shape] = field(repr=False)
    _namer: Namer = field(repr=False)
    _disk_of: Mapping[str, str] = field(repr=False)
    """parameter -> disk tensor, where that is all"""
    _parameter_of: Mapping[str, str] = field(repr=False)
    _tied: Mapping[str, Tied] = field(repr=False)
    """parameter -> its group"""
    _tied_disk: Mapping[str, tuple[Tied, Slot]] = field(repr=False)
    """disk tensor -> its group, and its place there"""
    _traced: dict[Any, dict[Slot, list[Entry]]] = field(default_factory=dict, repr=False)

    def regions_of_parameter(self, parameter: str) -> tuple[Region, ...]:
        """All of ``parameter``'s regions. Refused where no disk tensor feeds it, shapes disagree, or the conversion is no rearrangement of rows and columns."""
        if parameter in self._tied:
            tied = self._tied[parameter]
            return tuple(self._region(tied, entry) for entries in self._entries(tied).values() for entry in entries if tied.parameters[entry[1]] == parameter)
        if parameter not in self._disk_of:
            raise Refused("A parameter of the model has no tensor in the file.", where=parameter, found="no name on disk leads to it",
                          fix="use a checkpoint of this architecture; a tied weight is in the file under its partner's name")  # fmt: skip
        return (self._renaming(self._disk_of[parameter], parameter),)

    def regions_of_disk(self, disk: str) -> tuple[Region, ...]:
        """All regions of one disk tensor: several where parameters share it, none where it feeds nothing. Refused as above, and for a name not on disk."""
        if disk not in self._shapes:
            raise Refused("The file has no such tensor.", where=disk, found=f"{len(self._shapes)} other tensors")
        if disk in self._tied_disk:
            tied, slot = self._tied_disk[disk]
            return tuple(self._region(tied, entry) for entry in self._entries(tied)[slot])
        return (self._renaming(disk, self._parameter_of[disk]),) if disk in self._parameter_of else ()

    def resolve(self, name: str) -> str | None:
        """The parameter that ``name`` means, be it today's spelling or an older one; None where it means none, or only a part of one."""
        if name in self._targets:
            return name
        renamed, pattern = self._namer(name)
        return renamed if pattern is None and renamed in self._targets else None

    def _renaming(self, disk: str, parameter: str) -> Region:
        if self._shapes[disk] != self._targets[parameter]:
            raise Refused("A tensor of the file has another shape than the model's parameter.", where=f"{disk} -> {parameter}",
                          expected=list(self._targets[parameter]), found=list(self._shapes[disk]), fix="give the base that the adapter was trained on: qmerge inspect ADAPTER names it")  # fmt: skip
        return Region(disk, parameter, self._shapes[disk], self._targets[parameter])

    def _region(self, tied: Tied, entry: Entry) -> Region:
        slot, number, where = entry
        disk, parameter = tied.disks[slot], tied.parameters[number]
        return Region(disk, parameter, self._shapes[disk], self._targets[parameter], **where)

    def _entries(self, tied: Tied) -> dict[Slot, list[Entry]]:
        if tied.kind not in self._traced:
            table: dict[Slot, list[Entry]] = {slot: [] for slot in tied.disks}
            for entry in trace(tied.group, tied.parameters, self._targets, self._shapes, self._model):
                table[entry[0]].append(entry)
            self._traced[tied.kind] = table
        return self._traced[tied.kind]


def relate(model: nn.Module, disk_shapes: Mapping[str, Iterable[int]]) -> NameMap:
    """Relate the tensors of a file (name -> shape of the float weight) to the parameters of ``model``, a transformers class on the meta device.

    Names only: a second or two for 20,000 tensors. What cannot be loaded is in ``missing`` and ``unused``, and refused when asked for.
    """
    shapes = {name: tuple(shape) for name, shape in disk_shapes.items()}
    targets = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if isinstance(tensor, torch.Tensor)}
    namer, converters = _load_names(model, targets)
    disk_of, groups = _assign(shapes, targets, namer, converters)
    tied: dict[str, Tied] = {}
    tied_disk: dict[str, tuple[Tied, tuple[str, int]]] = {}
    for group in groups:
        parameters, disks = _parameters(group, shapes, model), group.slots
        pattern = re.sub(r"(?<=\.)\d+(?=\.|$)", "#", group.target)
        kind = (pattern, tuple(targets.get(name) for name in parameters), tuple((slot, shapes[disk]) for slot, disk in disks.items()))
        one = Tied(group, parameters, kind, disks)
        tied |= dict.fromkeys(parameters, one)
        tied_disk |= {disk: (one, slot) for slot, disk in disks.items()}
    parameter_of = {disk: parameter for parameter, disk in disk_of.items()}
    missing = tuple(name for name in targets if name not in disk_of and name not in tied)
    unused = tuple(name for name in shapes if name not in parameter_of and name not in tied_disk)
    return NameMap(missing, unused, model, shapes, targets, namer, disk_of, parameter_of, tied, tied_disk)


def saved_shapes(model: nn.Module) -> dict[str, Shape]:
    """The names and shapes under which transformers saves ``model`` (on the meta device): those of the architecture's first release.

    Adapters from before transformers 5 use these names. ``relate(model, saved_shapes(model))`` says where they lie in the module tree, whatever the file uses.
    """
    from transformers.core_model_loading import revert_weight_conversion

    saved: Any = model  # of transformers' own class, which is all that has such a first release
    with Views():
        return {name: tuple(tensor.shape) for name, tensor in revert_weight_conversion(saved, dict(model.state_dict())).items()}


def _load_names(model: nn.Module, targets: Mapping[str, Shape]) -> tuple[Namer, dict[str, Any]]:
    """``(what the loader makes of a name, pattern -> conversion)``."""
    from transformers import PreTrainedModel
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    if not isinstance(model, PreTrainedModel):
        return lambda name: (name, None), {}
    conversions = get_model_conversion_mapping(model)
    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
    prefix, known_names = model.base_model_prefix, dict(targets)

    def namer(name: str) -> tuple[str, str | None]:
        renamed, pattern = rename_source_key(name, renamings, converters, prefix, known_names)
        if renamed not in targets and name in targets:  # the loader's rule: a name that fits as it is was not to be renamed
            return rename_source_key(name, [], [], prefix, known_names)
        return renamed, pattern

    return namer, {pattern: converter for converter in converters for pattern in converter.source_patterns}


def _assign(shapes: Mapping[str, Shape], targets: Mapping[str, Shape], namer: Namer, converters: Mapping[str, Any]) -> tuple[dict[str, str], list[Group]]:
    """``(parameter -> disk tensor, groups)`` in the loader's order, on which stacking depends. Of two for one parameter the loader uses the first."""
    from transformers.core_model_loading import dot_natural_key

    disk_of: dict[str, str] = {}
    groups: dict[str, Group] = {}
    for disk in sorted(shapes, key=dot_natural_key):
        target, pattern = namer(disk)
        if target not in targets:
            continue
        if pattern is None:
            if target not in groups:
                disk_of.setdefault(target, disk)
        elif target not in disk_of:
            group = groups.setdefault(target, Group(converters[pattern], target))
            if pattern in group.converter.source_patterns:
                group.sources.setdefault(pattern, []).append(disk)
    return disk_of, list(groups.values())


def _parameters(group: Group, shapes: Mapping[str, Shape], model: nn.Module) -> tuple[str, ...]:
    """The parameters that a group makes. Of several the conversion itself knows the names; where it fails, the first stands for all: tracing will refuse it."""
    if len(group.converter.target_patterns) == 1:
        return (group.target,)
    converter = deepcopy(group.converter)
    for (pattern, _), disk in group.slots.items():
        converter.add_tensor(group.target, disk, pattern, torch.empty(shapes[disk], device="meta"))
    try:
        return tuple(converter.convert(group.target, model=model, config=model.config))
    except FAILURES:
        return (group.target,)
