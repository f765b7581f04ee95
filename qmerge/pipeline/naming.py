"""Under which names do an adapter's edits and the base's tensors meet?

An adapter names parameters of the module tree, a file may spell them otherwise or hold fused experts one by one. Where names are equal nothing is asked of transformers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch

from qmerge.adapters.adapter import Adapter
from qmerge.adapters.edits import Edit
from qmerge.adapters.lowrank import Experts, Factors, LowRank
from qmerge.adapters.regions import Region
from qmerge.adapters.several import Chain, WeightedSum
from qmerge.errors import Refused
from qmerge.formats.base import Base
from qmerge.pipeline.skeleton import Skeleton
from qmerge.types import known


def foreign_modules(adapters: Sequence[Adapter], names: Sequence[str]) -> list[str]:
    """Parameters that the adapters change and the file does not spell that way."""
    held = set(names)
    wanted = {f"{module}.weight" for adapter in adapters for module in adapter.claims.modules if adapter.claims.modules[module].parts.keys() & {"lora_A", "lora_embedding_A", "tokens", "base.weight"}}
    wanted |= {parameter for adapter in adapters for parameter in adapter.saved}
    return sorted(wanted - held)


def split_edit(edit: Edit, regions: Sequence[Region], parameter: str, where: str) -> list[Edit]:
    """What each part of a parameter gets of its edit. Refused where that is no low-rank delta."""
    if isinstance(edit, (Chain, WeightedSum)):
        parts = zip(*(split_edit(one, regions, parameter, where) for one in edit.edits), strict=True)
        return [replace(edit, edits=tuple(part)) for part in parts]
    if not isinstance(edit, (Experts, LowRank)):
        raise Refused("The adapter replaces a parameter that base or output hold in pieces.", where=f"{where}: {edit.keys[0]}", expected="LoRA on it, or a tensor of the file", found=f"{parameter}, {len(regions)} pieces",
                      fix="save the base with the transformers version that the adapter was trained with")
    recent = lru_cache(maxsize=1)(lambda: edit.factors())  # the parts of one parameter are merged one after the other
    return [_split(edit, region, recent, parameter) for region in regions]


def _split(edit: Experts | LowRank, region: Region, factors: Factors, parameter: str) -> Edit:
    """What one disk tensor gets of a fused parameter's delta."""
    from qmerge.adapters.experts import split_lowrank

    def part() -> tuple[torch.Tensor, torch.Tensor]:
        left, right = factors()
        return split_lowrank(left if left.dim() == 3 else left[None], right if right.dim() == 3 else right[None], region, region.parameter_shape)

    if isinstance(edit, LowRank) and not edit.plain:
        raise Refused("DoRA on a parameter that the file holds in pieces is not merged.", where=parameter, expected="plain LoRA", found=f"{edit.keys[0]}")
    kind = Experts if len(region.shape) == 3 else LowRank
    return kind(edit.keys, tuple(region.shape), part, edit.scaling)


class Names:
    """The relation between one base and its module tree, asked for when something does not match."""

    def __init__(self, base: Base, skeleton: Skeleton | None) -> None:
        self.base, self.skeleton = base, skeleton
        self.disk = {name: base.shape(name) for name in base.names}
        self._map: Any = None

    @property
    def map(self) -> Any:
        if self._map is None:
            from qmerge.adapters.names import relate

            stored = {name: shape[::-1] if name in self.base.conv else shape for name, shape in self.disk.items()}
            self._map = relate(known(self.skeleton).model, stored)
        return self._map

    def shapes(self, adapters: Sequence[Adapter]) -> dict[str, tuple[int, ...]]:
        """Shapes by every name that an adapter may use: the file's, and the module tree's where the two differ."""
        if self.skeleton is None or not foreign_modules(adapters, list(self.disk)):
            return self.disk
        tree = {name: tuple(tensor.shape) for name, tensor in self.skeleton.model.named_parameters(remove_duplicate=False)}
        for name in self.skeleton.linears:
            if self.skeleton.linears[name]:
                tree[name] = tree[name][::-1]
        return tree | self.disk

    def on_disk(self, edits: Mapping[str, Edit], where: str) -> dict[str, Edit]:
        """The edits by the file's own names; those of a fused parameter are split into those of its parts. The head of a tied model keeps its name."""
        found: dict[str, Edit] = {}
        for name, edit in edits.items():
            if name in self.disk or self.skeleton is None or name in self.skeleton.tied_names:
                parts = {name: edit}
            else:
                parts = self._parts(name, edit, where)
            for disk, part in parts.items():  # several parameters may share one tensor of the file (a fused qkv): each changes its own rows
                found[disk] = Chain((found[disk], part)) if disk in found else part
        return found

    def _parts(self, name: str, edit: Edit, where: str) -> dict[str, Edit]:
        parameter = self.map.resolve(name)
        if parameter is None:
            return {name: edit}  # make_pieces refuses it: the base lacks it
        regions = self.map.regions_of_parameter(parameter)
        if len(regions) == 1 and regions[0].same:
            return {regions[0].disk: edit}
        return {region.disk: part for region, part in zip(regions, split_edit(edit, regions, parameter, where), strict=True)}
