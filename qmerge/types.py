"""The frozen values that the layers hand to each other. Weights are ``[out, in]`` everywhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import torch

T = TypeVar("T")


def known(value: T | None) -> T:
    """``value``, where the code around it has made sure that it is there; AssertionError where it has not."""
    assert value is not None
    return value


def two_axes(shape: Sequence[int]) -> tuple[int, int]:
    """Of a weight ``[out, in]``. ValueError for any other number of axes."""
    rows, columns = shape
    return rows, columns


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of a checkpoint, from its header alone. ``dtype`` is safetensors' spelling (``"BF16"``); ``file`` is a base name."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    file: str
    start: int = 0
    """first byte of the data, counted from the start of the file"""
    nbytes: int = 0


@dataclass(frozen=True)
class QuantState:
    """What a bitsandbytes 4-bit weight needs beside its codes. One ``absmax`` per ``block_size`` elements of the row-major ``[out, in]`` weight.

    With double quantization ``absmax`` is uint8 and its value is ``nested_code[absmax] * nested_absmax[i // nested_block_size] + offset``.
    """

    absmax: torch.Tensor
    code: torch.Tensor
    block_size: int
    shape: tuple[int, int]
    dtype: str
    quant_type: str = "nf4"
    nested_absmax: torch.Tensor | None = None
    nested_code: torch.Tensor | None = None
    nested_block_size: int = 256
    offset: float = 0.0

    @property
    def nested(self) -> bool:
        return self.nested_absmax is not None


@dataclass(frozen=True)
class CodedRows:
    """Some rows ``[rows, columns]`` of a 4-bit weight as they are stored, all tensors on one device: ``packed`` uint8 ``[ceil(rows * columns / 2)]``, the even element in the high nibble;
    ``absmax`` fp32 of their blocks, nesting undone; ``levels`` fp32 ``[16]`` by code. The first element begins a block; ``block_size`` is even."""

    packed: torch.Tensor
    absmax: torch.Tensor
    levels: torch.Tensor
    block_size: int
    rows: int
    columns: int


@dataclass(frozen=True)
class Grid:
    """The values a weight may take: ``scale * (code - zero)`` (``int``) or ``absmax * level[code]`` (``nf4``, ``fp4``).

    ``group_size`` counts inputs that share a scale; -1 is the whole row. For ``nf4`` and ``fp4`` it is the block size over the flattened weight.
    ``least_zero``: an asymmetric int grid's zeros lie in ``least_zero .. 2^bits - 1``; gptq's first version cannot hold 0.
    """

    kind: str  # "int" | "nf4" | "fp4"
    bits: int = 4
    group_size: int = 128
    symmetric: bool = True
    double_quant: bool = True
    least_zero: int = 1


@dataclass(frozen=True)
class QuantizedWeight:
    """The solver's result before packing. ``codes`` uint8 ``[out, in]``, as they are stored (fp4's levels are not sorted).

    int grids: ``scales`` and ``zeros`` ``[out, groups]`` (fp32 values that fp16 can hold; zeros as integers), ``g_idx`` int32 ``[in]``.
    nf4, fp4: ``state`` holds absmax and the code book; ``scales``, ``zeros``, ``g_idx`` are None.
    """

    codes: torch.Tensor
    grid: Grid
    scales: torch.Tensor | None = None
    zeros: torch.Tensor | None = None
    g_idx: torch.Tensor | None = None
    state: QuantState | None = None


@dataclass(frozen=True)
class Metric:
    """A measured value with its 95 % interval, the count it rests on, and its unit. ``None`` means undefined, and ``note`` says why."""

    value: float | None
    ci_low: float | None
    ci_high: float | None
    n: int
    unit: str
    note: str | None = None

    def to_json(self) -> dict[str, Any]:
        row = {"value": self.value, "ci_low": self.ci_low, "ci_high": self.ci_high, "n": self.n, "unit": self.unit}
        return row | ({"note": self.note} if self.note else {})
