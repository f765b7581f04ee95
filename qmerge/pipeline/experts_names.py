"""Under which names does the output hold the weights of routed experts, and where do these lie in the module tree?

transformers keeps all experts of a layer in one parameter of three axes, hub files hold them one by one. transformers' own conversion relates the two. An int format
holds them one by one, as its loader names them: gptqmodel by the module tree of today, with an expert's number and its linears in the place of the fused parameter; all others as
the hub's files do. bitsandbytes quantizes no parameter of three axes, so in nf4 and fp4 experts stay float, and as the base holds them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from qmerge import formats
from qmerge.adapters.edits import Edit
from qmerge.adapters.regions import Region
from qmerge.errors import Refused
from qmerge.pipeline.naming import Names, split_edit
from qmerge.pipeline.pieces import Pieces, Spelling
from qmerge.pipeline.skeleton import Skeleton
from qmerge.types import known

if TYPE_CHECKING:
    from qmerge.adapters.names import NameMap

BY_MODULE_TREE = ("gptq", "awq")
"""formats whose MoE files gptqmodel reads (transformers leaves their experts at random): it knows the module tree's names only"""


@dataclass(frozen=True)
class ExpertWeight:
    """One weight ``[out, in]`` of one routed expert. ``name`` is the output's, ``parameter`` the module tree's, of which it is ``region``."""

    name: str
    parameter: str
    expert: int
    region: Region

    @property
    def module(self) -> str:
        return self.parameter.rpartition(".")[0]


def expert_of(region: Region) -> int | None:
    """The expert that a tensor is a weight ``[out, in]`` of: some outputs of one expert with all inputs. None where it is anything else."""
    if len(region.parameter_shape) != 3 or len(region.shape) != 2 or not region.whole:
        return None
    count, height = region.parameter_shape[:2]
    rows = torch.arange(count * height) if region.rows is None else region.rows
    expert = int(rows[0]) // height
    if bool((rows // height != expert).any()):
        return None
    whole = torch.equal(rows - expert * height, torch.arange(height)) if region.turned else region.cols is None
    return expert if whole else None


def spell(names: Names, fmt: str) -> Spelling:
    """How an output of format ``fmt`` spells the module tree. Refused where a parameter is in pieces on disk that are no expert's."""
    return _Speller(names, fmt).spelling()


def written_edits(spelling: Spelling, edits: Mapping[str, Edit], where: str) -> dict[str, Edit]:
    """Edits by the base's names -> by the output's."""
    outputs: dict[str, list[str]] = {}
    for name, source in spelling.sources.items():
        outputs.setdefault(source, []).append(name)
    found: dict[str, Edit] = {}
    for disk, edit in edits.items():
        parts = outputs.get(disk, [disk])
        if parts[0] in spelling.cuts:
            regions = [spelling.cuts[part] for part in parts]
            found |= dict(zip(parts, split_edit(edit, regions, regions[0].parameter, where), strict=True))
        else:
            found[parts[0]] = edit
    return found


def routed_weights(skeleton: Skeleton, pieces: Pieces, fmt: str) -> tuple[ExpertWeight, ...]:
    """The weights of routed experts that ``fmt`` quantizes, expert by expert. Empty where experts stay float."""
    found = []
    for parameter, parts in pieces.made_of.items() if fmt in formats.BITS else ():
        experts = _experts_of([region for _, region in parts])
        if parameter.rpartition(".")[0] in skeleton.experts and experts is not None:
            found += [ExpertWeight(name, parameter, expert, region) for (name, region), expert in zip(parts, experts, strict=True)]
    return tuple(found)


def float_experts(skeleton: Skeleton | None, routed: tuple[ExpertWeight, ...]) -> tuple[str, ...]:
    """Parameters of routed experts that stay float."""
    quantized = {weight.parameter for weight in routed}
    parameters = dict(skeleton.model.named_parameters()) if skeleton else {}
    return tuple(name for name, parameter in parameters.items() if parameter.dim() == 3 and name.rpartition(".")[0] in known(skeleton).experts and name not in quantized)


def held_one_by_one(skeleton: Skeleton, held: set[str]) -> set[str]:
    """Parameters of routed experts of which a file with weights named ``held`` has every expert's part, under the hub's names or the module tree's."""
    from qmerge.adapters.names import relate, saved_shapes

    fused = [name for name in float_experts(skeleton, ()) if name not in held]
    saved = relate(skeleton.model, saved_shapes(skeleton.model)) if fused else None
    found = set()
    for name in fused:
        parts = known(saved).regions_of_parameter(name)
        experts = _experts_of(parts)
        if experts is not None and any(held.issuperset(_labels(name, parts, experts, by_tree)) for by_tree in (False, True)):
            found.add(name)
    return found


class _Speller:
    def __init__(self, names: Names, fmt: str) -> None:
        self.names, self.skeleton = names, known(names.skeleton)
        self.apart, self.by_tree = fmt in formats.BITS, fmt in BY_MODULE_TREE
        self.experts = set(self.skeleton.experts)
        self.shapes = {name: tuple(parameter.shape) for name, parameter in self.skeleton.model.named_parameters(remove_duplicate=False)}
        self.all_there = all(name in names.disk or name in self.skeleton.tied_names for name in self.shapes)
        self._saved: NameMap | None = None

    @property
    def saved(self) -> NameMap:
        """Between the hub's names and the module tree."""
        if self._saved is None:
            from qmerge.adapters.names import relate, saved_shapes

            self._saved = relate(self.skeleton.model, saved_shapes(self.skeleton.model))
        return self._saved

    def spelling(self) -> Spelling:
        if self.all_there and not (self.apart and self.experts):
            return Spelling({name: name for name in self.names.disk})
        sources: dict[str, str] = {}
        cuts: dict[str, Region] = {}
        made_of: dict[str, tuple[tuple[str, Region], ...]] = {}
        on_disk = {name: self._regions(name) for name in self.shapes}
        for name, regions in on_disk.items():
            if self._routed(name):
                self._spell_experts(name, regions, sources, cuts, made_of)
        as_hub = bool(made_of) and not (self.apart and self.by_tree)
        for name, regions in on_disk.items():
            if regions and not self._routed(name):
                self._spell_other(name, regions, as_hub, sources, made_of)
        used = set(sources.values())
        return Spelling(sources | {name: name for name in self.names.disk if name not in used and name not in sources}, cuts, made_of)

    def _routed(self, name: str) -> bool:
        return len(self.shapes[name]) == 3 and name.rpartition(".")[0] in self.experts

    def _regions(self, name: str) -> tuple[Region, ...]:
        """Where a parameter lies on disk; nothing for a head that is its partner there."""
        missing = name not in self.names.disk if self.all_there else name in self.names.map.missing
        if missing and name in self.skeleton.tied_names:
            return ()
        if missing:
            raise Refused("the base lacks a tensor that its model class has", where=self.names.base.checkpoint.name, expected=name, found="no such tensor", fix="download it again, or save it again with save_pretrained")
        return (Region(name, name, self.shapes[name], self.shapes[name]),) if self.all_there else self.names.map.regions_of_parameter(name)

    def _spell_experts(self, name: str, regions: tuple[Region, ...], sources: dict[str, str], cuts: dict[str, Region], made_of: dict[str, tuple[tuple[str, Region], ...]]) -> None:
        fused = len(regions) == 1 and regions[0].same
        parts = self.saved.regions_of_parameter(name) if fused and self.apart else regions
        alone = _experts_of(parts)
        if self.apart and alone is not None:
            spelled = list(zip(_labels(name, parts, alone, self.by_tree), parts, strict=True))
            sources |= {label: regions[0].disk if fused else region.disk for label, region in spelled}
            cuts |= dict(spelled) if fused else {}
            made_of[name] = tuple(spelled)
        elif fused:
            sources[name] = regions[0].disk
        else:
            sources |= {region.disk: region.disk for region in regions}
            made_of[name] = tuple((region.disk, region) for region in regions)

    def _spell_other(self, name: str, regions: tuple[Region, ...], as_hub: bool, sources: dict[str, str], made_of: dict[str, tuple[tuple[str, Region], ...]]) -> None:
        if len(regions) != 1 or not regions[0].same:
            raise Refused("this base holds a parameter of its model class in pieces, which this version does not requantize", where=self.names.base.checkpoint.name, expected=name,
                          found=f"{len(regions)} tensors, the first {regions[0].disk}", fix="use --format bf16")
        label = name
        if as_hub and name not in self.skeleton.linears:
            label = regions[0].disk if regions[0].disk != name else self.saved.regions_of_parameter(name)[0].disk
        sources[label] = regions[0].disk
        if label != name:
            made_of[name] = ((label, regions[0]),)


def _labels(name: str, parts: tuple[Region, ...], experts: list[int], by_tree: bool) -> list[str]:
    """The output's names of the experts' weights."""
    if not by_tree:
        return [region.disk for region in parts]
    module, _, leaf = name.rpartition(".")
    halves = ["gate_proj", "up_proj"] if leaf == "gate_up_proj" else [leaf]
    found: dict[int, str] = {}
    for number, mates in _by_expert(experts).items():
        if len(mates) != len(halves):
            raise Refused("nobody knows what the parts of this expert's weight are called", where=name, expected=f"{len(halves)} parts", found=f"{len(mates)}",
                          fix="use --format compressed-tensors or bf16")
        found |= {place: f"{module}.{number}.{half}.weight" for place, half in zip(sorted(mates, key=lambda place: _first(parts[place])), halves, strict=True)}
    return [found[place] for place in range(len(parts))]


def _experts_of(regions: Sequence[Region]) -> list[int] | None:
    """The expert of each, or None where one of them is not of one expert alone."""
    found = [expert for region in regions if (expert := expert_of(region)) is not None]
    return found if len(found) == len(regions) else None


def _by_expert(experts: list[int]) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for place, expert in enumerate(experts):
        found.setdefault(expert, []).append(place)
    return found


def _first(region: Region) -> int:
    """The first of the outputs that a weight is for."""
    outputs = region.cols if region.turned else region.rows
    return 0 if outputs is None else int(outputs[0])
