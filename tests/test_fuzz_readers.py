"""Does every reader of foreign files keep its contract on some hundred inputs, changed at random? `make fuzz RUNS=…` gives as many as one likes."""

from __future__ import annotations

import json
import logging
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from fuzz.campaign import faults, reported
from fuzz.keep import fit
from fuzz.run import READERS, Count, corpus, load, quiet, run_plain

ROOT = Path(__file__).parents[1]
RUN = [sys.executable, str(ROOT / "tests" / "fuzz" / "run.py")]
SOME = 400
FINE = {"inputs": 9, "accepted": 4, "refused": 5, "failed": 0, "places": {}}


def test_every_harness_is_run() -> None:
    """Catches a harness that no list names, so that nobody runs it."""
    files = {path.stem for path in (ROOT / "tests" / "fuzz").glob("*.py") if "def check(" in path.read_text()}
    assert files == {*READERS, "planted"}


@pytest.fixture
def silent() -> Iterator[None]:
    """Libraries warn about what they are given, and a library that logs formats what it was given."""
    before, alarm = logging.root.manager.disable, signal.getsignal(signal.SIGALRM)
    with warnings.catch_warnings():
        quiet()
        yield
    logging.disable(before)
    signal.signal(signal.SIGALRM, alarm)


@pytest.mark.parametrize("reader", READERS)
def test_seeds_corpus_and_some_hundred_inputs(reader: str, tmp_path: Path, silent: None) -> None:
    """Catches a crash that is no message, a hang, something accepted that the reference reader refuses; a fault that was found before; and a harness that refuses what its
    reader has to accept, or the other way round."""
    module, count, runs = load(reader), Count(reader, "plain", tmp_path), len(corpus(reader)) + SOME
    count.start(module)
    run_plain(module, count, runs, 1, None)
    assert faults(count.row(), 0, runs) == []


@pytest.mark.parametrize("engine", ["plain", "auto"])
def test_a_planted_fault_is_found(engine: str, tmp_path: Path) -> None:
    """Catches a fuzzer that reports success whatever the reader does."""
    done = subprocess.run([*RUN, "planted", "--runs", "3000", "--engine", engine, "--found", str(tmp_path)], capture_output=True, text=True, timeout=900, check=False, cwd=ROOT)
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


def test_the_corpus_is_small_and_names_nobodys_folders() -> None:
    """Catches megabytes in the repository, files of a reader that is gone, and a path of the machine that found an input."""
    files = [path for path in (ROOT / "tests" / "fuzz" / "corpus").rglob("*") if path.is_file()]
    assert {path.parent.name for path in files} == set(READERS)
    assert sum(path.stat().st_size for path in files) < 1_000_000 and all(fit(path.read_bytes()) for path in files)
