"""How do 4-bit codes (NF4, FP4) and block maxima become weights, and back?

The plain-torch reading of bitsandbytes' 4-bit layout, on any device. Source: QLoRA (Dettmers et al., 2023) for the code
book and the double quantization; bitsandbytes for the byte order (the even element sits in the high nibble).
Tests hold these functions to bitsandbytes bit for bit.
"""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import torch

from qmerge.types import QuantState, known

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

FP4_LEVELS = tuple(sign * level / 12 for sign in (1.0, -1.0) for level in (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0))
"""bitsandbytes' 4-bit float: a sign bit and eight magnitudes, not sorted"""

_PIECE = 1 << 18  # codes looked up at once: the indices of a piece stay in a core's cache
_WORTH = 1 << 19  # codes of a call from which on the kernel's machine code is fetched, where numba is loaded
_SHARE = 1 << 21  # codes that a thread takes at a time: more than it costs to hand them over
_MAPPED = 1 << 25  # bytes from which on glibc maps memory afresh at each allocation


def code_book(quant_type: str, device: torch.device | str = "cpu") -> torch.Tensor:
    """The levels of ``nf4`` or ``fp4`` by code, fp32 ``[16]``."""
    return torch.tensor({"nf4": NF4_LEVELS, "fp4": FP4_LEVELS}[quant_type], dtype=torch.float32, device=device)


def sorted_levels(code: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The distinct levels of a code book in ascending order, fp32 ``[n]``, and the code that stores each, uint8 ``[n]``.

    What a solver that searches sorted levels works on: it finds positions in the first, and ``stored[positions]`` goes into the file. NF4: 16 levels, positions
    are codes. FP4: 15, for its codes 0 and 8 are +0 and -0 and the first one stores both.
    """
    levels, order = torch.sort(code.float(), stable=True)
    first = torch.ones_like(levels, dtype=torch.bool)
    first[1:] = levels[1:] != levels[:-1]
    return levels[first], order[first].to(torch.uint8)


def sorted_positions(codes: torch.Tensor, code: torch.Tensor) -> torch.Tensor:
    """Stored codes of any shape to positions in `sorted_levels`, uint8: ``sorted_levels(code)[0][positions] == code[codes]``."""
    levels, _ = sorted_levels(code)
    return torch.bucketize(code.float(), levels).to(torch.uint8)[codes.long()]


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
    blocks = torch.empty(state.absmax.numel(), dtype=torch.float32, device=state.absmax.device)
    for codes, out in zip(state.absmax.reshape(-1).split(_PIECE), blocks.split(_PIECE), strict=True):
        torch.index_select(known(state.nested_code).float(), 0, codes.int(), out=out)
    _scale(blocks, known(state.nested_absmax), state.nested_block_size)
    return blocks.add_(state.offset)


def spread(per_block: torch.Tensor, block_size: int, count: int) -> torch.Tensor:
    """One value per block to one per element: ``[blocks]`` to ``[count]``; the last block may be short."""
    return per_block.repeat_interleave(block_size)[:count]


def dequantize(codes: torch.Tensor, state: QuantState, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """uint8 ``codes`` (``[out, in]`` or flat) to weights ``[out, in]``: ``code[codes] * absmax``, computed in fp32 and cast once."""
    flat = state.code[codes.reshape(-1).long()]
    scale = spread(effective_absmax(state), state.block_size, flat.numel())
    return (flat * scale).reshape(state.shape).to(dtype)


def pair_table(code: torch.Tensor) -> torch.Tensor:
    """What `decode` looks bytes up in: int64 ``[256]``, the bits of the two fp32 levels that a byte stands for."""
    return torch.stack((code.repeat_interleave(16), code.repeat(16)), dim=1).contiguous().view(torch.int64).reshape(-1)


def decode(packed: torch.Tensor, absmax: torch.Tensor, table: torch.Tensor, block_size: int, count: int) -> torch.Tensor:
    """uint8 ``packed`` ``[ceil(count / 2)]`` and fp32 block maxima to weights fp32 ``[count]``: the bits of `dequantize`, without one integer per code.

    ``table`` is `pair_table` of the code book. The first code must begin a block. On a CPU, `decode_kernel` does it where numba is loaded (by a solver, or by `load_kernel`): five times as quick as torch, but
    numba's import takes as long as torch takes for more than a billion weights.
    """
    flat = room(packed.numel() * 2, packed.device)
    if flat.numel() >= _WORTH and _numba_is_there() and _fits_kernel(packed, absmax, block_size):
        decode_by_kernel(packed, absmax, table, block_size, flat)
    else:
        decode_in_torch(packed, absmax, table, block_size, flat)
    return flat[:count]


def load_kernel() -> None:
    """Import numba and the kernel, which `decode` uses from then on: 0.4 s and 130 MB, and for its first compilation on a machine 0.2 s more."""
    from qmerge.numerics import decode_kernel

    nothing = torch.empty(0)
    decode_kernel.decode_blocks(nothing.to(torch.uint8).numpy(), nothing.numpy(), nothing.numpy(), 2, nothing.numpy())


def _numba_is_there() -> bool:
    """Whether the solvers' loops, and so numba, are loaded; a thread that is still at it is not waited for."""
    return hasattr(sys.modules.get("qmerge.numerics.kernels"), "compiled")


def room(count: int, device: torch.device) -> torch.Tensor:
    """fp32 ``[count]``, not yet filled. What the C library maps afresh each time would cost more to touch, page by page of 4 KB, than to decode: numpy asks Linux for pages of 2 MB."""
    if device.type != "cpu" or count * 4 < _MAPPED:
        return torch.empty(count, dtype=torch.float32, device=device)
    whole = np.empty(count + 15, dtype=np.float32)
    first = -whole.ctypes.data // 4 % 16  # torch's own begin at multiples of 64 bytes
    return torch.from_numpy(whole[first : first + count])


def _fits_kernel(packed: torch.Tensor, absmax: torch.Tensor, block_size: int) -> bool:
    """What the kernel does not check itself."""
    here = packed.device.type == absmax.device.type == "cpu" and packed.is_contiguous() and absmax.is_contiguous()
    typed = packed.dtype == torch.uint8 and absmax.dtype == torch.float32 and packed.dim() == absmax.dim() == 1
    return here and typed and block_size % 2 == 0 and absmax.numel() * block_size >= packed.numel() * 2


def decode_by_kernel(packed: torch.Tensor, absmax: torch.Tensor, table: torch.Tensor, block_size: int, flat: torch.Tensor) -> None:
    """`decode` into ``flat``, on as many threads as torch has in this one, whole blocks for each. All arguments lie together on the CPU, ``block_size`` is even, ``absmax`` has all blocks: none of it is checked."""
    from qmerge.numerics.decode_kernel import decode_blocks

    levels = table.view(torch.float32)[1:32:2].contiguous().numpy()  # of the bytes 0x00 to 0x0F the second
    codes, maxima, out = packed.numpy(), absmax.numpy(), flat.numpy()
    share = max(_SHARE // block_size, 1) * block_size
    shares = range(0, out.size, share)
    left = iter(shares)

    def take() -> None:
        for begin in left:
            end = begin + share
            decode_blocks(codes[begin // 2 : end // 2], maxima[begin // block_size : end // block_size], levels, block_size, out[begin:end])

    others = min(torch.get_num_threads(), len(shares)) - 1
    if others < 1:
        take()
        return
    with ThreadPoolExecutor(others) as pool:
        helped = [pool.submit(take) for _ in range(others)]
        take()  # this thread is awake already
        for one in helped:
            one.result()


def decode_in_torch(packed: torch.Tensor, absmax: torch.Tensor, table: torch.Tensor, block_size: int, flat: torch.Tensor) -> None:
    """`decode` into ``flat`` by torch's own operations, on any device."""
    piece = max(_PIECE // (2 * block_size), 1) * 2 * block_size  # whole blocks and bytes
    for start in range(0, flat.numel(), piece):
        part = flat[start : start + piece]
        torch.index_select(table, 0, packed[start // 2 : (start + piece) // 2].int(), out=part.view(torch.int64))
        _scale(part, absmax[start // block_size :], block_size)


def _scale(flat: torch.Tensor, absmax: torch.Tensor, block_size: int) -> None:
    """Multiply runs of ``block_size`` in place; the last one may be short."""
    whole = flat.numel() // block_size
    flat[: whole * block_size].view(whole, block_size).mul_(absmax[:whole].unsqueeze(1))
    if flat.numel() % block_size:
        flat[whole * block_size :].mul_(absmax[whole])


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
    codes, maxima, offset = double_quantize(absmax, known(state.nested_code), state.nested_block_size)
    return replace(state, absmax=codes, nested_absmax=maxima, offset=offset)


def midpoints(code: torch.Tensor) -> torch.Tensor:
    """The 15 decision bounds between sorted levels; a value on a bound goes to the lower level, as in bitsandbytes."""
    return (code[:-1] + code[1:]) / 2


def nearest(weight: torch.Tensor, absmax: torch.Tensor, code: torch.Tensor, block_size: int) -> torch.Tensor:
    """Round-to-nearest codes as they are stored, uint8 in ``weight``'s shape, on given fp32 block maxima."""
    scale = spread(absmax, block_size, weight.numel())
    # times the reciprocal, as bitsandbytes does: a division rounds one weight in a million to the other side of a bound
    scaled = weight.reshape(-1) * (1.0 / torch.where(scale == 0, torch.ones_like(scale), scale))
    levels, stored = sorted_levels(code)
    return stored[torch.bucketize(scaled, midpoints(levels))].reshape(weight.shape)
