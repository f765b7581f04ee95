"""Do the speed benchmark's ratios and the comparison of two of its files say what was measured, and no more?"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

from bench_speed import in_turn, ratio  # noqa: E402
from compare_speed import change, main  # noqa: E402


def _file(path: Path, **rows: dict) -> Path:
    path.write_text(json.dumps({"schema": "speed/1", "machine": {"cores": 2}, "versions": {}, "rows": rows}))
    return path


def _compare(monkeypatch: pytest.MonkeyPatch, *paths: Path) -> int:
    monkeypatch.setattr(sys, "argv", ["compare_speed.py", *map(str, paths)])
    return main()


def test_a_ratio_is_of_pairs() -> None:
    """Catches a ratio of two means, which a slow minute that hits both arms moves."""
    row = ratio("r", "", [1.0, 10.0, 2.0], [2.0, 20.0, 4.0])
    assert row["value"] == pytest.approx(0.5) and row["ci_low"] == pytest.approx(0.5) and row["n"] == 3
    assert ratio("r", "", [1.0, 4.0], [1.0, 1.0])["value"] == pytest.approx(2.0), "the geometric mean: which side is above does not matter"


def test_the_interval_of_a_ratio_covers() -> None:
    """Catches a normal quantile for three rounds: the t interval of the logarithm covers in about 95 of 100."""
    random = np.random.default_rng(0)
    covered = 0
    for _ in range(600):
        noise = random.normal(0, 0.2, (2, 3))
        row = ratio("r", "", list(1.5 * np.exp(noise[0])), list(np.exp(noise[1])))
        covered += row["ci_low"] <= 1.5 <= row["ci_high"]
    assert 0.92 < covered / 600 < 0.98


def test_arms_take_turns_in_an_order_that_turns_round() -> None:
    """Catches an arm that always runs second, on warm caches."""
    order: list[str] = []
    found = in_turn(3, {"a": lambda: order.append("a"), "b": lambda: order.append("b") or 5.0})
    assert "".join(order) == "abbaab" and found["b"] == [5.0] * 3 and all(0 <= taken < 1 for taken in found["a"])


def test_a_regression_is_named_and_noise_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """Catches a comparison that passes a part which became 1.5 x slower, or fails one that is within its spread or within 10 %."""
    steady = {"value": 1.0, "ci_low": 0.98, "ci_high": 1 / 0.98, "n": 5}
    loose = {"value": 1.0, "ci_low": 0.5, "ci_high": 2.0, "n": 3}
    old = _file(tmp_path / "old.json", slow=steady, near=steady, noisy=loose, gone=steady)
    new = _file(tmp_path / "new.json", slow={k: v * 1.5 if k != "n" else v for k, v in steady.items()}, near={k: v * 1.06 if k != "n" else v for k, v in steady.items()},
                noisy={k: v * 1.5 if k != "n" else v for k, v in loose.items()})
    assert _compare(monkeypatch, old, new) == 3
    said = capsys.readouterr().out
    assert said.endswith("slower by more than 10%: slow\n") and "noisy: 1 → 1.5" in said and "cannot be told" in said and "gone: only in the old file" in said
    assert _compare(monkeypatch, old, old) == 0


def test_other_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """Catches a comparison of two files that hold no ratios, which would find nothing slower."""
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(SystemExit) as ended:
        _compare(monkeypatch, tmp_path / "other.json", tmp_path / "other.json")
    assert ended.value.code == 2 and "bench_speed.py" in capsys.readouterr().err


def test_the_change_of_two_files_has_both_spreads() -> None:
    """Catches an interval that forgets the old file's spread."""
    steady, loose = ({"value": 1.0, "ci_low": 1 / w, "ci_high": w, "n": 5} for w in (1.01, 1.2))
    assert change(steady, loose)[2] > 1.15 and change(loose, steady)[2] > 1.15 and math.isclose(change(steady, steady)[0], 1.0)
