"""Are the committed files that are made from the code those that the code makes now?"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
from write_generated import GENERATED, ROOT  # noqa: E402


@pytest.mark.parametrize("name", GENERATED)
def test_generated_files_are_current(name: str) -> None:
    """Pages and schemas that describe an older version. `python scripts/write_generated.py` writes them."""
    assert (ROOT / name).read_text("utf-8") == GENERATED[name]()
