"""What are the weights of arm C, and how much of the adapter does a candidate's every linear still hold?

Arm C is W + ΔW in fp32, in memory. Each candidate's linears are set against it: does a step of requantization keep the delta
(``delta_survival`` 1) or round it away (0)? Written apart from the pipeline on purpose: this side checks that side.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from qmerge.errors import Refused
from qmerge.numerics.lora import lora_delta
from qmerge.store.adapter import LoraAdapter, open_adapter


def merge_in_memory(model: nn.Module, adapter: str | LoraAdapter) -> nn.Module:
    """Add ``scaling * B @ A`` to each adapted ``nn.Linear`` or ``Conv1D`` of a plain fp32 model and replace saved modules; changes ``model``.

    A tied head follows an embedding that PEFT saved because the vocabulary grew, and stays behind (untied) where ``modules_to_save`` names the
    embedding alone: as when PEFT runs them. ``Refused`` for a module that is not there or does not fit.
    """
    opened = adapter if isinstance(adapter, LoraAdapter) else open_adapter(adapter)
    for name in opened.pairs:
        module = _find(model, name)
        if not isinstance(module, (nn.Linear, Conv1D)):
            raise Refused("the adapter changes a module that is no linear", where=name, expected="nn.Linear or Conv1D", found=type(module).__name__)
        delta = pair_delta(opened, name)
        weight = module.weight.data.T if isinstance(module, Conv1D) else module.weight.data
        if weight.shape != delta.shape:
            raise Refused("the adapter's delta does not fit the base", where=name, expected=list(weight.shape), found=list(delta.shape))
        weight += delta
    for name, tensor in opened.saved.items():
        _replace(model, name, opened.load(tensor).float(), set(opened.config.get("modules_to_save") or []))
    return model


def pair_delta(adapter: LoraAdapter, module: str) -> torch.Tensor:
    """ΔW fp32 ``[out, in]`` of one module."""
    a, b = adapter.load_pair(module)
    return lora_delta(a, b, adapter.pairs[module].scaling)


def linear_rows(base: dict[str, torch.Tensor], candidate: dict[str, torch.Tensor], adapter: LoraAdapter) -> dict[str, dict[str, float]]:
    """Per adapted linear with ΔW ≠ 0, from fp32 weights ``[out, in]``: ``delta_survival`` ``<W_out - W_base, ΔW> / <ΔW, ΔW>``,
    ``delta_ratio`` ``‖ΔW‖/‖W_base‖``, ``error_ratio`` ``‖W_out - (W_base + ΔW)‖/‖ΔW‖``. Linears that a side lacks are left out."""
    rows = {}
    for name in adapter.pairs:
        if name not in base or name not in candidate or base[name].shape != candidate[name].shape:
            continue
        delta = pair_delta(adapter, name).double()
        size = float(delta.norm())
        if size == 0.0:
            continue
        moved = candidate[name].double() - base[name].double()
        rows[name] = {
            "delta_survival": float((moved * delta).sum()) / size**2,
            "delta_ratio": size / max(float(base[name].double().norm()), 1e-30),
            "error_ratio": float((moved - delta).norm()) / size,
        }
    return rows


def _find(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError as error:
        raise Refused("the adapter changes a module that the base does not have", where=name, expected="a module of the base", found="none of this name") from error


def _replace(model: nn.Module, name: str, value: torch.Tensor, listed: set[str]) -> None:
    path, _, leaf = name.rpartition(".")
    owner = _find(model, path)
    old = getattr(owner, leaf, None)
    if not isinstance(old, nn.Parameter):
        raise Refused("the adapter saved a parameter that the base does not have", where=name, expected="a parameter of the base")
    grown = old.shape != value.shape
    if grown and (old.shape[1:] != value.shape[1:] or value.shape[0] < old.shape[0]):
        raise Refused("a saved parameter does not fit the base", where=name, expected=list(old.shape), found=list(value.shape))
    new = nn.Parameter(value, requires_grad=False)
    own_copy = any(path == item or path.endswith("." + item) for item in listed)
    for module in model.modules():
        for key, parameter in list(module.named_parameters(recurse=False)):
            if parameter is old and (module is owner or not own_copy):
                setattr(module, key, new)
                if isinstance(module, nn.Embedding):
                    module.num_embeddings = value.shape[0]
                elif isinstance(module, nn.Linear):
                    module.out_features = value.shape[0]
