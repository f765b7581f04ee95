"""What do several edits of one tensor make together: one after the other, or as a weighted sum of deltas?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from qmerge.adapters.edits import Change, Edit, Proof
from qmerge.adapters.lowrank import LowRank, LowRankChange


@dataclass(frozen=True)
class Chain(Edit):
    """One edit after the other, within one adapter (a base layer saved with the adapter, then its LoRA)."""

    edits: tuple[Edit, ...]

    @property
    def keys(self) -> tuple[str, ...]:  # type: ignore[override]
        return tuple(key for edit in self.edits for key in edit.keys)

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return self.edits[-1].shape

    @property
    def needs_base(self) -> bool:  # type: ignore[override]
        return self.edits[0].needs_base

    def load(self, device: torch.device) -> Change:
        return ChainChange([edit.load(device) for edit in self.edits])


class ChainChange(Change):
    def __init__(self, changes: Sequence[Change]) -> None:
        self.changes, self.rowwise = changes, all(change.rowwise for change in changes)

    def apply(self, rows: torch.Tensor, start: int) -> torch.Tensor:
        for change in self.changes:
            rows = change.apply(rows, start)
        return rows

    def prove(self, before: torch.Tensor, after: torch.Tensor, start: int, delta: torch.Tensor | None = None) -> Proof:
        total = Proof()
        for number, change in enumerate(self.changes):
            step = after if number == len(self.changes) - 1 else change.apply(before, start)
            total, before = total + change.prove(before, step, start), step
        return total


@dataclass(frozen=True)
class WeightedSum(Edit):
    """``W + Σ weight_i · (edit_i(W) - W)``: the exact weighted sum of the deltas, each over the untouched base."""

    edits: tuple[Edit, ...]
    weights: tuple[float, ...]

    @property
    def keys(self) -> tuple[str, ...]:  # type: ignore[override]
        return tuple(key for edit in self.edits for key in edit.keys)

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return self.edits[0].shape

    def load(self, device: torch.device) -> Change:
        plain = [edit for edit in self.edits if isinstance(edit, LowRank) and edit.plain]
        if len(plain) == len(self.edits):
            pairs = [edit.factors() for edit in plain]  # one product of higher rank is the sum of the products
            left = torch.cat([pair[0] * (weight * edit.scaling) for pair, weight, edit in zip(pairs, self.weights, plain, strict=True)], dim=1)
            return LowRankChange(left.to(device), torch.cat([pair[1] for pair in pairs]).to(device), 1.0)
        return WeightedSumChange([edit.load(device) for edit in self.edits], self.weights)


class WeightedSumChange(Change):
    def __init__(self, changes: Sequence[Change], weights: Sequence[float]) -> None:
        self.changes, self.weights, self.rowwise = changes, weights, all(change.rowwise for change in changes)

    def apply(self, rows: torch.Tensor, start: int) -> torch.Tensor:
        total = torch.zeros_like(rows)
        for change, weight in zip(self.changes, self.weights, strict=True):
            total.add_(change.apply(rows, start).sub_(rows), alpha=weight)
        return total.add_(rows)

    def added(self, rows: torch.Tensor, inputs: torch.Tensor, start: int) -> torch.Tensor:
        return torch.as_tensor(sum(weight * change.added(rows, inputs, start) for change, weight in zip(self.changes, self.weights, strict=True)))
