"""What does an adapter put in place of a tensor of the base: whole, in single rows, or as an addition to a bias?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from qmerge.adapters.edits import Change, Edit, Proof


@dataclass(frozen=True)
class Replace(Edit):
    """The adapter's own tensor instead of the base's (modules_to_save, trained biases). ``read(start, stop)`` gives rows in fp32, checked to be finite.

    Its number of rows may differ from the base's (a resized vocabulary): then ``shape[0]`` is the new one.
    """

    keys: tuple[str, ...]
    shape: tuple[int, ...]
    read: Callable[[int, int], torch.Tensor]
    needs_base = False

    def load(self, device: torch.device) -> Change:
        return ReplaceChange(self.read, device)


class ReplaceChange(Change):
    def __init__(self, read: Callable[[int, int], torch.Tensor], device: torch.device) -> None:
        self.read, self.device = read, device

    def apply(self, rows: torch.Tensor, start: int) -> torch.Tensor:
        """``rows`` gives the count alone; its values are not looked at."""
        return self.read(start, start + rows.shape[0]).to(self.device)

    def prove(self, before: torch.Tensor, after: torch.Tensor, start: int, delta: torch.Tensor | None = None) -> Proof:
        wanted = self.read(start, start + after.shape[0]).to(self.device).double()
        return Proof(float((after.double() - wanted).square().sum()), float(wanted.square().sum()))


@dataclass(frozen=True)
class ReplaceRows(Edit):
    """Single rows instead of the base's (``trainable_token_indices``); ``values`` reads fp32 ``[len(indices), dim]``."""

    keys: tuple[str, ...]
    shape: tuple[int, ...]
    indices: tuple[int, ...]
    values: Callable[[], torch.Tensor]

    def load(self, device: torch.device) -> Change:
        return ReplaceRowsChange(torch.tensor(self.indices, device=device), self.values().to(device))


class ReplaceRowsChange(Change):
    def __init__(self, indices: torch.Tensor, values: torch.Tensor) -> None:
        self.indices, self.values = indices, values

    def apply(self, rows: torch.Tensor, start: int) -> torch.Tensor:
        here = (self.indices >= start) & (self.indices < start + rows.shape[0])
        return rows.index_copy(0, self.indices[here] - start, self.values[here])

    def added(self, rows: torch.Tensor, inputs: torch.Tensor, start: int) -> torch.Tensor:
        wanted = torch.zeros(rows.shape[0], inputs.shape[1], device=rows.device)
        for index, value in zip(self.indices.tolist(), self.values, strict=True):
            if start <= index < start + rows.shape[0]:
                wanted[index - start] = (value - rows[index - start]) @ inputs
        return wanted


@dataclass(frozen=True)
class AddBias(Edit):
    """``bias + scaling · vector`` (``lora_bias``)."""

    keys: tuple[str, ...]
    shape: tuple[int, ...]
    vector: Callable[[], torch.Tensor]
    scaling: float

    def load(self, device: torch.device) -> Change:
        return AddBiasChange(self.vector().to(device), self.scaling)


class AddBiasChange(Change):
    def __init__(self, vector: torch.Tensor, scaling: float) -> None:
        self.vector, self.scaling = vector, scaling

    def apply(self, rows: torch.Tensor, start: int) -> torch.Tensor:
        return rows + self.scaling * self.vector[start : start + rows.shape[0]]

    def added(self, rows: torch.Tensor, inputs: torch.Tensor, start: int) -> torch.Tensor:
        return self.vector[start : start + rows.shape[0]].unsqueeze(1) * (self.scaling * inputs)
