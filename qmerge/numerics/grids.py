"""Which values may a weight take, and which scales lose least?

Scales are searched with the diagonal of the Hessian as weights, over shrink factors of each group's range, *after* rounding
to what the file can store. Codes are chosen later, by the solver; the search uses round-to-nearest.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qmerge.types import Grid

SHRINK_INT = tuple(round(1.06 - 0.02 * step, 4) for step in range(36))
SHRINK_BOOK = tuple(round(1.10 - 0.02 * step, 4) for step in range(26))


@dataclass(frozen=True)
class Search:
    """How scales are chosen. ``shrinks``: factors of a group's range that are tried; ``signed``: may a symmetric scale be negative, so that the larger extreme gets the longer half?"""

    shrinks: tuple[float, ...] = ()
    signed: bool = True


def storable(scale: torch.Tensor, model_dtype: torch.dtype) -> torch.Tensor:
    """fp32 scales rounded to values that fp16 and ``model_dtype`` both hold exactly, so that no loader rounds them again."""
    tiny = 2.0**-14  # below fp16's normal range bf16 and fp16 no longer share a mantissa
    sign = torch.where(scale < 0, -1.0, 1.0)
    size = scale.abs().clamp(tiny, 65504.0 if model_dtype == torch.float16 else 65280.0)
    shared = size.to(model_dtype).to(torch.float16) if model_dtype == torch.bfloat16 else size.to(torch.float16)
    return shared.float() * sign


def search_int(weight: torch.Tensor, importance: torch.Tensor, grid: Grid, model_dtype: torch.dtype, search: Search | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and zeros, fp32 ``[out, groups]``, for an int grid. ``weight`` ``[out, in]``, ``importance`` ``[in]`` ≥ 0 (diag H).

    Symmetric: zero is mid-range and the scale is signed, so the larger extreme gets the longer half of the grid.
    Each group's range includes 0; the last group may be short. Asymmetric: zeros ``grid.least_zero``..2^b-1 (gptq's v1 files cannot hold 0).
    """
    search = search or Search()
    rows, columns = weight.shape
    size = columns if grid.group_size == -1 else grid.group_size
    short = -columns % size
    groups = torch.nn.functional.pad(weight, (0, short)).reshape(-1, size)
    cost = torch.nn.functional.pad(importance, (0, short)).reshape(-1, size)
    scales, zeros = _trials(groups.amax(-1).clamp(min=0), groups.amin(-1).clamp(max=0), grid, model_dtype, search)
    best = _best_int(groups, cost, scales, zeros, 2**grid.bits - 1)
    picked = [values.gather(0, best.unsqueeze(0)).reshape(rows, -1) for values in (scales, zeros)]
    return picked[0], picked[1]


def _trials(high: torch.Tensor, low: torch.Tensor, grid: Grid, model_dtype: torch.dtype, search: Search) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and zeros to try, ``[trials, groups]``, the full range first."""
    top, half = 2**grid.bits - 1, 2 ** (grid.bits - 1)
    scales, zeros = [], []
    for shrink in search.shrinks or SHRINK_INT:
        if grid.symmetric:
            sign = torch.where(high >= -low, -1.0, 1.0) if search.signed else torch.ones_like(high)
            reach = torch.maximum(high, -low) / half if search.signed else torch.maximum(high / (half - 1), -low / half)
            scales.append(storable(shrink * sign * reach, model_dtype))
            zeros.append(torch.full_like(high, float(half)))
            continue
        step = storable(shrink * (high - low) / top, model_dtype)
        exact = -shrink * low / step
        scales += [step, step]
        zeros += [exact.floor().clamp(grid.least_zero, top), exact.ceil().clamp(grid.least_zero, top)]
    return torch.stack(scales), torch.stack(zeros)


def _best_int(groups: torch.Tensor, cost: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, top: int) -> torch.Tensor:
    """Index int64 ``[groups]`` of the trial with the least weighted error. ``cost`` ``[m, size]`` repeats along the groups."""
    if groups.device.type == "cpu":
        from qmerge.numerics import kernels

        return torch.from_numpy(kernels.best_int(*(part.contiguous().numpy() for part in (groups, cost, scales, zeros)), kernels.float32(top)))
    best, found = torch.full_like(scales[0], float("inf")), torch.zeros_like(scales[0], dtype=torch.int64)
    wide = cost.repeat(groups.shape[0] // cost.shape[0], 1)
    for index, (step, origin) in enumerate(zip(scales, zeros, strict=True)):
        error = round_int(groups, step.unsqueeze(-1), origin.unsqueeze(-1), top).sub_(groups).square_().mul_(wide).sum(-1)
        found = torch.where(error < best, index, found)
        best = torch.minimum(error, best)
    return found


def round_int(weight: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, top: int) -> torch.Tensor:
    """The nearest value of ``scale * (code - zero)``, code 0..top; shapes broadcast."""
    return (weight / scale).round_().add_(zero).clamp_(0, top).sub_(zero).mul_(scale)


def search_absmax(weight: torch.Tensor, importance: torch.Tensor, levels: torch.Tensor, block_size: int, shrinks: tuple[float, ...] = ()) -> torch.Tensor:
    """Block maxima fp32 ``[blocks]`` for a code-book grid, before double quantization. ``weight`` ``[out, in]``, ``importance`` ``[in]``, ``levels`` sorted."""
    pad = -weight.numel() % block_size
    flat = torch.nn.functional.pad(weight.reshape(-1), (0, pad)).reshape(-1, block_size)
    if weight.shape[1] % block_size == 0:
        cost = importance.reshape(-1, block_size)
    else:  # blocks run across rows
        cost = torch.nn.functional.pad(importance.expand(weight.shape).reshape(-1), (0, pad)).reshape(-1, block_size)
    trials = (flat.abs().amax(1) * torch.tensor(shrinks or SHRINK_BOOK, device=flat.device).unsqueeze(1)).clamp(min=1e-12)
    return trials.gather(0, _best_book(flat, cost, trials, levels).unsqueeze(0)).squeeze(0)


def _best_book(flat: torch.Tensor, cost: torch.Tensor, trials: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    bounds = (levels[:-1] + levels[1:]) / 2
    if flat.device.type == "cpu":
        from qmerge.numerics import kernels

        return torch.from_numpy(kernels.best_book(*(part.contiguous().numpy() for part in (flat, cost, trials, levels, bounds))))
    best, found = torch.full_like(trials[0], float("inf")), torch.zeros_like(trials[0], dtype=torch.int64)
    wide = cost.repeat(flat.shape[0] // cost.shape[0], 1)
    for index, trial in enumerate(trials):
        rounded = levels[torch.bucketize(flat / trial.unsqueeze(1), bounds)] * trial.unsqueeze(1)
        error = rounded.sub_(flat).square_().mul_(wide).sum(1)
        found = torch.where(error < best, index, found)
        best = torch.minimum(error, best)
    return found
