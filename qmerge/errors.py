"""What can go wrong, and with which exit code.

    QmergeError
    ├── UsageProblem   2   malformed command, option, recipe or budget
    ├── BelowBudget    3   measured, and worse than the budget allows
    ├── Refused        4   inputs were read and refused; nothing was written
    ├── CheckFailed    1   a finished file does not hold what it claims
    └── Interrupted   75   stopped by a signal or out of room; can be run again

Every message says what happened, where, what was expected and found, what to do, and what was written. Names in it may come from strangers' files, so it is shown
as `printable` text.
"""

from __future__ import annotations

import unicodedata

EXIT_CODES = {0: "fine", 1: "failed", 2: "malformed command or recipe", 3: "quality below budget", 4: "inputs refused (nothing written)", 75: "interrupted or out of room"}
"""what a process that ends with them says"""
MOST_SHOWN = 2000
"""characters of one part of a message"""
_ACTING = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})


def printable(text: str) -> str:
    r"""``text`` with every character that a terminal acts on, or that hides or turns others, written as Python writes it; line ends and tabs stay:
    ``printable("a\x1b[2Jb") == "a\\x1b[2Jb"``."""
    return text if text.isprintable() else "".join(char if char in "\n\t" or unicodedata.category(char) not in _ACTING else ascii(char)[1:-1] for char in text)


class QmergeError(Exception):
    """Base of every error that qmerge raises on purpose.

    ``what`` is one sentence; the rest are optional fragments that are printed one per line.
    """

    exit_code = 1

    def __init__(
        self,
        what: str,
        *,
        where: str | None = None,
        expected: object | None = None,
        found: object | None = None,
        fix: str | None = None,
        written: str | None = None,
    ) -> None:
        self.what, self.where, self.expected, self.found, self.fix, self.written = what, where, expected, found, fix, written
        super().__init__(what)

    def __str__(self) -> str:
        rows = [_shown(self.what)]
        labels = (
            ("where", self.where),
            ("expected", self.expected),
            ("found", self.found),
            ("what to do", self.fix),
            ("written", self.written),
        )
        rows += [f"  {label + ':':<12}{_shown(value)}" for label, value in labels if value is not None]
        return "\n".join(rows)


def _shown(part: object) -> str:
    text = str(part)
    return printable(text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]} … ({len(text)} characters)")


class UsageProblem(QmergeError):
    exit_code = 2


class BelowBudget(QmergeError):
    exit_code = 3


class Refused(QmergeError):
    """Inputs were read and refused before anything was written."""

    exit_code = 4

    def __init__(self, what: str, **details: object) -> None:
        details.setdefault("written", "nothing")
        super().__init__(what, **details)  # type: ignore[arg-type]


class CheckFailed(QmergeError):
    exit_code = 1


class Interrupted(QmergeError):
    exit_code = 75
