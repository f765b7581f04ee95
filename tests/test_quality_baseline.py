"""Is new held against old with the right statistics, and is a regression found at the stated rates?"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from report_rich import rich_results

from qmerge.errors import Refused
from qmerge.quality.baseline import MARGINS, baseline_checks, baseline_of, unpaired_difference
from qmerge.quality.compare import compare, load_budget
from qmerge.quality.measure import TokenScores
from qmerge.quality.sidecar import recompute, write_results
from qmerge.quality.stats import cluster_ratio
from qmerge.report.schema import faults

NOTHING = {"name": "none", "limits": {}}
DOCS, LENGTH = 60, 40


def _scores(seed: int, scale: float = 1.0, drift: float = 0.0) -> dict[str, TokenScores]:
    """Base and candidate on one text of ``DOCS`` correlated documents. The text is the same for every seed; ``seed`` draws the candidate's own
    rounding, ``scale`` multiplies its KL, ``drift`` is added to its loss."""
    text, own = np.random.default_rng(0), np.random.default_rng(seed + 1)
    doc = np.repeat(np.arange(DOCS), LENGTH).astype(np.int32)
    hard = text.lognormal(0, 0.8, DOCS)[doc] * text.lognormal(0, 1.0, len(doc))
    ref = (2.0 + text.normal(0, 0.5, DOCS)[doc] + text.exponential(1.0, len(doc))).astype(np.float32)
    base = ref + 0.3 * hard.astype(np.float32)
    kl = (scale * 1e-3 * hard * own.gamma(8, 1 / 8, DOCS)[doc] * own.gamma(2, 1 / 2, len(doc))).astype(np.float32)
    cand = (ref + drift + np.sqrt(kl) * own.normal(0, 1, len(doc))).astype(np.float32)

    def row(nll: np.ndarray, kls: np.ndarray, agree: float) -> TokenScores:
        return TokenScores(ref, nll, kls, own.random(len(doc)) < agree, np.zeros(len(doc), np.float32), np.full(len(doc), 0.5, np.float32), doc, doc)

    return {"base": row(base, (0.05 * hard).astype(np.float32), 0.7), "nf4": row(cand, kl, 0.97)}


def _results(scores: dict[str, TokenScores]) -> dict[str, Any]:
    """results.json around these scores."""
    arms = {name: {"kind": name, "bytes": 8, "texts": {"prose": {"metrics": {}}}} for name in scores}
    blank = {"schema_version": 1, "fingerprint": {"texts": {"prose": {"token_ids_sha256": "a"}}, "versions": {"torch": "1"}}, "arms": arms, "noise_floor": {}, "tasks": {}}
    done = recompute(blank, {"prose": scores})
    return done | {"verdict": {"state": "pass"}}


def _checks(new: dict[str, TokenScores], old: dict[str, TokenScores], paired: bool = True) -> dict[str, dict[str, Any]]:
    tokens = ({"prose": new}, {"prose": old}) if paired else None
    verdict = compare(_results(new), NOTHING, _results(old), tokens=tokens)
    return {row["metric"].removesuffix("_vs_baseline"): row for row in verdict["checks"]}


def test_paired_differences_are_those_of_a_slow_reading() -> None:
    """Catches a difference of the wrong arrays, a wrong sign, or an interval that takes tokens for independent: the arrays subtracted by hand."""
    new, old = _scores(1, 1.3), _scores(2)
    found = _checks(new, old)
    by_hand = {
        "kl_mean": (new["nf4"].kl.astype(float) - old["nf4"].kl, None),
        "nll_delta": (new["nf4"].nll_cand.astype(float) - old["nf4"].nll_cand, None),
        "top1_agreement": (new["nf4"].agree.astype(float) - old["nf4"].agree, None),
        "retention": (old["nf4"].nll_cand.astype(float) - new["nf4"].nll_cand, new["base"].nll_cand.astype(float) - new["nf4"].nll_ref),
    }
    for key, (top, bottom) in by_hand.items():
        bottom = np.ones(len(top)) if bottom is None else bottom
        whole = cluster_ratio(top, bottom, new["nf4"].doc)
        assert found[key]["value"] == pytest.approx(top.sum() / bottom.sum(), rel=1e-4, abs=1e-8), key
        assert found[key]["paired"] and [found[key][end] for end in ("ci_low", "ci_high")] == pytest.approx([whole.ci_low, whole.ci_high], rel=1e-4, abs=1e-8), key
        tokens = np.std(top - whole.value * bottom) / abs(bottom.sum()) * np.sqrt(len(top))
        assert found[key]["ci_high"] - found[key]["ci_low"] > 2 * 1.96 * tokens * (1.3 if key == "kl_mean" else 0.8), "by document, not by token"


def test_unpaired_is_the_difference_of_two_intervals_and_is_said_so() -> None:
    """Catches a comparison without sidecars that pretends to be paired."""
    new, old = _scores(1, 1.3), _scores(2)
    found = _checks(new, old, paired=False)["kl_mean"]
    ends = [_results(scores)["arms"]["nf4"]["texts"]["prose"]["metrics"]["kl_mean"] for scores in (new, old)]
    half = np.hypot(*((row["ci_high"] - row["ci_low"]) / 2 for row in ends))
    assert not found["paired"] and "from the two intervals" in found["reason"]
    assert (found["ci_low"], found["ci_high"]) == pytest.approx((ends[0]["value"] - ends[1]["value"] - half, ends[0]["value"] - ends[1]["value"] + half))
    assert unpaired_difference(ends[0], {"value": 1.0}) is None


def test_arrays_of_other_tokens_or_other_results_are_not_paired() -> None:
    """Catches differences of tokens that have nothing to do with each other, or of a sidecar that a later run has overwritten."""
    new, old = _scores(1), _scores(2)
    other = {name: TokenScores(**vars(row) | {"doc": row.doc[::-1].copy()}) for name, row in old.items()}
    stale = {name: TokenScores(**vars(row) | {"kl": row.kl * 1.5}) for name, row in old.items()}
    for tokens in (other, stale, {"base": old["base"]}):
        verdict = compare(_results(new), NOTHING, _results(old), tokens=({"prose": new}, {"prose": tokens}))
        assert not any(row["paired"] for row in verdict["checks"])


def test_a_difference_that_is_not_paired_says_why() -> None:
    """Catches "from the two intervals" that leaves the reader to guess which file is missing or wrong."""
    new, old = _scores(1), _scores(2)
    other = {name: TokenScores(**vars(row) | {"doc": row.doc[::-1].copy()}) for name, row in old.items()}
    stale = {name: TokenScores(**vars(row) | {"kl": row.kl * 1.5}) for name, row in old.items()}
    said = {
        "the two .npz are of other tokens": ({"prose": new}, {"prose": other}),
        "the .npz beside the baseline belongs to another run": ({"prose": new}, {"prose": stale}),
        "the .npz beside these results belongs to another run": ({"prose": stale}, {"prose": old}),
        "the .npz beside the baseline holds no nf4 on prose": ({"prose": new}, {"prose": {"base": old["base"]}}),
        "old.npz is not beside the baseline": "old.npz is not beside the baseline",
    }
    for why, tokens in said.items():
        for row in compare(_results(new), NOTHING, _results(old), tokens=tokens)["checks"]:
            assert row["unpaired"].startswith(why) and why in row["reason"]


def _state(new: dict[str, TokenScores], old: dict[str, TokenScores], key: str) -> str:
    """The paired check of one metric, without the quantiles that a whole row takes seconds for."""

    def arm(scores: dict[str, TokenScores]) -> dict[str, Any]:
        row = scores["nf4"]
        means = {"kl_mean": row.kl, "nll_delta": row.nll_cand - row.nll_ref}
        return {"arms": {"nf4": {"texts": {"prose": {"metrics": {name: {"value": float(values.astype(float).mean())} for name, values in means.items()}}}}}}

    rows = baseline_checks(arm(new), arm(old), [("nf4", "nf4")], scores={"prose": new}, old_scores={"prose": old})
    return next(row["state"] for row in rows if row["metric"] == f"{key}_vs_baseline")


def test_a_planted_regression_is_found_and_a_null_one_is_not() -> None:
    """Catches a gate that sleeps or cries wolf. Of 100 pairs of 60 documents: 50 % more KL, or 0.02 nats more loss, fails in at least 95; the same quality fails in at most 5."""
    pairs = [(seed, 1000 + seed) for seed in range(100)]
    worse = [_state(_scores(new, 1.5), _scores(old), "kl_mean") for new, old in pairs]
    drifted = [_state(_scores(new, drift=0.02), _scores(old), "nll_delta") for new, old in pairs]
    same = [_state(_scores(new), _scores(old), key) for new, old in pairs for key in ("kl_mean", "nll_delta")]
    assert worse.count("fail") >= 95 and drifted.count("fail") >= 95 and same.count("fail") <= 10, [x.count("fail") for x in (worse, drifted, same)]


def test_identical_runs_pass_everything() -> None:
    """Catches a rerun of the same thing that is inconclusive, after which nobody reads the gate."""
    for paired in (True, False):
        assert {row["state"] for row in _checks(_scores(1), _scores(1), paired).values()} == {"pass"}


def test_a_worsening_below_the_margin_counts_for_nothing() -> None:
    """Catches a failure because of another processor: differences that are certain and tiny."""
    old = _scores(1)
    new = {name: TokenScores(**vars(row) | {"kl": row.kl * np.float32(1.03)}) for name, row in old.items()}
    row = _checks(new, old)["kl_mean"]
    assert row["ci_low"] > 0 and row["state"] == "pass" and row["limit"]["max"] == pytest.approx(0.05 * row["old"])
    assert MARGINS["top1_agreement"] == 0.002


def test_what_only_one_run_measured_is_no_difference() -> None:
    """Catches an old baseline that is refused because the new run also measured generation; and another text that is not."""
    new, old = rich_results(), rich_results()
    new["fingerprint"] |= {"perplexity": {"wikitext-2": {"window": 2048}}, "suite": {"tasks": ["piqa"]}}
    assert compare(new, NOTHING, old)["state"] == "pass"
    new["fingerprint"]["texts"] = {"gsm8k-test": {"text_sha256": "b"}}
    with pytest.raises(Refused, match="texts"):
        compare(new, NOTHING, old)


def test_other_measurements_are_compared_too() -> None:
    """Catches protocols, generation and benchmarks that got worse unseen."""
    old, new = rich_results(), rich_results()
    nf4 = new["arms"]["nf4"]
    for row, key, change in ((nf4["perplexity"]["wikitext-2"]["metrics"], "ratio", 0.01), (nf4["generation"]["gsm8k-test"], "exact_match", -0.4), (nf4["tasks"], "macro_accuracy_delta", -0.05)):
        row[key] = {end: row[key][end] + change if end in ("value", "ci_low", "ci_high") else row[key][end] for end in row[key]}
    failed = {row["metric"] for row in compare(new, NOTHING, old)["checks"] if row["state"] == "fail"}
    assert failed == {"ratio_vs_baseline", "exact_match_vs_baseline", "macro_accuracy_delta_vs_baseline"}


def test_a_baseline_is_small_and_enough() -> None:
    """Catches a stripped file that judges otherwise than the whole one, or that is not results.json any more."""
    old, new = rich_results(), rich_results()
    new["arms"]["nf4"]["texts"]["gsm8k-test"]["metrics"]["kl_mean"] |= {"value": 0.01, "ci_low": 0.009, "ci_high": 0.011}
    small = baseline_of(old)
    assert faults(small) == [] and set(small["arms"]) == {"nf4", "naive"} and "linears" in small["left_out"]
    assert len(json.dumps(small)) < 0.5 * len(json.dumps(old))
    assert compare(new, NOTHING, small) == compare(new, NOTHING, old) and compare(new, NOTHING, small)["state"] == "fail"


def test_the_command_pairs_accepts_and_refuses(cli, tmp_path: Path) -> None:
    """Catches sidecars that are not looked for, a baseline made of results that failed, and a difference of versions with no way round it."""
    for name, scores in (("new", _scores(1, 1.6)), ("old", _scores(2))):
        write_results(_results(scores), {"prose": scores}, tmp_path / f"{name}.json")
    (tmp_path / "loose.yaml").write_text("kl_mean: {max: 1}\n")
    budget = ("--budget", tmp_path / "loose.yaml")
    answer = cli("compare", tmp_path / "new.json", *budget, "--baseline", tmp_path / "old.json", "--save-baseline", tmp_path / "accepted.json")
    assert answer.code == 4 and "token by token" in answer.out and not (tmp_path / "accepted.json").exists()
    accepted = cli("compare", tmp_path / "old.json", *budget, "--save-baseline", tmp_path / "accepted.json")
    assert accepted.code == 0 and f"commit {tmp_path}/accepted.json" in accepted.err and f"cp {tmp_path}/old.npz {tmp_path}/accepted.npz" in accepted.err
    answer = cli("compare", tmp_path / "new.json", *budget, "--baseline", tmp_path / "accepted.json")
    assert answer.code == 3 and "from the two intervals, as accepted.npz is not beside the baseline" in answer.out
    moved = json.loads((tmp_path / "accepted.json").read_text())
    moved["fingerprint"]["versions"]["torch"] = "2"
    (tmp_path / "moved.json").write_text(json.dumps(moved))
    answer = cli("compare", tmp_path / "old.json", *budget, "--baseline", tmp_path / "moved.json")
    assert answer.code == 4 and "--ignore-versions" in answer.err
    assert cli("compare", tmp_path / "old.json", *budget, "--baseline", tmp_path / "moved.json", "--ignore-versions").code == 0
    page = cli("report", tmp_path / "new.json", *budget, "--baseline", tmp_path / "accepted.json", "--out", tmp_path / "page")
    assert page.code == 0 and "## Against the baseline" in (tmp_path / "page/report.md").read_text()


def test_a_gate_rerun_from_the_sidecar_alone_gives_the_same_verdict(cli, tmp_path: Path) -> None:
    """Catches numbers in results.json that the per-token ones do not give: the verdict is the same, and a changed number is corrected."""
    scores = _scores(1)
    results = _results(scores)
    results["verdict"] = compare(results, load_budget("default"))
    write_results(results, {"prose": scores}, tmp_path / "results.json")
    assert json.loads(cli("compare", tmp_path / "results.json", "--recompute", "--json").out) == results["verdict"]
    forged = copy.deepcopy(results)
    forged["arms"]["nf4"]["texts"]["prose"]["metrics"]["kl_mean"] |= {"value": 0.2, "ci_low": 0.19, "ci_high": 0.21}
    (tmp_path / "results.json").write_text(json.dumps(forged))
    assert cli("compare", tmp_path / "results.json").code == 3
    assert json.loads(cli("compare", tmp_path / "results.json", "--recompute", "--json").out) == results["verdict"]


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 torn", b"not a zip"])
def test_a_damaged_sidecar_is_refused(cli, tmp_path: Path, content: bytes) -> None:
    """Catches a traceback from numpy or zipfile on a file that a full disk cut."""
    scores = _scores(1)
    write_results(_results(scores), {"prose": scores}, tmp_path / "results.json")
    (tmp_path / "results.npz").write_bytes(content)
    answer = cli("compare", tmp_path / "results.json", "--recompute")
    assert answer.code == 4 and "per-token arrays" in answer.err
    with np.load(Path(write_some(tmp_path, scores))) as whole:
        parts = {key: whole[key] for key in list(whole)[:-1] if not key.endswith("nll_ref")}
    np.savez(tmp_path / "results.npz", **parts)
    assert cli("compare", tmp_path / "results.json", "--recompute").code == 4


def write_some(folder: Path, scores: dict[str, TokenScores]) -> str:
    write_results(_results(scores), {"prose": scores}, folder / "whole.json")
    return str(folder / "whole.npz")
