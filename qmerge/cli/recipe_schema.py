"""What may stand in a recipe file? As JSON Schema, made of the recipe's fields, the values that each may take, and the help of the option of the same name.

The schema says less than the reader: which settings go together is only partly in it. What it refuses, the reader refuses.
"""

from __future__ import annotations

import json
from dataclasses import MISSING, fields
from importlib.resources import files
from typing import Any

from qmerge.cli.options import settings_of_a_merge
from qmerge.pipeline.recipe import Recipe
from qmerge.pipeline.recipe_values import POLISH, RANGES, WORDS, by_format
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
        "allOf": [_together(*rule) for rule in by_format()],
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
    if name in ("shard_size", "device_memory"):
        row["pattern"] = f"^{SIZE}$"
    if name == "device_memory":
        row |= {"minimum": 1, "exclusiveMaximum": 2**63}
    return row


def _together(formats: tuple[str, ...], name: str, values: tuple[Any, ...]) -> dict[str, Any]:
    """With one of ``formats``, ``name`` is one of ``values`` too. A recipe that names no format has the default one."""
    empty = {"pattern": r"^[\s,]*$"}
    chosen: dict[str, Any] = {"properties": {"format": {"enum": list(formats)}}}
    then = empty | {"items": empty} if values == ("",) else {"enum": list(values)}
    return {"if": chosen if _DEFAULT in formats else chosen | {"required": ["format"]}, "then": {"properties": {name: then}}}
