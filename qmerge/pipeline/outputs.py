"""In which format is each weight of the output stored, under which names, and what does the output's config say?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from math import prod
from typing import TYPE_CHECKING, Any

import torch

from qmerge import __version__, formats
from qmerge.errors import Refused
from qmerge.formats import dense, registry
from qmerge.formats import nf4 as nf4_format
from qmerge.formats.base import Base, quantize_as_bitsandbytes
from qmerge.formats.integers import Layout
from qmerge.formats.nf4_recipe import Nf4Recipe
from qmerge.pipeline.merge import is_nf4
from qmerge.pipeline.pieces import Pieces
from qmerge.pipeline.recipe import Recipe
from qmerge.pipeline.skeleton import Skeleton
from qmerge.store.settings import known_settings
from qmerge.types import Grid, QuantState, known, two_axes

if TYPE_CHECKING:
    from qmerge.pipeline.plan import MergePlan
    from qmerge.pipeline.requantize import Solved

WRITTEN_ANEW = ("quantization_config", "torch_dtype")
"""keys of the base's config that the output's own replace; `qmerge.store.settings` keeps those that are known"""


def split_weights(recipe: Recipe, base: Base, skeleton: Skeleton | None, pieces: Pieces) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Which weights become quantized anew, and which stay as they are stored. The head, where the recipe wants it quantized, comes last."""
    if recipe.format not in formats.QUANTIZING:
        return (), ()
    skeleton, table = known(skeleton), pieces.table
    inside = set(skeleton.inside)
    rounded = [name for name in skeleton.linears if name in table and (packed_in := table[name].source) is not None and base.encoded(packed_in)]
    source = rounded or list(skeleton.inside)
    outside = [name for name in source if name not in inside]
    head = _head_to_quantize(recipe, skeleton, pieces)
    if recipe.format in formats.BITS:
        _check_linears(recipe, skeleton, [name for name in source if name in inside])
        return (*(name for name in source if name in inside), *head), ()
    touched = [name for name in outside if table[name].edit is not None or not _fits_as_stored(recipe, base, known(table[name].source))]
    if touched and not recipe.rtn:
        raise Refused("a linear outside the decoder blocks, which calibration does not reach, cannot stay as it is stored", where=touched[0], expected="linears inside " + skeleton.blocks_name, found=f"{len(touched)} outside, changed by the adapter or of another kind", fix="use --rtn, --format gptq (which keeps it in float) or --format bf16")
    return (*(name for name in source if name in inside or name in touched), *head), tuple(name for name in outside if name not in touched)


def _fits_as_stored(recipe: Recipe, base: Base, source: str) -> bool:
    """May the base's own form of a weight stand in the output? Then it must be of the output's kind, block size and nesting."""
    grid = output_grid(recipe, base)
    return grid.kind == "nf4" and is_nf4(base, source) and _base_blocks(base, source) == (grid.group_size, grid.double_quant)


def _head_to_quantize(recipe: Recipe, skeleton: Skeleton, pieces: Pieces) -> tuple[str, ...]:
    if not recipe.quantize_head:
        return ()
    name = skeleton.output_embedding
    if name is None or name not in pieces.table:
        raise Refused("the output head shares its weight with the embeddings, so it cannot be quantized alone", where=name or "the model's output head", expected="a head of its own",
                      found="tied embeddings", fix="leave --quantize-head out")
    return (name,)


def _check_linears(recipe: Recipe, skeleton: Skeleton, names: list[str]) -> None:
    turned = [name for name in names if skeleton.linears[name]]
    if turned and known(registry.of_format(recipe.format)).linears_only:
        raise Refused(f"no loader puts format {recipe.format} into a Conv1D", where=turned[0].removesuffix(".weight"), expected="nn.Linear", found=f"{len(turned)} Conv1D modules",
                      fix="use --format gptq or nf4")


def check_shapes(recipe: Recipe, pieces: Pieces, requantized: tuple[str, ...]) -> list[str]:
    """Raise `Refused` where the format cannot hold one of the weights; a word on those that it holds padded, where that was asked for."""
    fmt, padded = registry.of_format(recipe.format), list[str]()
    if fmt is None:
        return []
    for name in requantized:
        module, shape = name.removesuffix(".weight"), two_axes(pieces.table[name].shape)
        fmt.check_shape(module, shape, recipe.grid, recipe.pad)
        if recipe.pad and not _fits_unpadded(fmt, module, shape, recipe.grid):
            padded.append(module)
    if not padded:
        return []
    return [f"{len(padded)} linears are written padded (--pad), e.g. {padded[0]}: transformers reads them, kernels of vLLM and SGLang are known to refuse such shapes"]


def _fits_unpadded(fmt: registry.Format, module: str, shape: tuple[int, int], grid: Grid) -> bool:
    try:
        fmt.check_shape(module, shape, grid, False)
    except Refused:
        return False
    return True


def output_grid(recipe: Recipe, base: Base, name: str | None = None) -> Grid:
    """What weights are rounded to; nf4 and fp4 have the block size and the nesting of the base's weight ``name`` (by default: of its first one) where the recipe does
    not say them."""
    grid = recipe.grid
    if grid.kind == "int":
        return grid
    found = _base_blocks(base, name)
    block, double = found or (grid.group_size, grid.double_quant)
    return replace(grid, group_size=recipe.block_size or block, double_quant=double if recipe.double_quant is None else recipe.double_quant)


def _base_blocks(base: Base, name: str | None = None) -> tuple[int, bool] | None:
    """Block size and double quantization of a base's 4-bit weight, of any where none is named; None where the base has none."""
    if base.recipe:
        return base.recipe.block_size, base.recipe.double_quant
    packed = [held for held, kind in sorted(base.quantized.items()) if kind in formats.BLOCK_SIZES]
    name = name if name in packed else next(iter(packed), None)
    if name is None:
        return None
    meta = nf4_format.read_meta(name, base.checkpoint.load, base.quantized[name])
    return int(meta["blocksize"]), f"{name}.nested_absmax" in base.checkpoint.specs


def bytes_out(recipe: Recipe, base: Base, pieces: Pieces, name: str, quantized: set[str]) -> int:
    piece, fmt = pieces.table[name], registry.of_format(recipe.format)
    if name in quantized:
        if recipe.bits_per_weight is not None:
            return round(prod(piece.shape) * recipe.bits_per_weight / 8)
        return known(fmt).stored_bytes(two_axes(piece.shape), output_grid(recipe, base, piece.source), config_dtype(base.checkpoint.config).itemsize)
    stored = base.dtype(known(piece.source))
    return prod(piece.shape) * (dense.DTYPES[recipe.format] if recipe.format in dense.DTYPES and stored.is_floating_point else stored).itemsize


def packed(plan: MergePlan, name: str, solved: Solved, records: dict[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of one requantized weight; its record goes into ``records``."""
    records[name.removesuffix(".weight")] = solved.to_json()
    yield from known(registry.of_format(plan.recipe.format)).pack(name, solved.quantized, model_dtype(plan)).items()


def model_dtype(plan: MergePlan) -> torch.dtype:
    """The dtype that a loader will give the model: scales are made to fit it."""
    return config_dtype(plan.config)


def config_dtype(config: Mapping[str, Any]) -> torch.dtype:
    """What a config calls the model's dtype; bfloat16 where it says nothing. Raises `Refused` for a word that is no float's."""
    inner = config.get("text_config")
    named = config.get("dtype") or config.get("torch_dtype") or (inner.get("dtype") if isinstance(inner, Mapping) else None) or "bfloat16"
    found = getattr(torch, str(named).removeprefix("torch."), None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise Refused("the config names a dtype that no model's weights have", where="config.json", expected="bfloat16, float16 or float32", found=repr(named)[:60], fix="correct dtype (torch_dtype) in the base's config.json")
    return found


def nf4_template(plan: MergePlan) -> QuantState | None:
    """Kind, block size, code books and nesting that an nf4 or fp4 output gives its linears; None for other formats. A linear's own form in the base may stand in
    for it only where both have the same layout."""
    grid = output_grid(plan.recipe, plan.base)
    if grid.kind == "int":
        return None
    named = str(model_dtype(plan)).removeprefix("torch.")
    return quantize_as_bitsandbytes(torch.zeros(64, grid.group_size, dtype=model_dtype(plan)), Nf4Recipe(grid.group_size, grid.double_quant, named, quant_type=grid.kind)).state


def output_config(plan: MergePlan, grids: Mapping[str, Grid] | None = None) -> dict[str, Any]:
    """The base's config without anything of the old quantization, and with the new one's.

    ``grids``: weight name -> what it was solved on (each ``Solved.quantized.grid``), where that may differ from the recipe's, as with mixed precision. A weight of
    ``plan.requantized`` that is not among them stayed float.
    """
    config = {key: value for key, value in known_settings(plan.config)[0].items() if key not in WRITTEN_ANEW}
    named = str(model_dtype(plan)).removeprefix("torch.")
    config["dtype"] = dense.CONFIG_NAMES.get(plan.recipe.format, named)
    fmt = registry.of_format(plan.recipe.format)
    if fmt:
        config["quantization_config"] = fmt.config(_layout(plan, grids, named))
    return config


def _layout(plan: MergePlan, grids: Mapping[str, Grid] | None, dtype: str) -> Layout:
    skeleton, table, base = plan.tree, plan.pieces.table, plan.base
    if grids is None:
        grids = {name: output_grid(plan.recipe, base, table[name].source) for name in plan.requantized}
    grids = dict(grids) | {name: output_grid(plan.recipe, base, table[name].source) for name in plan.kept_4bit}
    head = skeleton.output_embedding
    linears = [*skeleton.linears, *([head] if head and head not in skeleton.linears else [])]
    named = {*linears, skeleton.input_embedding}
    others = [name for name in table if name.startswith(skeleton.blocks_name + ".") and name.endswith(".weight") and len(table[name].shape) == 2 and name not in named and name not in grids]
    old = plan.checkpoint.config.get("quantization_config") if base.quantized and set(base.quantized.values()) <= set(formats.BLOCK_SIZES) else None
    return Layout(
        {_module(name): grid for name, grid in grids.items()}, tuple(_module(name) for name in linears if name not in grids), skeleton.blocks_name,
        _module(head) if head else None, dtype, __version__, tuple(_module(name) for name in others), old,
    )  # fmt: skip


def _module(name: str) -> str:
    return name.removesuffix(".weight")
