"""Are numbers written with the digits that are known, and do the tables hold what was measured?"""

from __future__ import annotations

import pytest
from test_report_results import build_results, hostile_results

from qmerge.report.numbers import format_limit, format_metric, format_value
from qmerge.report.sections import Section
from qmerge.report.tables import check_rows, fingerprint_rows, notes, plain_table, summary_rows, terminal_table
from qmerge.types import Metric


@pytest.mark.parametrize(
    ("value", "kind", "shown"),
    [
        (0.000114, "kl", "0.00011"),
        (0.04071, "kl", "0.0407"),
        (0.0012, "kl", "0.0012"),
        (0.0, "kl", "0"),
        (3.14e-7, "kl", "3.1e−7"),
        (1.234, "kl", "1.23"),
        (12.3449, "ppl", "12.34"),
        (6691.4, "ppl", "6691"),
        (0.9912, "percent", "99.1 %"),
        (-0.0004, "percent", "0.0 %"),
        (-0.004, "points", "−0.4 points"),
        (0.0021, "signed", "+0.0021"),
        (None, "kl", "—"),
    ],
)
def test_values_golden(value: float | None, kind: str, shown: str) -> None:
    """Catches false precision, a lost minus sign and "-0.0"."""
    assert format_value(value, kind) == shown


def test_interval_has_the_decimals_of_its_value() -> None:
    """Catches bounds rounded to other places than the value that they enclose."""
    assert format_metric(Metric(0.000114, 0.0000934, 0.00013, 48, "nats/token"), "kl") == "0.00011 (0.00009 to 0.00013)"
    assert format_metric({"value": 99.12, "ci_low": 97.0, "ci_high": 101.3, "n": 9, "unit": "%"}, "percent") == "99.1 % (97.0 to 101.3)"
    assert format_metric({"value": 4.6e-7, "ci_low": -3.7e-5, "ci_high": 3.7e-5}, "signed") == "0.000000 (−0.000037 to +0.000037)"


def test_undefined_is_not_missing() -> None:
    """Catches an undefined metric shown like one that was not measured, and NaN shown at all."""
    assert format_metric({"value": None, "note": "denominator inside the noise"}, "percent") == "undefined"
    assert format_metric({"value": float("nan"), "ci_low": None, "ci_high": None}, "kl") == "—"
    assert format_metric(None, "kl") == "—"
    said = notes(build_results(), "wikitext-2")
    assert said == ["Retention is undefined for base, merged, nf4, naive: the adapter's gain is inside the noise."]


def test_limits_show_their_direction() -> None:
    """Catches a minimum written as a maximum."""
    assert format_limit("top1_agreement", 0.9) == "≥ 90 %"
    assert format_limit("kl_mean", 0.05) == "≤ 0.05"
    assert format_limit("kl_mean", {"max": 0.05}) == "≤ 0.05" and format_limit("something_new", {"min": 2}) == "≥ 2"
    assert format_limit("macro_accuracy_delta", {"min": -0.02}) == "≥ −2 points"
    assert format_limit("something_new", 3) == "3"
    assert format_limit("kl_mean", None) == "—"


def test_summary_golden() -> None:
    """Catches swapped columns and arms."""
    rows = {row["arm"]: row for row in summary_rows(build_results(), "gsm8k-test")}
    assert list(rows) == ["base", "separate", "merged", "nf4", "naive"]
    assert rows["nf4"] == {
        "arm": "nf4",
        "kind": "nf4",
        "perplexity": "12.35 (12.09 to 12.61)",
        "kl": "0.00011 (0.00010 to 0.00012)",
        "top1": "98.6 % (98.2 to 99.0)",
        "retention": "99.1 % (97.0 to 101.2)",
        "bytes": "8.11 MB",
    }
    assert rows["separate"]["kl"] == "0 (reference)"


def test_failures_come_first_in_the_gate() -> None:
    """Catches the one failed check hidden below twenty passed ones."""
    rows = check_rows(build_results())
    assert [row["state"] for row in rows] == ["fail"] + ["pass"] * 5 + ["skipped"]
    assert rows[-1]["measured"] == "—"
    assert rows[0]["measured"] == "3.1 % (1.0 to 5.2)" and rows[0]["limit"] == "≥ 90 %"


def test_terminal_golden() -> None:
    """Catches columns that do not line up."""
    block = terminal_table(build_results()).split("\n\n")[0].splitlines()
    assert block[0] == "on gsm8k-test"
    assert block[6] == "nf4       12.35       0.00011 (0.00010 to 0.00012)     98.6 %  99.1 % (97.0 to 101.2)   8.11 MB"
    assert all(line[8:10] == "  " for line in block[1:2] + block[3:])


def test_terminal_is_at_most_110_columns_and_has_no_escapes() -> None:
    """Catches wide names that break the table, and a name that writes ANSI codes to the terminal."""
    results = hostile_results()
    results["arms"]["名前" * 60] = results["arms"].pop(next(name for name in results["arms"] if name.startswith("nf4")))
    table = terminal_table(results)
    assert max(map(len, table.splitlines())) <= 110
    assert not any(ord(char) < 32 and char != "\n" or ord(char) in range(0x7F, 0xA0) for char in table)


def test_fingerprint_hides_absolute_paths() -> None:
    """Catches a report that tells where a machine keeps its files."""
    rows = dict(fingerprint_rows({"fingerprint": {"base": "/home/someone/models/base", "texts": ["C:\\data\\a.txt"], "window": 2048}}))
    assert rows == {"base": "…/base", "texts": "…/a.txt", "window": "2048"}


def test_a_terminal_cuts_no_number_in_half() -> None:
    """Catches "0.0 points (−64.…": an interval that one cannot read, in a table that has no room for it."""
    rows = tuple((("demo", f"own-questions-{index} (acc_norm)", ("45.5 %", "12.1 to 83.4"), ("0.0 points", "−64.9 to 64.9"), "0", "1", ("+0.0035", "−0.0041 to 0.0110"))) for index in range(3))
    section = Section("Benchmarks", "", ("arm", "task", "accuracy", "difference", "flipped", "McNemar p", "gold margin, nats"), rows)
    shown = plain_table(section, 110)
    assert "…" not in shown and "0.0 points (−64.9 to 64.9)" in shown and "12.1 to" not in shown and max(map(len, shown.splitlines())) <= 110
    assert "12.1 to 83.4" in plain_table(section, 160) and "+0.0035 (−0.0041 to 0.0110)" in plain_table(section, 160)
