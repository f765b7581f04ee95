"""How do NF4 codes and block maxima become weights, and back?

The plain-torch reading of bitsandbytes' 4-bit layout, on any device. Source: QLoRA (Dettmers et al., 2023) for the code
book and the double quantization; bitsandbytes for the byte order (the even element sits in the high nibble).
Tests hold these functions to bitsandbytes bit for bit.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from qmerge.types import QuantState

NF4_LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
"""The 16 quantiles of a normal distribution, scaled to [-1, 1]; level 7 is exactly zero."""


def nf4_code(device: torch.device | str = "cpu") -> torch.Tensor:
    """The code book as fp32 ``[16]``."""
    return torch.tensor(NF4_LEVELS, dtype=torch.float32, device=device)


def unpack_nibbles(packed: torch.Tensor, count: int) -> torch.Tensor:
    """uint8 storage of any shape to uint8 codes ``[count]``; ``unpack_nibbles(tensor([0xA3]), 2) == [0xA, 0x3]``."""
    flat = packed.reshape(-1)
    return torch.stack((flat >> 4, flat & 0xF), dim=1).reshape(-1)[:count]


def pack_nibbles(codes: torch.Tensor) -> torch.Tensor:
    """uint8 codes of any shape to uint8 ``[ceil(n / 2), 1]``, as bitsandbytes stores them. An odd count is padded with zero codes."""
    flat = codes.reshape(-1)
    if flat.numel() % 2:
        flat = torch.nn.functional.pad(flat, (0, 1))
    return ((flat[::2] << 4) | flat[1::2]).unsqueeze(1)


def effective_absmax(state: QuantState) -> torch.Tensor:
    """The fp32 block maxima ``[blocks]`` that a loader sees, nested quantization undone first."""
    if not state.nested:
        return state.absmax.float()
    blocks = state.nested_code[state.absmax.long()]
    return blocks * spread(state.nested_absmax, state.nested_block_size, blocks.numel()) + state.offset


def spread(per_block: torch.Tensor, block_size: int, count: int) -> torch.Tensor:
    """One value per block to one per element: ``[blocks]`` to ``[count]``; the last block may be short."""
    return per_block.repeat_interleave(block_size)[:count]


def dequantize(codes: torch.Tensor, state: QuantState, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """uint8 ``codes`` (``[out, in]`` or flat) to weights ``[out, in]``: ``code[codes] * absmax``, computed in fp32 and cast once."""
    flat = state.code[codes.reshape(-1).long()]
    scale = spread(effective_absmax(state), state.block_size, flat.numel())
    return (flat * scale).reshape(state.shape).to(dtype)


def double_quantize(absmax: torch.Tensor, nested_code: torch.Tensor, nested_block_size: int = 256) -> tuple[torch.Tensor, torch.Tensor, float]:
    """fp32 ``absmax`` ``[blocks]`` to (uint8 ``[blocks]``, fp32 nested maxima, offset), as bitsandbytes does with ``compress_statistics``.

    An all-equal absmax is its own offset, so nothing is lost. Codes are the nearest ones, as bitsandbytes' torch and CUDA code takes them; its C++ for
    CPUs (0.50) looks them up in a table of 65536 bins, and takes the neighbour where a value lies within 1.5e-5 of a bound (one in a thousand).
    """
    offset = absmax.mean()
    centred = absmax - offset
    pad = -centred.numel() % nested_block_size
    blocks = torch.nn.functional.pad(centred, (0, pad)).reshape(-1, nested_block_size)
    maxima = blocks.abs().amax(dim=1)
    scaled = (blocks * (1.0 / maxima.clamp(min=1e-38)).unsqueeze(1)).clamp(-1, 1).reshape(-1)[: centred.numel()]
    if pad:  # bitsandbytes' torch code divides the short last block instead of multiplying by a reciprocal
        start = centred.numel() - (nested_block_size - pad)
        scaled[start:] = (centred[start:] / maxima[-1].clamp(min=1e-38)).clamp(-1, 1)
    bounds = (nested_code[:-1] + nested_code[1:]) / 2
    return torch.bucketize(scaled, bounds).to(torch.uint8), maxima, float(offset)


def with_absmax(state: QuantState, absmax: torch.Tensor) -> QuantState:
    """``state`` holding new fp32 block maxima, double-quantized when the original was. Read them back with `effective_absmax`."""
    if not state.nested:
        return replace(state, absmax=absmax.float())
    codes, maxima, offset = double_quantize(absmax, state.nested_code, state.nested_block_size)
    return replace(state, absmax=codes, nested_absmax=maxima, offset=offset)


def midpoints(code: torch.Tensor) -> torch.Tensor:
    """The 15 decision bounds between sorted levels; a value on a bound goes to the lower level, as in bitsandbytes."""
    return (code[:-1] + code[1:]) / 2


def nearest(weight: torch.Tensor, absmax: torch.Tensor, code: torch.Tensor, block_size: int) -> torch.Tensor:
    """Round-to-nearest codes, uint8 in ``weight``'s shape, on given fp32 block maxima."""
    scale = spread(absmax, block_size, weight.numel())
    # times the reciprocal, as bitsandbytes does: a division rounds one weight in a million to the other side of a bound
    scaled = weight.reshape(-1) * (1.0 / torch.where(scale == 0, torch.ones_like(scale), scale))
    return torch.bucketize(scaled, midpoints(code)).to(torch.uint8).reshape(weight.shape)


def block_maxima(weight: torch.Tensor, block_size: int) -> torch.Tensor:
    """``max|w|`` of each run of ``block_size`` elements of the flattened weight, fp32 ``[blocks]``."""
    flat = weight.reshape(-1)
    return torch.nn.functional.pad(flat, (0, -flat.numel() % block_size)).reshape(-1, block_size).abs().amax(dim=1).float()
