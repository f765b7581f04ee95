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
MOST_WAYS = 2.0**30
"""in which a name of 64 letters may be split among the repeats of a pattern and the choices in a row: seconds, in the worst case"""
_REPEATS = ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT")


def check_pattern(pattern: Any, where: str) -> None:
    """Refused where ``pattern`` is no regular expression, has a repeat or a choice inside a repeat, or can split a name in more ways than `MOST_WAYS`."""
    if not isinstance(pattern, str) or len(pattern) > MOST_LETTERS:
        raise Refused("A pattern of the adapter's config is no regular expression.", where=where, expected=f"text of at most {MOST_LETTERS} letters", found=repr(pattern)[:120])
    try:
        tree = _parser.parse(pattern)
        ways = _ways(tree, False)
    except (re.error, RecursionError, OverflowError) as error:
        raise Refused("A pattern of the adapter's config is no regular expression.", where=where, found=str(error)[:200]) from None
    if ways > MOST_WAYS:
        raise Refused("A pattern of the adapter's config could take for ever to match.", where=where, expected="few repeats and choices in a row, none inside a repeat", found=repr(pattern)[:120],
                      fix="write the modules' names out in adapter_config.json")


def check_compiles(pattern: str, where: str) -> None:
    """Refused where ``pattern`` is no regular expression."""
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise Refused("A pattern of the adapter's config is no regular expression.", where=where, found=str(error)[:200]) from None


def _ways(tree: Any, inside: bool) -> float:
    """In how many ways a name may be split along ``tree``; infinitely many where a repeat or a choice lies ``inside`` a repeat."""
    ways = 1.0
    for operator, value in tree:
        name = str(operator)
        if name in _REPEATS:
            least, most, body = value
            spread = min(int(most) - int(least) + 1, 64)
            ways *= _ways(body, inside or int(most) > 1) * (float("inf") if inside and spread > 1 else spread)
        elif name == "BRANCH":
            ways *= float("inf") if inside else sum(_ways(way, inside) for way in value[1])
        elif name == "GROUPREF_EXISTS":
            ways *= sum(_ways(way, inside) for way in value[1:] if way is not None)
        elif name in ("ASSERT", "ASSERT_NOT"):
            ways *= _ways(value[1], inside)
        elif name in ("SUBPATTERN", "ATOMIC_GROUP"):
            ways *= _ways(value[-1] if name == "SUBPATTERN" else value, inside)
    return ways
