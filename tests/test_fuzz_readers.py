"""Does every reader of foreign files keep its contract on some hundred inputs, changed at random? `make fuzz RUNS=…` gives as many as one likes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from fuzz.campaign import faults, reported
from fuzz.run import READERS

ROOT = Path(__file__).parents[1]
RUN = [sys.executable, str(ROOT / "tests" / "fuzz" / "run.py")]
FINE = {"inputs": 9, "accepted": 4, "refused": 5, "failed": 0, "places": {}}


def test_every_harness_is_run() -> None:
    """Catches a harness that no list names, so that nobody runs it."""
    files = {path.stem for path in (ROOT / "tests" / "fuzz").glob("*.py") if "def check(" in path.read_text()}
    assert files == {*READERS, "planted"}


@pytest.mark.parametrize("reader", READERS)
def test_some_hundred_inputs(reader: str, tmp_path: Path) -> None:
    """Catches a crash that is no message, a hang, something accepted that the reference reader refuses; and a harness that refuses what its reader has to accept."""
    done = subprocess.run([*RUN, reader, "--runs", "600", "--engine", "plain", "--found", str(tmp_path)], capture_output=True, text=True, timeout=300, check=False, cwd=ROOT)
    assert faults(reported(done.stdout), done.returncode, 600) == [], done.stderr[-2000:]


@pytest.mark.parametrize("engine", ["plain", "auto"])
def test_a_planted_fault_is_found(engine: str, tmp_path: Path) -> None:
    """Catches a fuzzer that reports success whatever the reader does."""
    done = subprocess.run([*RUN, "planted", "--runs", "3000", "--engine", engine, "--found", str(tmp_path)], capture_output=True, text=True, timeout=300, check=False, cwd=ROOT)
    row = reported(done.stdout)
    assert done.returncode == 1 and row and row["failed"] > 0 and row["inputs"] == 3000
    (name,) = row["places"].values()
    assert b"q" in (tmp_path / name).read_bytes()


@pytest.mark.parametrize(
    ("row", "code"),
    [(None, 0), (None, -9), (FINE, 1), (FINE | {"inputs": 8}, 0), (FINE | {"accepted": 0}, 0), (FINE | {"refused": 0}, 0), (FINE | {"failed": 1}, 0)],
    ids=["no report", "killed", "exit code", "too few inputs", "nothing accepted", "nothing refused", "a failure"],
)
def test_a_process_that_did_not_do_its_work_is_a_fault(row: dict[str, object] | None, code: int) -> None:
    """Catches a campaign that counts inputs nobody ran."""
    assert faults(FINE, 0, 9) == []
    assert faults(row, code, 9) != []


@pytest.mark.parametrize("text", ["", "\n", "Killed", "[1]", "5", json.dumps({"inputs": 5}), json.dumps(FINE) + "\nTraceback"])
def test_no_row_is_no_report(text: str) -> None:
    """Catches a campaign that takes the words of a dying process for its result."""
    assert reported(text) is None
    assert reported("words\n" + json.dumps(FINE) + "\n") == FINE
