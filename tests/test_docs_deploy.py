"""Do the deployment pages and what `qmerge advise` and the model card say of engines agree?"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from qmerge.report.engines import ENGINES, loads

ROOT = Path(__file__).parents[1]
PAGES = ROOT / "docs/deploy"


def _table() -> dict[str, dict[str, str]]:
    """Engine -> column -> cell, of the first table of docs/deploy/README.md; engines by the name of their page."""
    head, _, *rows = [line.strip("| ").split(" | ") for line in (PAGES / "README.md").read_text("utf-8").splitlines() if line.startswith("|")]
    columns = [re.sub(r"^merged ", "", name).strip("`") for name in head[2:]]
    return {page[1]: dict(zip(columns, row[2:], strict=True)) for row in rows if (page := re.match(r"\[.+?\]\((.+?)\.md\)", row[0]))}


TABLE = _table()


def test_every_engine_has_its_page_and_row() -> None:
    """Catches a page that the index forgets, and a row that leads nowhere."""
    assert set(TABLE) == {page.stem for page in PAGES.glob("*.md")} - {"README"} and set(ENGINES) <= set(TABLE)


@pytest.mark.parametrize("kind", ["gptq", "nf4", "compressed-tensors", "awq", "bf16"])
@pytest.mark.parametrize("engine", ENGINES)
def test_what_the_table_says_is_what_advise_says(engine: str, kind: str) -> None:
    """Catches a second truth: a format that the page promises and `qmerge advise --engine` rules out, or the other way round."""
    assert loads(engine, kind) is not TABLE[engine][kind].startswith(("no", "not"))


@pytest.mark.parametrize("page", sorted(PAGES.glob("*.md")), ids=lambda page: page.stem)
def test_pages_of_engines_say_what_was_run(page: Path) -> None:
    """Catches a page that lets its reader believe that commands were tried which were only read."""
    text = page.read_text("utf-8")
    assert page.stem in ("README", "transformers") or ("**Not run here" in text and "<!-- not run: " in text and "Read: " in text)


def test_the_named_tests_exist() -> None:
    """Catches evidence by a test that was renamed or removed."""
    named = re.findall(r"tests/(test_\w+\.py)(?:::(test_\w+))?", "\n".join(page.read_text("utf-8") for page in PAGES.glob("*.md")))
    lost = [name for name in named if not (ROOT / "tests" / name[0]).exists() or (name[1] and f"def {name[1]}(" not in (ROOT / "tests" / name[0]).read_text("utf-8"))]
    assert len(named) >= 4 and set(lost) <= {("test_docs_commands.py", "")}  # comes with another branch
