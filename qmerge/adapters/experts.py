"""Which LoRA factors belong to a parameter that PEFT targeted by its name (``target_parameters``: fused experts), and what do they add to it?

PEFT wraps the module once per targeted parameter, in the order in which the module registered them: the first lies innermost, so its keys have the most
``base_layer``. A is ``[rank * experts, in]``, B ``[out, rank * experts]``. Which axis of a fused parameter is in and which is out depends on the module's
``is_transposed``. Left out: per-expert adapters from before transformers 5, which need no arithmetic of their own (see `names.saved_shapes`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from qmerge.adapters.config import rank_and_scaling
from qmerge.adapters.edits import Edit
from qmerge.adapters.regions import Region
from qmerge.errors import Refused

PREFIX = "base_model.model."


@dataclass(frozen=True)
class ExpertPair:
    """``delta[e] = scaling * left[e] @ right[e]`` with the factors of `expert_factors`. ``a`` and ``b`` name tensors of the adapter file."""

    parameter: str
    a: str
    b: str
    shape: tuple[int, ...]
    rank: int
    experts: int
    """1 for a parameter of two axes"""
    scaling: float
    swapped: bool
    """is the parameter ``[experts, out, in]`` (or ``[out, in]``), not ``[experts, in, out]``?"""


def targeted_parameters(config: Mapping[str, Any], model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Module -> the parameters of it that ``target_parameters`` names, innermost wrapper first; modules without any are left out.

    PEFT's rule: a target is a parameter's full name or what follows one of its dots.
    """
    targets = tuple(config.get("target_parameters") or ())
    endings = tuple(f".{target}" for target in targets)
    found = {}
    for module_name, module in model.named_modules() if targets else ():
        names = [f"{module_name}.{name}" for name, _ in module.named_parameters(recurse=False)]
        if hits := tuple(name for name in names if name in targets or name.endswith(endings)):
            found[module_name] = hits
    return found


def expert_pairs(config: Mapping[str, Any], module: str, tensors: Mapping[str, tuple[int, ...]], model: nn.Module) -> dict[str, ExpertPair]:
    """Parameter -> its pair, for the targeted parameters of ``module``. ``tensors``: key of the adapter file -> shape; ``model`` on the meta device.

    Refused, naming the key, where a factor is missing or has a shape that PEFT's own wrapper would not have.
    """
    owner = model.get_submodule(module)
    names = targeted_parameters(config, model).get(module, ())
    pairs = {}
    for position, name in enumerate(names):
        stem = PREFIX + module + ".base_layer" * (len(names) - 1 - position)
        a, b = f"{stem}.lora_A.weight", f"{stem}.lora_B.weight"
        pairs[name] = _pair(config, name, a, b, tuple(model.get_parameter(name).shape), bool(getattr(owner, "is_transposed", False)))
        _check_shapes(pairs[name], tensors, config)
    return pairs


def _pair(config: Mapping[str, Any], name: str, a: str, b: str, shape: tuple[int, ...], transposed: bool) -> ExpertPair:
    if len(shape) not in (2, 3):
        raise Refused("LoRA on this parameter is not defined.", where=name, expected="two axes, or three with the experts first", found=list(shape))
    if len(shape) == 3 and shape[0] == 1 and transposed:
        raise Refused("PEFT adds the delta of a single fused expert the wrong way round, so nobody knows what this adapter was trained to do.", where=name,
                      expected="two experts or more, or [1, out, in]", found=list(shape), fix="keep this adapter separate")  # fmt: skip
    rank, scaling = rank_and_scaling(dict(config), name)
    return ExpertPair(name, a, b, shape, rank, shape[0] if len(shape) == 3 else 1, scaling, len(shape) == 2 or not transposed)


def _check_shapes(pair: ExpertPair, tensors: Mapping[str, tuple[int, ...]], config: Mapping[str, Any]) -> None:
    into, out = (pair.shape[-1], pair.shape[-2]) if pair.swapped else (pair.shape[-2], pair.shape[-1])
    for key, expected in ((pair.a, (pair.rank * pair.experts, into)), (pair.b, (out, pair.rank * pair.experts))):
        if key not in tensors:
            raise Refused("An adapter tensor for a targeted parameter is missing.", where=pair.parameter, expected=key, found="no such tensor in the adapter")
        if tuple(tensors[key]) != expected:
            raise Refused("An adapter tensor does not fit the parameter that it was trained for.",
                          where=f"tensor {key!r} for {pair.parameter} {list(pair.shape)}",
                          expected=f"{list(expected)} (rank {pair.rank}, {pair.experts} experts)",
                          found=f"{list(tensors[key])}, written by PEFT {config.get('peft_version')}",
                          fix="keep this adapter separate, with the versions of PEFT and transformers that it was trained with")  # fmt: skip


def expert_edits(adapter: Any, loose: Iterable[str], model: nn.Module, shapes: Mapping[str, tuple[int, ...]], fused: Callable[..., Edit],
                 plain: Callable[..., Edit]) -> dict[str, tuple[str, Edit]]:  # fmt: skip
    """Module as in the adapter's keys (``….experts.base_layer``) -> (parameter, edit), for all targeted parameters of a LoRA `Adapter`.

    ``fused`` and ``plain`` make the edit of three and of two axes: ``(keys, shape, factors, scaling)``, as `lowrank.Experts` and `lowrank.LowRank` do.
    ``loose`` are modules of the adapter that are none of the base's; nested ones must be explained here, others are the caller's to explain.
    Refused as `expert_pairs`, for nested ones without a targeted parameter, and for Conv1D, whose delta would lie across the weight.
    """
    from transformers.pytorch_utils import Conv1D

    def edit(pair: ExpertPair, a: str, b: str) -> Edit:
        def factors() -> tuple[torch.Tensor, torch.Tensor]:
            left, right = expert_factors(adapter.source.fp32(a), adapter.source.fp32(b), pair.experts, pair.swapped)
            return (left, right) if len(pair.shape) == 3 else (left[0], right[0])

        return (fused if len(pair.shape) == 3 else plain)((a, b), pair.shape, factors, pair.scaling)

    tensors = {f"{PREFIX}{name}.lora_{side}.weight": tuple(adapter.specs[key].shape)
               for name, pair in adapter.pairs.items() for side, key in (("A", pair.a), ("B", pair.b))}  # fmt: skip
    edits: dict[str, tuple[str, Edit]] = {}
    for module in targeted_parameters(adapter.config, model):
        if isinstance(model.get_submodule(module), Conv1D):
            raise Refused("The adapter targets the bare weight of a Conv1D, which stores it transposed.", where=module, fix="train with target_modules instead")
        for parameter, pair in expert_pairs(adapter.config, module, tensors, model).items():
            key = pair.a.removeprefix(PREFIX).removesuffix(".lora_A.weight")
            if parameter in shapes and tuple(shapes[parameter]) != pair.shape:
                raise Refused("The base's parameter has another shape than the model's.", where=parameter, expected=list(pair.shape),
                              found=list(shapes[parameter]))  # fmt: skip
            edits[key] = (parameter, edit(pair, adapter.pairs[key].a, adapter.pairs[key].b))
    if odd := sorted(name for name in set(loose) - set(edits) if name.endswith(".base_layer")):
        raise Refused("The adapter holds nested LoRA for which its config targets no parameter of this model.", where=adapter.name,
                      found=f"{len(odd)}, e.g. {odd[0]}",
                      expected=f"parameters that end in one of {sorted(adapter.config.get('target_parameters') or [])}")  # fmt: skip
    return edits


def expert_factors(a: torch.Tensor, b: torch.Tensor, experts: int, swapped: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """``(left [experts, x, rank], right [experts, rank, y])`` in the parameter's own layout ``[experts, x, y]`` from A and B as stored; any float dtype.

    A counts ``expert * rank + r`` along its rows, B counts ``r * experts + expert`` along its columns.
    """
    inner = a.reshape(experts, -1, a.shape[-1])
    outer = b.reshape(b.shape[0], -1, experts).permute(2, 0, 1)
    return (outer, inner) if swapped else (inner.transpose(1, 2), outer.transpose(1, 2))


def split_lowrank(left: torch.Tensor, right: torch.Tensor, region: Region, parameter_shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """The factors of what one disk tensor gets of a parameter's delta: ``(left' @ right').reshape(region.shape)``, zero where the parameter has no part in it.

    ``left`` is ``[experts, x, r]``, ``right`` ``[experts, r, y]``, the parameter ``[experts, x, y]`` or ``[x, y]`` (then one expert). The results have two
    axes for a disk tensor of two, three for one of three (or of two that stacks several experts).
    Refused where a transposed or shared tensor stacks several experts.
    """
    if tuple(parameter_shape) not in {(left.shape[0], left.shape[1], right.shape[2]), (left.shape[1], right.shape[2])}:
        raise Refused("Low-rank factors do not fit the parameter.", where=region.parameter, expected=list(parameter_shape),
                      found=f"{list(left.shape)} @ {list(right.shape)}")  # fmt: skip
    left, right = _rows(left, right, region)
    if region.cols is not None:
        right = right[..., region.cols.to(right.device)]
    stacked = left.shape[0] > 1
    if stacked and (not region.whole or (region.turned and len(region.shape) != 3)):
        raise Refused("The file stacks experts in a way that has no low-rank form.", where=f"{region.disk} -> {region.parameter}",
                      expected="one tensor per expert, or [experts, …]", found=list(region.shape))  # fmt: skip
    if not region.whole:
        left, right = _spread(left, right, region)
    if region.turned:
        left, right = right.transpose(1, 2), left.transpose(1, 2)
    return (left, right) if stacked or len(region.shape) == 3 else (left[0], right[0])


def _rows(left: torch.Tensor, right: torch.Tensor, region: Region) -> tuple[torch.Tensor, torch.Tensor]:
    """``(left [k, m, r], right [k, r, y])``: the selected rows as k blocks, each of one expert."""
    if region.rows is None:
        return left, right
    height = left.shape[1]
    owners, rows = region.rows // height, region.rows % height
    blocks = 1 + int((owners[1:] != owners[:-1]).sum())
    table = owners.reshape(blocks, -1) if owners.numel() % blocks == 0 else None
    if table is None or not bool((table == table[:, :1]).all()):
        raise Refused("The file mixes rows of several experts in one tensor.", where=f"{region.disk} -> {region.parameter}",
                      found=f"{blocks} runs of unequal length")  # fmt: skip
    experts, rows = table[:, 0].to(left.device), rows.reshape(blocks, -1).to(left.device)
    return left[experts[:, None], rows], right[experts]


def _spread(left: torch.Tensor, right: torch.Tensor, region: Region) -> tuple[torch.Tensor, torch.Tensor]:
    """One expert's factors, with zeros for the rows and columns of the disk tensor that are other parameters'."""
    height, width = (torch.Size(region.shape[:-1]).numel(), region.shape[-1])
    if region.into_rows is not None:
        tall = left.new_zeros(1, height, left.shape[2])
        tall[:, region.into_rows.to(left.device)] = left
        left = tall
    if region.into_cols is not None:
        wide = right.new_zeros(1, right.shape[1], width)
        wide[:, :, region.into_cols.to(right.device)] = right
        right = wide
    return left, right
