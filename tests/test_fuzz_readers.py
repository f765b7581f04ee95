"""Does every reader of foreign files keep its contract on some hundred inputs, changed at random? `make fuzz RUNS=…` gives as many as one likes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("reader", ["header", "index", "adapter", "recipe", "budget", "suite", "training", "results", "report", "sidecar", "manifest", "texts"])
def test_some_hundred_inputs(reader: str, tmp_path: Path) -> None:
    """Catches a crash that is no message, a hang, and something accepted that the reference reader refuses; and a harness that no longer reaches its reader."""
    words = [sys.executable, str(ROOT / "tests" / "fuzz" / "run.py"), reader, "--runs", "600", "--engine", "plain", "--found", str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300, check=False, cwd=ROOT)
    row = json.loads(done.stdout.splitlines()[-1])
    assert done.returncode == 0 and row["failed"] == 0, done.stderr[-2000:]
    assert row["inputs"] == 600 and row["accepted"] > 0 and row["refused"] > 0
