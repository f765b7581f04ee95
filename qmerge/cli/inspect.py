"""`qmerge inspect`: what is this folder?"""

from __future__ import annotations

from typing import Any

import click

from qmerge.cli.output import QuietCommand, result, result_json, say


@click.command("inspect", cls=QuietCommand)
@click.argument("path")
@click.option("--json", "as_json", is_flag=True, help="As JSON on stdout.")
def inspect_command(path: str, as_json: bool) -> None:
    """Say what PATH is: a base (recipe, blocks, linears, sizes) or an adapter (LoRA features), and what stands in the way of merging it."""
    from qmerge.pipeline.inspection import inspect

    facts = inspect(path)
    if as_json:
        result_json(facts)
    else:
        result("\n".join(_rows(facts)))
    if facts["problems"]:
        say("Next: see the problems above")
    elif facts["what"] == "adapter":
        say(f"Next: qmerge merge --base P --adapter {path} --out OUT --calibration FILE --dry-run")
    else:
        say(f"Next: qmerge merge --base {path} --adapter P --out OUT --calibration FILE --dry-run")


def _rows(facts: dict[str, Any], indent: str = "") -> list[str]:
    rows = []
    for key, value in facts.items():
        if isinstance(value, dict):
            rows += [f"{indent}{key.replace('_', ' ')}:"] + _rows(value, indent + "  ")
        elif isinstance(value, list):
            rows += [f"{indent}{key.replace('_', ' ')}: {'none' if not value else ''}".rstrip()] + [f"{indent}  {item}" for item in value]
        else:
            rows.append(f"{indent}{key.replace('_', ' ')}: {value}")
    return rows
