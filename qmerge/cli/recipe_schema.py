"""What may stand in a recipe file? As JSON Schema, made of the recipe's fields, the values that each may take, and the help of the option of the same name.

The schema says less than the reader: which settings go together is only partly in it. What it refuses, the reader refuses.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import MISSING, fields
from importlib.resources import files
from typing import Any

from qmerge.cli.options import settings_of_a_merge
from qmerge.formats import BITS, BLOCK_SIZES, BUILT, HEADS, MIXED, PADDED, QUANTIZING
from qmerge.pipeline.recipe import Recipe
from qmerge.pipeline.recipe_values import POLISH, RANGES, WORDS
from qmerge.units import SIZE

FILE = "recipe.schema.json"
TITLE = "A recipe of qmerge"
TYPES = {"int": "integer", "float": "number", "bool": "boolean", "str": "string", "None": "null"}
_DEFAULT = Recipe().format


def recipe_schema() -> dict[str, Any]:
    """Draft 2020-12. A setting may be left out (flags can give it), and may be written with - for _, which editors are not offered."""
    properties = {field.name: _property(field.name, str(field.type), None if field.default is MISSING else field.default) for field in fields(Recipe)}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": TITLE,
        "description": "Settings of qmerge merge and qmerge run (--recipe FILE). Flags of the same names win over the file.",
        "type": "object",
        "properties": properties,
        "patternProperties": {f"^{name.replace('_', '-')}$": {"$ref": f"#/properties/{name}"} for name in properties if "_" in name},
        "additionalProperties": False,
        "allOf": list(_together()),
    }


def schema_text() -> str:
    """The committed file, as it should be."""
    return json.dumps(recipe_schema(), indent=1, ensure_ascii=False) + "\n"


def committed_schema() -> str:
    """The file that is installed with this version."""
    return files("qmerge.cli").joinpath(FILE).read_text("utf-8")


def _property(name: str, kind: str, default: Any) -> dict[str, Any]:
    row: dict[str, Any] = {"description": settings_of_a_merge()[name][1]}
    if name == "adapter":
        return row | {"type": ["string", "array"], "items": {"type": "string"}}
    if name == "polish":
        some = "|".join(POLISH)
        words = {"type": "string", "pattern": rf"^[\s,]*(({some})\s*(,[\s,]*|$))*$"}
        return row | {"anyOf": [{"enum": list(POLISH)}, words, {"type": "array", "items": {"anyOf": [{"enum": list(POLISH)}, words]}}]}
    kinds = [TYPES[part] for part in kind.split(" | ")]
    row |= {"type": kinds[0] if len(kinds) == 1 else kinds}
    if default is not None and default != "":
        row["default"] = default
    if name in WORDS:
        row["enum"] = [*WORDS[name], *([None] if "null" in kinds else [])]
    if held := RANGES.get(name):
        row |= {"exclusiveMinimum" if held.above else "minimum": held.least, "exclusiveMaximum" if held.below else "maximum": held.most}
    if name == "shard_size":
        row["pattern"] = f"^{SIZE}$"
    return row


def _together() -> Iterable[dict[str, Any]]:
    """Settings that only some formats take. Each with the values that all others take too."""
    for bits in dict.fromkeys(BITS.values()):
        yield _only([name for name in BITS if BITS[name] == bits], "bits", list(bits))
    yield _only([name for name in BUILT if name not in BITS], "bits", [Recipe().bits])
    for name, formats, neutral in (
        ("block_size", BLOCK_SIZES, None), ("double_quant", BLOCK_SIZES, None), ("bits_per_weight", MIXED, None), ("quantize_head", HEADS, False), ("pad", PADDED, False),
    ):  # fmt: skip
        yield _only([other for other in BUILT if other not in formats], name, [neutral])
    none = {"pattern": r"^[\s,]*$"}
    yield _where([other for other in BUILT if other not in QUANTIZING], "polish", none | {"items": none})
    yield _only(["awq"], "symmetric", [False])


def _only(formats: list[str], name: str, values: list[Any]) -> dict[str, Any]:
    return _where(formats, name, {"enum": values})


def _where(formats: list[str], name: str, schema: dict[str, Any]) -> dict[str, Any]:
    """With one of ``formats``, ``name`` follows ``schema`` too. A recipe that names no format has the default one."""
    chosen: dict[str, Any] = {"properties": {"format": {"enum": formats}}}
    return {"if": chosen if _DEFAULT in formats else chosen | {"required": ["format"]}, "then": {"properties": {name: schema}}}
