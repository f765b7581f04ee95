"""scripts/bench_eval.py: does it run on a real model, and does its page follow from what was measured?"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))


def test_a_small_case_runs_to_a_page_and_is_added_to(zoo, tmp_path, monkeypatch):
    """Would catch a benchmark that has rotted: a name of the package that moved, a row that the comparison of two files refuses, a case that wipes out another."""
    import bench_eval
    from compare_speed import read

    case = bench_eval.Case("tiny", ((4, 16),), Path(zoo.nf4("llama")), Path(zoo.adapter("llama")), Path(zoo.held_out), several=2)
    monkeypatch.setattr(bench_eval, "CASES", (case, bench_eval.Case("gone", ((1, 8),), tmp_path / "none", tmp_path / "none")))
    for words in ([], ["--keep"]):
        monkeypatch.setattr(sys, "argv", ["bench_eval.py", "--rounds=2", f"--out={tmp_path / 'speed.json'}", *words])
        bench_eval.main()
    found = read(tmp_path / "speed.json")
    assert set(found["rows"]) == {"evaluate/tiny/16", "evaluate/tiny/2 candidates"} and set(found["beside"]) == {"tiny"} and "&&" in found["command"]
    page = (tmp_path / "speed.md").read_text()
    assert "tiny/16: 4 windows of 16" in page and f"{found['rows']['evaluate/tiny/16']['value']:.2f}" in page and str(tmp_path) not in page + json.dumps(found)


def test_the_committed_page_is_made_of_the_committed_figures():
    """Figures that were changed in one of the two files, or a ratio above its aim that nobody was told of."""
    import bench_eval

    folder = Path(__file__).parents[1] / "docs" / "measurements"
    found = json.loads((folder / "evaluation-speed.json").read_text(encoding="utf-8"))
    assert (folder / "evaluation-speed.md").read_text(encoding="utf-8") == bench_eval.page(found)
    assert all(row["value"] <= row["limit"] for row in found["rows"].values())


@pytest.mark.parametrize("rounds", ["1", "0"])
def test_one_round_has_no_spread(rounds, monkeypatch, capsys):
    """An interval of width 0 that would make every later run a regression."""
    import bench_eval

    monkeypatch.setattr(sys, "argv", ["bench_eval.py", f"--rounds={rounds}"])
    with pytest.raises(SystemExit):
        bench_eval.main()
    assert "at least 2" in capsys.readouterr().err
