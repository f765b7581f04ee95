"""Does results.schema.json describe what is written, and is what leaves it found?"""

from __future__ import annotations

import copy
import json
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import tomllib
from report_rich import rich_results
from test_report_results import build_results

from qmerge.errors import Refused
from qmerge.report.html import render_html
from qmerge.report.load import load_results
from qmerge.report.markdown import render_markdown
from qmerge.report.schema import KEYWORDS, faults, results_schema

ROOT = Path(__file__).parents[1]


def _places(node: Any, path: tuple = ()) -> list[tuple]:
    """Every place of the results, one item per list."""
    found = [path] if path else []
    items = node.items() if isinstance(node, dict) else enumerate(node[:1]) if isinstance(node, list) else ()
    for key, item in items:
        found += _places(item, (*path, key))
    return found


def _spoiled(results: dict[str, Any], path: tuple, value: Any) -> dict[str, Any]:
    changed = copy.deepcopy(results)
    node = changed
    for key in path[:-1]:
        node = node[key]
    if value is ...:
        del node[path[-1]]
    else:
        node[path[-1]] = value
    return changed


def _short(results: dict[str, Any]) -> dict[str, Any]:
    """One candidate and one text, with lists and batches of one."""

    def cut(node: Any) -> Any:
        if isinstance(node, dict):
            few = {"1", "arc_easy", "gsm8k-test", "lm-eval", "model.layers.0.mlp.up_proj"}
            names = [key for key in node if key in few] if few & set(node) else list(node)
            return {key: cut(node[key]) for key in names if key not in ("base", "merged", "naive", "separate")}
        return [cut(node[0])] if isinstance(node, list) and node else node

    return cut(results)


def test_the_schema_is_one() -> None:
    """Catches a schema that validators refuse, and a keyword that the package's own reader passes over."""
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.Draft202012Validator.check_schema(results_schema())

    def keywords(node: Any) -> set[str]:
        inner = [*node.get("properties", {}).values(), *node.get("$defs", {}).values(), *(node[key] for key in ("items", "additionalProperties") if key in node)]
        return set(node).union(*map(keywords, inner))

    assert keywords(results_schema()) <= KEYWORDS


@pytest.mark.parametrize("build", [build_results, rich_results])
def test_results_follow_the_schema(build) -> None:
    """Catches a part that is written and not described, or described otherwise than it is written."""
    assert faults(build()) == []


def test_every_spoiled_place_is_judged_as_jsonschema_does() -> None:
    """Catches a fault that one of the two readers lets through: each place of rich results is given each wrong type in turn."""
    jsonschema = pytest.importorskip("jsonschema")
    validator = jsonschema.Draft202012Validator(results_schema())
    results = _short(rich_results())
    places = [path for path in _places(results) if path[0] != "fingerprint" or len(path) < 3]
    refused = 0
    for number, path in enumerate(places):
        for value in (..., [None, True, 7, 2.5, -1, "text", [], {}, [1, "a"]][number % 9], [{}, "text", None][number % 3]):
            spoiled = _spoiled(results, path, value)
            ours = bool(faults(spoiled))
            assert ours == (not validator.is_valid(spoiled)), (path, value)
            refused += ours
    assert len(places) > 150 and refused > 150


def test_faults_name_the_place() -> None:
    """Catches "invalid results" with nothing to look for."""
    assert faults(_spoiled(build_results(), ("arms", "nf4", "bytes"), "8 MB")) == ["arms.nf4.bytes: expected integer or null"]
    assert faults(_spoiled(build_results(), ("verdict", "checks", 0, "state"), "maybe")) == ["verdict.checks[0].state: expected one of pass, fail, inconclusive, skipped"]
    assert faults([]) == ["the file: expected object"] and faults({"schema_version": 1}) == [f"the file: {key} is missing" for key in ("fingerprint", "arms", "verdict")]


def test_a_verdict_needs_whole_results_and_a_report_does_not(tmp_path: Path) -> None:
    """Catches a traceback on a damaged file where a clear refusal belongs, and a report that says nothing because one part is damaged."""
    file = tmp_path / "results.json"
    file.write_text(json.dumps(_spoiled(build_results(), ("arms", "nf4", "texts"), ["gsm8k"])))
    with pytest.raises(Refused, match="arms.nf4.texts: expected object"):
        load_results(file, whole=True)
    assert "naive" in render_markdown(load_results(file))


@pytest.mark.parametrize("junk", [None, [[]], "text", 7, {"a": {"b": []}}])
def test_no_wrong_type_crashes_a_report(junk: Any) -> None:
    """Catches a new section that trusts its part of the file."""
    results = _short(rich_results())
    places = _places(results)
    for path in places[::2]:
        assert render_markdown(_spoiled(results, path, junk)), path
    for path in places[::24]:
        assert render_html(_spoiled(results, path, junk)), path


def test_everything_beside_the_code_is_packaged() -> None:
    """Catches an installed qmerge without its schema, templates or budgets."""
    globs = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["qmerge"]
    package = ROOT / "qmerge"
    beside = [path.relative_to(package).as_posix() for path in package.rglob("*") if path.is_file() and path.suffix != ".py" and path.parent.name != "__pycache__"]
    assert {"report/results.schema.json", "report/history.html", "quality/budgets/strict.yaml"} <= set(beside)
    assert [name for name in beside if not any(fnmatch(name, glob) for glob in globs)] == []
