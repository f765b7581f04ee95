"""Does a history join only what was measured alike, in the order of time, and survive what lies in a folder?"""

from __future__ import annotations

import json
import os
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
from report_rich import hostile_rich_results, rich_results
from test_report_html import ALLOWED, _read
from test_report_markdown import _tables

from qmerge.errors import UsageProblem
from qmerge.report.history import collect, plot, render_history_html, render_history_markdown


def _write(folder: Path, name: str, results: dict[str, Any], when: str | None, kl: float | None = None, torch: str = "2.11.0") -> Path:
    path = folder / name / "results.json"
    path.parent.mkdir(parents=True)
    results.pop("measured_at", None)
    if when:
        results["measured_at"] = when
    results["fingerprint"]["versions"]["torch"] = torch
    if kl is not None:
        results["arms"]["nf4"]["texts"]["gsm8k-test"]["metrics"]["kl_mean"] |= {"value": kl, "ci_low": kl * 0.9, "ci_high": kl * 1.1}
    path.write_text(json.dumps(results, ensure_ascii=True))
    return path


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Four runs, written in another order than they were measured; the last with another torch; the second has no time of its own."""
    _write(tmp_path, "c", rich_results(), "2026-03-03T00:00:00+00:00", 0.0003)
    _write(tmp_path, "a", rich_results(), "2026-03-01T12:00:00+02:00", 0.0001)
    untimed = _write(tmp_path, "z", rich_results(), None, 0.0002)
    os.utime(untimed, (1772409600, 1772409600))  # 2026-03-02
    _write(tmp_path, "b", rich_results(), "2026-03-04T00:00:00+00:00", 0.0004, torch="2.12.0")
    return tmp_path


def _values(history: Any, text: str, arm: str) -> list[list[float]]:
    return [[point.metric["value"] for point in points] for (where, name, _), points in history.series.items() if (where, name) == (text, arm)]


def test_runs_are_in_the_order_of_their_measurement(runs: Path) -> None:
    """Catches the order of file names, and a file without a time put at either end."""
    assert sorted(_values(collect(runs, "kl_mean"), "gsm8k-test", "nf4"), key=len) == [[0.0004], [0.0001, 0.0002, 0.0003]]


def test_unlike_fingerprints_are_never_joined(runs: Path) -> None:
    """Catches one line through two protocols, whose step would be read as a regression; versions are joined on request only."""
    apart, joined = collect(runs, "kl_mean"), collect(runs, "kl_mean", ignore_versions=True)
    assert _values(joined, "gsm8k-test", "nf4") == [[0.0001, 0.0002, 0.0003, 0.0004]]
    digests = {digest for text, arm, digest in apart.series if (text, arm) == ("gsm8k-test", "nf4")}
    assert len(digests) == 2 and all(digest in render_history_html(apart) for digest in digests)
    results = rich_results()
    results["fingerprint"]["protocol"]["window"] = 512
    _write(runs, "other", results, "2026-03-05T00:00:00+00:00")
    assert len(_values(collect(runs, "kl_mean", ignore_versions=True), "gsm8k-test", "nf4")) == 2


def test_other_metrics_and_tasks(runs: Path) -> None:
    """Catches a history that knows texts only, and a misspelt metric shown as an empty page."""
    assert {text for text, _, _ in collect(runs, "accuracy").series} == {"arc_easy", "piqa", "winogrande"}
    assert {text for text, _, _ in collect(runs, "macro_accuracy_delta").series} == {"tasks"}
    with pytest.raises(UsageProblem, match="no such metric"):
        collect(runs, "kl")


def test_what_is_no_results_file_is_named_and_left_out(runs: Path, tmp_path: Path) -> None:
    """Catches one broken file that hides the history, links followed out of the folder or round in circles, and hidden folders read."""
    (runs / "broken").mkdir()
    (runs / "broken/results.json").write_text("{")
    (runs / "old").mkdir()
    (runs / "old/results.json").write_text('{"schema_version": 7}')
    (runs / "loop").symlink_to(runs, target_is_directory=True)
    (runs / "linked-results.json").symlink_to(runs / "c/results.json")
    _write(runs, ".hidden", rich_results(), None)
    found = collect(runs, "kl_mean")
    assert found.files == 6 and [name for name, _ in found.unread] == ["broken/results.json", "old/results.json"]
    assert "broken/results.json" in render_history_html(found)


def test_plots_and_pages_are_well_formed_and_inert(tmp_path: Path) -> None:
    """Catches elements that names bring along, in the drawing, in HTML and in Markdown: hostile arms, texts, fingerprints and files."""
    for number in range(3):
        _write(tmp_path, f"plain/{number}", rich_results(), f"2026-03-0{number + 1}T00:00:00+00:00")
        hostile = hostile_rich_results(10_000 if number else 0)
        hostile["fingerprint"] = {"versions": {}}
        hostile = json.loads(json.dumps(hostile).replace("\\ud800", ""))  # half a character is refused with the file
        _write(tmp_path, f"hostile/{number}<script>alert(1)<|`\u202e\x1b[31m", hostile, f"2026-03-0{number + 1}T00:00:00+00:00")
    for name in ("plain", "hostile"):
        found = collect(tmp_path / name, "kl_mean")
        page = render_history_html(found)
        assert {tag for tag, _ in _read(page)} <= ALLOWED and "\x1b" not in page and "\u202e" not in page and "<script" not in page
        assert not [row for _, row in _read(page) if any(key.startswith("on") or key in ("src", "href") for key in row)]
        text = next(iter(found.series))[0]
        assert ElementTree.fromstring(plot(found, text)).tag.endswith("svg")
        markdown = render_history_markdown(found)
        assert all(len({row.count("|") for row in rows}) == 1 for rows in _tables(markdown)) and "<" not in markdown and len(markdown.encode()) < 200_000


@pytest.mark.parametrize("values", [[0.0], [0.0, 0.0], [1e-9, 1.0], [-1.0, 1.0]])
def test_degenerate_histories_draw(tmp_path: Path, values: list[float]) -> None:
    """Catches a logarithm of zero and an axis of no length."""
    for index, value in enumerate(values):
        _write(tmp_path, str(index), rich_results(), f"2026-03-0{index + 1}T00:00:00+00:00", value)
    assert ElementTree.fromstring(plot(collect(tmp_path, "kl_mean"), "gsm8k-test")) is not None


def test_command(cli, runs: Path, tmp_path: Path) -> None:
    """Catches a --history that needs a results.json, and one that writes an empty page without a word."""
    answer = cli("report", "--history", runs, "--metric", "top1_agreement", "--out", tmp_path / "page")
    assert answer.code == 0 and "top-1 agreement" in (tmp_path / "page/history.md").read_text()
    assert (tmp_path / "page/history.html").read_text().count("<figure>") == 2
    (tmp_path / "empty").mkdir()
    assert cli("report", "--history", tmp_path / "empty", "--out", tmp_path / "page").code == 2
    assert cli("report", "--out", tmp_path / "page").code == 2 and cli("report", runs / "a/results.json", "--history", runs, "--out", tmp_path / "page").code == 2
