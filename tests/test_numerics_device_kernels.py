"""Do the Triton kernels for an accelerator give the codes of the plain tensor code? In Triton's interpreter: no device is needed, and none has run them yet."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
TESTS = Path(__file__).parent


@pytest.fixture(scope="module")
def differences() -> dict[str, dict[str, float]]:
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(TESTS.parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, str(TESTS / "support" / "interpreted_kernels.py")], env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def test_rounding_gives_the_same_codes(differences) -> None:
    """Catches a kernel that feeds errors to columns that are rounded already, masks an odd block's edge wrongly, or breaks ties another way. Sums are ordered alike, so at most a tie in a thousand differs."""
    assert len(differences) == 6
    for case, found in differences.items():
        assert found["rounding"] <= 1e-3 and abs(found["rounding, loss"]) < 1e-4, case


def test_descent_gives_the_same_codes(differences) -> None:
    """Catches a sweep that works on a stale gradient; and a check of it on codes that no sweep moves."""
    for case, found in differences.items():
        assert found["descent"] <= 1e-3 and abs(found["descent, loss"]) < 1e-4, case
        assert found["moved by descent"] > 0.05, case
