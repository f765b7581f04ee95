"""What do low-rank factors add to a weight: plain LoRA, several of them at once, and DoRA?

LoRA (Hu et al., 2021): ``W + s · B A``. DoRA (Liu et al., 2024): ``m / ‖W + s · B A‖ · (W + s · B A)``, the norm per output row over the base that the adapter
was trained on. Factors are ``left [out, rank]`` and ``right [rank, in]``; product and sum are fp32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from qmerge.adapters.edits import Change, Edit

Factors = Callable[[], tuple[torch.Tensor, torch.Tensor]]
"""reads ``(left, right)`` in fp32, checked to be finite"""


@dataclass(frozen=True)
class LowRank(Edit):
    """``W + scaling · left @ right``. ``shape`` is ``[out, in]``; ``magnitude`` reads DoRA's vector, over columns with ``by_column`` (embeddings)."""

    keys: tuple[str, ...]
    shape: tuple[int, ...]
    factors: Factors
    scaling: float = 1.0
    magnitude: Callable[[], torch.Tensor] | None = None
    by_column: bool = False

    def load(self, device: torch.device) -> Change:
        left, right = (factor.to(device).contiguous() for factor in self.factors())
        if self.magnitude is None:
            return LowRankChange(left, right, self.scaling)
        kind = ColumnDoraChange if self.by_column else DoraChange
        return kind(left, right, self.scaling, self.magnitude().to(device))

    @property
    def plain(self) -> bool:
        """is the delta the product alone, whatever the base?"""
        return self.magnitude is None


class LowRankChange(Change):
    def __init__(self, left: torch.Tensor, right: torch.Tensor, scaling: float) -> None:
        self.left, self.right, self.scaling = left, right, scaling

    def product(self, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor, float] | None:
        return self.left[start:stop], self.right, self.scaling

    def apply(self, rows: torch.Tensor, start: int) -> torch.Tensor:
        return torch.mm(self.left[start : start + rows.shape[0]], self.right).mul_(self.scaling).add_(rows)

    def added(self, rows: torch.Tensor, inputs: torch.Tensor, start: int) -> torch.Tensor:
        return torch.mm(self.left[start : start + rows.shape[0]], torch.mm(self.right, inputs)).mul_(self.scaling)


class DoraChange(LowRankChange):
    """Rows can be merged alone: each row's norm is its own."""

    def product(self, start: int, stop: int) -> None:
        return None

    def __init__(self, left: torch.Tensor, right: torch.Tensor, scaling: float, magnitude: torch.Tensor) -> None:
        super().__init__(left, right, scaling)
        self.magnitude = magnitude

    def apply(self, rows: torch.Tensor, start: int) -> torch.Tensor:
        merged = super().apply(rows, start)
        factor = self.magnitude[start : start + rows.shape[0]] / torch.linalg.norm(merged, dim=1)
        return merged.mul_(factor.unsqueeze(1))

    def added(self, rows: torch.Tensor, inputs: torch.Tensor, start: int) -> torch.Tensor:
        # ‖w + s·b A‖² = ‖w‖² + 2s·b·(A w) + s²·b (A Aᵀ) bᵀ: the norm without the product
        left, right, wide = self.left[start : start + rows.shape[0]].double(), self.right.double(), rows.double()
        cross = (left * (wide @ right.T)).sum(1)
        own = (left * (left @ (right @ right.T))).sum(1)
        norm = ((wide * wide).sum(1) + 2 * self.scaling * cross + self.scaling**2 * own).clamp(min=0).sqrt()
        factor = (self.magnitude[start : start + rows.shape[0]].double() / norm).unsqueeze(1)
        x = inputs.double()
        base = wide @ x
        return (factor * (base + self.scaling * (left @ (right @ x))) - base).float()


class ColumnDoraChange(LowRankChange):
    """DoRA on an embedding ``[tokens, dim]``: the norm of a column runs over all tokens, so rows cannot be merged alone."""

    rowwise = False

    def product(self, start: int, stop: int) -> None:
        return None

    def __init__(self, left: torch.Tensor, right: torch.Tensor, scaling: float, magnitude: torch.Tensor) -> None:
        super().__init__(left, right, scaling)
        self.magnitude = magnitude

    def apply(self, rows: torch.Tensor, start: int) -> torch.Tensor:
        merged = super().apply(rows, start)
        return merged.mul_((self.magnitude / torch.linalg.norm(merged, dim=0)).unsqueeze(0))

    def added(self, rows: torch.Tensor, inputs: torch.Tensor, start: int) -> torch.Tensor:
        left, right, wide = self.left.double(), self.right.double(), rows.double()
        cross = (right * (left.T @ wide)).sum(0)
        own = (right * ((left.T @ left) @ right)).sum(0)
        norm = ((wide * wide).sum(0) + 2 * self.scaling * cross + self.scaling**2 * own).clamp(min=0).sqrt()
        x = inputs.double()
        scaled = (self.magnitude.double() / norm).unsqueeze(1) * x
        return (wide @ scaled + self.scaling * (left @ (right @ scaled)) - wide @ x).float()


@dataclass(frozen=True)
class Experts(Edit):
    """``W_e + scaling · left_e @ right_e`` on a fused parameter ``[experts, x, y]``; ``factors`` gives ``[experts, x, rank]`` and ``[experts, rank, y]``."""

    keys: tuple[str, ...]
    shape: tuple[int, ...]
    factors: Factors
    scaling: float = 1.0

    def load(self, device: torch.device) -> Change:
        left, right = (factor.to(device).contiguous() for factor in self.factors())
        return ExpertsChange(left, right, self.scaling)


class ExpertsChange(Change):
    def __init__(self, left: torch.Tensor, right: torch.Tensor, scaling: float) -> None:
        self.left, self.right, self.scaling = left, right, scaling

    def apply(self, rows: torch.Tensor, start: int) -> torch.Tensor:
        merged = torch.empty_like(rows)
        for index in range(rows.shape[0]):
            torch.mm(self.left[start + index], self.right[start + index], out=merged[index])
        return merged.mul_(self.scaling).add_(rows)

    def added(self, rows: torch.Tensor, inputs: torch.Tensor, start: int) -> torch.Tensor:
        stop = start + rows.shape[0]
        return torch.matmul(self.left[start:stop], torch.matmul(self.right[start:stop], inputs)).mul_(self.scaling)
