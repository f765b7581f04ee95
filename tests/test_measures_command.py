"""Do `qmerge eval` and `qmerge run` measure what is asked with --perplexity and --generate, and show it everywhere?"""

from __future__ import annotations

import json

import pytest

from qmerge.report.html import render_html
from qmerge.report.markdown import render_markdown

WIKI = ("--perplexity", "gptq,tokens=64:{0}", "--perplexity", "lm-eval,tokens=64:{0}")


@pytest.fixture(scope="module")
def evaluated(zoo, written, cli, tmp_path_factory):
    """A float merge measured on held-out text, with two protocols on another text, and six continuations."""
    out = tmp_path_factory.mktemp("measured") / "results.json"
    candidate, _ = written("llama", "bf16")
    answer = cli("eval", "--base", zoo.nf4("llama"), "--adapter", zoo.adapter("llama"), "--candidate", candidate, "--text", zoo.held_out, "--tokens", 64, "--out", out, "--device", "cpu",
                 *(word.format(zoo.other) for word in WIKI), "--generate", 6, "--new-tokens", 16)  # fmt: skip
    assert answer.code == 0, answer.err
    return json.loads(out.read_text()), answer, candidate.name


def test_results_hold_each_protocol_for_each_arm(evaluated):
    """A protocol measured for the candidate only, or without its settings, compares with nothing."""
    results, _, candidate = evaluated
    for arm in ("base", "separate", "merged", candidate):
        rows = results["arms"][arm]["perplexity"]
        assert {label: (row["protocol"], set(row["metrics"])) for label, row in rows.items()} == {
            "gptq,tokens=64:other": ("gptq", {"ppl", "ratio"}), "lm-eval,tokens=64:other": ("lm-eval", {"word_ppl", "byte_ppl", "bits_per_byte", "ratio"})}  # fmt: skip
    ratios = {arm: results["arms"][arm]["perplexity"]["gptq,tokens=64:other"]["metrics"]["ratio"] for arm in ("base", "separate", candidate)}
    assert ratios["separate"]["value"] == 1.0 and abs(ratios[candidate]["value"] - 1) < abs(ratios["base"]["value"] - 1)
    assert ratios["base"]["ci_low"] < ratios["base"]["value"] < ratios["base"]["ci_high"]
    told = results["fingerprint"]["perplexity"]["gptq,tokens=64:other"]
    assert told["tokens"] == 64 and told["scored_tokens"] == 63 * told["windows"] and len(told["text_sha256"]) == 64


def test_tables_show_each_protocol(evaluated):
    """Measured for minutes, and not in the report that people read."""
    results, answer, candidate = evaluated
    for page in (answer.out, render_markdown(results), render_html(results)):
        assert "Perplexity by protocol" in page and "gptq,tokens=64:other" in page.replace("\\", "")
        assert all(words in page for words in ("lm-eval,tokens=64:other", "perplexity per word", "perplexity per byte", "bits per byte"))
    assert max(map(len, answer.out.splitlines())) <= 110


def test_results_hold_continuations_of_each_arm(evaluated):
    """Continuations of a model against itself, or under settings that nobody can repeat."""
    results, answer, candidate = evaluated
    base, same, ours = (results["arms"][arm]["generation"]["held_out"] for arm in ("base", "separate", candidate))
    assert (base["prompts"], base["new_tokens"], len(base["divergence_quantiles"])) == (6, 16, 11)
    assert same["exact_match"]["value"] == 1.0 and same["first_divergence"]["value"] == 16.0 >= ours["first_divergence"]["value"] > base["first_divergence"]["value"]
    told = results["fingerprint"]["generation"]
    assert told["decoding"] == "greedy" and told["new_tokens"] == 16 and told["texts"]["held_out"]["prompts"] == 6
    for page in (answer.out, render_markdown(results), render_html(results)):
        assert "Greedy continuations against separate" in page and "equal throughout" in page


@pytest.mark.parametrize(("command", "code", "words"), [("gptq=wiki.txt", 2, "gptq:wiki.txt"), ("gptq,tokens=129:{other}", 2, "longer than the model's context"), ("gptq:nowhere.txt", 4, "no such file")])
def test_run_refuses_a_wrong_request_before_it_merges(zoo, cli, tmp_path, command, code, words):
    """Hours of merging, and then a typing error."""
    answer = cli("run", "--base", zoo.nf4("llama"), "--adapter", zoo.adapter("llama"), "--out", tmp_path / "out", "--format", "bf16", "--text", zoo.held_out, "--device", "cpu",
                 "--perplexity", command.format(other=zoo.other))  # fmt: skip
    assert answer.code == code and words in answer.err and not list(tmp_path.iterdir())


def test_run_refuses_continuations_that_do_not_fit_before_it_merges(zoo, cli, tmp_path):
    """Hours of merging for nothing, as above."""
    answer = cli("run", "--base", zoo.nf4("llama"), "--adapter", zoo.adapter("llama"), "--out", tmp_path / "out", "--format", "bf16", "--text", zoo.held_out, "--device", "cpu",
                 "--generate", 4, "--new-tokens", 128)  # fmt: skip
    assert answer.code == 2 and "do not fit the model's context" in answer.err and not list(tmp_path.iterdir())


def test_run_refuses_calibration_text_as_perplexity_text(zoo, cli, tmp_path):
    """A perplexity on the text that the merge was calibrated on flatters it."""
    answer = cli("run", "--base", zoo.nf4("llama"), "--adapter", zoo.adapter("llama"), "--out", tmp_path / "out", "--format", "nf4", "--text", zoo.held_out, "--device", "cpu",
                 "--calibration", zoo.calibration, "--samples", 8, "--tokens", 64, "--perplexity", f"gptq,tokens=64:{zoo.calibration}")  # fmt: skip
    assert answer.code == 4 and "overlap" in answer.err and not list(tmp_path.iterdir())
