"""How does a compressed-tensors checkpoint (pack-quantized, as transformers, vLLM and llm-compressor read it) store an int weight?

``weight_packed`` int32 ``[out, ceil(in * bits / 32)]``, ``weight_scale`` ``[out, groups]`` in the model's dtype, ``weight_shape`` int64 ``[2]``, and for
asymmetric grids ``weight_zero_point`` int32 ``[ceil(out * bits / 32), groups]``. The library counts codes from -2^(b-1) and packs them from 0, so the packed
values are our codes and zeros as they are. Linears may have grids of their own: each ``config_group`` names its own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch

from qmerge.formats.integers import Layout, check_zeros, dequantize, group_index, group_problem, groups_of, no_fit, stored_scales
from qmerge.numerics.packing import pack_rows, unpack_rows, words
from qmerge.types import Grid, QuantizedWeight, known

__all__ = ["SUFFIXES", "check_shape", "config", "dequantize", "grid_of", "pack", "stored_bytes", "unpack"]

SUFFIXES = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point")


def check_shape(module: str, shape: tuple[int, int], grid: Grid, pad: bool = False) -> None:
    """Raise `Refused` where the container cannot hold ``[out, in]``, and say which format can. ``pad``: the last word of a row may be short."""
    per_word = 32 // grid.bits
    problem = group_problem(shape[1], grid)
    if not problem and not pad:
        if shape[1] % per_word:
            problem = f"engines read whole words of {per_word} inputs"
        elif not grid.symmetric and shape[0] % per_word:
            problem = f"engines read zero points in whole words of {per_word} outputs"
    if problem:
        outs, padding = 1 if grid.symmetric else per_word, group_problem(shape[1], grid) is None
        raise no_fit("compressed-tensors", module, shape, grid, problem, f"out % {outs} == 0, in % {per_word} == 0, in % group_size == 0", outs, per_word, padding)


def pack(module: str, quantized: QuantizedWeight, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    """The tensors of one linear, by name. Scales must be values that ``dtype``, the model's, holds; anything else is a bug and raises."""
    bits = quantized.grid.bits
    check_zeros(module, quantized, 0)
    stored = {
        f"{module}.weight_packed": pack_rows(quantized.codes.T, bits).T.contiguous(),
        f"{module}.weight_scale": stored_scales(module, known(quantized.scales), dtype).contiguous(),
        f"{module}.weight_shape": torch.tensor(quantized.codes.shape, dtype=torch.int64),
    }
    return stored if quantized.grid.symmetric else stored | {f"{module}.weight_zero_point": pack_rows(known(quantized.zeros), bits)}


def unpack(module: str, load: Callable[[str], torch.Tensor], grid: Grid) -> QuantizedWeight:
    """The inverse of `pack`, bit for bit."""
    out, inputs = (int(size) for size in load(f"{module}.weight_shape"))
    codes = unpack_rows(load(f"{module}.weight_packed").T, grid.bits, inputs).T.contiguous()
    scales = load(f"{module}.weight_scale").float()
    if grid.symmetric:
        zeros = torch.full_like(scales, 2.0 ** (grid.bits - 1))
    else:
        zeros = unpack_rows(load(f"{module}.weight_zero_point"), grid.bits, out).float()
    return QuantizedWeight(codes, grid, scales=scales, zeros=zeros, g_idx=group_index(inputs, grid))


def stored_bytes(shape: tuple[int, int], grid: Grid, scale_bytes: int = 2) -> int:
    """Bytes of the tensors that `pack` makes; ``scale_bytes`` is the size of the model's dtype."""
    (out, inputs), groups = shape, groups_of(shape[1], grid)
    zeros = 0 if grid.symmetric else words(out, grid.bits) * 4 * groups
    return out * words(inputs, grid.bits) * 4 + scale_bytes * out * groups + 16 + zeros


def grid_of(settings: Mapping[str, Any], module: str) -> Grid:
    """What a config that `config` made says about a module. Raises KeyError where no group does."""
    for group in settings["config_groups"].values():
        if module in group["targets"] or "Linear" in group["targets"]:
            args = group["weights"]
            return Grid("int", int(args["num_bits"]), -1 if args["strategy"] == "channel" else int(args["group_size"]), bool(args["symmetric"]), least_zero=0)
    raise KeyError(module)


def config(layout: Layout) -> dict[str, Any]:
    """``quantization_config``. One grid: all linears but the ignored ones. Several: every linear by its full name, because vLLM asks whether a fused module is
    a ``Linear`` before it asks for the names of its parts."""
    kinds = Counter((grid.bits, grid.group_size, grid.symmetric) for grid in layout.grids.values())
    groups = {}
    for number, kind in enumerate(sorted(kinds, key=lambda kind: (-kinds[kind], kind))):
        members = sorted(module for module, grid in layout.grids.items() if (grid.bits, grid.group_size, grid.symmetric) == kind)
        groups[f"group_{number}"] = _group(["Linear"] if len(kinds) == 1 else members, *kind)
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": sorted({*layout.floats, *layout.others}),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def _group(targets: list[str], bits: int, group_size: int, symmetric: bool) -> dict[str, Any]:
    weights = {
        "num_bits": bits,
        "type": "int",
        "symmetric": symmetric,
        "strategy": "channel" if group_size == -1 else "group",
        "group_size": None if group_size == -1 else group_size,
        "actorder": None,
        "dynamic": False,
    }
    return {"targets": targets, "weights": weights, "input_activations": None, "output_activations": None}
