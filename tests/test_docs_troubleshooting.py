"""Does docs/troubleshooting.md quote messages that qmerge still has?"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
QUOTED = re.findall(r"\*\*`(.+?)`\*\*", (ROOT / "docs/troubleshooting.md").read_text("utf-8"))
GAP = "\0"
"""where a message holds a value"""
STATES = ("FAIL", "INCONCLUSIVE", "FAILED files:", "note")
"""words that the output puts before a line, from a value"""


def _texts() -> set[str]:
    """Every string of the package; an f-string with a gap for each value."""
    found: set[str] = set()
    for file in (ROOT / "qmerge").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.add(node.value)
            elif isinstance(node, ast.JoinedStr):
                found.add("".join(str(part.value) if isinstance(part, ast.Constant) else GAP for part in node.values))
    return found


TEXTS = _texts()
WITH_VALUES = [re.compile(".+".join(map(re.escape, text.split(GAP)))) for text in TEXTS if GAP in text and len(text.replace(GAP, "").strip()) >= 10]


@pytest.mark.parametrize("message", QUOTED)
def test_quoted_messages_are_in_the_code(message: str) -> None:
    """Catches a page that explains an error whose words have changed: whoever searches it for what they see would find nothing."""
    pieces = [piece.strip() for piece in re.split(r"…|'[xy]'|\(budget", message) if len(piece.strip()) > 3]
    lost = [piece for piece in pieces if piece not in STATES and not any(piece in text for text in TEXTS) and not any(form.search(piece) for form in WITH_VALUES)]
    whole = message.replace("…", "a value")  # a value may stand where the page quotes words of it
    assert pieces and (not lost or any(form.fullmatch(whole) for form in WITH_VALUES))
