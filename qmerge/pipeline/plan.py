"""What will a run read, compute and write? Headers only; every refusal that can be known beforehand happens here."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from qmerge import formats
from qmerge.errors import Refused
from qmerge.formats import gptq as gptq_format
from qmerge.formats import nf4 as nf4_format
from qmerge.formats.base import Base, open_base
from qmerge.formats.dense import DTYPES
from qmerge.pipeline.recipe import Recipe, read_nf4_recipe
from qmerge.pipeline.skeleton import Skeleton, build_skeleton
from qmerge.store.adapter import LoraAdapter, open_adapter
from qmerge.store.checkpoint import Checkpoint, open_checkpoint
from qmerge.store.publish import check_output
from qmerge.units import format_bytes

FLOAT_BYTES = {"BF16": 2, "F16": 2, "F32": 4, "F64": 8}


@dataclass(frozen=True)
class MergePlan:
    """The whole job. ``requantized`` are weight names that become 4-bit; ``kept_4bit`` stay as the base stores them, byte for byte."""

    recipe: Recipe
    base: Base
    adapter: LoraAdapter
    skeleton: Skeleton
    changed: tuple[str, ...]
    requantized: tuple[str, ...]
    kept_4bit: tuple[str, ...]
    untied: str | None
    bytes_in: int
    bytes_out: int
    warnings: tuple[str, ...]

    @property
    def checkpoint(self) -> Checkpoint:
        return self.base.checkpoint

    def to_json(self) -> dict[str, Any]:
        return {
            "base": self.checkpoint.name,
            "adapter": self.adapter.name,
            "format": self.recipe.format,
            "linears_changed_by_the_adapter": len(self.changed),
            "linears_requantized": len(self.requantized),
            "bytes_in": self.bytes_in,
            "bytes_out": self.bytes_out,
            "warnings": list(self.warnings),
        }


def plan(recipe: Recipe) -> MergePlan:
    """Read headers and configs, check everything against everything, and say what would be done. Writes nothing."""
    check_calibration_given(recipe)
    adapter = open_adapter(recipe.adapter)
    checkpoint = open_checkpoint(recipe.original if recipe.on == "original" and recipe.original else recipe.base)
    check_output(Path(recipe.out), [checkpoint.path, adapter.path], recipe.overwrite)
    skeleton = build_skeleton(checkpoint)
    base = open_base(checkpoint, on=recipe.on, recipe=read_nf4_recipe(recipe.nf4_recipe), linears=skeleton.linears)
    check_names(base, skeleton)
    check_adapter(base, adapter, skeleton)
    changed = tuple(f"{module}.weight" for module in adapter.pairs)
    requantized, kept = _split(recipe, base, skeleton, set(changed))
    untied = _untied(base, adapter, skeleton)
    if recipe.format == "gptq":
        for name in requantized:
            gptq_format.check_shape(name.removesuffix(".weight"), base.shape(name), recipe.grid)
    bytes_out = sum(_bytes_out(recipe, base, name, set(requantized), set(kept)) for name in base.names)
    if untied and untied not in base.names:
        bytes_out += _bytes_out(recipe, base, skeleton.input_embedding, set(), set())
    check_room(Path(recipe.out), bytes_out)
    return MergePlan(
        recipe, base, adapter, skeleton, changed, requantized, kept, untied,
        checkpoint.weight_bytes + sum(spec.nbytes for spec in adapter.specs.values()), bytes_out, tuple(_warnings(recipe, base, adapter, skeleton)),
    )


def check_calibration_given(recipe: Recipe) -> None:
    if recipe.format in formats.QUANTIZING and not recipe.calibration and not recipe.rtn:
        raise Refused(f"format {recipe.format} rounds to 4 bits, and no calibration text was given", where="--calibration",
                      expected="text like what the adapter was trained on", found="none", fix="--calibration FILE, or --rtn to round without it (this can erase a small adapter)")


def check_room(out: Path, bytes_out: int) -> None:
    """The whole output must fit beside an old one: it grows in a sibling folder and is swapped in at the end."""
    there = next(parent for parent in out.absolute().parents if parent.exists())
    free = shutil.disk_usage(there).free
    if free < bytes_out * 1.05:
        raise Refused("the output does not fit on the disk", where=str(out), expected=f"{format_bytes(round(bytes_out * 1.05))} free", found=format_bytes(free), fix="make room, or choose another --out")


def check_names(base: Base, skeleton: Skeleton) -> None:
    """The file must hold what the model class holds, under the class's names."""
    wanted = {name for name, _ in skeleton.model.named_parameters(remove_duplicate=False)}
    tied = {skeleton.output_embedding} if skeleton.tied and skeleton.output_embedding else set()
    missing = sorted(wanted - set(base.names) - tied)
    if missing:
        raise Refused("the base lacks a tensor that its model class has", where=base.checkpoint.name, expected=missing[0], found=f"{len(missing)} such tensors are missing")


def check_adapter(base: Base, adapter: LoraAdapter, skeleton: Skeleton) -> None:
    """Every pair must land on a weight of the base with its shape, every replacement on a tensor of its shape."""
    names = set(base.names)
    for module, pair in adapter.pairs.items():
        weight = f"{module}.weight"
        if weight not in names and weight == skeleton.output_embedding and skeleton.tied:
            raise Refused("the adapter has a LoRA pair on a head that this base ties to its embeddings, which this version does not merge", where=f"{adapter.name}: {pair.a}",
                          expected="pairs on linears that the base stores", found=f"{weight}, stored as {skeleton.input_embedding} only", fix="keep this adapter separate")
        if weight not in names:
            raise Refused("the adapter was made for another base: it changes a module that this base lacks", where=f"{adapter.name}: {pair.a}", expected=f"a tensor {weight} in {base.checkpoint.name}", found="none")
        out, inputs = base.shape(weight)
        found = [adapter.specs[pair.b].shape[0], adapter.specs[pair.a].shape[1]]
        if found != [out, inputs]:
            raise Refused("the adapter was made for another base: the shapes differ", where=f"{adapter.name}: {pair.a}, {pair.b}", expected=f"[out, in] = [{out}, {inputs}] as in {base.checkpoint.name}", found=f"{found}")
    for name, tensor in adapter.saved.items():
        if name not in names and not name.startswith("lm_head."):
            raise Refused("the adapter replaces a tensor that this base lacks", where=f"{adapter.name}: {tensor}", expected=f"{name} in {base.checkpoint.name}", found="none")
        if base.is_4bit(name):
            raise Refused("the adapter replaces a tensor that the base holds in 4 bits", where=f"{adapter.name}: {tensor}", expected="a float tensor", found="an NF4 weight", fix="this version merges modules_to_save of float modules only")
        shape = tuple(adapter.specs[tensor].shape)
        if name in names and shape != tuple(base.checkpoint.specs[name].shape):
            raise Refused("the adapter replaces a tensor by one of another shape (a resized vocabulary, perhaps)", where=f"{adapter.name}: {tensor}", expected=str(list(base.checkpoint.specs[name].shape)), found=str(list(shape)),
                          fix="this version does not resize vocabularies")


def _split(recipe: Recipe, base: Base, skeleton: Skeleton, changed: set[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Which weights become 4-bit anew, and which stay as they are stored."""
    if recipe.format not in formats.QUANTIZING:
        return (), ()
    inside = set(skeleton.inside)
    source = [name for name in skeleton.linears if base.is_4bit(name)] if (base.quantized or base.fly) else list(skeleton.inside)
    outside = [name for name in source if name not in inside]
    if recipe.format == "gptq":
        return tuple(name for name in source if name in inside), ()
    touched = [name for name in outside if name in changed]
    if touched and not recipe.rtn:
        raise Refused("the adapter changes a linear outside the decoder blocks, which calibration does not reach", where=touched[0], expected="linears inside " + skeleton.blocks_name, found=f"{len(touched)} outside", fix="use --rtn, --format gptq (which keeps it in float) or --format bf16")
    return tuple(name for name in source if name in inside or name in touched), tuple(name for name in outside if name not in changed)


def _untied(base: Base, adapter: LoraAdapter, skeleton: Skeleton) -> str | None:
    """The head's name where the adapter changes one side of a tied pair, so that the output must hold both (some files hold both all the same)."""
    head, entrance = skeleton.output_embedding, skeleton.input_embedding
    if not skeleton.tied or head == entrance:
        return None
    changed = adapter.saved.keys() | {f"{module}.weight" for module in adapter.pairs}
    return head if head in changed or entrance in changed else None


def _bytes_out(recipe: Recipe, base: Base, name: str, requantized: set[str], kept: set[str]) -> int:
    shape = base.shape(name)
    if name in requantized or name in kept:
        if recipe.format == "gptq":
            return gptq_format.stored_bytes(shape, recipe.grid)
        block, double = 64, True
        if base.recipe:
            block, double = base.recipe.block_size, base.recipe.double_quant
        elif name in base.quantized:
            double = f"{name}.nested_absmax" in base.checkpoint.specs
        return nf4_format.stored_bytes(shape, block, double)
    if recipe.format in DTYPES:
        return prod(shape) * DTYPES[recipe.format].itemsize
    return prod(shape) * (2 if base.is_4bit(name) else FLOAT_BYTES.get(base.checkpoint.specs[name].dtype, 2))


def _warnings(recipe: Recipe, base: Base, adapter: LoraAdapter, skeleton: Skeleton) -> list[str]:
    found = []
    trained_on = str(adapter.config.get("base_model_name_or_path") or "").rstrip("/").rsplit("/", 1)[-1]
    if trained_on and trained_on != base.checkpoint.name.rstrip("/").rsplit("/", 1)[-1]:
        found.append(f"the adapter says it was trained on {trained_on!r}, and this base is {base.checkpoint.name!r}: shapes fit, but only you can know whether the weights do")
    if recipe.on == "original":
        found.append("merging into the float base: the adapter was trained on the 4-bit one, whose rounding error it has learnt to live with")
    if recipe.rtn:
        found.append("rounding to nearest without calibration: a small adapter can be erased by it")
    if recipe.calibration and not recipe.generic and recipe.format in formats.QUANTIZING:
        found.append("no --generic text: the model may drift on text unlike the calibration text")
    if _untied(base, adapter, skeleton):
        found.append("the adapter changes one side of tied embeddings: the output holds both, and tie_word_embeddings becomes false")
    return found


def describe_plan(found: MergePlan) -> str:
    """For people, several lines."""
    recipe = found.recipe
    target = {"gptq": f"gptq, {recipe.bits} bits, group size {recipe.group_size}, {'symmetric' if recipe.symmetric else 'asymmetric'}", "nf4": "nf4 (bitsandbytes)"}.get(recipe.format, recipe.format)
    rows = [
        f"base      {found.checkpoint.name}: {len(found.base.quantized) or len(found.base.fly)} linears in NF4, {format_bytes(found.checkpoint.weight_bytes)}",
        f"adapter   {found.adapter.name}: changes {len(found.changed)} linears" + (f", replaces {len(found.adapter.saved)} tensors" if found.adapter.saved else ""),
        f"output    {target}: {len(found.requantized)} linears requantized, about {format_bytes(found.bytes_out)}",
    ]
    return "\n".join(rows + [f"note      {warning}" for warning in found.warnings])
