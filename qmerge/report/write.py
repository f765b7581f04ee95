"""How do report.md, report.html and the other files of a report reach the disk, whole or not at all?"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from qmerge.errors import UsageProblem
from qmerge.report.fields import Results
from qmerge.report.html import render_html
from qmerge.report.junit import render_junit
from qmerge.report.markdown import render_markdown


def write_report(results: Results, out_dir: str | Path) -> tuple[Path, Path]:
    """Write ``report.md`` and ``report.html`` into ``out_dir`` (made if missing); both are rendered before either is written."""
    folder = Path(out_dir)
    pages = {"report.md": render_markdown(results), "report.html": render_html(results)}
    folder.mkdir(parents=True, exist_ok=True)
    for name, page in pages.items():
        _replace(folder / name, page)
    return folder / "report.md", folder / "report.html"


def write_junit(results: Results, target: str | Path, strict: bool = False) -> None:
    """Write the verdict's checks as JUnit XML to ``target``."""
    write_page(target, render_junit(results, strict))


def write_json(value: Any, target: str | Path) -> None:
    """Write ``value`` as JSON, one space deep, sorted as given."""
    write_page(target, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def write_page(target: str | Path, page: str) -> None:
    """One page at ``target``, in a folder that is made if missing. ``UsageProblem`` where a folder has that name."""
    target = Path(target)
    if target.is_dir():
        raise UsageProblem("this names a folder", where=str(target), expected="a file to write", found="a folder")
    if target.parent.exists() and not target.parent.is_dir():
        raise UsageProblem("this lies below a file", where=str(target), expected="a file to write in a folder", found="a file")
    target.parent.mkdir(parents=True, exist_ok=True)
    _replace(target, page)


def _replace(target: Path, page: str) -> None:
    handle, temporary = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as file:
            file.write(page)
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp makes it private; a report has the rights of any new file
        os.replace(temporary, target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
