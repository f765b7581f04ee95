"""Are files that a command would write refused before it works, where they cannot be written or would replace something else?"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_report_results import passing_results

from qmerge.api.targets import check_file, check_results_file
from qmerge.errors import UsageProblem

EVAL = ("eval", "--base", "b", "--adapter", "a", "--candidate", "c", "--text", "t.txt")


@pytest.fixture()
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "results.json"
    path.write_text(json.dumps(passing_results()))
    (tmp_path / "afile").write_text("mine")
    (tmp_path / "adir").mkdir()
    (tmp_path / "b").mkdir()
    return path


@pytest.mark.parametrize("target", ["adir", "afile/r.json", "afile/deep/r.json", "r.npz", "r.samples", "afile", "b/r.json", "n" * 250, "n" * 300])
def test_eval_refuses_a_results_file_before_it_measures(cli, results: Path, target: str) -> None:
    """Catches an hour of measuring that ends in NotADirectoryError, results over the .npz beside them, a file of the user's replaced, or one put into an input."""
    before = sorted(results.parent.rglob("*"))
    answer = cli(*EVAL, "--out", target)
    assert answer.code == 2 and "--out" in answer.err and "Traceback" not in answer.err
    assert sorted(results.parent.rglob("*")) == before and (results.parent / "afile").read_text() == "mine"


@pytest.mark.parametrize("flag", ["--junit", "--save-baseline"])
@pytest.mark.parametrize("target", ["results.json", "adir", "afile/x"])
def test_compare_does_not_write_over_what_it_reads(cli, results: Path, flag: str, target: str) -> None:
    """Catches `--save-baseline results.json`, which left of the results only their excerpt, and `--junit results.json`, which left none."""
    before = results.read_text()
    answer = cli("compare", results.name, flag, target)
    assert answer.code == 2 and flag in answer.err and results.read_text() == before


def test_results_may_be_replaced_by_results(tmp_path: Path) -> None:
    """Catches a check that is too strict: whoever measures again wants the old file replaced, also one that was cut short."""
    for text in ('{"schema_version": 1}', '{"schema_version": 7}', '{\n "schema_version": 1, "arms": {"a', ""):
        (tmp_path / "r.json").write_text(text)
        check_results_file(tmp_path / "r.json", "--out")
    check_file(tmp_path / "new/folder/r.json", "--out", [tmp_path / "base", "org/name"])


def test_a_folder_that_cannot_be_written_is_named() -> None:
    """Catches PermissionError after the work; /proc is a folder in which nobody, root neither, makes files."""
    with pytest.raises(UsageProblem, match="cannot be written"):
        check_file("/proc/nowhere/results.json", "--out")


def test_a_report_is_written_whole_or_not_at_all(cli, results: Path) -> None:
    """Catches report.md beside a report.html that could not be written."""
    (results.parent / "page/report.html").mkdir(parents=True)
    answer = cli("report", results.name, "--out", "page")
    assert answer.code == 2 and "report.html names a folder" in answer.err and not (results.parent / "page/report.md").exists()


@pytest.mark.parametrize("words", [("--baseline", ""), ("--junit", ""), ("--save-baseline", ""), ("--budget", "")])
def test_an_empty_value_is_no_absent_one(cli, results: Path, words: tuple[str, str]) -> None:
    """Catches `--baseline "$ACCEPTED"` with a variable that is not set: a gate that passes without its baseline."""
    answer = cli("compare", results.name, *words)
    assert answer.code == 2 and words[0] in answer.err and "empty value" in answer.err


def test_a_text_without_a_file_is_not_the_working_folder(cli, results: Path) -> None:
    """Catches `--text "prose=$FILE"` with a variable that is not set: every text of the folder was measured."""
    answer = cli(*EVAL[:-2], "--text", "prose=", "--out", "r.json")
    assert answer.code == 2 and "prose=" in answer.err and "no file" in answer.err


def test_a_number_that_is_none_does_not_pass_the_gate(cli, results: Path) -> None:
    """Catches NaN in results.json, which every limit let through: it is no JSON, and qmerge never writes it."""
    results.write_text(results.read_text().replace('"value": 0.9', '"value": NaN', 1))
    assert "NaN" in results.read_text()
    answer = cli("compare", results.name)
    assert answer.code == 4 and "NaN" in answer.err
