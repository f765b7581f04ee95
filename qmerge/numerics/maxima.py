"""Which block maxima can a bitsandbytes 4-bit checkpoint hold, once its double quantization is settled?"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from qmerge.types import QuantState, known


@dataclass(frozen=True)
class Maxima:
    """The nested maxima, offset and code book of one weight, expanded to its blocks ``[blocks]``; all None without double quantization."""

    size: torch.Tensor | None
    code: torch.Tensor | None
    offset: float

    def storable(self, wanted: torch.Tensor) -> torch.Tensor:
        """The value that the file can hold nearest to each of ``wanted``, in its shape; NaN where that would not be positive."""
        found = wanted.clone() if self.size is None else self._value(self._index(wanted)).reshape(wanted.shape)
        return torch.where(found > 0, found, torch.full_like(found, float("nan")))

    def _index(self, wanted: torch.Tensor) -> torch.Tensor:
        code, size = known(self.code), known(self.size)
        return torch.bucketize((wanted.reshape(-1) - self.offset) / size.clamp(min=1e-38), (code[:-1] + code[1:]) / 2)

    def _value(self, index: torch.Tensor) -> torch.Tensor:
        return known(self.code)[index] * known(self.size) + self.offset

    def store(self, state: QuantState, maxima: torch.Tensor) -> QuantState:
        """``state`` with these block maxima, all of them values that `storable` gave."""
        if self.size is None:
            return replace(state, absmax=maxima.reshape(-1).cpu())
        return replace(state, absmax=self._index(maxima).to(torch.uint8).cpu())


def maxima_of(state: QuantState, device: torch.device) -> Maxima:
    """From a state whose nesting stays as it is."""
    if not state.nested:
        return Maxima(None, None, 0.0)
    blocks = state.absmax.numel()
    size = known(state.nested_absmax).float().repeat_interleave(state.nested_block_size)[:blocks].to(device)
    return Maxima(size, known(state.nested_code).float().to(device), state.offset)
