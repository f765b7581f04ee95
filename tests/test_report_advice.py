"""Is the recommendation the one that the measured values support, and are only readable results read?"""

from __future__ import annotations

import pytest
from test_report_results import build_results, passing_results

from qmerge.errors import Refused, UsageProblem
from qmerge.report import fields
from qmerge.report.advice import recommend
from qmerge.report.load import load_results


def test_a_failed_check_of_a_shared_arm_counts_for_every_candidate() -> None:
    """Catches "ship it" beside a failed verdict, where the float merge itself is off."""
    results = build_results()
    results["verdict"]["checks"].append({"arm": "merged", "text": "gsm8k-test", "metric": "merged_floor_factor", "value": 3.0, "limit": 2, "state": "fail"})
    assert fields.candidate_state(results, "nf4") == "fail"
    results["verdict"]["checks"] = results["verdict"]["checks"][-1:]
    del results["arms"]["naive"]
    advice = recommend(results)
    assert advice.action == "keep_separate"
    assert advice.reason == "merged: KL of merged over the noise floor on gsm8k-test is 3.00, the budget asks for ≤ 2."


def test_advice_ships_the_passing_candidate_with_the_smallest_kl() -> None:
    """Catches a recommendation taken from the overall verdict or from the order of the file."""
    advice = recommend(build_results())
    assert (advice.action, advice.candidate) == ("ship", "nf4")
    assert "0.00052 nats/token" in advice.reason and "6.5 × the noise floor" in advice.reason and "99.1 %" in advice.reason
    assert advice.reason.endswith("nf4 passes all of its own checks; the verdict is about the other candidates.")
    alone = recommend(passing_results())
    assert (alone.action, alone.candidate) == ("ship", "nf4") and "the verdict is about" not in alone.reason


def test_advice_keeps_separate_and_says_why() -> None:
    """Catches a failed candidate that is recommended, or a "no" without the measured value and its limit."""
    results = build_results()
    del results["arms"]["nf4"]
    advice = recommend(results)
    assert advice.action == "keep_separate" and advice.candidate is None
    assert advice.reason == "naive: retention on gsm8k-test is 3.1 % (1.0 to 5.2), the budget asks for ≥ 90 %."


def test_advice_asks_for_more_text_when_undecided() -> None:
    """Catches "inconclusive" being read as pass or as fail."""
    results = build_results()
    for check in results["verdict"]["checks"]:
        check["state"] = "inconclusive" if check["arm"] == "nf4" else "fail"
    advice = recommend(results)
    assert advice.action == "collect_more" and advice.candidate == "nf4"


def test_load_refuses_another_layout(tmp_path) -> None:
    """Catches numbers of a later schema being shown under today's names."""
    (tmp_path / "results.json").write_text('{"schema_version": 2}')
    with pytest.raises(Refused, match="layout"):
        load_results(tmp_path / "results.json")
    (tmp_path / "results.json").write_text("not json")
    with pytest.raises(Refused, match="JSON"):
        load_results(tmp_path / "results.json")
    with pytest.raises(UsageProblem):
        load_results(tmp_path / "absent.json")
