"""scripts/bench_quality*.py: are its ratios and its words computed from scores, is nothing lost that a tool refused, and does it run on a real model?"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from qmerge.quality.measure import TokenScores

SCRIPTS = Path(__file__).parent.parent / "scripts"


@pytest.fixture(scope="module")
def bench():
    sys.path.insert(0, str(SCRIPTS))
    try:
        import bench_quality as driver
        import bench_quality_arms as arms
        import bench_quality_cases as cases
        import bench_quality_make as make
        import bench_quality_measure as measuring
        import bench_quality_page as page
        import bench_quality_promises as promises
    finally:
        sys.path.remove(str(SCRIPTS))
    return SimpleNamespace(driver=driver, arms=arms, cases=cases, make=make, measuring=measuring, page=page, promises=promises)


def scores(kl: np.ndarray, nll: float = 0.0) -> TokenScores:
    n, zeros = len(kl), np.zeros(len(kl), np.float32)
    window = np.arange(n, dtype=np.int32) // 10
    return TokenScores(zeros, zeros + np.float32(nll), kl.astype(np.float32), zeros == 0, zeros, zeros, window, window)


@pytest.fixture
def kl() -> np.ndarray:
    return np.random.default_rng(0).lognormal(size=400)


def test_the_ratio_of_two_arms_is_paired_by_window(bench, kl):
    """Would catch a bootstrap that draws the two arms apart: half of the other arm's KL everywhere is half with no spread at all."""
    row = bench.promises.kl_ratio(scores(kl / 2), scores(kl))
    assert row == {"value": pytest.approx(0.5), "ci_low": pytest.approx(0.5), "ci_high": pytest.approx(0.5), "n": 40}


def test_the_ratio_of_perplexities_is_the_exponential_of_the_mean_difference(bench, kl):
    """Would catch a ratio of mean NLLs, which no perplexity is."""
    assert bench.promises.ppl_ratio(scores(kl, 3.1), scores(kl, 3.0))["value"] == pytest.approx(np.exp(0.1), rel=1e-5)


def judged(bench, case: str, factor: float, kl: np.ndarray) -> dict[tuple[int, str], str]:
    names = ("ours-gptq-int4", "ours-gptq-int4-distill", "ours-nf4", "ours-gptq-int3", "ours-gptq-int2-g32")
    found = {name: scores(kl * factor) for name in names}
    found |= {name: scores(kl) for name in ("gptqmodel-int3", "gptqmodel-int2-g32", "gptqmodel-mse", "served", "peft-nf4", "rtn")}
    found |= {"gptqmodel": scores(kl * 9), "base": scores(kl, 1.0)}
    sizes = {name: {"state": "made", "bits_per_weight": 4.2} for name in ("ours-gptq-int4", "gptqmodel", "gptqmodel-mse")}
    rows = bench.promises.promises(
        case, {"in-domain": found, "wikitext2": found}, sizes, {"ratio": {"value": 1.5 * factor, "ci_low": 0.1, "ci_high": 9.0, "n": 2}}
    )
    return {(row["promise"], f"{row['what']}: {row['who']}"): row["state"] for row in rows}


@pytest.mark.parametrize("factor", [0.3, 0.45, 0.65, 3.0])
def test_a_promise_is_judged_by_its_number(bench, kl, factor):
    """Would catch a table that says "met" whatever was measured, and one that compares with the worst peer (9 times as far) instead of the best."""
    found = judged(bench, "strong", factor, kl)
    limits = {(1, "KL in-domain: qmerge gptq int4 g128 sym / gptqmodel int4 g128, mse=2.4"): 0.5}
    limits |= {(1, "KL in-domain: qmerge gptq int4 g128 sym, polish distill / gptqmodel int4 g128, mse=2.4"): 0.35}
    limits |= {
        (4, "KL WikiText-2: qmerge gptq int4 g128 sym / gptqmodel int4 g128, mse=2.4"): 0.7,
        (3, "KL in-domain: qmerge gptq int3 g128 sym / gptqmodel int3 g128"): 0.6,
    }
    limits |= {(2, "KL in-domain / noise floor: qmerge nf4"): 4.0}
    assert {key: found[key] for key in limits} == {key: "met" if factor <= limit else "missed" for key, limit in limits.items()}


def test_an_interval_that_reaches_over_the_target_is_said(bench, kl):
    """Would catch a noisy ratio that is shown as plainly met."""
    assert (
        judged(bench, "light", 0.5, kl)[5, "seconds: qmerge gptq int4 g128 sym / gptqmodel int4 g128, defaults"]
        == "met (the interval reaches over the target)"
    )


def test_a_promise_without_its_arm_says_so(bench, kl):
    """Would catch a promise that is dropped from the table when a format refused its arm."""
    rows = bench.promises.promises("neox", {"in-domain": {"gptqmodel": scores(kl), "base": scores(kl), "served": scores(kl)}}, {}, None)
    assert {row["state"] for row in rows if row["promise"] == 1 and row["what"].startswith("KL")} == {
        "qmerge gptq int4 g128 sym was not measured",
        "qmerge gptq int4 g128 sym, polish distill was not measured",
    }


def test_retention_inside_the_noise_is_not_kept(bench, kl):
    """Would catch a promise of retention that is met by a ratio to noise."""
    base, noise = scores(kl), np.random.default_rng(1).normal(size=400).astype(np.float32)
    noisy = TokenScores(base.nll_ref, noise, base.kl, base.agree, base.delta_p, base.confidence, base.window, base.doc)
    assert bench.promises.kept(noisy, base)["value"] is None and bench.promises.kept(scores(kl, 1.0), scores(kl, 0.1))[
        "value"
    ] == pytest.approx(0.9)


def test_a_peer_that_left_linears_in_float_is_no_rival_at_these_bits(bench):
    """Would catch the best peer being one that stores 11 bits."""
    made = {"ours-gptq-int4": {"bits_per_weight": 4.2}, "gptqmodel": {"bits_per_weight": 4.2}, "autoround": {"bits_per_weight": 11.0}}
    assert bench.promises.at_most_as_large(("gptqmodel", "autoround"), made) == ("gptqmodel",)


def test_text_that_was_tuned_on_is_left_out(bench, tmp_path):
    """Would catch figures from the documents that the solver's settings were chosen on."""
    file = tmp_path / bench.cases.TUNED_ON
    file.write_text("".join(f'{{"text": "{number}"}}\n' for number in range(1000)))
    told = bench.cases.chosen_text(bench.cases.Text("in-domain", file), tmp_path / "out.jsonl", None, 3)
    assert (told["skipped"], (tmp_path / "out.jsonl").read_text().split()) == (
        400,
        ['{"text":', '"400"}', '{"text":', '"401"}', '{"text":', '"402"}'],
    )


def test_a_chosen_arm_is_found_by_the_start_of_its_name(bench):
    """Would catch --arm gptq making peers too, or an arm of one case turning up in another."""
    names = [arm.name for arm in bench.arms.arms_of("light", ["ours-gptq-int4", "peft"])]
    assert names == [
        "ours-gptq-int4",
        "ours-gptq-int4-quick",
        "ours-gptq-int4-quick-mixed",
        "ours-gptq-int4-quick-plain",
        "ours-gptq-int4-mixed",
        "ours-gptq-int4-bf16",
        "ours-gptq-int4-asym",
        "ours-gptq-int4-g32",
        "ours-gptq-int4-blocks",
        "ours-gptq-int4-distill",
        "peft-nf4",
    ]
    assert [arm.name for arm in bench.arms.arms_of("light", ["gptqmodel$", "ours-nf4$"])] == ["ours-nf4", "gptqmodel"]


@pytest.fixture(scope="module")
def measured(bench, zoo, tmp_path_factory):
    """(what the bench says about a tiny real case, its page, the lines it said, those of a second run): one arm of ours, one refused, one peer, one that is absent."""
    said: list[str] = []
    text = bench.cases.Text("in-domain", Path(zoo.held_out))
    case = bench.cases.Case("light", Path(zoo.nf4("llama")), Path(zoo.adapter("llama")), Path(zoo.calibration), Path(zoo.other), (text,))
    known = {arm.name: arm for arm in (*bench.arms.OURS, *bench.arms.PEERS)}
    wide = bench.arms.Arm("ours-wide", "qmerge gptq, 16 bits", "ours", {"format": "gptq", "bits": 16})
    arms = [known["ours-nf4"], wide, known["peft-nf4"], known["llmcompressor"]]
    args = argparse.Namespace(skip_docs=None, docs=0, quick=True, device="cpu")
    work = tmp_path_factory.mktemp("bench")
    with pytest.MonkeyPatch.context() as patch:
        for module in (bench.make, bench.measuring):
            patch.setattr(module, "WINDOW", 64)
            patch.setattr(module, "code_digest", lambda *_: "fixed")  # else an edit while the test runs would remake everything
        patch.setattr(bench.make, "SAMPLES", 12)
        said_each = []
        for _ in range(2):
            with bench.make.Maker(work, work / "none", 1, "cpu", False, said.append) as maker:
                maker.prepare(case)
                made = {arm.name: maker.make(case, arm) for arm in arms}
                off = {
                    "ours-nf4": dict(
                        zip(
                            ("", "lean"),
                            maker.side_by_side(case, [bench.arms.without("ours-nf4", step) for step in (None, "lean")]),
                            strict=True,
                        )
                    )
                }
                found = bench.driver.measured(case, maker, made, off, None, args)
            said_each.append(list(said))
            said.clear()
    header = {"command": "x", "versions": {}, "machine": {}, "solver_sha256": "0", "arithmetic": "fp32 on the CPU", "cases": [found]}
    return found, bench.page.markdown(json.loads(json.dumps(header, allow_nan=False))), *said_each


@pytest.mark.slow  # each arm is made in a process of its own, as its tools are
def test_every_arm_is_made_or_says_why_not(measured):
    """Would catch an arm that a format refuses, or whose tool is not installed, going missing silently."""
    found, page, *_ = measured
    assert {name: row["state"] for name, row in found["arms"].items()} == {
        "ours-nf4": "made",
        "ours-wide": "refused",
        "peft-nf4": "made",
        "llmcompressor": "absent",
    }
    assert "--bits 16" in page and "make bench-peers" in page


@pytest.mark.slow
def test_a_checkpoint_of_ours_is_measured_from_disk_beside_the_peer(measured):
    """Would catch arms that are measured on the wrong model: ours must be nearer to the reference than PEFT's, and PEFT's as far as nearest NF4."""
    kl = {name: row["kl_mean"]["value"] for name, row in measured[0]["metrics"]["in-domain"].items()}
    assert kl["merged"] < 1e-9 < kl["ours-nf4"] < kl["peft-nf4"] and kl["separate"] == 0
    assert kl["peft-nf4"] == pytest.approx(kl["rtn"], rel=0.05)


@pytest.mark.slow
def test_what_was_made_and_measured_is_not_made_again(measured):
    """Would catch keys that never match, so that every run starts from nothing."""
    *_, first, second = measured
    assert [line for line in first if "making" in line] and not [line for line in second if "making" in line or "measured" in line]


@pytest.mark.slow
def test_a_step_that_is_off_is_set_against_all_steps(measured):
    """Would catch an ablation that was made with all steps on (ratio 1), and a step that the page leaves out."""
    found, page, *_ = measured
    rows = found["ablations"]["ours-nf4"]
    assert rows["lean"]["state"] == "made" and abs(rows["lean"]["ratio"]["value"] - 1) > 1e-4 and rows[""]["ratio"]["value"] == 1
    assert rows[""]["kl_mean"]["value"] == pytest.approx(found["metrics"]["in-domain"]["ours-nf4"]["kl_mean"]["value"], rel=1e-6)
    assert "| lean |" in page and "| nothing |" in page


def test_every_switch_of_the_solver_has_its_ablation(bench):
    """Would catch a list of steps kept by hand, which forgets the newest."""
    from qmerge.pipeline.requantize import Steps

    assert bench.driver.steps() == list(Steps.__dataclass_fields__)


@pytest.mark.slow
def test_the_page_shows_every_figure_of_an_arm(measured):
    """Would catch a table that loses bits, seconds or memory."""
    found, page, *_ = measured
    row = next(line for line in page.splitlines() if line.startswith("| qmerge nf4 |")).split("|")
    assert len(row) == 13 and float(row[9]) == pytest.approx(found["arms"]["ours-nf4"]["bits_per_weight"], abs=1e-3)
