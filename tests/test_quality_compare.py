"""The gate says pass, fail or inconclusive on the interval, and its words and exit code agree."""

from __future__ import annotations

import copy

import pytest

from qmerge.errors import Refused, UsageProblem
from qmerge.quality.compare import compare, exit_code, load_budget


def metric(value, half=0.0, note=None):
    return {"value": value, "ci_low": None if value is None else value - half, "ci_high": None if value is None else value + half, "n": 100, "unit": "", "note": note}


def results(**changes):
    good = {
        "ppl_ratio": metric(1.005, 0.002), "kl_mean": metric(0.004, 0.001), "kl_vs_base": metric(0.02, 0.01),
        "top1_agreement": metric(0.97, 0.01), "retention": metric(0.97, 0.02), "nonfinite": metric(0.0),
    }  # fmt: skip
    merged = {"kl_mean": metric(1e-9), "floor_factor": metric(0.001, 0.0001)}
    return {
        "fingerprint": {"texts": {"prose": {"text_sha256": "a"}}, "versions": {"torch": "1"}},
        "arms": {"base": {"texts": {}}, "separate": {"texts": {}}, "merged": {"texts": {"prose": {"metrics": merged}}},
                 "nf4": {"texts": {"prose": {"metrics": good | changes}}}},
        "tasks": {},
    }  # fmt: skip


@pytest.fixture
def budget():
    return load_budget("default")


def test_shipped_budgets_load_and_are_ordered():
    """A typing error in a shipped budget would turn the gate off."""
    strict, default, lenient = (load_budget(n)["limits"] for n in ("strict", "default", "lenient"))
    for key in default:
        side = next(iter(default[key]))
        rows = [b[key][side] for b in (strict, default, lenient)]
        assert rows == sorted(rows, reverse=side == "min"), key
    assert default["ppl_ratio"] == {"max": 1.03} and default["retention"] == {"min": 0.90}


def test_budget_faults_come_all_at_once(tmp_path):
    """One fault per run makes a person run it five times."""
    file = tmp_path / "mine.yaml"
    file.write_text("kl_meen: {max: 1}\nkl_mean: {min: 1}\nretention: 0.9\nppl_ratio: {max: .nan}\n")
    with pytest.raises(UsageProblem) as error:
        load_budget(file)
    assert all(word in str(error.value) for word in ("kl_meen", "kl_mean wants", "retention wants", "ppl_ratio.max"))
    for content in ("", "[1]", "a: ["):
        file.write_text(content)
        with pytest.raises(UsageProblem):
            load_budget(file)
    with pytest.raises(UsageProblem, match="no such budget"):
        load_budget("defautl")


def test_good_candidate_passes(budget):
    """And says with which numbers."""
    verdict = compare(results(), budget)
    assert verdict["state"] == "pass" and exit_code(verdict, strict=True) == 0
    assert "nf4 on prose: retention 0.9700 (0.9500 to 0.9900) ≥ 0.9" in verdict["reasons"]
    assert {c["state"] for c in verdict["checks"]} == {"pass"}


@pytest.mark.parametrize(("key", "bad", "unsure"), [
    ("ppl_ratio", metric(1.2, 0.01), metric(1.03, 0.01)),
    ("kl_mean", metric(0.2, 0.01), metric(0.05, 0.01)),
    ("kl_vs_base", metric(0.9, 0.01), metric(0.1, 0.01)),
    ("top1_agreement", metric(0.5, 0.01), metric(0.9, 0.01)),
    ("retention", metric(0.03, 0.01), metric(0.9, 0.05)),
    ("retention", metric(0.89, 0.001), {"value": 0.99, "ci_low": None, "ci_high": None, "note": "one cluster only"}),
])  # fmt: skip
def test_each_limit_fails_and_hesitates(budget, key, bad, unsure):
    """Each limit must bite, on the bound and not on the point, and be the first reason."""
    failed, open_ = compare(results(**{key: bad}), budget), compare(results(**{key: unsure}), budget)
    assert failed["state"] == "fail" and key in failed["reasons"][0] and exit_code(failed) == 3
    assert open_["state"] == "inconclusive" and key in open_["reasons"][0]
    assert (exit_code(open_), exit_code(open_, strict=True)) == (0, 3)


def test_bare_base_cannot_pass_where_kl_is_small(budget):
    """With a light adapter the base itself has KL 0.02, well under the absolute limit."""
    verdict = compare(results(kl_mean=metric(0.02, 0.001), kl_vs_base=metric(1.0), retention=metric(0.0)), budget)
    assert verdict["state"] == "fail"


def test_undefined_retention_is_skipped_but_one_text_must_define_it(budget):
    """Generic text cannot show that the fine-tune survived; if no text can, nothing was shown."""
    undefined = metric(None, note="the adapter's gain is not above 3 standard errors")
    alone = compare(results(retention=undefined), budget)
    assert alone["state"] == "inconclusive" and "adapter" in alone["reasons"][0]
    both = results()
    both["arms"]["nf4"]["texts"]["wiki"] = {"metrics": both["arms"]["nf4"]["texts"]["prose"]["metrics"] | {"retention": undefined, "kl_vs_base": metric(5.0)}}
    verdict = compare(both, budget)
    assert verdict["state"] == "pass"
    assert {c["metric"] for c in verdict["checks"] if c["state"] == "skipped"} == {"retention", "kl_vs_base"}


def test_a_wrong_merge_fails_even_with_a_good_candidate(budget):
    """If merged floats differ from base + adapter, the adapter was merged wrongly and the rest is luck."""
    wrong = results()
    wrong["arms"]["merged"]["texts"]["prose"]["metrics"] = {"kl_mean": metric(0.01), "floor_factor": metric(100.0, 1.0)}
    assert compare(wrong, budget)["reasons"][0].startswith("merged on prose")
    wrong["arms"]["merged"]["texts"]["prose"]["metrics"] = {"kl_mean": metric(0.01), "floor_factor": metric(None)}
    assert compare(wrong, budget)["state"] == "fail"


def test_non_finite_tokens_fail(budget):
    """They are left out of the means, so only this check can see them."""
    verdict = compare(results(nonfinite=metric(3.0)), budget)
    assert verdict["state"] == "fail" and "3 tokens are not finite" in verdict["reasons"][0]


def test_macro_accuracy_is_checked_when_tasks_ran(budget):
    """A suite that ran and is not judged looks like a pass."""
    ran = results() | {"tasks": {"arc": {}}}
    assert compare(ran, budget)["state"] == "inconclusive"
    ran["arms"]["nf4"]["tasks"] = {"macro_accuracy_delta": metric(-0.05, 0.01)}
    assert compare(ran, budget)["state"] == "fail"


def test_no_candidate_is_no_pass(budget):
    """An empty comparison must not be green."""
    empty = results()
    del empty["arms"]["nf4"]
    assert compare(empty, budget)["state"] == "inconclusive"


def test_baseline_needs_the_same_fingerprint(budget):
    """Numbers of two protocols differ by more than any 4-bit loss."""
    old = copy.deepcopy(results())
    old["fingerprint"]["texts"]["prose"]["text_sha256"] = "b"
    with pytest.raises(Refused, match="texts.prose.text_sha256"):
        compare(results(), budget, old)
    old = copy.deepcopy(results())
    old["fingerprint"]["versions"]["torch"] = "2"
    with pytest.raises(Refused, match="versions.torch"):
        compare(results(), budget, old)
    assert compare(results(), budget, old, ignore_versions=True)["state"] == "pass"


def test_baseline_regression_fails(budget):
    """Still within budget, measurably worse than last time."""
    verdict = compare(results(kl_mean=metric(0.01, 0.001)), budget, results())
    assert verdict["state"] == "fail" and "baseline" in verdict["reasons"][0]
    assert compare(results(kl_mean=metric(0.0045, 0.001)), budget, results())["state"] == "inconclusive", "12 % worse, and the interval reaches back"
    assert compare(results(kl_mean=metric(0.0041, 0.001)), budget, results())["state"] == "pass", "what another processor changes"
