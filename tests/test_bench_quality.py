"""scripts/bench_quality.py: are its ratios and its words "met" and "missed" computed from the scores?"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from qmerge.quality.measure import TokenScores

SCRIPT = Path(__file__).parent.parent / "scripts" / "bench_quality.py"


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("bench_quality", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def scores(kl: np.ndarray) -> TokenScores:
    n, zeros = len(kl), np.zeros(len(kl), np.float32)
    window = np.arange(n, dtype=np.int32) // 10
    return TokenScores(zeros, zeros, kl.astype(np.float32), zeros == 0, zeros, zeros, window, window)


def test_the_ratio_of_two_arms_is_paired_by_window(bench):
    """Would catch a bootstrap that draws the two arms apart: half of the other arm's KL everywhere is half with no spread at all."""
    kl = np.random.default_rng(0).lognormal(size=400)
    row = bench.kl_ratio(scores(kl / 2), scores(kl))
    assert row == {"value": pytest.approx(0.5), "ci_low": pytest.approx(0.5), "ci_high": pytest.approx(0.5), "windows": 40}


@pytest.mark.parametrize(
    ("factor", "kept", "words"),
    [
        (0.5, (0.98, 0.97, 0.99), ["met", "missed", "met"]),
        (0.9, (0.97, 0.95, 0.99), ["missed", "missed", "met (the interval reaches over the target)"]),
        (0.7001, (None, None, None), ["missed", "missed", "unknown"]),
    ],
)
def test_a_promise_is_judged_by_its_number(bench, factor, kept, words):
    """Would catch a table that says "met" whatever was measured."""
    kl = np.random.default_rng(0).lognormal(size=400)
    arms = {"nf4": {"retention": dict(zip(("value", "ci_low", "ci_high"), kept, strict=True))}}
    measured = {"gptq": scores(kl * factor), "gptqmodel": scores(kl), "nf4": scores(kl), "rtn": scores(kl)}
    assert [row["state"] for row in bench.promises(measured, arms)] == words
