"""What did bitsandbytes make of a float base while the adapter was trained?

The recipe says how it was loaded; bitsandbytes' own code quantizes it again, so that the same weights come out.
"""

from __future__ import annotations

import torch

from qmerge.formats.nf4_recipe import Nf4Recipe
from qmerge.formats.rows import Device, Reader, decode_flat, four_bit_reader
from qmerge.numerics import nf4
from qmerge.types import Grid, QuantizedWeight, QuantState, known


def quantize(weight: torch.Tensor, recipe: Nf4Recipe, device: Device = "cpu") -> tuple[torch.Tensor, QuantState]:
    """``weight`` ``[out, in]`` by bitsandbytes' own code, as ``load_in_4bit`` would have done: packed codes uint8 ``[ceil(n / 2)]`` and their state, on the
    CPU."""
    import bitsandbytes.functional as bnb

    dtype = getattr(torch, recipe.dtype) if recipe.dtype else weight.dtype
    packed, state = bnb.quantize_4bit(
        weight.to(device=device, dtype=dtype).contiguous(), blocksize=recipe.block_size, compress_statistics=recipe.double_quant, quant_type=recipe.quant_type
    )
    nested = state.state2
    own = QuantState(
        absmax=state.absmax.cpu(),
        code=state.code.float().cpu(),
        block_size=state.blocksize,
        shape=(weight.shape[0], weight.shape[1]),
        dtype=str(dtype).removeprefix("torch."),
        quant_type=recipe.quant_type,
        nested_absmax=nested.absmax.float().cpu() if nested else None,
        nested_code=nested.code.float().cpu() if nested else None,
        nested_block_size=nested.blocksize if nested else 256,
        offset=float(state.offset) if nested else 0.0,
    )
    return packed.cpu().reshape(-1).view(torch.uint8), own


def quantize_as_bitsandbytes(weight: torch.Tensor, recipe: Nf4Recipe, device: Device = "cpu") -> QuantizedWeight:
    """`quantize` with one uint8 per code, ``[out, in]``."""
    packed, state = quantize(weight, recipe, device)
    codes = nf4.unpack_nibbles(packed, weight.numel()).reshape(weight.shape)
    return QuantizedWeight(codes, Grid(recipe.quant_type, 4, recipe.block_size, True, recipe.double_quant), state=state)


def fly_reader(weight: torch.Tensor, recipe: Nf4Recipe, device: Device = "cpu") -> Reader:
    """Rows of a weight quantized now. Double quantization needs all block maxima first, so the reader holds the packed codes: half a byte per weight."""
    packed, state = quantize(weight, recipe, device)
    return four_bit_reader(state, lambda start, stop: packed[start:stop])


def decode_with_bitsandbytes(weight: QuantizedWeight, device: Device) -> torch.Tensor:
    """fp32 ``[out, in]`` on ``device`` by bitsandbytes' kernels; nested block maxima are undone before."""
    state = known(weight.state)
    absmax = nf4.effective_absmax(state).to(device)
    return decode_flat(nf4.pack_nibbles(weight.codes).reshape(-1).to(device), absmax, state, weight.codes.numel()).reshape(state.shape)
