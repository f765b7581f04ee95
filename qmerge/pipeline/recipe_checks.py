"""Which settings of a recipe cannot be, alone or together? Told from the recipe alone: no model is looked at, and torch is not imported."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING

from qmerge.adapters.choices import SUM
from qmerge.errors import Refused, UsageProblem
from qmerge.formats import BITS, BLOCK_SIZES, BUILT, HEADS, MIXED, PADDED, QUANTIZING
from qmerge.pipeline.recipe_values import FIXED, POLISH, value_fault
from qmerge.units import parse_bytes

if TYPE_CHECKING:
    from qmerge.pipeline.recipe import Recipe


def check_values(recipe: Recipe, faults: list[str]) -> None:
    """Adds to ``faults`` a line for each that is found."""
    if recipe.format not in BUILT:
        faults.append(f"--format {recipe.format}: no such format; this version writes {', '.join(BUILT)}")
    else:
        _check_grid(recipe, faults)
        _check_quantizing(recipe, faults)
    alone = (value_fault(field.name, getattr(recipe, field.name)) for field in fields(recipe) if field.name != "format")
    faults += [fault for fault in alone if fault]
    if recipe.original and recipe.on != "original":
        faults.append("--original was given without --on original")
    _check_adapters(recipe, faults)
    _check_sizes(recipe, faults)
    if recipe.rtn and recipe.calibration:
        faults.append("--rtn uses no calibration text, and calibration was given (by --calibration or in the recipe): leave one of them out")


def _check_grid(recipe: Recipe, faults: list[str]) -> None:
    """Can the format hold these bits, groups and blocks?"""
    fmt, bits = recipe.format, BITS.get(recipe.format, (4,))
    if recipe.bits not in bits:
        others = [name for name, held in BITS.items() if recipe.bits in held]
        faults.append(f"--bits {recipe.bits}: format {fmt} {'has' if fmt in BITS else 'takes no --bits, or'} {', '.join(map(str, bits))}" + (f"; {' and '.join(others)} can" if others else ""))
    for setting, only in FIXED.get(fmt, {}).items():
        found, free = getattr(recipe, setting), " or ".join(name for name in BITS if FIXED.get(name, {}).get(setting) != only)
        if found != only and setting == "symmetric":
            faults.append(f"{'--sym' if found else '--asym'}: format {fmt} is {'symmetric' if only else 'asymmetric'}; use --format {free}")
        elif found != only and setting != "bits":  # of which `BITS` has spoken
            faults.append(f"--{setting.replace('_', '-')} {found}: format {fmt} has {only} alone; use --format {free}")
    for flag, value in (("--block-size", recipe.block_size), ("--double-quant", recipe.double_quant)):
        if value is not None and fmt not in BLOCK_SIZES:
            faults.append(f"{flag} belongs to --format {' and '.join(BLOCK_SIZES)}" + ("; here it is --group-size" if fmt in BITS and flag == "--block-size" else ""))


def _check_quantizing(recipe: Recipe, faults: list[str]) -> None:
    """Settings that only some formats, or only a calibrated run, can follow."""
    fmt, budget = recipe.format, recipe.bits_per_weight
    if budget is not None and fmt not in MIXED:
        faults.append(f"--bits-per-weight: format {fmt} has one bit width for all linears; {' and '.join(MIXED)} can mix them")
    if budget is not None and not recipe.symmetric:
        faults.append("--bits-per-weight with --asym: transformers reads several asymmetric grids in one checkpoint as if they were the first one; leave --asym out")
    if recipe.quantize_head and fmt not in HEADS:
        faults.append(f"--quantize-head: no loader takes a quantized head in format {fmt}; use --format {' or '.join(HEADS)}")
    elif recipe.quantize_head and fmt == "gptq" and not recipe.symmetric:
        faults.append("--quantize-head with --asym: only gptqmodel reads a quantized head in format gptq, and asymmetric files only from its own hand; leave --asym out, or use --format compressed-tensors")
    if unknown := [name for name in recipe.polish if name not in POLISH]:
        faults.append(f"--polish {unknown[0]}: expected {' or '.join(POLISH)}")
    if recipe.pad and recipe.polish:
        faults.append("--pad with --polish: polishing moves the scales of whole groups, which padded rows need not have; leave one of them out")
    if recipe.pad and fmt not in PADDED:
        faults.append(f"--pad belongs to --format {' and '.join(PADDED)}")
    needing = {"--polish": recipe.polish, "--bits-per-weight": budget}
    if recipe.quick and (others := [flag for flag, value in needing.items() if value]):
        faults.append(f"--quick with {' and '.join(others)}: it measures nothing against the adapter kept separate; leave one of them out")
    if recipe.quick and recipe.rtn:
        faults.append("--quick solves on calibration text, and --rtn uses none: leave one of them out")
    for flag, value in (("--polish", recipe.polish), ("--bits-per-weight", budget)):
        if value and recipe.rtn:
            faults.append(f"{flag} measures on calibration text, and --rtn uses none: leave one of them out")
        if value and fmt not in QUANTIZING:
            faults.append(f"{flag} belongs to formats that quantize: {', '.join(QUANTIZING)}")


def _check_adapters(recipe: Recipe, faults: list[str]) -> None:
    try:
        choices = recipe.choices
    except UsageProblem as problem:
        faults.append(f"{problem.where}: {problem.what}")
        return
    if recipe.combine != SUM and len(choices) < 2:
        faults.append(f"--combine {recipe.combine} needs at least two adapters")
    if recipe.combine == SUM and (recipe.density is not None or recipe.combine_rank is not None):
        faults.append("--density and --combine-rank belong to --combine ties, dare_*, magnitude_prune* and *svd")
    if recipe.each and (len(choices) < 2 or recipe.combine != SUM):
        faults.append("--each writes one checkpoint per adapter: give several --adapter and no --combine")
    if recipe.each and recipe.format in QUANTIZING:
        faults.append(f"--each shares one pass over the base, which --format {recipe.format} cannot: it solves each adapter on its own. Run them one by one, or use --format bf16")


def _check_sizes(recipe: Recipe, faults: list[str]) -> None:
    """Texts that stand for bytes."""
    for flag, value, such in (("--shard-size", recipe.shard_size, "5GB or 500MB"), ("--device-memory", recipe.device_memory, "20GiB or 16GB")):
        try:
            if value is not None and parse_bytes(str(value)) < 1:
                raise ValueError
        except ValueError:
            faults.append(f"{flag} {str(value)[:40]}: expected a size such as {such}")


def check_calibration_given(recipe: Recipe) -> None:
    if recipe.format in QUANTIZING and not recipe.calibration and not recipe.rtn:
        raise Refused(f"format {recipe.format} rounds to 4 bits, and no calibration text was given", where="--calibration",
                      expected="text like what the adapter was trained on", found="none", fix="--calibration FILE, or --rtn to round without it (this can erase a small adapter)")
