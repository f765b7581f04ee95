"""`qmerge recipe`, and the schema that editors complete recipes by: does it say of a file what the reader says?"""

from __future__ import annotations

import json
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from fuzz import recipe as fuzzed
from hypothesis import given, settings
from hypothesis import strategies as st

from qmerge.cli.options import settings_of_a_merge
from qmerge.cli.recipe import commented_recipe
from qmerge.cli.recipe_schema import committed_schema
from qmerge.errors import UsageProblem
from qmerge.formats import BUILT
from qmerge.pipeline.recipe import Recipe, build_recipe
from qmerge.pipeline.recipe_values import RANGES, WORDS
from qmerge.store.yamlfiles import parse_yaml

ROOT = Path(__file__).parents[1]
SCHEMA = jsonschema.Draft202012Validator(json.loads(committed_schema()))
LEAST = {"base": "b", "adapter": "a", "out": "o"}
NAMES = [field.name for field in fields(Recipe)]


def reads(path: Path, rows: dict[str, Any]) -> bool:
    path.write_text(json.dumps(rows))
    try:
        build_recipe(str(path), (), {})
    except UsageProblem:
        return False
    return True


def shown() -> list[tuple[str, str]]:
    """YAML blocks of README and docs that are recipes: each key is a setting."""
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    found = [(str(page.relative_to(ROOT)), text) for page in pages for text in re.findall(r"^```yaml\n(.*?)^```", page.read_text("utf-8"), re.M | re.S)]
    read = [(page, text, parse_yaml(text)) for page, text in found]
    return [(page, text) for page, text, rows in read if isinstance(rows, dict) and rows and {str(key).replace("-", "_") for key in rows} <= set(NAMES)]


def test_the_schema_is_a_schema() -> None:
    """A keyword that is spelled wrong is passed over in silence by every editor."""
    jsonschema.Draft202012Validator.check_schema(SCHEMA.schema)


def test_every_setting_is_an_option_and_in_the_schema() -> None:
    """A setting that only YAML knows, or only flags."""
    assert set(settings_of_a_merge()) == set(NAMES) == set(SCHEMA.schema["properties"])
    assert set(WORDS) | set(RANGES) <= set(NAMES)


@pytest.mark.parametrize("page, text", shown())
def test_recipes_of_the_pages_validate(page: str, text: str) -> None:
    """A page that shows a recipe which editors underline in red."""
    SCHEMA.validate(parse_yaml(text))


@pytest.mark.parametrize("content", fuzzed.seeds().accepted)
def test_recipes_of_the_tests_validate(content: bytes) -> None:
    """A schema that is stricter than what is read."""
    SCHEMA.validate(parse_yaml(content.decode()))


VALUES = st.one_of(
    st.sampled_from([*BUILT, "ties", "pooled", "rtn", "blocks", "blocks, distill", ",", "", "5GB", "1 MiB", "5 boxes", "original", "mixed", "a=0.5", None, True, False, [], ["a", "b"], ["blocks"], 0, 4, 8, 128, 64, -1, 0.5, 4.5]),
    st.integers(-2, 2**33), st.floats(-1, 20), st.text(max_size=3),
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(rows=st.dictionaries(st.sampled_from([*NAMES, "group-size", "bitz"]), VALUES, max_size=4), fmt=st.none() | st.sampled_from(BUILT))
def test_what_the_schema_refuses_the_reader_refuses(rows: dict[str, Any], fmt: str | None, tmp_path_factory: pytest.TempPathFactory) -> None:
    """An editor that underlines what works."""
    given = LEAST | rows | ({"format": fmt} if fmt else {})
    if not SCHEMA.is_valid(given):
        assert not reads(tmp_path_factory.getbasetemp() / "recipe.yaml", given)


@pytest.mark.parametrize("rows", [
    {"bits": 5}, {"format": "nf4", "bits": 8}, {"format": "gptq", "block_size": 64}, {"group-size": 100}, {"bitz": 4}, {"samples": 1}, {"polish": "shine"}, {"format": "bf16", "polish": ["blocks"]},
    {"seed": True}, {"adapter": [1]}, {"format": "awq", "symmetric": True}, {"density": 0}, {"shard_size": "large"}, {"compute": "int8"}, {"bits_per_weight": 5}, {"combine": "mean"},
])  # fmt: skip
def test_the_schema_refuses_what_an_editor_should_underline(rows: dict[str, Any]) -> None:
    """A schema that lets everything through."""
    assert not SCHEMA.is_valid(LEAST | rows)


def test_the_written_recipe_is_the_defaults(tmp_path: Path) -> None:
    """A comment that shows a default which is none, or that cannot be read once its # is gone."""
    text = commented_recipe()
    for content in (text, re.sub(r"^# (\w+: \S.*)$", lambda row: row[1] if row[1].split(":")[0] in NAMES else row[0], text, flags=re.M)):
        (tmp_path / "r.yaml").write_text(content)
        rows = parse_yaml(content)
        SCHEMA.validate(rows)
        assert build_recipe(str(tmp_path / "r.yaml"), (), {}) == Recipe(rows["base"], (rows["adapter"],) if isinstance(rows["adapter"], str) else tuple(rows["adapter"]), rows["out"])
    assert len(rows) == len(NAMES)


def test_init_writes_a_recipe_that_editors_pick_up(cli: Any, tmp_path: Path) -> None:
    """The first line of the file names a schema that is not there."""
    found = cli("recipe", "init", tmp_path / "mine.yaml")
    first = (tmp_path / "mine.yaml").read_text("utf-8").splitlines()[0]
    assert found.code == 0 and first.startswith("# yaml-language-server: $schema=")
    assert (tmp_path / first.partition("=")[2]).read_text("utf-8") == committed_schema()
    assert cli("recipe", "check", tmp_path / "mine.yaml").code == 0


def test_init_overwrites_nothing(cli: Any, tmp_path: Path) -> None:
    """An afternoon's recipe replaced by the defaults; another tool's schema of the same name replaced by ours."""
    (tmp_path / "mine.yaml").write_text("base: x\n")
    assert cli("recipe", "init", tmp_path / "mine.yaml").code == 2 and (tmp_path / "mine.yaml").read_text() == "base: x\n"
    (tmp_path / "qmerge-recipe.schema.json").write_text("{}")
    found = cli("recipe", "init", tmp_path / "new.yaml")
    assert found.code == 0 and "left as it is" in found.err and (tmp_path / "qmerge-recipe.schema.json").read_text() == "{}"


def test_check_says_what_is_missing_and_every_fault(cli: Any, tmp_path: Path) -> None:
    """A recipe without OUT, which flags give, called broken; or one fault at a time."""
    (tmp_path / "part.yaml").write_text("base: b\nadapter: a\nformat: bf16\n")
    found = cli("recipe", "check", tmp_path / "part.yaml", "--json")
    told = json.loads(found.out)
    assert found.code == 0 and told["missing"] == ["out"] and told["changed"] == {"base": "b", "adapter": ["a"], "format": "bf16"} and "--out" in found.err
    (tmp_path / "bad.yaml").write_text("bitz: 4\nsamples: 1\n")
    found = cli("recipe", "check", tmp_path / "bad.yaml")
    assert found.code == 2 and "bitz" in found.err and "--samples 1" in found.err and found.out == ""
    assert cli("recipe", "check", tmp_path / "none.yaml").code == 2


def test_schema_is_printed(cli: Any) -> None:
    """`qmerge recipe schema > FILE` with talk in it."""
    assert json.loads(cli("recipe", "schema").out) == SCHEMA.schema


def test_on_is_a_name(tmp_path: Path) -> None:
    """YAML 1.1 reads the key ``on`` as true: a recipe with ``on: original`` was refused."""
    (tmp_path / "r.yaml").write_text("base: b\nadapter: a\nout: o\non: original\nrtn: yes\n")
    found = build_recipe(str(tmp_path / "r.yaml"), (), {})
    assert found.on == "original" and found.rtn is True
