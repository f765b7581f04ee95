"""Which values may a weight take, and which scales lose least?

Scales are searched with the diagonal of the Hessian as weights, over shrink factors of each group's range, *after* rounding
to what the file can store. Codes are chosen later, by the solver; the search uses round-to-nearest.
"""

from __future__ import annotations

import torch

from qmerge.types import Grid

SHRINK_INT = tuple(round(1.06 - 0.02 * step, 4) for step in range(36))
SHRINK_NF4 = tuple(round(1.10 - 0.02 * step, 4) for step in range(26))


def storable(scale: torch.Tensor, model_dtype: torch.dtype) -> torch.Tensor:
    """fp32 scales rounded to values that fp16 and ``model_dtype`` both hold exactly, so that no loader rounds them again."""
    tiny = 2.0**-14  # below fp16's normal range bf16 and fp16 no longer share a mantissa
    sign = torch.where(scale < 0, -1.0, 1.0)
    size = scale.abs().clamp(tiny, 65504.0 if model_dtype == torch.float16 else 65280.0)
    shared = size.to(model_dtype).to(torch.float16) if model_dtype == torch.bfloat16 else size.to(torch.float16)
    return shared.float() * sign


def search_int(weight: torch.Tensor, importance: torch.Tensor, grid: Grid, model_dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and zeros, fp32 ``[out, groups]``, for an int grid. ``weight`` ``[out, in]``, ``importance`` ``[in]`` ≥ 0 (diag H).

    Symmetric: zero is mid-range and the scale is signed, so the larger extreme gets the longer half of the grid.
    Asymmetric: zeros 1..2^b-1, which gptq's v1 files can hold.
    """
    rows, columns = weight.shape
    size = columns if grid.group_size == -1 else grid.group_size
    groups = weight.reshape(rows, columns // size, size)
    cost = importance.reshape(1, columns // size, size)
    top, half = 2**grid.bits - 1, 2 ** (grid.bits - 1)
    high, low = groups.amax(-1).clamp(min=0), groups.amin(-1).clamp(max=0)
    best = torch.full_like(high, float("inf"))
    scale, zero = torch.ones_like(high), torch.full_like(high, float(half))
    for shrink in SHRINK_INT:
        if grid.symmetric:
            sign = torch.where(high >= -low, -1.0, 1.0)
            trials = [(storable(shrink * sign * torch.maximum(high, -low) / half, model_dtype), torch.full_like(high, float(half)))]
        else:
            step = storable(shrink * (high - low) / top, model_dtype)
            exact = -shrink * low / step
            trials = [(step, exact.floor().clamp(1, top)), (step, exact.ceil().clamp(1, top))]
        for step, origin in trials:
            error = round_int(groups, step.unsqueeze(-1), origin.unsqueeze(-1), top).sub_(groups).square_().mul_(cost).sum(-1)
            better = error < best
            best = torch.where(better, error, best)
            scale, zero = torch.where(better, step, scale), torch.where(better, origin, zero)
    return scale, zero


def round_int(weight: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, top: int) -> torch.Tensor:
    """The nearest value of ``scale * (code - zero)``, code 0..top; shapes broadcast."""
    return (weight / scale).round_().add_(zero).clamp_(0, top).sub_(zero).mul_(scale)


def search_absmax(weight: torch.Tensor, importance: torch.Tensor, code: torch.Tensor, block_size: int) -> torch.Tensor:
    """Block maxima fp32 ``[blocks]`` for a code-book grid, before double quantization. ``weight`` ``[out, in]``, ``importance`` ``[in]``."""
    pad = -weight.numel() % block_size
    flat = torch.nn.functional.pad(weight.reshape(-1), (0, pad)).reshape(-1, block_size)
    cost = torch.nn.functional.pad(importance.expand(weight.shape).reshape(-1), (0, pad)).reshape(-1, block_size)
    largest = flat.abs().amax(1)
    bounds = (code[:-1] + code[1:]) / 2
    best, absmax = torch.full_like(largest, float("inf")), largest.clone()
    for shrink in SHRINK_NF4:
        trial = (largest * shrink).clamp(min=1e-12)
        rounded = code[torch.bucketize(flat / trial.unsqueeze(1), bounds)] * trial.unsqueeze(1)
        error = rounded.sub_(flat).square_().mul_(cost).sum(1)
        better = error < best
        best, absmax = torch.where(better, error, best), torch.where(better, trial, absmax)
    return absmax
