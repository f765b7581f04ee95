"""Can the files that a command will write be written, and would they take the place of something else? Asked before anything is measured."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

from qmerge.errors import UsageProblem

MOST_READ = 512 * 1024 * 1024
LONGEST_NAME = 200
"""bytes; temporary names are longer, and file systems stop at 255"""


def check_file(target: str | Path, flag: str, inputs: Iterable[str | Path] = ()) -> None:
    """``UsageProblem`` where ``target``, the file that ``flag`` names, is a folder, cannot be made, is one of ``inputs`` or lies inside one."""
    path = Path(target)
    if len(os.fsencode(path.name)) > LONGEST_NAME:
        raise UsageProblem(f"the name of {flag} is too long", where=path.name[:40] + "…", expected=f"at most {LONGEST_NAME} bytes")
    if path.is_dir():
        raise UsageProblem(f"{flag} names a folder", where=str(target), expected="a file to write", found="a folder", fix=f"{flag} {path / 'results.json'}" if flag == "--out" else None)
    nearest = next(parent for parent in path.absolute().parents if os.path.lexists(parent))
    if not nearest.is_dir():
        raise UsageProblem(f"{flag} lies below a file", where=str(target), expected="a file to write, in a folder", found=f"{nearest.name} is a file")
    try:
        with tempfile.TemporaryFile(dir=nearest):
            pass  # the only way to know: root may write everywhere, but not to a read-only disk or to /proc
    except OSError as error:
        raise UsageProblem(f"{flag} cannot be written", where=str(target), expected="a folder that can be written to", found=f"{nearest.name or nearest}: {error.strerror or error}") from error
    whole = path.resolve()
    for source in inputs:
        place = Path(source)
        if whole == place.resolve() or place.resolve() in whole.parents:
            raise UsageProblem(f"{flag} would change an input", where=str(target), expected="a file elsewhere", found=f"it {'is' if whole == place.resolve() else 'lies inside'} {place.name}")


def check_results_file(target: str | Path, flag: str, inputs: Iterable[str | Path] = ()) -> None:
    """`check_file` of a results.json, beside which an .npz and a folder .samples go, and which replaces nothing but results."""
    path = Path(target)
    check_file(path, flag, inputs)
    if path.suffix in (".npz", ".samples"):
        raise UsageProblem(f"{flag} has the name of what goes beside it", where=str(target), expected="a results.json", found=path.suffix, fix=f"{flag} {path.with_suffix('.json')}")
    if path.exists() and not _is_results(path):
        raise UsageProblem(f"{flag} exists and holds no results of qmerge, so it is not replaced", where=str(target), fix="choose another name, or remove the file yourself")
    for beside in (path.with_suffix(".npz"), path.with_suffix(".samples")):
        if beside.exists() and beside.is_dir() != (beside.suffix == ".samples"):
            raise UsageProblem(f"what goes beside {flag} cannot be written", where=str(beside), expected="a folder" if beside.suffix == ".samples" else "a file", found="a file" if beside.is_file() else "a folder")


def _is_results(path: Path) -> bool:
    """Also of an older or newer layout, and half of one: whoever measures again wants it replaced."""
    try:
        if not path.is_file() or path.stat().st_size > MOST_READ:
            return False
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError):
        return False
    if not text.strip():
        return True
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return '"schema_version"' in text[:200]
    return isinstance(content, dict) and "schema_version" in content
