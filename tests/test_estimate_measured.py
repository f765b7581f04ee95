"""Do real processes take what their runs foresaw?"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def script():
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        import measure_estimates
    finally:
        sys.path.remove(str(ROOT / "scripts"))
    return measure_estimates


def check(row):
    """Within a fifth: the peak of memory, and the disk between what must lie there and what may; within a percent: the output."""
    told = row.foreseen
    assert abs(row.ram - told["peak_ram_bytes"]) <= 0.2 * row.ram, (told["peak_ram_bytes"], row.ram)
    assert abs(row.written - told["bytes_written"]) <= 0.01 * row.written, (told["bytes_written"], row.written)
    assert 0.8 * told["bytes_written"] <= row.disk <= 1.2 * told["disk_most_bytes"], (told["disk_most_bytes"], row.disk)


@pytest.mark.parametrize("fmt", ["bf16", *(pytest.param(fmt, marks=pytest.mark.slow) for fmt in ("gptq", "nf4"))])
def test_a_small_model_takes_what_it_foresaw(script, tmp_path, fmt):
    """A refusal, or a start, on figures that no process ever had."""
    (tmp_path / "run").mkdir()
    model = {"base": str(script.DEMO / "base-nf4"), "adapter": str(script.DEMO / "adapter")}
    more = () if fmt == "bf16" else ("--samples", "8", "--tokens", "256", "--curvature-tokens", "0" if fmt == "nf4" else "2048")
    check(script.taken(script.words(model, fmt, *more), tmp_path / "run"))


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.parametrize("fmt", ["gptq", "nf4", "bf16"])
def test_a_model_that_outweighs_the_libraries_takes_what_it_foresaw(script, tmp_path, fmt):
    """Formulas that only the libraries' share makes right: here activations, statistics and solver are more than half of the peak. The time only within a factor of five: machines are busy."""
    model, more = script.made(tmp_path, **script.MADE), () if fmt == "bf16" else ("--samples", "16", "--tokens", "512")
    (tmp_path / "run").mkdir()
    row = script.taken(script.words(model, fmt, *more), tmp_path / "run")
    check(row)
    assert 0.2 <= row.elapsed_s / row.foreseen["elapsed_s"] <= 5
