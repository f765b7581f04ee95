"""Benchmarks: lm-eval's own numbers, item for item, from named tasks and from the user's files; kept, so that a verdict can be counted again."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml

from qmerge.errors import Refused, UsageProblem
from qmerge.quality import local_tasks, suites
from qmerge.quality.paired import cluster_labels, margin, margin_rows, paired_row, task_rows
from qmerge.quality.samples import file_name, name_samples, read_samples, sample_text, samples_folder, write_samples
from qmerge.quality.suites import load_suite
from qmerge.quality.tasks import Item, items_digest, open_tasks, run_suite

lm_eval = pytest.importorskip("lm_eval")
SUITES = Path(__file__).parents[1] / "eval" / "suites"
CHOICE = {"name": "birds", "file": "birds.jsonl", "kind": "choice", "prompt": "Question: {q}\nAnswer:", "choices": "options", "gold": "right"}
FILL = {"name": "twins", "file": "twins.jsonl", "kind": "fill", "contexts": "starts", "continuation": "end", "gold": "right", "cluster": "starts"}
SUMS = {"name": "sums", "file": "sums.jsonl", "kind": "generate", "prompt": "{q}", "answer": "a", "number": "([0-9]+)", "gold_after": "#### ", "max_tokens": 6}


def write_files(folder: Path) -> Path:
    """Three small files in shapes that people have, and a suite over them."""
    words = "cat mat birds tree rain hills noon old green seven".split()
    choice = [{"q": f"what saw the {w}?", "options": [f"the {w}", f"a {words[i - 1]} near the hills", "rain"][: 2 + i % 2], "right": i % 2, "note": None} for i, w in enumerate(words)]
    fill = [{"starts": [f"the {w} sat on the mat since the {w}", f"the {w} sat on the mat since the rain"], "end": f"was {e}.", "right": j} for w in words[5:] for j, e in enumerate(("old", "green"))]
    sums = [{"q": f"Question: {i} birds and {i} birds?\nAnswer:", "a": f"{i}+{i}\n#### {2 * i}"} for i in range(4)]
    for name, rows in (("birds", choice), ("twins", fill), ("sums", sums)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "suite.yaml").write_text(yaml.safe_dump({"tasks": [CHOICE, FILL, SUMS], "batch_size": 4}, sort_keys=False))
    return folder / "suite.yaml"


@pytest.fixture(scope="module")
def suite_file(tmp_path_factory):
    return write_files(tmp_path_factory.mktemp("suite"))


@pytest.fixture(scope="module")
def arm(zoo):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place = zoo.float("llama")
    return AutoModelForCausalLM.from_pretrained(place, dtype="float32").eval(), AutoTokenizer.from_pretrained(place)


@pytest.fixture(scope="module")
def long_arm(zoo, arm):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(zoo.float("llama", "llama-long", max_position_embeddings=1024), dtype="float32").eval(), arm[1]


@pytest.fixture(scope="module")
def answers(arm, suite_file):
    return run_suite(open_tasks(load_suite(suite_file)), *arm)


def by_hand(model, tokenizer, folder: Path) -> dict:
    """lm-eval as its documentation shows it, with task configs written out by hand: no code of qmerge."""
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    def common(name):
        return {"task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / f"{name}.jsonl")}}, "test_split": "test"}

    mean = {"aggregation": "mean", "higher_is_better": True}
    wanted = [
        common("birds") | {"output_type": "multiple_choice", "doc_to_text": "Question: {{q}}\nAnswer:", "doc_to_choice": "options", "doc_to_target": "right",
                           "metric_list": [{"metric": "acc", **mean}, {"metric": "acc_norm", **mean}]},
        common("twins") | {"output_type": "multiple_choice", "doc_to_text": "right", "doc_to_choice": "starts", "doc_to_target": "end", "metric_list": [{"metric": "acc", **mean}]},
        common("sums") | {"output_type": "generate_until", "doc_to_text": "{{q}}", "doc_to_target": "{{a}}",
                          "generation_kwargs": {"until": ["\n\n"], "do_sample": False, "temperature": 0.0, "max_gen_toks": 6},
                          "filter_list": [{"name": "number", "filter": [{"function": "regex", "regex_pattern": "([0-9]+)"}, {"function": "take_first"}]}],
                          "metric_list": [{"metric": "exact_match", "regexes_to_ignore": ["(?s).*#### ", ",", "\\$", "\\.$"], "ignore_case": True, **mean}]},
    ]  # fmt: skip
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4, softmax_dtype="float32")
    return lm_eval.simple_evaluate(model=lm, tasks=wanted, task_manager=TaskManager(include_defaults=False), log_samples=True)


def test_equal_to_a_run_of_lm_eval_by_hand(arm, suite_file, answers):
    """Another prompt, another batch, a sum in the model's own dtype, items in another order: numbers that look like lm-eval's and are not."""
    found = by_hand(*arm, suite_file.parent)
    assert set(answers) == set(found["samples"])
    for task, rows in found["samples"].items():
        ours, metric = answers[task], {"birds": "acc_norm", "twins": "acc", "sums": "exact_match"}[task]
        assert [(i.item, i.hash, i.prompt_hash, i.correct) for i in ours] == [(r["doc_id"], r["doc_hash"], r["prompt_hash"], r[metric]) for r in rows]
        if task == "sums":
            assert [i.answer for i in ours] == [r["filtered_resps"][0] for r in rows]
        else:
            assert [i.loglikelihoods for i in ours] == [tuple(ll for ll, _ in r["filtered_resps"]) for r in rows]  # to the bit
        reported = next(value for key, value in found["results"][task].items() if key.startswith(f"{metric},"))
        assert np.mean([i.correct for i in ours]) == pytest.approx(reported)


def test_log_likelihoods_are_the_models_own(arm, answers):
    """A shift by one position, or the context scored too: seen by a forward pass that shares nothing with lm-eval."""
    import torch

    model, tokenizer = arm
    item = answers["birds"][1]
    context, choice = "Question: what saw the mat?\nAnswer:", " a cat near the hills"
    whole, before = tokenizer(context + choice)["input_ids"], len(tokenizer(context)["input_ids"])
    with torch.no_grad():
        logs = model(input_ids=torch.tensor([whole])).logits[0].double().log_softmax(-1)
    expected = sum(float(logs[position - 1, whole[position]]) for position in range(before, len(whole)))
    assert item.loglikelihoods[1] == pytest.approx(expected, abs=1e-4) and item.gold == (1,)


def test_margins_are_gold_minus_the_best_wrong(answers):
    """A margin against the mean, or against the first choice, or divided by tokens where acc_norm divides by characters."""
    item = answers["birds"][3]
    lls, right = item.loglikelihoods, item.gold[0]
    assert margin(item) == lls[right] - max(ll for k, ll in enumerate(lls) if k != right) and len(lls) == 3
    per_character = [ll / length for ll, length in zip(lls, item.lengths, strict=True)]
    assert margin(item, normalised=True) == per_character[right] - max(ll for k, ll in enumerate(per_character) if k != right)
    for one in (i for task in ("birds", "twins") for i in answers[task]):
        assert (margin(one, normalised=one.metric == "acc_norm") > 0) == (one.correct == 1.0)
    assert margin(answers["sums"][0]) is None


def test_items_that_share_a_sentence_are_one_cluster(answers):
    """WinoGrande's twins counted as independent: error bars √2 too small."""
    assert len(set(cluster_labels(answers["twins"]))) == 5 and len(set(cluster_labels(answers["birds"]))) == 10


def changed(item: Item, **values) -> Item:
    return Item(**{**item.__dict__, **values})


def test_an_arm_that_lowers_every_margin_shows_before_its_accuracy_does(answers):
    """Accuracy is blind between flips; the margin must see a loss that flips nothing, with its size and sign."""
    worse = {t: [changed(i, loglikelihoods=tuple(ll - 0.01 * (k in i.gold) for k, ll in enumerate(i.loglikelihoods))) for i in items] for t, items in answers.items()}
    arms = {"separate": {}, "nf4": {}}
    task_rows({"separate": answers, "nf4": worse}, arms)
    row = arms["nf4"]["tasks"]["birds"]
    assert row["flips"] == 0 and row["delta"]["value"] == 0.0
    assert row["margin_delta"]["value"] == pytest.approx(-0.01) and row["margin_delta"]["ci_high"] < 0 and row["margin_delta"]["unit"] == "nats"
    assert row["margin_norm_delta"]["unit"] == "nats/character" and "margin_norm_delta" not in arms["nf4"]["tasks"]["twins"] and "margin_delta" not in arms["nf4"]["tasks"]["sums"]


def test_numbers_that_are_not_finite_are_said(answers):
    """NaN in one item makes the mean NaN, or vanishes without a word."""
    items = answers["birds"]
    broken = [changed(items[0], loglikelihoods=(None, *items[0].loglikelihoods[1:])), *items[1:]]
    row = margin_rows(items, broken, cluster_labels(items))["margin_delta"]
    assert row["n"] == len(items) - 1 and "1 items have no finite margin" in row["note"]


def test_arms_are_matched_by_item_and_not_by_position(answers):
    """Two arms whose items come in another order, or are others, compared row by row."""
    arms = {"separate": {}, "nf4": {}}
    task_rows({"separate": answers, "nf4": {t: items[::-1] for t, items in answers.items()}}, arms)
    assert all(arms["nf4"]["tasks"][task]["flips"] == 0 for task in answers)
    with pytest.raises(Refused, match="same items"):
        task_rows({"separate": answers, "nf4": answers | {"birds": [changed(i, prompt_hash="x") for i in answers["birds"]]}}, arms)


def test_paired_row_of_known_answers():
    """Flips that cancel must show in the flips and not in the difference."""
    row, _ = paired_row(np.array([1.0, 1, 0, 0, 1]), np.array([0.0, 1, 1, 0, 1]))
    assert (row["delta"]["value"], row["flips"], row["lost"], row["won"], row["mcnemar_p"]) == (0.0, 2, 1, 1, 1.0)
    assert row["accuracy"]["value"] == pytest.approx(0.6) and row["smallest_detectable"] == pytest.approx(2.8016 * math.sqrt(2) / 5, rel=1e-3)


def test_the_reference_against_itself_is_exactly_nothing(answers):
    """An interval around a difference that is 0 by definition."""
    arms = {"separate": {}}
    about = task_rows({"separate": answers}, arms)
    rows = arms["separate"]["tasks"]
    assert all((rows[key]["value"], rows[key]["ci_low"], rows[key]["ci_high"]) == (0, 0, 0) for key in ("macro_accuracy_delta", "macro_bootstrap"))
    assert about["twins"] == {"n": 10, "metric": "acc", "chance": 0.5} and about["sums"] == {"n": 4, "metric": "exact_match"}


def test_logs_keep_every_bit_and_are_checked(answers, tmp_path):
    """A log that rounds, or one of another run beside these results: a verdict counted again from it would be of something else."""
    arms = {"separate": {}, "nf4": {}}
    both = {"separate": answers, "nf4": answers}
    results = {"arms": arms, "tasks": task_rows(both, arms)}
    name_samples(both, arms)
    write_samples(both, tmp_path / "results.json")
    assert read_samples(tmp_path / "results.json", results) == both
    assert arms["nf4"]["tasks"]["birds"]["samples"] == "nf4.birds.jsonl" and not list(samples_folder(tmp_path / "results.json").glob("*.part"))
    log = samples_folder(tmp_path / "results.json") / "nf4.birds.jsonl"
    row = json.loads(log.read_text().splitlines()[3])
    assert set(row) >= {"item", "hash", "gold", "loglikelihoods", "correct", "margin"}
    log.write_text(log.read_text().replace('"correct": 0.0', '"correct": 1.0', 1))
    with pytest.raises(Refused, match="not the one"):
        read_samples(tmp_path / "results.json", results)
    log.unlink()
    with pytest.raises(Refused, match="cannot be read"):
        read_samples(tmp_path / "results.json", results)


def test_log_names_stay_in_their_folder_and_apart():
    """A task called ../../x, or two names that become one."""
    names = [file_name(a, t) for a, t in (("nf4", "../../x"), ("nf4", "x/../y"), ("a.b", "c"), ("a", "b.c"), ("A", "b.c"), ("nf4", "t" * 400), ("nf4", "群"), ("nf4", ""))]
    assert len({name.lower() for name in names}) == len(names) and all("/" not in n and not n.startswith(".") and len(n) < 255 for n in names)


def test_generated_text_with_odd_characters_survives_the_log(answers, tmp_path):
    """U+2028 ends a line for Python's splitlines, and a lone surrogate cannot be written as UTF-8."""
    odd = {"sums": [changed(i, answer="a\u2028b\x85\ud800\n") for i in answers["sums"]]}
    arms = {"separate": {}}
    task_rows({"separate": odd}, arms)
    name_samples({"separate": odd}, arms)
    write_samples({"separate": odd}, tmp_path / "r.json")
    assert read_samples(tmp_path / "r.json", {"arms": arms}) == {"separate": odd}
    assert sample_text(odd["sums"]).count("\n") == 4


def test_suite_faults_come_all_at_once(tmp_path):
    """A suite that is half understood measures something else, and one fault per run makes a person run it nine times."""
    file = tmp_path / "suite.yaml"
    (tmp_path / "a.jsonl").write_text("{}\n")
    file.write_text(yaml.safe_dump({"task": ["x"], "limit": "many", "include_path": "nowhere", "tasks": [
        3, {"name": "n", "shots": 5}, {"name": "f", "file": "gone.jsonl", "kind": "fill", "prompt": "x"}, {"name": "k", "file": "a.jsonl", "kind": "chice"}, "twice", "twice",
        SUMS | {"name": "g", "file": "a.jsonl", "number": "(", "until": [3]}, CHOICE | {"name": "c", "file": "a.jsonl", "choices": ["{a", "{b.c}"]},
        {"name": "p", "file": "a.jsonl", "kind": "choice", "prompt": "no field", "choices": ["one"], "gold": "a b", "num_fewshot": 2},
    ]}))  # fmt: skip
    with pytest.raises(UsageProblem) as error:
        load_suite(file)
    words = ("unknown key 'task'", "limit has the wrong type", "include_path", "task 1: neither", "shots", "gone.jsonl", "contexts is missing", "prompt has no meaning", "chice", "twice is named twice",
             "number is no regex", "until must be", "choice '{a' is malformed", "{b.c} is no field", "prompt names no {field}", "choices must be", "'a b' cannot be a field", "num_fewshot needs fewshot_file")  # fmt: skip
    assert not [word for word in words if word not in str(error.value)]


def test_a_batch_size_is_a_number_or_auto(suite_file):
    """lm-eval's own word refused, or another word handed on to it after the models were loaded."""
    content = yaml.safe_load(suite_file.read_text())
    for size, fine in (("auto", True), (3, True), ("large", False), (0, False), (True, False)):
        file = suite_file.with_name(f"batch-{size}.yaml")
        file.write_text(yaml.safe_dump(content | {"batch_size": size}))
        if fine:
            assert load_suite(file).options["batch_size"] == size
        else:
            with pytest.raises(UsageProblem, match="batch_size"):
                load_suite(file)


@pytest.mark.parametrize(("task", "row", "word"), [
    (CHOICE, {"q": "a", "options": ["x"], "right": 0}, "at least two texts"),
    (CHOICE, {"q": "a", "options": ["x", "y"], "right": 2}, "outside 0 to 1"),
    (CHOICE, {"q": "a", "options": ["x", "y"], "right": True}, "must be an index"),
    (CHOICE, {"q": "a", "options": ["x", "y"], "right": "z"}, "not one of the choices"),
    (CHOICE, {"options": ["x", "y"], "right": 1}, "no field q"),
    (CHOICE | {"prompt": "{q}{r}"}, {"q": "1", "r": "2", "options": ["x", "y"], "right": 1}, "bare number"),
    (FILL, {"starts": ["x", "y"], "end": "", "right": 0}, "end must be text"),
    (FILL, {"starts": ["x", "y"], "end": "z", "right": "x"}, "must be an index"),
    (SUMS, {"q": "x", "a": 5}, "a must be text"),
    (SUMS, [1], "no JSON object"),
])  # fmt: skip
def test_rows_that_cannot_be_scored_are_named(tmp_path, task, row, word):
    """lm-eval scores a gold index out of range as always wrong, and a True as 1, with no more than a log line."""
    (tmp_path / task["file"]).write_text(json.dumps(row) + "\n")
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump({"tasks": [task]}))
    with pytest.raises(Refused) as error:
        load_suite(tmp_path / "suite.yaml")
    assert f"{task['file']}:1" in str(error.value) and word in str(error.value)


def test_templates_are_text_and_not_code(tmp_path):
    """A prompt with Jinja's marks in it, or a trailing newline, must reach the model as written."""
    from lm_eval.utils import apply_template

    row = {"a": "x {{7*7}} {% raw %}", "b": "é"}
    for text in ("Q: {a} {{{{7*7}}}}\n{b}\n", "{{%x%}} {a}{b} #}}", '"{a}" \\n 😀', "{a}{{{b}}}"):
        assert apply_template(local_tasks.template(text), row) == text.format_map(row)
    assert local_tasks.template("{a}") == "a"


def test_constant_and_composed_choices(tmp_path, arm):
    """Choices that are no list in the file: yes and no, or two columns."""
    (tmp_path / "t.jsonl").write_text(json.dumps({"q": "the cat?", "one": "it's \"a\" {x}", "two": "mat", "right": 1, "word": "yes"}) + "\n")
    two = CHOICE | {"name": "two", "file": "t.jsonl", "choices": ["{one}!", "{two}"]}
    yes = CHOICE | {"name": "yes", "file": "t.jsonl", "choices": ["no", "yes"], "gold": "word"}
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump({"tasks": [two, yes]}))
    opened = open_tasks(load_suite(tmp_path / "suite.yaml"))
    task = opened.tasks["two"][0]
    assert task.doc_to_choice(task.eval_docs[0]) == ["it's \"a\" {x}!", "mat"]
    found = run_suite(opened, *arm)
    assert found["yes"][0].gold == (1,) and found["yes"][0].lengths == (2, 3) and found["two"][0].gold == (1,)


def test_examples_come_from_their_own_file(tmp_path, arm):
    """Few-shot examples drawn from the items that are scored, or none at all."""
    write_files(tmp_path)
    shutil.copy(tmp_path / "birds.jsonl", tmp_path / "train.jsonl")
    (tmp_path / "train.jsonl").write_text((tmp_path / "train.jsonl").read_text().replace("what saw", "who heard"))
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump({"tasks": [CHOICE | {"num_fewshot": 2, "fewshot_file": "train.jsonl"}], "limit": 2}))
    opened = open_tasks(load_suite(tmp_path / "suite.yaml"))
    found = [run_suite(opened, *arm) for _ in range(2)]
    context = opened.tasks["birds"][0].instances[0].args[0]
    assert context.count("who heard") == 2 and context.count("what saw") == 1
    assert found[0] == found[1] and len(found[0]["birds"]) == 2  # the same examples for every arm


def test_prompts_that_lm_eval_cuts_are_counted(tmp_path, arm):
    """Examples that fall out of a short context without a word."""
    long = "the cat saw a bird and " * 40
    rows = [{"q": q, "options": ["rain", "hills"], "right": 0} for q in ("short", long)]
    (tmp_path / "birds.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump({"tasks": [CHOICE]}))
    found = run_suite(open_tasks(load_suite(tmp_path / "suite.yaml")), *arm)
    assert [item.truncated for item in found["birds"]] == [False, True]
    assert task_rows({"separate": found}, {"separate": {}})["birds"]["truncated"] == 1


def test_the_fingerprint_knows_the_data_and_no_folder(suite_file, answers, tmp_path):
    """Results on changed items compared as equals; a person's folders in a published file."""
    content = load_suite(suite_file).content
    assert str(suite_file.parent) not in json.dumps(content) and content["tasks"][0]["file"]["name"] == "birds.jsonl"
    shutil.copytree(suite_file.parent, tmp_path / "copy")
    (tmp_path / "copy" / "birds.jsonl").write_text((tmp_path / "copy" / "birds.jsonl").read_text() + "\n")
    assert load_suite(tmp_path / "copy" / "suite.yaml").content != content
    assert items_digest(answers) != items_digest(answers | {"birds": answers["birds"][1:]})


def test_names_beside_a_suite(suite_file):
    """`--tasks` that replaces the suite, or says one task twice."""
    suite = load_suite(suite_file, suites.split_names(" arc_easy,piqa "))
    assert list(suite.tasks) == ["birds", "twins", "sums", "arc_easy", "piqa"]
    assert list(load_suite(None, ["piqa"]).tasks) == ["piqa"]
    with pytest.raises(UsageProblem, match="named twice"):
        load_suite(suite_file, ["birds"])
    with pytest.raises(UsageProblem, match="at least one entry"):
        load_suite(None, [])



def test_group_is_one_task_of_all_its_items(tmp_path, suite_file, arm):
    """MMLU's 57 parts as 57 tasks would outvote all others in the mean."""
    for part in ("one", "two"):
        config = local_tasks.task_config(CHOICE | {"name": part}, suite_file.parent)
        (tmp_path / f"{part}.yaml").write_text(yaml.safe_dump(config))
    (tmp_path / "both.yaml").write_text(yaml.safe_dump({"group": "both", "task": ["one", "two"], "aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}]}))
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump({"tasks": [{"name": "both", "metric": "acc", "num_fewshot": 0}], "include_path": "."}))
    suite = load_suite(tmp_path / "suite.yaml", allow_code=True)
    from lm_eval.tasks import TaskManager

    import qmerge.quality.tasks as module
    with pytest.MonkeyPatch.context() as patch:  # lm-eval's whole index takes 11 s to build and adds nothing here
        patch.setattr(module, "_index", lambda suite: TaskManager(include_path=suite.include_path, include_defaults=False))
        found = run_suite(open_tasks(suite), *arm)
    assert list(found) == ["both"] and len(found["both"]) == 20 and {i.task for i in found["both"]} == {"one", "two"} and {i.metric for i in found["both"]} == {"acc"}


def test_metric_that_a_task_lacks_is_refused(tmp_path, arm):
    """Another metric than the one asked for, printed under its name."""
    write_files(tmp_path)
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump({"tasks": [FILL | {"metric": "acc_norm"}]}))
    with pytest.raises(Refused, match="no such score"):
        run_suite(open_tasks(load_suite(tmp_path / "suite.yaml")), *arm)


@pytest.mark.slow
def test_shipped_suites_name_tasks_and_metrics_that_lm_eval_has():
    """A typing error in a ready suite, found by the first user."""
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks._yaml_loader import load_yaml

    index = TaskManager().task_index
    for file in ("quick", "standard"):
        for name, task in load_suite(SUITES / f"{file}.yaml").tasks.items():
            assert name in index, name
            config = load_yaml(index[name].yaml_path, resolve_func=False, recursive=True)
            if "metric_list" in config:
                metric, _, wished = task["metric"].partition(",")
                assert metric in [m["metric"] for m in config["metric_list"]], name
                assert not wished or wished in [f["name"] for f in config["filter_list"]], name


def test_in_domain_template_works_with_the_rows_that_it_shows(tmp_path, long_arm):
    """A template whose own examples do not run."""
    shutil.copy(SUITES / "in-domain.yaml", tmp_path)
    with pytest.raises(UsageProblem, match="choices.jsonl.*twins.jsonl.*sums.jsonl"):
        load_suite(tmp_path / "in-domain.yaml")
    for line in (SUITES / "in-domain.yaml").read_text().splitlines():
        if line.startswith("#   ") and ".jsonl " in line:
            name, row = line.lstrip("# ").split(maxsplit=1)
            (tmp_path / name).write_text(f"{row}\n{row.replace('…', '...')}\n")
    found = run_suite(open_tasks(load_suite(tmp_path / "in-domain.yaml")), *long_arm)
    assert {name: len(items) for name, items in found.items()} == {"own-choices": 2, "own-twins": 2, "own-sums": 2}


def test_public_benchmarks_offline(arm, long_arm):
    """The files of ../shared/data as they are, without network."""
    if not (SUITES.parents[2] / "shared" / "data").is_dir():
        with pytest.raises(UsageProblem, match="there is no file"):
            load_suite(SUITES / "shared-offline.yaml")
        pytest.skip("skipped: no ../shared/data beside the repository")
    suite = load_suite(SUITES / "shared-offline.yaml")
    assert list(suite.tasks) == ["arc-easy", "piqa", "winogrande", "gsm8k"] and all(not local_tasks.row_faults(t, suite.folder) for t in suite.tasks.values())
    suite.tasks.pop("gsm8k"), suite.options.update(limit=2)
    opened = open_tasks(suite)
    with pytest.raises(Refused, match="longer than the model's context"):
        run_suite(opened, *arm)
    found = run_suite(opened, *long_arm)
    assert all(len(items) == 2 for items in found.values()) and len(set(cluster_labels(found["winogrande"]))) == 1


def chatting(suite_file: Path, folder: Path) -> Path:
    for file in suite_file.parent.glob("*.jsonl"):
        shutil.copy(file, folder)
    (folder / "chat.yaml").write_text(yaml.safe_dump({"tasks": [CHOICE], "chat_template": True}))
    return folder / "chat.yaml"


def test_chats_of_a_suite_are_those_of_lm_eval(arm, suite_file, tmp_path, monkeypatch):
    """Written in a child, a prompt must not differ from what lm-eval itself would have asked."""
    from lm_eval.models.huggingface import HFLM

    from qmerge.quality import tasks
    from qmerge.store.templates import ChatWriter

    model, tokenizer = arm
    history = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "what saw the cat?"}]
    with ChatWriter(tokenizer) as chats:
        assert tasks.write_chat(chats, history, True) == HFLM(pretrained=model, tokenizer=tokenizer).apply_chat_template(history)
    ours = run_suite(open_tasks(load_suite(str(chatting(suite_file, tmp_path)))), model, tokenizer)
    monkeypatch.setattr(tasks, "write_chat", lambda chats, history, prompt: HFLM.apply_chat_template(HFLM(pretrained=model, tokenizer=tokenizer), history, prompt))
    assert run_suite(open_tasks(load_suite(str(tmp_path / "chat.yaml"))), model, tokenizer) == ours


def test_a_suite_with_a_template_that_never_ends(arm, suite_file, tmp_path, monkeypatch):
    """A stranger's template is a program: in lm-eval's process it held the evaluation for ever."""
    import copy

    from qmerge.store import templates

    tokenizer = copy.deepcopy(arm[1])
    tokenizer.chat_template = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}x"
    monkeypatch.setattr(templates, "LIMIT_S", 1.0)
    with pytest.raises(Refused, match="chat template cannot write") as found:
        run_suite(open_tasks(load_suite(str(chatting(suite_file, tmp_path)))), arm[0], tokenizer)
    assert "nothing within" in str(found.value)
