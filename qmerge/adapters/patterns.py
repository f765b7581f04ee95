"""Could a stranger's regular expression take for ever?

PEFT's configs hold patterns that are matched against every module's name, by PEFT and here. Python's engine tries every way to split a text among nested repeats, so thirty
letters can take longer than a life; there is no time limit to set. So the pattern's own tree is looked at, before it meets a name.
"""

from __future__ import annotations

import re
import sys
from typing import Any

from qmerge.errors import Refused

if sys.version_info >= (3, 11):
    from re import _parser  # the tree has no public name
else:
    import sre_parse as _parser

MOST_LETTERS = 4000
MOST_REPEATS = 6
"""open-ended repeats one after the other: time grows with the length of a name to this power, in the worst case"""
_REPEATS = ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT")


def check_pattern(pattern: Any, where: str) -> None:
    """Refused where ``pattern`` is no regular expression, has a repeat or a choice inside a repeat, or more open-ended repeats in a row than `MOST_REPEATS`."""
    if not isinstance(pattern, str) or len(pattern) > MOST_LETTERS:
        raise Refused("A pattern of the adapter's config is no regular expression.", where=where, expected=f"text of at most {MOST_LETTERS} letters", found=repr(pattern)[:120])
    try:
        tree = _parser.parse(pattern)
        repeats = _repeats(tree, False)
    except (re.error, RecursionError, OverflowError) as error:
        raise Refused("A pattern of the adapter's config is no regular expression.", where=where, found=str(error)[:200]) from None
    if repeats > MOST_REPEATS:
        raise Refused("A pattern of the adapter's config could take for ever to match.", where=where, expected=f"at most {MOST_REPEATS} repeats in a row, none inside another", found=repr(pattern)[:120],
                      fix="write the modules' names out in adapter_config.json")


def _repeats(tree: Any, inside: bool) -> int:
    """Open-ended repeats on the longest way through ``tree``; far too many where one lies within another (or a choice does, ``inside`` a repeat)."""
    count = 0
    for operator, value in tree:
        name = str(operator)
        if name in _REPEATS:
            least, most, body = value
            many = int(most) > 1 and int(most) != int(least)
            count += (MOST_REPEATS + 1 if inside and int(most) != int(least) else int(many)) + _repeats(body, inside or int(most) > 1)
        elif name == "BRANCH":
            ways = [_repeats(way, inside) for way in value[1]]
            count += max(ways) + (MOST_REPEATS + 1 if inside else 0)
        elif name == "GROUPREF_EXISTS":
            count += sum(_repeats(way, inside) for way in value[1:] if way is not None)
        elif name in ("ASSERT", "ASSERT_NOT"):
            count += _repeats(value[1], inside)
        elif name in ("SUBPATTERN", "ATOMIC_GROUP"):
            count += _repeats(value[-1] if name == "SUBPATTERN" else value, inside)
    return count
