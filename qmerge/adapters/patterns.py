"""Could a stranger's regular expression take for ever?

PEFT's configs hold patterns that are matched against every module's name, by PEFT and here. Python's engine tries every way to split a text among nested repeats, so thirty
letters can take longer than a life; there is no time limit to set. So the pattern's own tree is looked at, before it meets a name.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass, replace
from math import comb
from typing import Any

from qmerge.errors import Refused

if sys.version_info >= (3, 11):
    from re import _parser  # the tree has no public name
else:
    import sre_parse as _parser

MOST_LETTERS = 4000
LETTERS = 64
"""of a module's name, about"""
MOST_WAYS = 2.0**26
"""in which such a name may be split among the repeats of a pattern: seconds, where a name is made for it"""
_REPEATS = ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT")


def check_pattern(pattern: Any, where: str) -> None:
    """Refused where ``pattern`` is no regular expression, has a repeat or a choice inside a repeat, or can split a name in more ways than `MOST_WAYS`."""
    if not isinstance(pattern, str) or len(pattern) > MOST_LETTERS:
        raise Refused("A pattern of the adapter's config is no regular expression.", where=where, expected=f"text of at most {MOST_LETTERS} letters", found=repr(pattern)[:120])
    try:
        tree = _parser.parse(pattern)
        ways = _shape(tree, False).ways
    except (re.error, RecursionError, OverflowError) as error:
        raise Refused("A pattern of the adapter's config is no regular expression.", where=where, found=str(error)[:200]) from None
    if ways > MOST_WAYS:
        raise Refused("A pattern of the adapter's config could take for ever to match.", where=where, expected="few repeats and choices in a row, none inside a repeat", found=repr(pattern)[:120],
                      fix='in adapter_config.json, write the names out: "target_modules": ["q_proj", "k_proj", …], as they are in the tensors\' names')


def check_compiles(pattern: str, where: str) -> None:
    """Refused where ``pattern`` is no regular expression."""
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise Refused("A pattern of the adapter's config is no regular expression.", where=where, found=str(error)[:200]) from None


@dataclass(frozen=True)
class _Shape:
    """Of a part of a pattern: its ``repeats``, one after the other, ``choices`` that may fit at one place, and the ways of what it ``looks`` at aside."""

    repeats: int = 0
    choices: float = 1.0
    looks: float = 1.0

    @property
    def ways(self) -> float:
        """Repeats share a name in order: as many ways as there are to put so many bars between its letters."""
        return max(self.looks, self.choices * comb(LETTERS + self.repeats, self.repeats))

    def then(self, other: _Shape) -> _Shape:
        return _Shape(self.repeats + other.repeats, self.choices * other.choices, max(self.looks, other.looks))


def _shape(tree: Any, inside: bool) -> _Shape:
    """Infinitely many choices where a repeat or a choice lies ``inside`` a repeat."""
    found = _Shape()
    for operator, value in tree:
        name = str(operator)
        if name in _REPEATS:
            least, most, body = value
            found = found.then(_shape(body, inside or int(most) > 1))
            if int(most) > int(least):
                found = found.then(_Shape(choices=float("inf")) if inside else _Shape(choices=2) if int(most) == 1 else _Shape(1))
        elif name == "BRANCH":
            found = found.then(_Shape(choices=float("inf")) if inside else _either(value[1], inside))
        elif name == "GROUPREF_EXISTS":
            found = found.then(_either([way for way in value[1:] if way is not None], inside))
        elif name in ("ASSERT", "ASSERT_NOT"):  # looked at from each place that what is before it leads to, and then left as it is
            found = replace(found, looks=max(found.looks, found.then(_shape(value[1], inside)).ways))
        elif name in ("SUBPATTERN", "ATOMIC_GROUP"):
            found = found.then(_shape(value[-1] if name == "SUBPATTERN" else value, inside))
    return found


def _either(ways: list[Any], inside: bool) -> _Shape:
    """One of several. Of plain words only those fit at one place that begin one another."""
    words = [_word(way) for way in ways]
    if None not in words:
        return _Shape(choices=max(sum(str(word).startswith(str(other)) for other in words) for word in words))
    shapes = [_shape(way, inside) for way in ways]
    return _Shape(max(shape.repeats for shape in shapes), sum(shape.choices for shape in shapes), max(shape.looks for shape in shapes))


def _word(tree: Any) -> str | None:
    """The text that a part stands for, where it is plain letters."""
    return "".join(chr(value) for _, value in tree) if all(str(operator) == "LITERAL" for operator, _ in tree) else None
