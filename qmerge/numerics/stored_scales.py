"""Which scales or block maxima may a quantized weight have while its codes stay, and what is the weight then?

int grids have one scale per row and group, code books one maximum per run of ``block_size`` elements of the flattened weight. Row-major, both are one factor
per run of equally many elements, so one class serves all grids. What is changed is always rounded to what the file holds.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from qmerge.numerics import grids, nf4
from qmerge.numerics.maxima import Maxima, maxima_of
from qmerge.types import QuantizedWeight, known


@dataclass(frozen=True)
class StoredScales:
    """``start`` fp32 ``[runs]``: the scales as they are; ``size``: elements of a run (the last one may be short)."""

    quantized: QuantizedWeight
    start: torch.Tensor
    size: int
    model_dtype: torch.dtype
    maxima: Maxima | None = None

    def storable(self, wanted: torch.Tensor) -> torch.Tensor:
        """fp32 ``[runs]``, each the nearest value that the file can hold; the start where that would be none with the sign of the start."""
        if self.maxima is not None:
            found = self.maxima.storable(wanted)
        else:
            found = grids.storable(wanted, self.model_dtype)
        return torch.where(found * self.start > 0, found, self.start)

    def weight(self, scales: torch.Tensor) -> torch.Tensor:
        """What a loader computes with: fp32 ``[out, in]`` of ``scales`` ``[runs]``, bit for bit as the solver's own values."""
        units = self._units().reshape(-1)
        whole = units.numel() // self.size
        units[: whole * self.size].view(whole, self.size).mul_(scales[:whole].unsqueeze(1))
        if units.numel() % self.size:
            units[whole * self.size :].mul_(scales[whole])
        return units.reshape(self.quantized.codes.shape)

    def _units(self) -> torch.Tensor:
        held = self.quantized
        if held.state is not None:
            return held.state.code.float()[held.codes.long()]
        zeros = known(held.zeros).float().repeat_interleave(self.size, dim=1)
        return held.codes.float().sub_(zeros)

    def sums(self, product: torch.Tensor) -> torch.Tensor:
        """Sum of ``product`` ``[out, in]`` over each run, ``[runs]``."""
        flat = product.reshape(-1)
        return torch.nn.functional.pad(flat, (0, -flat.numel() % self.size)).reshape(-1, self.size).sum(1)

    def build(self, scales: torch.Tensor) -> QuantizedWeight:
        """The same codes with ``scales``, each of them a value that `storable` gave. The start gives back the very weight."""
        if torch.equal(scales, self.start):
            return self.quantized
        if self.maxima is not None:
            return replace(self.quantized, state=self.maxima.store(known(self.quantized.state), scales))
        return replace(self.quantized, scales=scales.reshape(known(self.quantized.scales).shape).clone())


def stored_scales(quantized: QuantizedWeight, model_dtype: torch.dtype) -> StoredScales:
    """Of a weight as the solver leaves it, on the CPU. Double quantization: the nested maxima and the offset stay, the uint8 of each block may change."""
    if quantized.state is not None:
        state = quantized.state
        return StoredScales(quantized, nf4.effective_absmax(state), state.block_size, model_dtype, maxima_of(state, quantized.codes.device))
    (rows, columns), scales = quantized.codes.shape, known(quantized.scales)
    return StoredScales(quantized, scales.float().reshape(-1).clone(), columns * rows // scales.numel(), model_dtype)
