"""How do report.md and report.html reach the disk, whole or not at all?"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from qmerge.report.fields import Results
from qmerge.report.html import render_html
from qmerge.report.markdown import render_markdown


def write_report(results: Results, out_dir: str | Path) -> tuple[Path, Path]:
    """Write ``report.md`` and ``report.html`` into ``out_dir`` (made if missing); both are rendered before either is written."""
    folder = Path(out_dir)
    pages = {"report.md": render_markdown(results), "report.html": render_html(results)}
    folder.mkdir(parents=True, exist_ok=True)
    for name, page in pages.items():
        _replace(folder / name, page)
    return folder / "report.md", folder / "report.html"


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
