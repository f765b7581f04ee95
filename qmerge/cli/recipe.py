"""`qmerge recipe`: begin a recipe file, check one, and give editors its schema."""

from __future__ import annotations

import os
import textwrap
from dataclasses import fields
from pathlib import Path
from typing import Any

import click

from qmerge.cli.completing import PLACE
from qmerge.cli.helping import INPUTS, HelpfulGroup
from qmerge.cli.options import json_option, settings_of_a_merge
from qmerge.cli.output import QuietCommand, result, result_json, say, warn
from qmerge.errors import UsageProblem

SCHEMA = "qmerge-recipe.schema.json"
"""what it is called beside a recipe"""
NEEDED = {"base": "path-or-hub-id-of-the-base", "adapter": "path-or-hub-id-of-the-adapter", "out": "path-of-a-new-folder"}


@click.group("recipe", cls=HelpfulGroup, short_help="Keep the settings in a YAML file that editors complete.")
def recipe_group() -> None:
    """Keep the settings of a merge in a YAML file: begin one, check one, and let editors complete it.

    `qmerge merge --recipe FILE` and `qmerge run --recipe FILE` read it; flags win over it.
    """


@recipe_group.command("init", cls=QuietCommand, example="qmerge recipe init recipe.yaml\nqmerge recipe check recipe.yaml\nqmerge merge --recipe recipe.yaml --dry-run")
@click.argument("file", type=PLACE, metavar="[FILE]", default="recipe.yaml")
@json_option("written (paths)")
def init_command(file: str, as_json: bool) -> None:
    """Write a recipe that holds every setting with its default and one line about it. An existing FILE (default: recipe.yaml) stays as it is.

    The schema that editors complete and check it by is written beside it.
    """
    from qmerge.cli.recipe_schema import committed_schema

    path = Path(file)
    if path.exists() or path.is_symlink():
        raise UsageProblem("this file exists already, and is left as it is", where=file, expected="the name of a new file", found="a folder" if path.is_dir() else "a file",
                           fix="choose another name, or move it away", written="nothing")  # fmt: skip
    if not path.parent.is_dir():
        raise UsageProblem("the folder for the recipe is not there", where=str(path.parent), expected="a folder", found="a file" if path.parent.exists() else "nothing", fix=f"mkdir -p {path.parent}", written="nothing")
    schema = path.with_name(SCHEMA)
    written = [file]
    _create(path, commented_recipe())
    if not schema.exists() or (_ours(schema) and schema.read_text("utf-8") != committed_schema()):
        _replace(schema, committed_schema())
        written.append(str(schema))
    elif not _ours(schema):
        warn(f"{schema} is another file, and is left as it is: editors will not complete {file}")
    if as_json:
        result_json({"written": written})
    else:
        result("\n".join(written))
    say(f"Next: fill in base, adapter and out, then qmerge recipe check {file}")


@recipe_group.command("check", cls=QuietCommand, example="qmerge recipe check recipe.yaml")
@click.argument("file", type=PLACE, metavar="FILE")
@json_option("recipe, missing, changed (what differs from the defaults), settings")
def check_command(file: str, as_json: bool) -> None:
    """Read FILE as merge and run would: exit 0 and what differs from the defaults, or 2 and every fault. Models and texts are not looked for."""
    from qmerge.pipeline.recipe import Recipe, build_recipe, missing_in

    missing = missing_in(file)
    recipe, usual = build_recipe(file, (), {name: ("…",) if name == "adapter" else "…" for name in missing}), Recipe()
    settings = {field.name: getattr(recipe, field.name) for field in fields(Recipe) if field.name not in missing}
    changed = {name: value for name, value in settings.items() if value != getattr(usual, name)}
    if as_json:
        result_json({"recipe": file, "missing": list(missing), "changed": changed, "settings": settings})
    else:
        result("\n".join([f"{file}: fine", *(f"  {name}: {_yaml(value)}" for name, value in changed.items())]))
    if missing:
        say(f"not in it, so to be given as flags: {', '.join(f'--{name}' for name in missing)}")
    say(f"Next: qmerge merge --recipe {file}{''.join(f' --{name} P' for name in missing)} --dry-run")


@recipe_group.command("schema", cls=QuietCommand, example="qmerge recipe schema > qmerge-recipe.schema.json")
def schema_command() -> None:
    """Print the JSON Schema of recipes (draft 2020-12)."""
    from qmerge.cli.recipe_schema import committed_schema

    result(committed_schema().rstrip("\n"))


def commented_recipe() -> str:
    """YAML: the needed settings with values to fill in, the others as comments with their defaults, by topic."""
    from qmerge.pipeline.recipe import Recipe

    usual, topic = Recipe(), INPUTS
    rows = [
        f"# yaml-language-server: $schema=./{SCHEMA}",
        "# A recipe for qmerge merge --recipe and qmerge run --recipe; flags win over it. Relative paths count from where qmerge is started.",
        "# Editors with a YAML language server (VS Code: the extension YAML) complete and check it by the schema named above.",
        "# A setting that is commented out has the default that stands there: take the # away to change it.",
        "",
    ]
    for name, (its_topic, said) in settings_of_a_merge().items():
        if its_topic != topic:
            topic = its_topic
            rows += [f"# ---- {topic} ----", ""]
        rows += [f"# {line}" for line in textwrap.wrap(said, 140)]
        rows += [f"{name}: {NEEDED[name]}" if name in NEEDED else f"# {name}: {_yaml(getattr(usual, name))}".rstrip(), ""]
    return "\n".join(rows).rstrip("\n") + "\n"


def _yaml(value: Any) -> str:
    if isinstance(value, tuple):
        return "[" + ", ".join(value) + "]"
    return {None: "null", True: "true", False: "false"}[value] if value is None or isinstance(value, bool) else str(value)


def _create(path: Path, text: str) -> None:
    """A new file; never over one that came meanwhile."""
    with open(path, "x", encoding="utf-8") as file:
        file.write(text)


def _ours(path: Path) -> bool:
    """Is it a schema that `qmerge recipe init` has written?"""
    from qmerge.cli.recipe_schema import TITLE
    from qmerge.store.regular import read_plain

    try:
        return f'"title": "{TITLE}"'.encode() in read_plain(path, 1_000_000)
    except (OSError, ValueError):
        return False


def _replace(path: Path, text: str) -> None:
    part = path.with_name(f"{path.name}.part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)
