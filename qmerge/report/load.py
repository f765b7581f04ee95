"""Where is a results.json, and can this version read it?"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NoReturn

from qmerge.errors import Refused, UsageProblem
from qmerge.report.clean import clean
from qmerge.report.schema import faults

SCHEMA_VERSION = 1
MAX_BYTES = 512 * 1024 * 1024
MOST_DIGITS = 300
AGAIN = "it was cut short or is another file: take it from where it was kept, or measure again with qmerge eval"


def load_results(path: str | Path, whole: bool = False) -> dict[str, Any]:
    """The results as a dict. ``whole``: they must follow results.schema.json, since a verdict on half a file would be one on nothing; a
    report shows what is there. A relative ``path`` is looked up from the working directory, then from its ``eval`` folder, where the notebook lives.

    Raises ``UsageProblem`` when there is no such file and ``Refused`` when it is not results.json of schema version 1, or leaves its schema.
    """
    given = Path(path).expanduser()
    tried = [given] if given.is_absolute() else [Path.cwd() / given, Path.cwd() / "eval" / given]
    folder = next((place for place in tried if place.is_dir()), None)
    if folder is not None:
        raise UsageProblem("This is a folder, not results.", where=str(path), expected="a results.json", found="a folder", fix=f"did you mean {given / 'results.json'}?")
    found = next((place for place in tried if place.is_file()), None)
    if found is None:
        fix = "check the path: qmerge run writes OUT.eval/results.json, and qmerge compare RESULTS --save-baseline FILE a baseline"
        raise UsageProblem("There is no such results file.", where=str(path), expected="a results.json that qmerge run or qmerge eval wrote", found="nothing", fix=fix)
    if found.stat().st_size > MAX_BYTES:
        raise Refused("This results.json is too large to be one.", where=str(path), expected=f"at most {MAX_BYTES} bytes")
    try:
        text = found.read_text("utf-8")
        results = json.loads(text, parse_constant=_no_number, parse_float=_finite, parse_int=_whole)
        if "\\ud" in text.lower():  # half a character, which JSON can spell and no file can hold
            json.dumps(results, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise Refused("This file is not JSON.", where=str(path), expected="a results.json that qmerge run or qmerge eval wrote", found=str(error), fix=AGAIN) from error
    version = results.get("schema_version") if isinstance(results, dict) else None
    if not isinstance(results, dict) or version != SCHEMA_VERSION:
        fix = "Use the qmerge that wrote it, or evaluate again."
        raise Refused("These results have another layout.", where=str(path), expected=f"schema_version {SCHEMA_VERSION}", found="none" if version is None else version, fix=fix)
    if whole:
        check_whole(results, path)
    return results


def _no_number(word: str) -> NoReturn:
    raise ValueError(f"{word} is no number of JSON, and no result")


def _finite(word: str) -> float:
    """What is read has to be written again by `bench --into` and `compare --save-baseline`; 1e999 would be infinity, which passes limits too."""
    return value if math.isfinite(value := float(word)) else _no_number(word)


def _whole(word: str) -> int:
    """A whole number that a float can be as large as: limits are."""
    return int(word) if len(word) < MOST_DIGITS else _no_number(f"a number of {len(word)} digits")


def check_whole(results: dict[str, Any], path: str | Path) -> None:
    """``Refused`` where ``results``, read from ``path``, leave results.schema.json."""
    if wrong := faults(results):
        raise Refused("These results are damaged or incomplete.", where=str(path), expected="results.schema.json", found="; ".join(clean(fault) for fault in wrong[:5]), fix="evaluate again")
