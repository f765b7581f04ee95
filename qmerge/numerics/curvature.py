"""How much does the model's loss mind an error in each output of a linear, and two errors at once?

``G = E[g gᵀ]``, g the gradient of the log-likelihood by the linear's outputs, for tokens drawn from the model's own distribution, is the output side of the
Fisher information, the curvature of the KL. With ``H = E[x xᵀ]`` it makes the Kronecker form of the loss, ``½ tr(G E H Eᵀ)`` for a change E of the weight
(as in K-FAC; YAQA rounds to it). G's few large directions are what rows of a weight share: an error in one row can be undone by another.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from qmerge.errors import CheckFailed
from qmerge.numerics.products import add_product

DAMP = 0.1
"""added to G's diagonal, in means of it: G is estimated on few tokens"""


@dataclass
class Curvature:
    """Running sum of ``g gᵀ`` for the ``outputs`` rows of one linear, kept for consecutive blocks of ``width`` rows; rows of different blocks count as independent.

    fp32 while it grows; `pack` halves it. Call `add` in a fixed order: the same order gives the same bits.
    """

    outputs: int
    width: int
    blocks: list[torch.Tensor] = field(default_factory=list)

    def spans(self) -> list[slice]:
        return [slice(start, min(start + self.width, self.outputs)) for start in range(0, self.outputs, self.width)]

    def add(self, gradient: torch.Tensor) -> None:
        """``gradient`` fp32 or bf16 ``[tokens, outputs]``; products are summed in fp32."""
        if not self.blocks:
            self.blocks = [torch.zeros(span.stop - span.start, span.stop - span.start, device=gradient.device) for span in self.spans()]
        for span, total in zip(self.spans(), self.blocks, strict=True):
            part = gradient[:, span]
            add_product(total, part.T, part, exact=False)

    def join(self, other: Curvature) -> None:
        for mine, its in zip(self.blocks, other.blocks, strict=True):
            mine.add_(its)

    def squares(self) -> torch.Tensor:
        """Σ g² fp32 ``[outputs]``."""
        return torch.cat([block.diagonal() for block in self.blocks])

    def pack(self) -> Curvature:
        """In bf16 and main memory, in units of the mean of G's diagonal: where G is much more than its largest eigenvector, damping is far more than that rounds off; else `coupled` adds to it. Zeros stay zeros (a dead linear). Raises `CheckFailed` where a gradient was not finite."""
        mean = float(self.squares().double().mean())
        if not math.isfinite(mean):
            raise CheckFailed("the gradients of the calibration text are not finite", fix="check the base and the adapter for NaN or overflow; --curvature-tokens 0 takes no gradients")
        if mean == 0:
            return Curvature(self.outputs, self.width, [torch.zeros(block.shape, dtype=torch.bfloat16) for block in self.blocks])
        return Curvature(self.outputs, self.width, [(block / mean).to(torch.bfloat16).cpu() for block in self.blocks])

    def near(self) -> Curvature:
        """Itself: it is in memory."""
        return self

    def damped(self, device: torch.device | str = "cpu") -> list[torch.Tensor]:
        """fp32 ``G + λI`` block by block, symmetric, in units in which the mean of G's diagonal is 1. Where nothing was seen, the identity: rows are independent."""
        found = []
        for block in self.blocks:
            full = block.to(device).float()
            full = torch.tril(full) + torch.tril(full, -1).T
            full.diagonal().add_(DAMP)
            found.append(full)
        return found


@dataclass(frozen=True)
class Distant:
    """A packed `Curvature` that lies on a disk: ``outputs`` and ``width`` as there, ``readers`` give one of its ``blocks`` each."""

    outputs: int
    width: int
    readers: tuple[Callable[[], torch.Tensor], ...]

    @property
    def blocks(self) -> list[torch.Tensor]:
        return [read() for read in self.readers]

    def near(self) -> Curvature:
        """In memory."""
        return Curvature(self.outputs, self.width, self.blocks)
