"""How does a GPTQ checkpoint (v1, as AutoGPTQ, gptqmodel, vLLM and SGLang read it) store an int weight?

``qweight`` int32 ``[in * bits / 32, out]``, ``qzeros`` int32 ``[groups, out * bits / 32]`` holding zero - 1, ``scales`` fp16 ``[groups, out]``,
``g_idx`` int32 ``[in]``. Zeros must be at least 1, so that v1's stored zero - 1 does not borrow from its neighbour.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from qmerge.errors import Refused
from qmerge.numerics.packing import pack_rows, unpack_rows
from qmerge.types import Grid, QuantizedWeight

SUFFIXES = ("qweight", "qzeros", "scales", "g_idx")


def check_shape(module: str, shape: tuple[int, int], grid: Grid) -> None:
    """Raise `Refused` where the container cannot hold ``[out, in]``, and say which format can."""
    out, inputs = shape
    size = inputs if grid.group_size == -1 else grid.group_size
    problem = None
    if inputs % 32 or out % 32:
        problem = "gptq packs rows and columns in multiples of 32"
    elif inputs % size:
        problem = f"its {inputs} inputs do not divide into groups of {size}"
    if problem:
        fits = [str(g) for g in (128, 64, 32) if inputs % g == 0 and g != size and not (inputs % 32 or out % 32)]
        fix = "use --format nf4, whose blocks run across rows, or --format bf16" + (f"; --group-size {fits[0]} would fit this linear too" if fits else "")
        raise Refused(f"format gptq cannot hold a linear: {problem}", where=module, expected="out % 32 == 0, in % 32 == 0, in % group_size == 0",
                      found=f"[out, in] = [{out}, {inputs}], group size {grid.group_size}", fix=fix)


def pack(module: str, quantized: QuantizedWeight) -> dict[str, torch.Tensor]:
    """The four tensors of one linear, by name. Scales must be values that fp16 holds, zeros 1..2^b-1; anything else is a bug and raises."""
    bits = quantized.grid.bits
    scales, zeros = quantized.scales.T.contiguous(), quantized.zeros.T.contiguous()
    stored = scales.to(torch.float16)
    if not torch.equal(stored.float(), scales) or float(zeros.min()) < 1:
        raise ValueError(f"{module}: scales do not fit fp16 exactly, or a zero is below 1")
    return {
        f"{module}.qweight": pack_rows(quantized.codes.T.contiguous(), bits),
        f"{module}.qzeros": pack_rows((zeros - 1).to(torch.int64).T.contiguous(), bits).T.contiguous(),
        f"{module}.scales": stored,
        f"{module}.g_idx": quantized.g_idx,
    }


def unpack(module: str, load: Callable[[str], torch.Tensor], grid: Grid) -> QuantizedWeight:
    """The inverse of `pack`, bit for bit."""
    codes = unpack_rows(load(f"{module}.qweight"), grid.bits).T.contiguous()
    zeros = unpack_rows(load(f"{module}.qzeros").T.contiguous(), grid.bits).float() + 1
    scales = load(f"{module}.scales").float().T.contiguous()
    return QuantizedWeight(codes, grid, scales=scales, zeros=zeros, g_idx=load(f"{module}.g_idx"))


def dequantize(quantized: QuantizedWeight) -> torch.Tensor:
    """``scale * (code - zero)`` fp32 ``[out, in]``."""
    group = quantized.g_idx.long()
    return (quantized.codes.float() - quantized.zeros[:, group]) * quantized.scales[:, group]


def stored_bytes(shape: tuple[int, int], grid: Grid) -> int:
    """Bytes of the tensors that `pack` makes."""
    out, inputs = shape
    groups = 1 if grid.group_size == -1 else inputs // grid.group_size
    return out * inputs * grid.bits // 8 + groups * out * grid.bits // 8 + 2 * groups * out + 4 * inputs


def config(grid: Grid, blocks_name: str, kept_inside: list[list[str]] | None, version: str) -> dict[str, Any]:
    """``quantization_config``. ``kept_inside`` lists, where only some linears of a block are quantized, those that are."""
    settings: dict[str, Any] = {
        "quant_method": "gptq",
        "bits": grid.bits,
        "group_size": grid.group_size,
        "sym": grid.symmetric,
        "desc_act": False,
        "static_groups": True,
        "lm_head": False,
        "checkpoint_format": "gptq",
        "pack_dtype": "int32",
        "block_name_to_quantize": blocks_name,
        "meta": {"quantizer": [f"qmerge:{version}"]},
    }
    return settings | ({"modules_in_block_to_quantize": kept_inside} if kept_inside else {})
