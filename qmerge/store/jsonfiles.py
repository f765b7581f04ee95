"""How is a JSON file read without trusting it?

Duplicate keys are refused (Python's own reader silently keeps the last one), sizes are capped, and every failure is a
:class:`~qmerge.errors.Refused` that names the file.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qmerge.errors import Refused
from qmerge.store.regular import read_plain

MAX_JSON_BYTES = 100_000_000


def parse_object(raw: bytes, where: str, *, constants: bool = True) -> dict[str, Any]:
    """The JSON object in ``raw`` (UTF-8 bytes). ``where`` names the file in errors.

    ``constants=False`` also refuses ``NaN`` and ``Infinity``, which are not JSON; some model configs need them; and ``-0``, which other readers take for a fraction.
    Raises Refused: not UTF-8, not JSON, a duplicate key at any depth, or not an object.
    """
    def refuse_constant(name: str) -> float:
        raise ValueError(f"{name} is not JSON")

    def whole(digits: str) -> int:
        if digits == "-0":
            raise ValueError("-0 is no whole number")
        return int(digits)

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise ValueError(f"the key {key!r} appears twice")
            found[key] = value
        return found

    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=unique, parse_constant=None if constants else refuse_constant,
                           parse_int=None if constants else whole)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise Refused("The file does not hold valid JSON.", where=where, expected="one JSON object, no key twice", found=reason,
                      fix="download or save the file again") from None
    if not isinstance(value, dict):
        raise Refused("The file holds JSON, but not an object.", where=where, expected="{ … }", found=type(value).__name__,
                      fix="download or save the file again")
    return value


def read_object(path: Path, *, what: str) -> dict[str, Any]:
    """The JSON object in the file ``path``; ``what`` says in errors what the file is ("the model's config").

    Raises Refused: missing, unreadable, larger than 100 MB, or anything :func:`parse_object` refuses.
    """
    where = f"{path.name} in {path.parent.name or path.parent}"
    try:
        raw = read_plain(path, MAX_JSON_BYTES)
    except ValueError as problem:
        raise Refused(f"{path.name} is too large to be {what}.", where=where, expected=f"at most {MAX_JSON_BYTES} bytes", found=str(problem)) from None
    except FileNotFoundError:
        raise Refused(f"{path.name} is missing ({what}).", where=str(path.parent), expected=path.name, found="no such file",
                      fix="check the folder, or download it again") from None
    except OSError as error:
        raise Refused(f"{path.name} cannot be read ({what}).", where=where, found=error.strerror, fix="see that it may be read (ls -l), then run the same command again") from None
    return parse_object(raw, where)
