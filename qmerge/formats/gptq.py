"""How does a GPTQ checkpoint (v1, as AutoGPTQ, gptqmodel, vLLM and SGLang read it) store an int weight?

``qweight`` int32 ``[ceil(in * bits / 32), out]``, ``qzeros`` int32 ``[groups, ceil(out * bits / 32)]`` holding zero - 1, ``scales`` fp16 ``[groups, out]``,
``g_idx`` int32 ``[in]``; 2, 3, 4 or 8 bits, 3 as 32 values in 3 words. Zeros must be at least 1, so that v1's stored
zero - 1 does not borrow from its neighbour.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from qmerge.errors import Refused
from qmerge.formats.integers import Layout, check_zeros, dequantize, group_problem, groups_of, no_fit, stored_scales
from qmerge.numerics.packing import pack_rows, unpack_rows, words
from qmerge.types import Grid, QuantizedWeight, known

__all__ = ["SUFFIXES", "check_shape", "config", "dequantize", "grid_of", "pack", "stored_bytes", "unpack"]

SUFFIXES = ("qweight", "qzeros", "scales", "g_idx")


def check_shape(module: str, shape: tuple[int, int], grid: Grid, pad: bool = False) -> None:
    """Raise `Refused` where the container cannot hold ``[out, in]``, and say which format can. ``pad``: the last word and group of a row may be short."""
    problem = "gptq packs rows and columns in multiples of 32" if shape[0] % 32 or shape[1] % 32 else group_problem(shape[1], grid)
    if problem and grid.bits == 3:
        problem += "; with 3 bits no loader takes padding"
    elif pad:
        return
    if problem:
        raise no_fit("gptq", module, shape, grid, problem, "out % 32 == 0, in % 32 == 0, in % group_size == 0", 32, 32, grid.bits != 3)


def pack(module: str, quantized: QuantizedWeight, dtype: torch.dtype = torch.float16) -> dict[str, torch.Tensor]:
    """The four tensors of one linear, by name. Scales are fp16 whatever the model's ``dtype``, and must be values that fp16 holds, zeros 1..2^b-1; anything
    else is a bug and raises."""
    bits = quantized.grid.bits
    check_zeros(module, quantized, 1)
    return {
        f"{module}.qweight": pack_rows(quantized.codes.T, bits),
        f"{module}.qzeros": pack_rows(known(quantized.zeros) - 1, bits).T.contiguous(),
        f"{module}.scales": stored_scales(module, known(quantized.scales).T.contiguous(), torch.float16),
        f"{module}.g_idx": known(quantized.g_idx),
    }


def unpack(module: str, load: Callable[[str], torch.Tensor], grid: Grid) -> QuantizedWeight:
    """The inverse of `pack`, bit for bit."""
    scales, g_idx = load(f"{module}.scales").float().T.contiguous(), load(f"{module}.g_idx")
    codes = unpack_rows(load(f"{module}.qweight"), grid.bits, g_idx.numel()).T.contiguous()
    zeros = unpack_rows(load(f"{module}.qzeros").T.contiguous(), grid.bits, scales.shape[0]).float() + 1
    return QuantizedWeight(codes, grid, scales=scales, zeros=zeros, g_idx=g_idx)


def stored_bytes(shape: tuple[int, int], grid: Grid, scale_bytes: int = 2) -> int:
    """Bytes of the tensors that `pack` makes."""
    out, inputs = shape
    groups = groups_of(inputs, grid)
    return 4 * (words(inputs, grid.bits) * out + groups * words(out, grid.bits)) + 2 * groups * out + 4 * inputs


def grid_of(settings: dict[str, Any], module: str) -> Grid:
    """What a config that `config` made says about a module."""
    return Grid("int", int(settings["bits"]), int(settings["group_size"]), bool(settings["sym"]), least_zero=1)


def config(layout: Layout) -> dict[str, Any]:
    """``quantization_config``. Raises `Refused` where the loaders could not be told which linears are quantized."""
    grid, inside = layout.grid, layout.blocks_name + "."
    settings: dict[str, Any] = {
        "quant_method": "gptq",
        "bits": grid.bits,
        "group_size": grid.group_size,
        "sym": grid.symmetric,
        "desc_act": False,
        "static_groups": True,
        "lm_head": layout.head is not None and layout.head in layout.grids,
        "checkpoint_format": "gptq",
        "pack_dtype": "int32",
        "block_name_to_quantize": layout.blocks_name,
        "meta": {"quantizer": [f"qmerge:{layout.version}"]},
    }
    floats = [module for module in layout.floats if module.startswith(inside)]
    if not floats:
        return settings
    # Loaders take names within a block, the same for every block.
    short = sorted({module.removeprefix(inside).partition(".")[2] for module in layout.grids if module.startswith(inside)})
    if wrong := [module for module in floats if any(module.endswith(name) for name in short)]:
        raise Refused("format gptq can leave a linear float in all blocks or in none", where=wrong[0], expected="the same linears in every block",
                      found="quantized in another block, float in this one", fix="use --format compressed-tensors, which names linears one by one")
    return settings | {"modules_in_block_to_quantize": [short]}
