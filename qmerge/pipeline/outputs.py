"""In which format is each weight of the output stored, under which names, and what does the output's config say?"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import TYPE_CHECKING, Any

import torch

from qmerge import __version__, formats
from qmerge.errors import Refused
from qmerge.formats import dense, gptq, nf4
from qmerge.formats.base import Base, Nf4Recipe, quantize_as_bitsandbytes
from qmerge.pipeline.merge import is_nf4
from qmerge.pipeline.pieces import Pieces
from qmerge.pipeline.recipe import Recipe
from qmerge.pipeline.skeleton import Skeleton
from qmerge.types import QuantState

if TYPE_CHECKING:
    from qmerge.pipeline.plan import MergePlan
    from qmerge.pipeline.requantize import Solved

NEVER_COPIED = ("quantization_config", "auto_map", "_name_or_path", "_attn_implementation_internal", "trust_remote_code", "torch_dtype")


def split_weights(recipe: Recipe, base: Base, skeleton: Skeleton | None, pieces: Pieces) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Which weights become 4-bit anew, and which stay as they are stored."""
    if recipe.format not in formats.QUANTIZING:
        return (), ()
    inside, table = set(skeleton.inside), pieces.table
    rounded = [name for name in skeleton.linears if name in table and table[name].source is not None and base.encoded(table[name].source)]
    source = rounded or list(skeleton.inside)
    outside = [name for name in source if name not in inside]
    if recipe.format == "gptq":
        return tuple(name for name in source if name in inside), ()
    touched = [name for name in outside if table[name].edit is not None or not is_nf4(base, table[name].source)]
    if touched and not recipe.rtn:
        raise Refused("the adapter changes a linear outside the decoder blocks, which calibration does not reach", where=touched[0], expected="linears inside " + skeleton.blocks_name, found=f"{len(touched)} outside", fix="use --rtn, --format gptq (which keeps it in float) or --format bf16")
    return tuple(name for name in source if name in inside or name in touched), tuple(name for name in outside if name not in touched)


def check_shapes(recipe: Recipe, pieces: Pieces, requantized: tuple[str, ...]) -> None:
    """Raise `Refused` where the format cannot hold one of the weights."""
    if recipe.format == "gptq":
        for name in requantized:
            gptq.check_shape(name.removesuffix(".weight"), pieces.table[name].shape, recipe.grid)


def bytes_out(recipe: Recipe, base: Base, pieces: Pieces, name: str, quantized: set[str]) -> int:
    piece = pieces.table[name]
    if name in quantized:
        if recipe.format == "gptq":
            return gptq.stored_bytes(piece.shape, recipe.grid)
        block, double = 64, True
        if base.recipe:
            block, double = base.recipe.block_size, base.recipe.double_quant
        elif piece.source in base.quantized:
            double = f"{piece.source}.nested_absmax" in base.checkpoint.specs
        return nf4.stored_bytes(piece.shape, block, double)
    stored = base.dtype(piece.source)
    return prod(piece.shape) * (dense.DTYPES[recipe.format] if recipe.format in dense.DTYPES and stored.is_floating_point else stored).itemsize


def packed(plan: MergePlan, name: str, solved: Solved, records: dict) -> Iterator[tuple[str, torch.Tensor]]:
    module = name.removesuffix(".weight")
    records[module] = solved.to_json()
    parts = gptq.pack(module, solved.quantized) if plan.recipe.format == "gptq" else nf4.pack(name, solved.quantized)
    yield from parts.items()


def model_dtype(plan: MergePlan) -> torch.dtype:
    """The dtype that a loader will give the model: scales are made to fit it."""
    config = plan.config
    named = config.get("dtype") or config.get("torch_dtype") or (config.get("text_config") or {}).get("dtype") or "bfloat16"
    return getattr(torch, str(named).removeprefix("torch."))


def nf4_template(plan: MergePlan) -> QuantState:
    """Block size, code books and nesting for linears that had no NF4 form: the base's recipe, or bitsandbytes' with double quantization."""
    recipe = plan.base.recipe or Nf4Recipe()
    named = str(model_dtype(plan)).removeprefix("torch.")
    return quantize_as_bitsandbytes(torch.zeros(64, 64, dtype=model_dtype(plan)), Nf4Recipe(recipe.block_size, recipe.double_quant, named)).state


def output_config(plan: MergePlan) -> dict[str, Any]:
    """The base's config without anything of the old quantization, and with the new one's."""
    recipe = plan.recipe
    config = {key: value for key, value in plan.config.items() if key not in NEVER_COPIED}
    named = str(model_dtype(plan)).removeprefix("torch.")
    config["dtype"] = dense.CONFIG_NAMES.get(recipe.format, named)
    if recipe.format == "gptq":
        prefix = plan.skeleton.blocks_name + "."
        short = sorted({name.removeprefix(prefix).partition(".")[2].removesuffix(".weight") for name in plan.requantized})
        kept = [short] if len(plan.requantized) != len(plan.skeleton.inside) else None
        config["quantization_config"] = gptq.config(recipe.grid, plan.skeleton.blocks_name, kept, __version__)
    elif recipe.format == "nf4":
        old = plan.checkpoint.config.get("quantization_config") if plan.base.quantized and set(plan.base.quantized.values()) == {"nf4"} else None
        config["quantization_config"] = nf4.config(old, nf4_template(plan).nested, named) | {"bnb_4bit_quant_storage": "uint8"}
    return config
