"""What is a quantized weight when some codes may go to a neighbour and scales may move, and how does its loss pull at both?

The idea of AutoRound (Cheng et al., 2023): a bounded offset per weight, rounded straight-through, and a factor per scale. Here the offset is from the solver's
codes and starts at 0. Where within its step the target lies would be no better start: error feedback and descent have moved codes away from it for good reasons.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from qmerge.numerics import nf4
from qmerge.numerics.stored_scales import StoredScales
from qmerge.types import QuantizedWeight, known

BOUND = 1.0
"""offsets lie in -1 … 1: a code moves to a neighbour at most"""


@dataclass
class Offsets:
    """One linear. ``places`` int64 ``[out, in]``: the solver's codes as positions in ``levels``, sorted fp32 (for int grids 0 … 2^bits - 1).

    ``offset`` ``[out, in]`` and ``theta`` ``[runs]`` are what is trained; `weight` is the loader's fp32 weight for them.
    """

    held: StoredScales
    places: torch.Tensor
    levels: torch.Tensor
    zeros: torch.Tensor | None
    offset: torch.Tensor
    theta: torch.Tensor

    def moved(self) -> torch.Tensor:
        """Positions after the offsets, int64."""
        return (self.places + self.offset.round().long()).clamp_(0, self.levels.numel() - 1)

    def scales(self) -> torch.Tensor:
        """fp32 ``[runs]``, as the file holds them."""
        return self.held.storable(self.held.start * self.theta.exp())

    def _spread(self, scales: torch.Tensor) -> torch.Tensor:
        return nf4.spread(scales, self.held.size, self.places.numel()).reshape(self.places.shape)

    def weight(self) -> torch.Tensor:
        return self._units(self.moved()) * self._spread(self.scales())

    def _units(self, places: torch.Tensor) -> torch.Tensor:
        units = self.levels[places]
        return units if self.zeros is None else units - self.zeros

    def pulls(self, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss's gradient by the weight, fp32 ``[out, in]``, to those by ``offset`` and by ``theta``: rounding passes them as if it were not there."""
        places, wide = self.moved(), self._spread(self.scales())
        last = self.levels.numel() - 1
        low, high = (places - 1).clamp_(min=0), (places + 1).clamp_(max=last)
        step = (self.levels[high] - self.levels[low]) / (high - low)
        return gradient * step * wide, self.held.sums(gradient * self._units(places) * wide)

    def build(self) -> QuantizedWeight:
        """The stored weight."""
        held, places = self.held.quantized, self.moved()
        codes = places if self.zeros is not None else nf4.sorted_levels(known(held.state).code)[1].long()[places]
        codes = torch.where(places == self.places, held.codes, codes.to(torch.uint8))  # FP4 has two codes for zero
        return replace(self.held.build(self.scales()), codes=codes)


def offsets(held: StoredScales) -> Offsets:
    """Of a solved linear, at the solver's codes and scales."""
    quantized = held.quantized
    if quantized.state is None:
        places, zeros = quantized.codes.long(), known(quantized.zeros).float().repeat_interleave(held.size, dim=1)
        levels = torch.arange(2**quantized.grid.bits, dtype=torch.float32)
    else:
        levels, zeros = nf4.sorted_levels(quantized.state.code)[0], None
        places = nf4.sorted_positions(quantized.codes, quantized.state.code).long()
    return Offsets(held, places, levels, zeros, torch.zeros(places.shape), torch.zeros_like(held.start))
