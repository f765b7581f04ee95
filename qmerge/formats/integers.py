"""What do the int formats have in common, whatever their containers look like?

The weight that codes stand for, how many groups a row has, what a config is made of, and how a linear that does not fit is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from qmerge.errors import Refused
from qmerge.formats import GROUP_SIZES
from qmerge.types import Grid, QuantizedWeight, known


@dataclass(frozen=True)
class Layout:
    """What a quantized checkpoint's config is made from.

    ``grids``: module -> what it was rounded to. ``floats``: linears (and the head) that stay float; ``others``: further modules with a matrix, such as routers,
    which engines may build as linears.
    ``blocks_name``: where the decoder's blocks are. ``head``: the output head's module, where it has one. ``dtype``: the model's, in the config's word.
    ``old``: the base's own bitsandbytes settings, where it has any.
    """

    grids: Mapping[str, Grid]
    floats: tuple[str, ...]
    blocks_name: str
    head: str | None
    dtype: str
    version: str
    others: tuple[str, ...] = ()
    old: Mapping[str, Any] | None = None

    @property
    def grid(self) -> Grid:
        """The one grid of all linears. Raises `ValueError` where there are several: a format that cannot mix them was asked to."""
        found = {_kind(grid): grid for grid in self.grids.values()}
        if len(found) != 1:
            raise ValueError(f"{len(found)} kinds of grids in a format that has one for all linears")
        return next(iter(found.values()))


def _kind(grid: Grid) -> tuple[Any, ...]:
    return (grid.kind, grid.bits, grid.group_size, grid.symmetric, grid.double_quant)


def groups_of(inputs: int, grid: Grid) -> int:
    """Groups in a row of ``inputs``; the last one may be short."""
    return 1 if grid.group_size == -1 else -(-inputs // grid.group_size)


def group_index(inputs: int, grid: Grid) -> torch.Tensor:
    """The group of each input, int32 ``[in]``."""
    return torch.arange(inputs, dtype=torch.int32) // (inputs if grid.group_size == -1 else grid.group_size)


def dequantize(quantized: QuantizedWeight) -> torch.Tensor:
    """``scale * (code - zero)`` fp32 ``[out, in]``."""
    group = known(quantized.g_idx).long()
    return (quantized.codes.float() - known(quantized.zeros)[:, group]) * known(quantized.scales)[:, group]


def stored_scales(module: str, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Scales in the file's dtype. Raises `ValueError` where that would round them behind the solver's back."""
    stored = scales.to(dtype)
    if not torch.equal(stored.float(), scales):
        raise ValueError(f"{module}: scales do not fit {str(dtype).removeprefix('torch.')} exactly")
    return stored


def check_zeros(module: str, quantized: QuantizedWeight, least: int) -> None:
    """Raises `ValueError` for a zero that the container cannot hold; a symmetric grid's zero is its middle."""
    grid, zeros = quantized.grid, known(quantized.zeros)
    if float(zeros.min()) < least or float(zeros.max()) > 2**grid.bits - 1 or not torch.equal(zeros, zeros.round()):
        raise ValueError(f"{module}: a zero is not one of {least}..{2**grid.bits - 1}")
    if grid.symmetric and bool((zeros != 2 ** (grid.bits - 1)).any()):
        raise ValueError(f"{module}: a symmetric grid whose zero is not its middle")


def no_fit(fmt: str, module: str, shape: tuple[int, int], grid: Grid, problem: str, expected: str, outs: int, ins: int, padding: bool = False) -> Refused:
    """The refusal of a linear ``[out, in]`` that ``fmt`` cannot hold; ``outs`` and ``ins`` are what it wants them to be multiples of; ``padding``: ``pad`` would do."""
    fits = [str(size) for size in GROUP_SIZES if size not in (-1, grid.group_size) and not shape[1] % size and not shape[1] % ins and not shape[0] % outs]
    fix = "use --format nf4, whose blocks run across rows, or --format bf16" + (f"; --group-size {fits[0]} would fit this linear too" if fits else "")
    fix += "; --pad writes it padded, which transformers reads and most engines do not" if padding else ""
    found = f"[out, in] = {list(shape)}, group size {grid.group_size}"
    return Refused(f"format {fmt} cannot hold a linear: {problem}", where=module, expected=expected, found=found, fix=fix)


def group_problem(inputs: int, grid: Grid) -> str | None:
    """Why rows of ``inputs`` do not fit the groups, None where they do."""
    if grid.group_size == -1 or inputs % grid.group_size == 0:
        return None
    return f"its {inputs} inputs do not divide into groups of {grid.group_size}"
