"""`qmerge inspect`: what is this folder?"""

from __future__ import annotations

from typing import Any

import click

from qmerge.cli.completing import PLACE
from qmerge.cli.options import json_option
from qmerge.cli.output import QuietCommand, result, result_json, say


@click.command("inspect", cls=QuietCommand, short_help="What is this folder, and what stands in the way of merging it?", example="qmerge inspect BASE\nqmerge inspect ADAPTER")
@click.argument("path", type=PLACE)
@json_option("what it is, its facts by name, and problems")
def inspect_command(path: str, as_json: bool) -> None:
    """Say what PATH is: a base (recipe, blocks, linears, sizes), an adapter (type, features) or a folder of adapters, and what stands in the way of merging it."""
    from qmerge.api.looking import inspect

    facts = inspect(path)
    if as_json:
        result_json(facts)
    else:
        result("\n".join(_rows(facts)))
    say(f"Next: {_next(facts, path)}")


def _next(facts: dict[str, Any], path: str) -> str:
    if facts["what"] == "adapters":
        usable = [choice for choice, held in zip(facts["choices"], facts["adapters"].values(), strict=True) if "name" in held]
        return f"qmerge merge --base P --adapter '{usable[0]}' --out OUT --calibration FILE --dry-run" if usable else "see the problems above"
    if facts["problems"]:
        return "see the problems above"
    if facts["what"] == "adapter":
        return f"qmerge merge --base P --adapter {_quoted(path)} --out OUT --calibration FILE --dry-run"
    recipe = " --nf4-recipe double|single|FILE (or --on original)" if facts["recipe"]["kind"] == "float" else ""
    target = "--calibration FILE" if "gptq" in facts["writes"] else "--format bf16"
    return f"qmerge merge --base {_quoted(path)}{recipe} --adapter P --out OUT {target} --dry-run"


def _quoted(path: str) -> str:
    return f"'{path}'" if any(mark in path for mark in "# ") else path


def _rows(facts: dict[str, Any], indent: str = "") -> list[str]:
    rows = []
    for key, value in facts.items():
        if isinstance(value, dict):
            rows += [f"{indent}{key.replace('_', ' ')}:{'' if value else ' none'}"] + _rows(value, indent + "  ")
        elif isinstance(value, list):
            rows += [f"{indent}{key.replace('_', ' ')}: {'none' if not value else ''}".rstrip()] + [f"{indent}  {item}" for item in value]
        elif value is not None:
            rows.append(f"{indent}{key.replace('_', ' ')}: {value}")
    return rows
