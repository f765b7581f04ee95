"""How does an AWQ checkpoint store an int weight, and what weights does one hold, whoever wrote it?

The GEMM layout of AutoAWQ, gptqmodel, transformers and vLLM: ``qweight`` int32 ``[in, out / 8]``, ``qzeros`` int32 ``[groups, out / 8]``, ``scales``
``[groups, out]``; W = scales * (codes - zeros), transposed. A word holds eight outputs in the order 0 2 4 6 1 3 5 7. Rows of ``[out, in]`` are read together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from qmerge.errors import Refused
from qmerge.formats.integers import Layout, check_zeros, dequantize, group_index, group_problem, groups_of, no_fit, stored_scales
from qmerge.formats.rows import Reader, whole_reader
from qmerge.store.checkpoint import Checkpoint
from qmerge.types import Grid, QuantizedWeight, TensorSpec, known

__all__ = ["SUFFIXES", "check_settings", "check_shape", "components", "config", "dequantize", "grid_of", "open_rows", "pack", "shape", "stored_bytes", "unpack"]

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
SUFFIXES = ("qweight", "qzeros", "scales")
_WORDS = 64  # columns of words decoded at once


def components(weight: str) -> tuple[str, ...]:
    """The names of the tensors that belong to ``weight``, which itself no file holds."""
    return tuple(weight.removesuffix("weight") + suffix for suffix in SUFFIXES)


def check_settings(settings: Mapping[str, Any], where: str) -> None:
    """Raise `Refused` for a layout that is not GEMM with 4 bits, by its name."""
    layout = settings.get("version") or settings.get("checkpoint_format") or settings.get("format") or "gemm"
    bits = settings.get("bits", settings.get("w_bit", 4))
    if str(layout).lower() != "gemm" or bits != 4:
        raise Refused("the base is in an AWQ layout that this version does not read", where=where, expected="version gemm, bits 4",
                      found=f"version {layout}, bits {bits}", fix="give the float model with --on original, or a base in NF4, GPTQ or AWQ (gemm)")


def shape(weight: str, specs: Mapping[str, TensorSpec]) -> tuple[int, int]:
    """``[out, in]``, from headers. Raises `Refused` where parts are missing or do not fit each other."""
    held = [specs.get(name) for name in components(weight)]
    first, second, third = held
    if first is None or second is None or third is None:
        raise Refused("an AWQ weight is incomplete", where=weight, expected=", ".join(components(weight)), found="no such tensor", fix="download it again, or save it again with save_pretrained")
    (inputs, words), (groups, zero_words), (rows, out) = first.shape, second.shape, third.shape
    if {first.dtype, second.dtype} != {"I32"} or words * 8 != out or (groups, zero_words) != (rows, words) or inputs % groups:
        raise Refused("the parts of an AWQ weight do not fit each other", where=weight, expected="[in, out / 8], [groups, out / 8] and [groups, out]",
                      found=", ".join(f"{spec.dtype} {list(spec.shape)}" for spec in (first, second, third)))
    return out, inputs


def open_rows(weight: str, checkpoint: Checkpoint) -> Reader:
    """Raises `Refused` where the parts do not fit each other."""
    names = components(weight)
    out, inputs = shape(weight, checkpoint.specs)
    zeros, scales = unpack_codes(checkpoint.load(names[1])).float(), checkpoint.load(names[2]).float()

    def load(device: torch.device) -> torch.Tensor:
        packed, near, there = checkpoint.load(names[0]).to(device), zeros.to(device), scales.to(device)
        weights = torch.empty(out, inputs, device=device)
        size = inputs // there.shape[0]
        for start in range(0, out // 8, _WORDS):
            part = slice(start * 8, (start + _WORDS) * 8)
            codes = unpack_codes(packed[:, start : start + _WORDS]).float().view(there.shape[0], size, -1)
            weights[part] = codes.sub_(near[:, None, part]).mul_(there[:, None, part]).view(inputs, -1).T
        return weights

    return whole_reader((out, inputs), load)


def unpack_codes(packed: torch.Tensor) -> torch.Tensor:
    """int32 ``[n, m / 8]`` to uint8 ``[n, m]``, in the order of the outputs."""
    codes = torch.empty(*packed.shape, 8, dtype=torch.uint8, device=packed.device)
    for place, output in enumerate(ORDER):
        codes[..., output] = (packed >> 4 * place) & 15
    return codes.reshape(packed.shape[0], -1)


def pack_codes(codes: torch.Tensor) -> torch.Tensor:
    """Integers 0..15 ``[n, m]`` to int32 ``[n, m / 8]``: the inverse of `unpack_codes`."""
    wide = codes.to(torch.int32).reshape(codes.shape[0], -1, 8)
    packed = torch.zeros(wide.shape[:2], dtype=torch.int32, device=codes.device)
    for place, output in enumerate(ORDER):
        packed |= wide[..., output] << 4 * place
    return packed


def check_shape(module: str, shape: tuple[int, int], grid: Grid, pad: bool = False) -> None:
    """Raise `Refused` where the container cannot hold ``[out, in]``, and say which format can."""
    problem = "awq packs outputs in words of 8" if shape[0] % 8 else group_problem(shape[1], grid)
    if problem:
        raise no_fit("awq", module, shape, grid, problem, "out % 8 == 0, in % group_size == 0", 8, 1)


def pack(module: str, quantized: QuantizedWeight, dtype: torch.dtype = torch.float16) -> dict[str, torch.Tensor]:
    """The three tensors of one linear, by name. Scales are fp16 whatever the model's ``dtype``; what does not fit exactly is a bug and raises."""
    check_zeros(module, quantized, 0)
    return {
        f"{module}.qweight": pack_codes(quantized.codes.T),
        f"{module}.qzeros": pack_codes(known(quantized.zeros).T),
        f"{module}.scales": stored_scales(module, known(quantized.scales).T.contiguous(), torch.float16),
    }


def unpack(module: str, load: Callable[[str], torch.Tensor], grid: Grid) -> QuantizedWeight:
    """The inverse of `pack`, bit for bit."""
    codes, zeros = (unpack_codes(load(f"{module}.{part}")).T.contiguous() for part in ("qweight", "qzeros"))
    return QuantizedWeight(codes, grid, scales=load(f"{module}.scales").float().T.contiguous(), zeros=zeros.float(), g_idx=group_index(codes.shape[1], grid))


def stored_bytes(shape: tuple[int, int], grid: Grid, scale_bytes: int = 2) -> int:
    """Bytes of the tensors that `pack` makes."""
    groups = groups_of(shape[1], grid)
    return (shape[0] * shape[1] + groups * shape[0]) // 2 + 2 * groups * shape[0]


def grid_of(settings: Mapping[str, Any], module: str) -> Grid:
    """What a config that `config` made says about a module."""
    return Grid("int", int(settings["bits"]), int(settings["group_size"]), False, least_zero=0)


def config(layout: Layout) -> dict[str, Any]:
    """``quantization_config``. ``modules_to_not_convert`` names linears only: vLLM looks for these names anywhere in its own, and a router called ``mlp.gate``
    would take ``mlp.gate_proj`` with it."""
    grid = layout.grid
    return {
        "quant_method": "awq",
        "bits": grid.bits,
        "group_size": grid.group_size,
        "zero_point": True,
        "version": "gemm",
        "backend": "auto",
        "modules_to_not_convert": sorted(layout.floats) or None,
        "meta": {"quantizer": [f"qmerge:{layout.version}"]},
    }
