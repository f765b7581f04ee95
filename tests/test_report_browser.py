"""Does a browser show the pages without overlap, spilling, console messages or requests, on a phone and a desktop, light and dark? Needs Chromium."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import shutil
from pathlib import Path

import pytest
from report_rich import hostile_rich_results, rich_results

from qmerge.report.history import collect, render_history_html
from qmerge.report.html import render_html

CHROMIUM = os.environ.get("QMERGE_TEST_CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
ROOT = Path(__file__).parents[1]


@pytest.mark.skipif(not CHROMIUM, reason="skipped: no chromium on this machine")
@pytest.mark.parametrize("name", ["rich", "hostile", "history", "notebook"])
def test_nothing_overlaps_or_complains(name: str, tmp_path: Path) -> None:
    """Catches labels that cover each other, a page wider than a phone, and anything that the content policy had to stop."""
    pytest.importorskip("aiohttp")
    spec = importlib.util.spec_from_file_location("look_at_page", ROOT / "scripts" / "look_at_page.py")
    look_at_page = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(look_at_page)
    page = tmp_path / "page.html"
    if name == "history":
        for number in range(5):
            (tmp_path / f"{number}").mkdir()
            (tmp_path / f"{number}/results.json").write_text(json.dumps(rich_results() | {"measured_at": f"2026-03-0{number + 1}T00:00:00+00:00"}))
        page.write_text(render_history_html(collect(tmp_path, "kl_mean")), "utf-8")
    elif name == "notebook":
        shutil.copyfile(ROOT / "docs" / "separate_vs_merged.html", page)
    else:
        page.write_text(render_html({"rich": rich_results, "hostile": hostile_rich_results}[name]()), "utf-8")
    assert asyncio.run(look_at_page.look(page, None, str(CHROMIUM))) == []
