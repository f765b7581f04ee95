"""A whole evaluation on a tiny model: the results say what happened, leak nothing, and judge a bad candidate as bad."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_quality_arms import build

from qmerge.cli.run_texts import apart
from qmerge.errors import Refused, UsageProblem
from qmerge.quality import arms
from qmerge.quality.asked import candidate_names
from qmerge.quality.compare import compare, load_budget
from qmerge.quality.evaluate import check_overlap, evaluate, evaluate_in_full
from qmerge.quality.running import public_path
from qmerge.quality.sidecar import read_scores, recompute, write_results
from qmerge.report.schema import faults
from qmerge.store.texts import Document

METRICS = {
    "ppl", "nll", "nll_delta", "ppl_ratio", "kl_mean", "kl_median", "kl_p90", "kl_p99", "kl_p999",
    "top1_agreement", "delta_p_rms", "retention", "nonfinite", "kl_vs_base",
}  # fmt: skip


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    root = tmp_path_factory.mktemp("secret-place")
    made = build(root)
    made.root, made.good, made.other = root, str(root / "good"), str(root / "other.txt")
    arms.load_merged(made.nf4, made.adapter).model.save_pretrained(made.good, save_original_format=False)
    (root / "other.txt").write_text("qqqq zzz " * 80)
    return made


@pytest.fixture(scope="module")
def outcome(tiny):
    done = evaluate_in_full(
        tiny.nf4, tiny.adapter, {"good": tiny.good, "bare-base": tiny.nf4}, {"held_out": tiny.text, "other": tiny.other}, 32,
        also=("rtn",), results_dir=tiny.root / "out",
    )  # fmt: skip
    return done.results, done.scores


def test_results_hold_every_arm_text_and_metric(outcome):
    """The contract that report and gate read."""
    results, _ = outcome
    assert results["schema_version"] == 1
    assert list(results["arms"]) == ["base", "separate", "merged", "rtn", "good", "bare-base"]
    for name, arm in results["arms"].items():
        assert arm["bytes"] > 0 and set(arm["texts"]) == {"held_out", "other"}
        for row in arm["texts"].values():
            assert set(row["metrics"]) >= METRICS, name
            assert len(row["kl_quantiles"]) == 101 and len(row["kl_by_confidence"]) == 5
            assert len(row["window_nll_delta"]) > 1
    assert set(results["arms"]["good"]["linears"]["model.layers.0.mlp.up_proj"]) == {"delta_survival", "delta_ratio", "error_ratio"}
    assert all(results["noise_floor"][text]["value"] > 0 and results["noise_floor"][text]["source"] for text in ("held_out", "other"))
    assert results["fingerprint"]["texts"]["held_out"]["windows"] > 1 and "torch" in results["fingerprint"]["versions"]


def test_reference_rows_are_exact(outcome):
    """Separate against itself, the base at retention 0, merged at rounding."""
    arms_ = outcome[0]["arms"]

    def value(arm, metric):
        return arms_[arm]["texts"]["held_out"]["metrics"][metric]["value"]

    assert (value("separate", "kl_mean"), value("separate", "top1_agreement"), value("separate", "retention")) == (0.0, 1.0, 1.0)
    assert value("base", "retention") == 0.0 and value("base", "kl_vs_base") == 1.0 and value("base", "ppl") > 1.2 * value("separate", "ppl")
    assert value("merged", "kl_mean") < 1e-6 and value("merged", "floor_factor") < 0.1


def test_a_bad_candidate_fails_and_an_identical_one_passes(outcome):
    """The point of the whole thing."""
    results, _ = outcome
    budget = load_budget("default")
    assert results["verdict"] == compare(results, budget) and results["verdict"]["state"] == "fail"
    assert results["verdict"]["reasons"][0].startswith("bare-base on held_out")
    alone = results | {"arms": {k: v for k, v in results["arms"].items() if k != "bare-base"}}
    assert compare(alone, budget)["state"] == "pass"


def test_results_are_json_and_name_no_folder(outcome, tiny, tmp_path):
    """Paths of the machine in a file that people publish; NaN in a file that other languages read; a verdict that cannot be recomputed."""
    results, scores = outcome
    text = json.dumps(results, allow_nan=False)
    assert str(tiny.root) not in text and tiny.root.name not in text and str(Path.home()) not in text
    assert results["arms"]["good"]["path"] == "../good"
    write_results(results, scores, tmp_path / "results.json")
    assert json.loads((tmp_path / "results.json").read_text()) == recompute(results, read_scores(tmp_path / "results.npz"))
    assert faults(results) == [], "results.schema.json describes what is really written"


def test_same_input_same_numbers(tiny, outcome):
    """A gate that flickers is switched off."""
    again = evaluate(tiny.nf4, tiny.adapter, {"good": tiny.good}, {"held_out": tiny.text, "other": tiny.other}, 32)
    assert again["arms"]["good"]["texts"] == outcome[0]["arms"]["good"]["texts"]
    assert again["fingerprint"] == outcome[0]["fingerprint"]
    assert again["arms"]["good"]["path"] == "good"


def test_adapter_that_does_not_help_leaves_retention_undefined(outcome):
    """Rows of q and z are not what it was trained on: no share of a gain that is not there."""
    metric = outcome[0]["arms"]["good"]["texts"]["other"]["metrics"]["retention"]
    assert metric["value"] is None and "3 standard errors" in metric["note"]


def test_bad_requests_stop_before_any_model_is_loaded(tiny):
    """Minutes of work, then a message that could have come at once."""
    ask = (tiny.nf4, tiny.adapter)
    for candidates, texts, options in (
        ({"separate": tiny.good}, {"t": tiny.text}, {}),
        ({"../x": tiny.good}, {"t": tiny.text}, {}),
        ({}, {}, {}),
        ({}, {"t": tiny.text}, {"also": ("rtm",)}),
        ({}, {"t": tiny.text}, {"also": ("original",)}),
    ):
        with pytest.raises(UsageProblem):
            evaluate(*ask, candidates, texts, 32, **options)
    with pytest.raises(UsageProblem, match="longer than the model's context"):
        evaluate(*ask, {}, {"t": tiny.text}, 4096)


def test_candidate_names_are_unique_and_never_reserved():
    """Two folders called `out`, or one called `base`, would overwrite each other's rows."""
    names = candidate_names(["/a/out", "/b/out", "/c/base", "/d/my model"])
    assert list(names) == ["out", "out-2", "candidate-base", "my-model"] and names["out-2"] == "/b/out"


def test_public_paths_stay_near(tmp_path):
    """`../../home/somebody/…` is a local path too."""
    (tmp_path / "a" / "b").mkdir(parents=True)
    assert public_path(str(tmp_path / "a" / "b"), tmp_path / "a") == "b"
    assert public_path(str(tmp_path / "a"), tmp_path / "x") == "../a"
    assert public_path(str(tmp_path / "a"), tmp_path / "x" / "y" / "z") == "a"


def test_overlap_is_refused_unless_allowed():
    """Calibrating on the test."""
    docs = [Document(" ".join(f"word{i}" for i in range(20)))]
    with pytest.raises(Refused, match="overlap"):
        check_overlap(docs, docs)
    assert len(check_overlap(docs, docs, allow=True)) == 8
    assert check_overlap(docs, [Document("something else")]) == []


def test_the_refusal_counts_every_document_that_overlaps():
    """A system prompt in all documents, counted once because the first holds each of its n-grams: "1 of 3" looks like chance."""
    prompt = " ".join(f"word{i}" for i in range(20))
    with pytest.raises(Refused) as caught:
        check_overlap([Document(prompt)], [Document(f"{prompt} {i}") for i in range(3)])
    assert "3 of 3 evaluation documents" in str(caught.value)


@pytest.mark.parametrize(("shared", "left"), [(0, 10), (2, 8), (9, 10)], ids=["none", "few", "nearly all"])
def test_held_out_documents_that_overlap_by_chance_are_left_out(shared, left):
    """One training set, split by qmerge itself, and refused for one sentence in a thousand; or a template's text thinned to its odd rows, unsaid."""
    prompt = " ".join(f"word{i}" for i in range(20))
    kept = [Document(f"{prompt} {i}" if i < shared else f"another text, number {i}") for i in range(10)]
    assert len(apart([Document(prompt)], kept)) == left


@pytest.fixture(scope="module")
def measured(tiny, cli, tmp_path_factory):
    """`qmerge eval` with benchmarks of one's own, through the command."""
    pytest.importorskip("lm_eval")
    folder = tmp_path_factory.mktemp("measured")
    rows = [{"q": f"the cat number {i} sat on mat", "choices": [f" {i % 7} and then ran", " qqq zzz"], "gold": 0, "story": i // 3} for i in range(12)]
    (folder / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "suite.yaml").write_text("tasks: [{name: cats, file: items.jsonl, kind: choice, prompt: '{q}', choices: choices, gold: gold, cluster: story}]\n")
    answer = cli("eval", "--base", tiny.nf4, "--adapter", tiny.adapter, "--candidate", tiny.good, "--candidate", tiny.nf4, "--text", tiny.text, "--tokens", 32,
                 "--suite", folder / "suite.yaml", "--out", folder / "results.json", "--device", "cpu")
    assert answer.code == 0, answer.err
    return folder


def test_benchmarks_are_paired_in_the_results(measured):
    """Accuracies of two arms compared unpaired, a metric without its name, a log that nobody finds."""
    results = json.loads((measured / "results.json").read_text())
    assert results["tasks"] == {"cats": {"n": 12, "metric": "acc_norm", "chance": 0.5}}
    good, base = results["arms"]["good"]["tasks"], results["arms"]["base"]["tasks"]
    assert good["cats"]["delta"]["value"] == 0.0 and good["macro_accuracy_delta"]["value"] == 0.0 and abs(good["cats"]["margin_delta"]["value"]) < 1e-3
    assert base["cats"]["margin_delta"]["value"] < -0.01  # the base was not trained on these words
    assert {row["tasks"]["cats"]["samples"] for row in results["arms"].values()} == {file.name for file in (measured / "results.samples").iterdir()}
    assert results["fingerprint"]["suite"]["items_sha256"]["cats"] and str(measured) not in (measured / "results.json").read_text()
    assert any(check["metric"] == "macro_accuracy_delta" for check in results["verdict"]["checks"])


def test_a_gate_comes_back_from_the_sidecars_alone(measured, cli, tmp_path):
    """A verdict that rests on numbers in results.json which the measured ones beside it do not give."""
    import shutil

    shutil.copytree(measured, tmp_path / "copy")
    file = tmp_path / "copy" / "results.json"
    results = json.loads(file.read_text())
    before = cli("compare", file, "--json")
    verdict = json.loads(before.out)
    assert verdict == results["verdict"]
    for arm in results["arms"].values():  # every measured number of text and tasks is lost
        arm["texts"] = {text: {"metrics": {}} for text in arm["texts"]}
        arm["tasks"] = {task: {key: row[key] for key in ("samples", "samples_sha256")} for task, row in arm["tasks"].items() if "samples" in row}
    file.write_text(json.dumps(results | {"verdict": None}))
    again = cli("compare", file, "--recompute", "--json")
    assert json.loads(again.out) == verdict and again.code == before.code
    assert "stored numbers are not what the files beside" in again.err
    next((tmp_path / "copy" / "results.samples").glob("good.*")).unlink()
    assert cli("compare", file, "--recompute").code == 4


def test_sidecar_of_other_results_is_refused(measured, outcome, cli, tmp_path):
    """Arrays of yesterday's run beside today's results.json."""
    write_results(*outcome, tmp_path / "other.json")
    (tmp_path / "results.json").write_text((measured / "results.json").read_text())
    (tmp_path / "other.npz").rename(tmp_path / "results.npz")
    answer = cli("compare", tmp_path / "results.json", "--recompute")
    assert answer.code == 4 and "other results" in answer.err


def test_unknown_tasks_end_a_run_before_any_model_is_loaded(tiny, cli, tmp_path):
    """Minutes of measuring, then a typing error in `--tasks`; or a merge of hours before it."""
    pytest.importorskip("lm_eval")
    answer = cli("eval", "--base", tiny.nf4, "--adapter", tiny.adapter, "--candidate", tiny.good, "--text", tiny.text, "--tasks", "arc_esay,piqa", "--out", tmp_path / "r.json")
    assert answer.code == 2 and "arc_esay" in answer.err and "did you mean arc_easy" in answer.err and "piqa" not in answer.err.split("found")[1].split("what to do")[0]
    assert cli("eval", "--base", tiny.nf4, "--adapter", tiny.adapter, "--candidate", tiny.good, "--text", tiny.text, "--suite", tmp_path / "no.yaml", "--out", tmp_path / "r.json").code == 2


def test_run_takes_benchmarks_too(tiny, measured, cli, tmp_path):
    """`qmerge run` that merges for hours and then finds no suite, or forgets to keep the items."""
    ask = ("run", "--base", tiny.nf4, "--adapter", tiny.adapter, "--format", "bf16", "--device", "cpu", "--text", tiny.text, "--eval-tokens", 32)
    assert cli(*ask, "--out", tmp_path / "no", "--suite", tmp_path / "none.yaml").code == 2 and not (tmp_path / "no").exists()
    answer = cli(*ask, "--out", tmp_path / "merged-model", "--suite", measured / "suite.yaml")
    assert answer.code == 0, answer.err
    assert (tmp_path / "merged-model.eval" / "results.samples").is_dir() and "cats (acc_norm)" in (tmp_path / "merged-model.eval" / "report.md").read_text()
