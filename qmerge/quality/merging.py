"""What are the weights of arm C, and how much of the adapter does a candidate's every linear still hold?

Arm C is W + ΔW in fp32, in memory, in the module tree: names, ties, fused experts and replicated layers as the model class has them. Each candidate's linears are set
against it: does a step of requantization keep the delta (``delta_survival`` 1) or round it away (0)?
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from qmerge.adapters.choices import AdapterSet
from qmerge.adapters.edits import Edit
from qmerge.adapters.several_adapters import joint_edits
from qmerge.adapters.tying import head_edit, head_follows
from qmerge.errors import Refused
from qmerge.quality.attach import as_set
from qmerge.quality.plain import dense_weights


def merge_in_memory(model: nn.Module, adapter: str | AdapterSet) -> nn.Module:
    """Apply the adapters' edits to a plain fp32 model; changes ``model``. Raises `Refused` for a module that is not there or does not fit."""
    chosen = as_set(adapter)
    opened = chosen.open()
    configs = [one.config for one in opened]
    edits = model_edits(model, chosen)
    if spans := _spans(configs):
        _replicate(model, spans)
    edits = _settle_ties(model, edits, configs)
    loose = {name: edits.pop(name) for name in list(edits) if not _has(model, name)}
    for name, edit in edits.items():
        _apply(model, name, edit)
    if loose:
        _apply_on_disk_names(model, loose)
    return model


def model_edits(model: nn.Module, chosen: AdapterSet) -> dict[str, Edit]:
    """Parameter -> edit, for the shapes of ``model`` (linears as ``[out, in]``) with the layers that the adapter replicates, and under the older names of a fused parameter's parts."""
    opened = chosen.open()
    tree = _without_values(model)
    if spans := _spans([one.config for one in opened]):
        _replicate(tree, spans)
    shapes = {name: tuple(parameter.shape) for name, parameter in tree.named_parameters(remove_duplicate=False)}
    for name, module in tree.named_modules():
        if isinstance(module, Conv1D):
            shapes[f"{name}.weight"] = tuple(module.weight.shape[::-1])
    known = {f"{module}.weight" for one in opened for module in one.pairs}
    if known - shapes.keys() and hasattr(model, "config"):
        from qmerge.adapters.names import saved_shapes

        shapes = saved_shapes(tree) | shapes
    return joint_edits(opened, chosen.weights, chosen.combination, shapes, tree)


def edited_weights(model: nn.Module, edits: Mapping[str, Edit]) -> dict[str, torch.Tensor]:
    """Module name -> weight ``[out, in]`` of the linears, and parameter name -> ``[experts, …]`` of the fused experts, that ``edits`` change; views; a PEFT model under its base's names."""
    found = {name: weight for name, weight in dense_weights(model).items() if f"{name}.weight" in edits}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        own = name.removeprefix("base_model.model.").replace(".base_layer", "")
        if own in edits and parameter.dim() == 3:
            found[own] = parameter.data
    return found


def linear_rows(base: Mapping[str, torch.Tensor], candidate: Mapping[str, torch.Tensor], edits: Mapping[str, Edit]) -> dict[str, dict[str, float]]:
    """Per edited linear (and fused experts) with ΔW ≠ 0, from fp32 weights as `edited_weights` gives them: ``delta_survival`` ``<W_out - W_base, ΔW> / <ΔW, ΔW>``,
    ``delta_ratio`` ``‖ΔW‖/‖W_base‖``, ``error_ratio`` ``‖W_out - (W_base + ΔW)‖/‖ΔW‖``. Linears that a side lacks are left out."""
    rows = {}
    for parameter, edit in edits.items():
        name = parameter.removesuffix(".weight")
        if name not in base or name not in candidate or base[name].shape != candidate[name].shape or edit.shape != tuple(base[name].shape):
            continue
        weight = base[name].float().contiguous()
        delta = (edit.load(weight.device).apply(weight, 0) - weight).double()
        size = float(delta.norm())
        if size == 0.0:
            continue
        moved = candidate[name].double() - weight.double()
        rows[name] = {
            "delta_survival": float((moved * delta).sum()) / size**2,
            "delta_ratio": size / max(float(weight.double().norm()), 1e-30),
            "error_ratio": float((moved - delta).norm()) / size,
        }
    return rows


def _spans(configs: list[dict[str, Any]]) -> list[Any] | None:
    return next((config["layer_replication"] for config in configs if config.get("layer_replication")), None)


def _without_values(model: nn.Module) -> nn.Module:
    """The module tree of ``model`` with parameters on the meta device, ties kept."""
    empty = {id(parameter): nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False) for parameter in model.parameters()}
    return copy.deepcopy(model, empty)


def _replicate(model: nn.Module, spans: list[Any]) -> None:
    """PEFT's own replication, and then tensors of their own for each copy."""
    from peft.tuners.tuners_utils import replicate_layers

    replicate_layers(model, spans)
    for module in model.modules():
        if isinstance(module, nn.ModuleList):
            for index, layer in enumerate(module):
                module[index] = copy.deepcopy(layer)


def _settle_ties(model: Any, edits: dict[str, Edit], configs: list[dict[str, Any]]) -> dict[str, Edit]:
    """Where embedding and head share a tensor: one edit for both, or two tensors from now on."""
    entrance, head = model.get_input_embeddings(), model.get_output_embeddings()
    if entrance is None or head is None or entrance.weight is not head.weight:
        return edits
    names = {module: name for name, module in model.named_modules()}
    first, second = f"{names[entrance]}.weight", f"{names[head]}.weight"
    if first not in edits and second not in edits:
        return edits
    if head_follows(first, edits.get(first), edits.get(second), configs):
        return {name: edit for name, edit in edits.items() if name != second}
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    own = head_edit(edits.get(first), edits.get(second))
    return edits if own is None else edits | {second: own}


def _has(model: nn.Module, name: str) -> bool:
    path, _, leaf = name.rpartition(".")
    try:
        return isinstance(getattr(model.get_submodule(path), leaf, None), nn.Parameter)
    except AttributeError:
        return False


def _apply(model: nn.Module, name: str, edit: Edit) -> None:
    path, _, leaf = name.rpartition(".")
    owner = model.get_submodule(path)
    old = getattr(owner, leaf)
    turned = isinstance(owner, Conv1D) and leaf == "weight"
    weight = old.data.T.contiguous() if turned else old.data
    grown = not edit.needs_base and edit.shape[1:] == tuple(weight.shape[1:]) and isinstance(owner, (nn.Embedding, nn.Linear))
    if edit.shape != tuple(weight.shape) and not grown:
        raise Refused("the adapter does not fit the base", where=f"{name}: {edit.keys[0]}", expected=list(weight.shape), found=list(edit.shape), fix="qmerge inspect ADAPTER names the base that it was trained on: give that one")
    rows = weight if edit.shape == tuple(weight.shape) else weight.new_empty(edit.shape)
    merged = edit.load(weight.device).apply(rows, 0)
    new = nn.Parameter((merged.T if turned else merged).contiguous(), requires_grad=False)
    for module in model.modules():
        for key, parameter in list(module.named_parameters(recurse=False)):
            if parameter is old:
                setattr(module, key, new)
                if isinstance(module, nn.Embedding):
                    module.num_embeddings = new.shape[0]
                elif isinstance(module, nn.Linear) and key == "weight":
                    module.out_features = new.shape[0]


def _apply_on_disk_names(model: nn.Module, edits: Mapping[str, Edit]) -> None:
    """Edits by the names of a file that holds a fused parameter in pieces: take each piece out, change it, put it back."""
    from qmerge.adapters.names import relate, saved_shapes

    relation = relate(model, saved_shapes(model))
    for name, edit in edits.items():
        regions = relation.regions_of_disk(name)
        if not regions:
            raise Refused("the adapter changes a tensor that the base does not have", where=edit.keys[0], expected=name, found="none of this name", fix="qmerge inspect ADAPTER names the base that it was trained on: give that one")
        piece = torch.empty(regions[0].shape)
        for region in regions:
            region.write_disk(piece, model.get_parameter(region.parameter).data)
        merged = edit.load(piece.device).apply(piece, 0)
        for region in regions:
            region.write(model.get_parameter(region.parameter).data, merged)
