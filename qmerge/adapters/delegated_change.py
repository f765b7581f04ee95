"""What does PEFT make of one tensor: the result of its own merge, and the proof by what its unmerged layer answers?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from qmerge.adapters.delegated_layer import Layer
from qmerge.adapters.edits import Change, Edit
from qmerge.errors import Refused
from qmerge.store.adapter import check_finite
from qmerge.types import known

Load = Callable[[str], torch.Tensor]
"""reads a tensor of the adapter's file as stored"""


@dataclass(frozen=True)
class Delegated(Edit):
    """The weight that PEFT's layer has after its own merge, ``[out, in]``. ``shared``: tensors that it reads too and another edit's ``keys`` count."""

    keys: tuple[str, ...]
    shape: tuple[int, ...]
    layer: Layer
    read: Load = field(repr=False)
    shared: tuple[str, ...] = ()

    def load(self, device: torch.device) -> Change:
        return DelegatedChange(self.layer, _read(self, device))


class DelegatedChange(Change):
    rowwise = False

    def __init__(self, layer: Layer, tensors: dict[str, torch.Tensor]) -> None:
        self.layer, self.tensors = layer, tensors

    def apply(self, rows: torch.Tensor, start: int) -> torch.Tensor:
        return _merged(self.layer, self.tensors, rows, None)[0]

    @torch.no_grad()
    def added(self, rows: torch.Tensor, inputs: torch.Tensor, start: int) -> torch.Tensor:
        separate = self.layer.build(self.tensors, rows)
        if self.layer.embedding:
            moved: torch.Tensor = separate(torch.arange(rows.shape[0], device=rows.device)) - rows
            return moved @ inputs
        nothing: torch.Tensor = separate(torch.zeros(1, rows.shape[1], device=rows.device))  # a trained bias answers this too; it is another edit's
        answer: torch.Tensor = separate(inputs.T)
        return (answer - nothing - inputs.T @ rows.T).T


@dataclass(frozen=True)
class DelegatedBias(Edit):
    """The bias that PEFT's layer has after its own merge, ``[out]``; for the types whose bias does not depend on the weight."""

    keys: tuple[str, ...]
    shape: tuple[int, ...]
    layer: Layer
    read: Load = field(repr=False)
    shared: tuple[str, ...] = ()

    def load(self, device: torch.device) -> Change:
        return DelegatedBiasChange(self.layer, _read(self, device))


class DelegatedBiasChange(Change):
    rowwise = False

    def __init__(self, layer: Layer, tensors: dict[str, torch.Tensor]) -> None:
        self.layer, self.tensors = layer, tensors

    def _any_weight(self, device: torch.device) -> torch.Tensor:
        return torch.randn(self.layer.shape, generator=torch.Generator().manual_seed(0)).to(device)

    def apply(self, rows: torch.Tensor, start: int) -> torch.Tensor:
        return known(_merged(self.layer, self.tensors, self._any_weight(rows.device), rows)[1])

    @torch.no_grad()
    def added(self, rows: torch.Tensor, inputs: torch.Tensor, start: int) -> torch.Tensor:
        bias = rows.reshape(-1)
        separate = self.layer.build(self.tensors, self._any_weight(rows.device), bias)
        answer: torch.Tensor = separate(torch.zeros(1, self.layer.shape[1], device=rows.device))[0]
        return (answer - bias).unsqueeze(1) * inputs


@torch.no_grad()
def _merged(layer: Layer, tensors: dict[str, torch.Tensor], weight: torch.Tensor, bias: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    built: Any = layer.build(tensors, weight, bias)
    try:
        built.merge(safe_merge=True)
    except (RuntimeError, ValueError, NotImplementedError) as problem:
        raise Refused("PEFT cannot merge this layer.", where=f"{layer.module} in {layer.name}", found=str(problem)[:300], fix="keep this adapter separate") from problem
    base: Any = built.get_base_layer()
    merged = base.weight.data.T if layer.conv else base.weight.data
    return merged.float().contiguous(), None if bias is None else base.bias.data.float()


def _read(edit: Delegated | DelegatedBias, device: torch.device) -> dict[str, torch.Tensor]:
    tensors = {}
    for key in (*edit.keys, *edit.shared):
        tensors[key] = edit.read(key)
        check_finite(f"{edit.layer.name}: {key}", tensors[key])
    return {key: tensor.to(device) for key, tensor in tensors.items()}
