"""Without an extra, does each thing that wants it name the command that installs it, before any work?"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import tomllib

from qmerge.errors import UsageProblem
from qmerge.extras import BROUGHT_BY, LOADERS, need

DECLARED = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]


@pytest.fixture
def without(monkeypatch):
    """As on a machine where these modules are not installed: neither found nor importable."""
    return lambda *modules: [monkeypatch.setitem(sys.modules, module, None) for module in modules]


def named(answer, extra: str) -> bool:
    return answer.code == 2 and f"pip install 'qmerge[{extra}]'" in answer.err and "Traceback" not in answer.err


@pytest.mark.parametrize("fmt, extra", [("gptq", "gptq"), ("awq", "gptq"), ("compressed-tensors", "compressed")])
def test_eval_and_bench_name_the_extra_of_the_candidate(cli, zoo, written, without, tmp_path, fmt, extra):
    """An ImportError's traceback, or one from deep in transformers after the base was loaded for minutes."""
    out, _ = written("llama", fmt, "--rtn")
    without(*LOADERS[fmt])
    inputs = ("--base", zoo.nf4("llama"), "--adapter", zoo.adapter("llama"), "--candidate", out)
    for answer in (cli("eval", *inputs, "--text", zoo.held_out, "--tokens", 64, "--out", tmp_path / "results.json"), cli("bench", *inputs, "--prompt-tokens", 8, "--new-tokens", 8, "--out", tmp_path / "bench.json")):
        assert named(answer, extra), answer.err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("fmt, extra", [("gptq", "gptq"), ("awq", "gptq"), ("compressed-tensors", "compressed")])
def test_run_names_the_extra_before_it_merges(cli, zoo, without, tmp_path, fmt, extra):
    """Hours of requantizing, and then no way to measure the result."""
    without(*LOADERS[fmt])
    answer = cli("run", "--base", zoo.nf4("llama"), "--adapter", zoo.adapter("llama"), "--out", tmp_path / "out", "--calibration", zoo.calibration, "--text", zoo.held_out, "--format", fmt)
    assert named(answer, extra), answer.err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("fmt", ["gptq", "awq", "compressed-tensors"])
def test_merging_and_verifying_want_no_extra(zoo, cli, without, tmp_path, fmt):
    """A base install that cannot write a format without its loader."""
    without(*BROUGHT_BY)
    answer = cli("merge", "--base", zoo.nf4("llama"), "--adapter", zoo.adapter("llama"), "--out", tmp_path / "out", "--format", fmt, "--rtn", "--device", "cpu")
    assert answer.code == 0, answer.err
    assert cli("verify", tmp_path / "out").code == 0


def test_benchmarks_name_their_extra(cli, zoo, written, without, tmp_path):
    """No module named lm_eval, after the perplexities were measured."""
    without("lm_eval")
    answer = cli("eval", "--base", zoo.nf4("llama"), "--adapter", zoo.adapter("llama"), "--candidate", written("llama", "bf16")[0], "--text", zoo.held_out, "--tokens", 64,
                 "--tasks", "piqa", "--out", tmp_path / "results.json")
    assert named(answer, "eval"), answer.err


@pytest.mark.parametrize("module", ["model_signing", "OpenSSL"])
def test_signatures_name_their_extra(cli, written, without, tmp_path, module):
    """model-signing 1.1.1 imports pyOpenSSL and does not ask for it: both have to be looked for."""
    without(module)
    answer = cli("verify", written("llama", "bf16")[0], "--signature", tmp_path / "x.sig", "--public-key", tmp_path / "key.pub")
    assert named(answer, "sign"), answer.err


def test_several_missing_are_one_command(without):
    """An error for each missing package in turn."""
    without("gptqmodel", "lm_eval")
    with pytest.raises(UsageProblem, match=r"needs gptqmodel and lm-eval, which are not installed") as caught:
        need("this", "gptqmodel", "lm_eval")
    assert caught.value.fix == "pip install 'qmerge[gptq,eval]'"


def test_extras_are_those_of_pyproject():
    """A command that names an extra which pip does not know installs nothing, with a warning that nobody reads."""
    assert set(BROUGHT_BY.values()) == set(DECLARED) - {"dev", "fuzz"}
    for module, extra in BROUGHT_BY.items():
        names = {row.split(">")[0].strip().replace("-", "_").lower() for row in DECLARED[extra]}
        assert {"openssl": "pyopenssl"}.get(module.lower(), module.lower()) in names
