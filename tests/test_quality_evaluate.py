"""A whole evaluation on a tiny model: the results say what happened, leak nothing, and judge a bad candidate as bad."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from test_quality_arms import build

from qmerge.errors import Refused, UsageProblem
from qmerge.quality import arms, tasks
from qmerge.quality.compare import compare, load_budget
from qmerge.quality.evaluate import candidate_names, check_overlap, evaluate, evaluate_with_scores, public_path
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
    return evaluate_with_scores(
        tiny.nf4, tiny.adapter, {"good": tiny.good, "bare-base": tiny.nf4}, {"held_out": tiny.text, "other": tiny.other}, 32,
        also=("rtn",), results_dir=tiny.root / "out",
    )  # fmt: skip


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


def test_paired_row_of_known_answers():
    """Flips that cancel must show in the flips and not in the difference."""
    row, _ = tasks.paired_row(np.array([1.0, 1, 0, 0, 1]), np.array([0.0, 1, 1, 0, 1]))
    assert (row["lost"], row["won"], row["flips"], row["delta"]["value"], row["mcnemar_p"]) == (1, 1, 2, 0.0, 1.0)
    assert row["accuracy"]["value"] == 0.6
    assert tasks.macro_delta([np.array([0.0, 1.0]), np.array([0.0, 0.0])]).value == 0.25
    assert tasks.macro_delta([np.array([0.0])]).value is None


def test_suite_faults_come_all_at_once(tmp_path):
    """A suite that is half understood measures something else."""
    pytest.importorskip("lm_eval")
    file = tmp_path / "suite.yaml"
    file.write_text("task: [x]\nlimit: many\ninclude_path: nowhere\n")
    with pytest.raises(UsageProblem) as error:
        tasks.load_suite(file)
    assert all(word in str(error.value) for word in ("unknown key 'task'", "limit", "`tasks`"))


def test_suite_without_lm_eval_names_the_extra(tmp_path, monkeypatch):
    """The message must end in the command to type."""
    monkeypatch.setattr(tasks.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageProblem, match=r"qmerge\[eval\]"):
        tasks.load_suite(tmp_path / "suite.yaml")


def test_suite_pairs_the_arms_per_item(tiny, tmp_path):
    """Accuracies of two arms compared unpaired, or items matched by position."""
    pytest.importorskip("lm_eval")
    (tmp_path / "items.jsonl").write_text("\n".join(json.dumps({"q": f"the cat number {i}", "choices": [" sat", " qqq"], "gold": i % 2}) for i in range(6)))
    definition = {
        "task": "tiny_choice", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(tmp_path / "items.jsonl")}}, "test_split": "test",
        "output_type": "multiple_choice", "doc_to_text": "{{q}}", "doc_to_choice": "{{choices}}", "doc_to_target": "{{gold}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }  # fmt: skip
    (tmp_path / "tiny_choice.yaml").write_text(yaml.safe_dump(definition))
    (tmp_path / "suite.yaml").write_text("tasks: [tiny_choice]\ninclude_path: .\nnum_fewshot: 0\n")
    results = evaluate(tiny.nf4, tiny.adapter, {"good": tiny.good}, {"held_out": tiny.text}, 32, suite=str(tmp_path / "suite.yaml"))
    assert results["tasks"] == {"tiny_choice": {"n": 6}}
    good = results["arms"]["good"]["tasks"]
    assert good["tiny_choice"]["delta"]["value"] == 0.0 and good["macro_accuracy_delta"]["value"] == 0.0
    assert results["arms"]["separate"]["tasks"]["tiny_choice"]["accuracy"]["n"] == 6
    assert any(check["metric"] == "macro_accuracy_delta" for check in results["verdict"]["checks"])
