"""Which functions belong to a quantizing format?

The pipeline asks here and branches on no format's name. A format is four pure functions, `check_shape`/`stored_bytes`, `pack`, `unpack` and `config`; what
else is here says where a checkpoint that was written holds its weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from qmerge.formats import awq, compressed_tensors, gptq
from qmerge.formats import nf4 as nf4_format
from qmerge.formats.integers import Layout
from qmerge.numerics import nf4
from qmerge.types import Grid, QuantizedWeight, known

Load = Callable[[str], torch.Tensor]


@dataclass(frozen=True)
class Format:
    """One on-disk format. Weights are named ``<module>.weight`` and are ``[out, in]``; ``Load`` gives a tensor of the file by name.

    ``marker``: how a name in the file ends that says "this module is quantized". ``linears_only``: loaders replace ``nn.Linear`` and leave Conv1D as it is.
    """

    name: str
    marker: str
    linears_only: bool
    check_shape: Callable[[str, tuple[int, int], Grid, bool], None]
    stored_bytes: Callable[[tuple[int, int], Grid, int], int]
    pack: Callable[[str, QuantizedWeight, torch.dtype], dict[str, torch.Tensor]]
    unpack: Callable[[str, Load, Iterable[str], Mapping[str, Any]], QuantizedWeight]
    dequantize: Callable[[QuantizedWeight], torch.Tensor]
    components: Callable[[str], tuple[str, ...]]
    config: Callable[[Layout], dict[str, Any]]
    config_file: str | None = None
    """a second file that repeats ``quantization_config``, where loaders look for one"""

    def find(self, names: Iterable[str]) -> list[str]:
        """The weights among a file's tensor names that this format holds packed, sorted."""
        return sorted(f"{name.partition(self.marker)[0]}.weight" for name in names if self.marker in name)


def of_format(name: str) -> Format | None:
    """The format that the recipe names; None for float ones."""
    return _formats().get(name)


def of_settings(settings: Mapping[str, Any]) -> Format | None:
    """The format that a ``quantization_config`` names; None where there is none, or none that this version writes."""
    method = settings.get("quant_method")
    return _formats().get(str(settings.get("bnb_4bit_quant_type", "nf4")) if method == "bitsandbytes" else str(method))


def _formats() -> dict[str, Format]:
    packed = {
        "gptq": _integers("gptq", gptq, ".qweight", False, "quantize_config.json"),
        "compressed-tensors": _integers("compressed-tensors", compressed_tensors, ".weight_packed", True),
        "awq": _integers("awq", awq, ".qweight", True),
    }
    return packed | {kind: _blocks(kind) for kind in ("nf4", "fp4")}


def _integers(name: str, module: ModuleType, marker: str, linears_only: bool, config_file: str | None = None) -> Format:
    def components(weight: str) -> tuple[str, ...]:
        return tuple(weight.removesuffix("weight") + suffix for suffix in module.SUFFIXES)

    def pack(weight: str, quantized: QuantizedWeight, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        stored: dict[str, torch.Tensor] = module.pack(weight.removesuffix(".weight"), quantized, dtype)
        return stored

    def unpack(weight: str, load: Load, names: Iterable[str], settings: Mapping[str, Any]) -> QuantizedWeight:
        inner = weight.removesuffix(".weight")
        held: QuantizedWeight = module.unpack(inner, load, module.grid_of(settings, inner))
        return held

    return Format(name, marker, linears_only, module.check_shape, module.stored_bytes, pack, unpack, module.dequantize, components, module.config, config_file)


def _blocks(kind: str) -> Format:
    """bitsandbytes' two: any shape fits, and each weight brings its own state."""

    def unpack(weight: str, load: Load, names: Iterable[str], settings: Mapping[str, Any]) -> QuantizedWeight:
        return nf4_format.unpack(weight, load, names, nf4_format.find_quantized(names)[weight])

    def pack(weight: str, quantized: QuantizedWeight, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        if (solved_on := known(quantized.state).quant_type) != kind:
            raise ValueError(f"{weight}: solved on {solved_on}, to be written as {kind}")
        return nf4_format.pack(weight, quantized)

    return Format(
        kind, f".weight{nf4_format.STATE_KEY}", False,
        check_shape=lambda module, shape, grid, pad: None,
        stored_bytes=lambda shape, grid, scale_bytes: nf4_format.stored_bytes(shape, grid.group_size, grid.double_quant),
        pack=pack,
        unpack=unpack,
        dequantize=lambda quantized: nf4.dequantize(quantized.codes, known(quantized.state)),
        components=lambda weight: tuple({part: None for quant_type in ("nf4", "fp4") for part in nf4_format.components(weight, quant_type)}),
        config=nf4_format.config,
    )  # fmt: skip
