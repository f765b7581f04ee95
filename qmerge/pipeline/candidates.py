"""On which grids may a linear be solved, and how does a result on one become a stored weight?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from qmerge.numerics import gptq, grids, nf4
from qmerge.numerics.curvature import Curvature
from qmerge.numerics.gptq import ElementGrid
from qmerge.numerics.grids import Search
from qmerge.numerics.maxima import maxima_of
from qmerge.types import Grid, QuantizedWeight, QuantState, known, two_axes

BASES = "base's"
FULL_RANGE = (1.0,)


@dataclass(frozen=True)
class Linear:
    """One linear to requantize. ``merged`` fp32 ``[out, in]``; ``base`` is its 4-bit form before the merge, where it had one; ``delta`` what the adapter added;
    ``curvature`` how errors of its rows count together, where that was measured."""

    name: str
    merged: torch.Tensor
    base: QuantizedWeight | None
    delta: torch.Tensor | None = None
    curvature: Curvature | None = None


@dataclass(frozen=True)
class Option:
    """A grid that a linear may be solved on. ``scales`` fp32 ``[out, groups]``; ``element`` is the same, element by element.

    ``build(codes, scales)`` makes the stored weight. ``storable`` rounds scales to what the file holds; None: they stay as they are.
    """

    label: str
    scales: torch.Tensor
    element: ElementGrid
    build: Callable[[torch.Tensor, torch.Tensor], QuantizedWeight]
    size: int
    """columns that share a scale; the last group of a row may have fewer"""
    storable: Callable[[torch.Tensor], torch.Tensor] | None = None

    def with_scales(self, scales: torch.Tensor) -> Option:
        return replace(self, scales=scales, element=self.element.with_scales(scales, self.size))

    def some(self, rows: slice) -> Option:
        """The grid of some rows; nothing is built from it. Scales of code books, which may run across rows, stay whole and cannot be changed."""
        if not isinstance(self.storable, SameSign):
            return replace(self, element=self.element.some(rows), storable=None)
        return replace(self, scales=self.scales[rows], element=self.element.some(rows), storable=self.storable.some(rows))

    def units(self, codes: torch.Tensor) -> torch.Tensor:
        """fp32 ``[out, in]``: what the scales multiply."""
        return gptq.units(codes, self.element)


@dataclass(frozen=True)
class SameSign:
    """Scales of integers rounded to what the file holds, NaN where they would change sign: the zeros were found for it."""

    scales: torch.Tensor
    model_dtype: torch.dtype

    def __call__(self, wanted: torch.Tensor) -> torch.Tensor:
        return grids.storable(torch.where(wanted * self.scales > 0, wanted, torch.full_like(wanted, float("nan"))), self.model_dtype)

    def some(self, rows: slice) -> SameSign:
        return replace(self, scales=self.scales[rows])


def options(
    linear: Linear, grid: Grid, importance: torch.Tensor, model_dtype: torch.dtype, nf4_like: QuantState | None, search: Search | None = None, keep_base: bool = True
) -> list[Option]:
    """The grids to try. int: searched scales. Code books: searched maxima, and the base's own ones where it has the very layout of the output."""
    search = search or Search()
    if grid.kind == "int":
        return [_int_option(linear.merged, grid, importance, model_dtype, search)]
    weight = linear.merged
    base = linear.base.state if linear.base is not None else None
    like = replace(known(nf4_like if nf4_like is not None else base), shape=two_axes(weight.shape))
    levels = like.code.sort().values.to(weight.device)
    maxima = grids.search_absmax(weight, importance, levels, like.block_size, search.shrinks)
    found = [_book_option("searched", nf4.with_absmax(like, maxima.cpu()), grid, weight.device)]
    if keep_base and base is not None and same_layout(base, like):
        found.append(_book_option(BASES, base, grid, weight.device))
    return found


def same_layout(one: QuantState, other: QuantState) -> bool:
    """Could one be stored in the other's place under the same config?"""
    return (one.quant_type, one.block_size, one.nested) == (other.quant_type, other.block_size, other.nested)


def positions(state: QuantState, codes: torch.Tensor) -> torch.Tensor:
    """Stored codes as places in the sorted code book (the same for NF4), in their shape."""
    return state.code.sort(stable=True).indices.argsort().to(codes.device)[codes.long()].to(torch.uint8)


def _int_option(weight: torch.Tensor, grid: Grid, importance: torch.Tensor, model_dtype: torch.dtype, search: Search) -> Option:
    scales, zeros = grids.search_int(weight, importance, grid, model_dtype, search)
    size = weight.shape[1] if grid.group_size == -1 else grid.group_size
    g_idx = torch.arange(weight.shape[1], dtype=torch.int32) // size

    def build(codes: torch.Tensor, chosen: torch.Tensor) -> QuantizedWeight:
        return QuantizedWeight(codes.cpu(), grid, scales=chosen.cpu(), zeros=zeros.cpu(), g_idx=g_idx)

    return Option("searched", scales, gptq.int_grid(scales, zeros, weight.shape[1], grid), build, size, SameSign(scales, model_dtype))


def _book_option(label: str, state: QuantState, grid: Grid, device: torch.device) -> Option:
    """``grid`` as asked for; the state says the block size. Blocks that run across rows keep their maxima."""
    sort = state.code.sort(stable=True)
    stored, shape = sort.indices.to(torch.uint8).to(device), state.shape
    absmax = nf4.effective_absmax(state).to(device)
    element = gptq.book_grid(absmax, shape, state.block_size, sort.values.to(device))
    kind = replace(grid, group_size=state.block_size, double_quant=state.nested)
    whole = shape[1] % state.block_size == 0
    maxima = maxima_of(state, device)

    def build(codes: torch.Tensor, chosen: torch.Tensor) -> QuantizedWeight:
        held = maxima.store(state, chosen) if whole and chosen is not scales else state
        return QuantizedWeight(stored[codes.long()].cpu(), kind, state=held)

    scales = absmax.reshape(shape[0], -1) if whole else absmax.reshape(1, -1)
    return Option(label, scales, element, build, state.block_size, maxima.storable if whole else None)
