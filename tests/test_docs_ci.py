"""Are the snippets of docs/ci.md YAML, do their commands exist with these options, and is the committed baseline one?"""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import click
import pytest
import yaml

from qmerge.cli.main import cli as group
from qmerge.quality.compare import load_budget
from qmerge.report.schema import faults

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/ci.md").read_text("utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", PAGE, re.DOTALL)
SNIPPETS = {("github" if "jobs" in found else "gitlab"): found for kind, text in BLOCKS if kind == "yaml" for found in [yaml.load(text, yaml.BaseLoader)]}


def _scripts() -> list[str]:
    """Every shell line of the page: of the snippets and of the blocks."""
    steps = [step["run"] for step in SNIPPETS["github"]["jobs"]["gate"]["steps"] if "run" in step]
    return [*steps, *SNIPPETS["gitlab"]["gate"]["script"], *(line for kind, text in BLOCKS if kind == "sh" for line in text.splitlines())]


COMMANDS = sorted({line.strip() for line in _scripts() if line.startswith("qmerge ")})


def test_snippets_are_pipelines() -> None:
    """Catches indentation that turns a key into text: what CI needs is where it looks for it."""
    job = SNIPPETS["github"]["jobs"]["gate"]
    assert SNIPPETS["github"]["on"] == ["pull_request"] and all("uses" in step or "run" in step for step in job["steps"])
    assert "GITHUB_STEP_SUMMARY" in job["steps"][-2]["run"] and job["steps"][-2]["if"] == job["steps"][-1]["if"] == "always()"
    gate = SNIPPETS["gitlab"]["gate"]
    assert gate["artifacts"]["reports"]["junit"] == "out/junit.xml" and gate["retry"]["exit_codes"] == ["75"]


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_exist_with_these_options(line: str) -> None:
    """Catches a documented option that was renamed, by the real command's own parser."""
    words = shlex.split(line)[1:]
    command = group.get_command(click.Context(group), words[0])
    assert command is not None, words[0]
    command.make_context(words[0], words[1:], resilient_parsing=False)


def test_the_page_names_what_make_and_ci_do() -> None:
    """Catches a target that the page promises and the Makefile lost, and a CI that no longer gates the demo."""
    makefile = (ROOT / "Makefile").read_text("utf-8")
    assert len(COMMANDS) >= 8 and all(f"\n{target}: " in makefile for target in ("gate", "baseline", "card", "notebook-page"))
    assert "make gate" in (ROOT / ".ci/run").read_text("utf-8") and "eval/baselines/demo.json" in makefile


def test_the_committed_baseline_is_the_demo_s() -> None:
    """Catches a baseline that the gate would refuse, that failed itself, or that holds what it need not."""
    file = ROOT / "eval/baselines/demo.json"
    baseline = json.loads(file.read_text("utf-8"))
    assert faults(baseline) == [] and file.stat().st_size < 60_000
    assert list(baseline["arms"]) == ["demo"] and set(baseline["arms"]["demo"]["texts"]) == {"prose", "code"} and baseline["verdict"]["state"] == "pass"
    assert baseline["left_out"] and not {"linears", "path"} & set(baseline["arms"]["demo"])
    assert load_budget(ROOT / "eval/budgets/example.yaml")["limits"]["retention"] == {"min": 0.95}
