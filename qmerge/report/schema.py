"""Does a results file have the layout that results.schema.json describes, and if not, where?

A reading of the JSON Schema keywords that the committed schema uses, so that an installed qmerge checks files from outside without a
package more; a test holds it against the jsonschema package.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.resources import files
from typing import Any

KEYWORDS = {"$schema", "$defs", "$ref", "title", "description", "type", "const", "enum", "minimum", "properties", "required", "additionalProperties", "items"}
TYPES: dict[str, tuple[type, ...]] = {"object": (Mapping,), "array": (list, tuple), "string": (str,), "number": (int, float), "integer": (int,), "boolean": (bool,), "null": (type(None),)}


@cache
def results_schema() -> dict[str, Any]:
    """The committed schema, draft 2020-12."""
    found: dict[str, Any] = json.loads(files("qmerge.report").joinpath("results.schema.json").read_text("utf-8"))
    return found


def faults(results: Any, most: int = 20) -> list[str]:
    """Where ``results`` leave the schema, at most ``most`` places: ``"arms.nf4.bytes: expected integer or null"``. Empty where they follow it."""
    found: list[str] = []
    for fault in _walk(results, results_schema(), ""):
        found.append(fault)
        if len(found) == most:
            break
    return found


def _walk(value: Any, schema: Mapping[str, Any], path: str) -> Iterator[str]:
    if "$ref" in schema:
        yield from _walk(value, results_schema()["$defs"][schema["$ref"].rsplit("/", 1)[1]], path)
    here = path or "the file"
    wanted = schema.get("type")
    if wanted is not None and not any(_is(value, name) for name in ([wanted] if isinstance(wanted, str) else wanted)):
        yield f"{here}: expected {wanted if isinstance(wanted, str) else ' or '.join(wanted)}"
        return
    if "const" in schema and not _same(value, schema["const"]):
        yield f"{here}: expected {schema['const']!r}"
    if "enum" in schema and not any(_same(value, item) for item in schema["enum"]):
        yield f"{here}: expected one of {', '.join(map(str, schema['enum']))}"
    if "minimum" in schema and _is(value, "number") and value < schema["minimum"]:
        yield f"{here}: expected at least {schema['minimum']}"
    if isinstance(value, Mapping):
        yield from _members(value, schema, path)
    if isinstance(value, (list, tuple)) and "items" in schema:
        for index, item in enumerate(value):
            yield from _walk(item, schema["items"], f"{here}[{index}]")


def _members(value: Mapping[Any, Any], schema: Mapping[str, Any], path: str) -> Iterator[str]:
    for name in schema.get("required", ()):
        if name not in value:
            yield f"{path or 'the file'}: {name} is missing"
    named, others = schema.get("properties", {}), schema.get("additionalProperties")
    for key, item in value.items():
        part = named.get(key, others)
        if part is not None:
            yield from _walk(item, part, f"{path}.{key}" if path else str(key))


def _is(value: Any, name: str) -> bool:
    if isinstance(value, bool):
        return name == "boolean"
    if name == "integer" and isinstance(value, float):
        return value.is_integer()
    return isinstance(value, TYPES[name])


def _same(value: Any, wanted: Any) -> bool:
    return isinstance(value, bool) == isinstance(wanted, bool) and value == wanted
