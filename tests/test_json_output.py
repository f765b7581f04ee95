"""``--json`` of every command: one document on standard output, nothing else there, and it holds what the help says."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from report_rich import rich_results
from test_report_results import passing_results

from qmerge.cli.main import cli as group

WITHOUT = {"qmerge recipe schema": "is JSON itself", "qmerge completion": "is a shell's script"}
KEYS = {
    "inspect": {"what", "problems"}, "recipe init": {"written"}, "recipe check": {"recipe", "missing", "changed", "settings"}, "merge": {"out", "estimate", "elapsed_s", "floor_s", "peak_rss_bytes"}, "merge --dry-run": {"estimate"},
    "run": {"verdict", "out", "results", "report", "merge"}, "run --dry-run": {"estimate"}, "eval": {"arms", "verdict"}, "compare": {"state", "reasons", "checks"}, "report": {"report"},
    "report --history": {"report"}, "advise": {"action", "reason", "alternative", "table"}, "bench": {"rows", "settings"}, "verify": {"out", "passed", "checks"}, "card": {"card", "written"}, "card --print": {"card", "written"},
    "push": {"repo", "private", "files", "bytes"},
}  # fmt: skip


def commands(found: click.Group, path: str = "qmerge") -> Iterator[tuple[str, click.Command]]:
    for name, command in found.commands.items():
        if isinstance(command, click.Group):
            yield from commands(command, f"{path} {name}")
        else:
            yield f"{path} {name}", command


@pytest.fixture(scope="module")
def place(written: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, results, and a recipe."""
    root = tmp_path_factory.mktemp("json")
    shutil.copytree(written("llama", "bf16")[0], root / "OUT")
    (root / "results.json").write_text(json.dumps(passing_results()))
    (root / "runs").mkdir()
    (root / "runs" / "results.json").write_text(json.dumps(rich_results()))
    (root / "recipe.yaml").write_text("base: b\nadapter: a\nformat: bf16\n")
    return root


def words(what: str, zoo: Any, place: Path, new: Path) -> list[Any]:
    """What follows ``qmerge``."""
    pair = ["--base", zoo.nf4("llama"), "--adapter", zoo.adapter("llama")]
    cheap = [*pair, "--out", new / "out", "--format", "bf16", "--device", "cpu"]
    given: dict[str, list[Any]] = {
        "inspect": [zoo.nf4("llama")], "recipe init": [new / "new.yaml"], "recipe check": [place / "recipe.yaml"], "merge": cheap, "merge --dry-run": cheap,
        "run": [*cheap, "--text", zoo.held_out, "--tokens", 64], "run --dry-run": [*cheap, "--text", zoo.held_out, "--tokens", 64],
        "eval": [*pair, "--candidate", place / "OUT", "--text", zoo.held_out, "--tokens", 64, "--device", "cpu", "--out", new / "r.json"],
        "compare": [place / "results.json"], "report": [place / "results.json", "--out", new], "report --history": [place / "runs", "--out", new], "advise": [place / "results.json"],
        "bench": [*pair, "--candidate", place / "OUT", "--without-merged", "--rounds", 1, "--repeats", 1, "--batches", 1, "--prompt-tokens", 8, "--new-tokens", 4, "--device", "cpu"],
        "verify": [place / "OUT"], "card": [place / "OUT"], "card --print": [place / "OUT"], "push": [place / "OUT", "--repo", "org/name"],
    }  # fmt: skip
    return [*what.split(), *given[what], "--json"]


@pytest.mark.parametrize("what", [pytest.param(name, marks=pytest.mark.slow if name == "bench" else ()) for name in KEYS])
def test_one_document_and_nothing_else(cli: Any, zoo: Any, place: Path, tmp_path: Path, what: str) -> None:
    """`qmerge … --json | jq` that stumbles over a table, a path or a library's banner."""
    found = cli(*words(what, zoo, place, tmp_path))
    assert found.code in (0, 3), found.err
    document = json.loads(found.out)
    assert KEYS[what] <= set(document), document.keys()


def test_every_command_is_tried() -> None:
    """A new command without `--json`, or one that the test above does not know."""
    assert {path for path, command in commands(group) if not any("--json" in option.opts for option in command.params)} == set(WITHOUT)
    assert {f"qmerge {name.partition(' --')[0]}" for name in KEYS} == {path for path, _ in commands(group)} - set(WITHOUT)


def test_the_same_words_everywhere() -> None:
    """Eleven ways to say what `--json` does."""
    for path, command in commands(group):
        for option in command.params:
            if isinstance(option, click.Option) and "--json" in option.opts:
                assert re.match(r"One JSON document on stdout, nothing else there: .+\.$", str(option.help)), path


@pytest.mark.parametrize("what", [["inspect", "nowhere"], ["verify", "nowhere"], ["compare", "nowhere.json"], ["recipe", "check", "nowhere.yaml"], ["card", "nowhere"]])
def test_a_failure_leaves_stdout_empty(cli: Any, what: list[str]) -> None:
    """Half a document, or a message where a script expects one."""
    found = cli(*what, "--json")
    assert found.code in (2, 4) and found.out == "" and found.err.startswith("error: ")
