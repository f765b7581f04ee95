"""Which commands do README, CONTRIBUTING and docs show, and which of them carry a mark why they are not run?

A command block is a fence of ``sh``, ``bash`` or ``python``. ``<!-- not run: REASON -->`` on the line above it says why that block is not run.
As a program (``python tests/support/documented.py``) it prints the count by page.
"""

from __future__ import annotations

import os
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [page for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))) if page.exists()]
SHELLS, CODE = ("sh", "bash", "shell", "console"), ("python", "py")
MARK = re.compile(r"^\s*<!-- not run: (.+?) -->\s*$")
FENCE = re.compile(r"^(\s*)(`{3,})(\S*)")
SETTING = re.compile(r"[A-Z_]+=\S*$")


@dataclass(frozen=True)
class Block:
    """``number``: the line of the fence; ``reason``: why it is not run, None where it is."""

    page: Path
    number: int
    language: str
    body: str
    reason: str | None

    @property
    def where(self) -> str:
        return f"{label(self.page)}:{self.number}"

    @property
    def commands(self) -> list[str]:
        """Each command of a shell block, its continuation lines joined and its comment left out; a Python block whole, as one."""
        if self.language in CODE:
            return [self.body]
        lines = [re.sub(r"(^|\s+)#\s.*$", "", line).strip() for line in self.body.replace("\\\n", " ").splitlines()]
        return [line for line in lines if line and not line.startswith("#")]


def label(page: Path) -> str:
    return os.path.relpath(page, ROOT)


def program(command: str) -> str:
    """The first word of a command that is no setting: ``HF_HUB_OFFLINE=1 qmerge eval …`` is qmerge's."""
    words = shlex.split(command)
    return next((word for word in words if not SETTING.match(word)), "")


def fences(page: Path) -> list[Block]:
    """Every fenced block of a page, commands or not."""
    lines = page.read_text("utf-8").splitlines()
    found, at = [], 0
    while at < len(lines):
        if opened := FENCE.match(lines[at]):
            indent, ticks, language = opened.groups()
            end = next((row for row in range(at + 1, len(lines)) if lines[row].strip() == ticks), len(lines))
            body = "\n".join(line.removeprefix(indent) for line in lines[at + 1 : end])
            mark = MARK.search(lines[at - 1]) if at else None
            found.append(Block(page, at + 1, language, body, mark[1] if mark else None))
            at = end
        at += 1
    return found


def blocks(page: Path) -> list[Block]:
    """The command blocks of a page, in its order."""
    return [block for block in fences(page) if block.language in (*SHELLS, *CODE)]


def count() -> list[tuple[str, int, int, int, int]]:
    """``(page, blocks, commands, commands that are run, commands that are marked)`` for each page that has any."""
    rows = []
    for page in PAGES:
        found = blocks(page)
        run, marked = (sum(len(block.commands) for block in found if (block.reason is None) is wanted) for wanted in (True, False))
        if found:
            rows.append((label(page), len(found), run + marked, run, marked))
    return rows


def table() -> str:
    rows = count()
    rows.append(("all", *(sum(row[column] for row in rows) for column in range(1, 5))))
    return "\n".join(f"{page:<44}{total:>7}{commands:>10}{run:>6}{marked:>8}" for page, total, commands, run, marked in [("page", "blocks", "commands", "run", "marked"), *rows])


if __name__ == "__main__":
    print(table())
