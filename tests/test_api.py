"""`qmerge.merge`, `evaluate`, `compare`: do they do what the commands do, to the byte, and say it in typed values?"""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from dataclasses import FrozenInstanceError, fields
from pathlib import Path

import pytest

import qmerge
from qmerge import api
from qmerge.api.merging import Settings
from qmerge.errors import EXIT_CODES, BelowBudget, CheckFailed, Refused, UsageProblem
from qmerge.pipeline.recipe import Recipe

SETTINGS = {"samples": 8, "tokens": 64, "device": "cpu"}


@pytest.fixture(scope="module")
def made(zoo, cli, tmp_path_factory):
    """The same merge, calibrated, by a call and by the command: ``(result, what progress heard, the command's folder)``."""
    folder, heard = tmp_path_factory.mktemp("api"), []
    result = qmerge.merge(zoo.nf4("llama"), zoo.adapter("llama"), folder / "call", calibration=zoo.calibration, progress=heard.append, **SETTINGS)
    answer = cli("merge", "--base", zoo.nf4("llama"), "--adapter", zoo.adapter("llama"), "--out", folder / "command", "--calibration", zoo.calibration, "--samples", 8, "--tokens", 64, "--device", "cpu")
    assert answer.code == 0, answer.err
    return result, heard, folder / "command"


@pytest.fixture(scope="module")
def measured(zoo, cli, made, tmp_path_factory):
    """The same evaluation by a call and by the command: ``(result, the command's results.json)``."""
    folder = tmp_path_factory.mktemp("measured")
    result = qmerge.evaluate(zoo.nf4("llama"), zoo.adapter("llama"), made[0], {"own": zoo.held_out}, out=folder / "call.json", tokens=64, device="cpu")
    answer = cli("eval", "--base", zoo.nf4("llama"), "--adapter", zoo.adapter("llama"), "--candidate", made[0].out, "--text", f"own={zoo.held_out}", "--out", folder / "command.json", "--tokens", 64, "--device", "cpu")
    assert answer.code == 0, answer.err
    return result, folder / "command.json"


def _files(folder: Path) -> dict[str, str]:
    return {name: row["sha256"] for name, row in json.loads((folder / "manifest.json").read_text())["files"].items()}


def test_import_is_quick_and_loads_nothing():
    """Catches a front door that takes seconds: torch, click or numpy imported by ``import qmerge``, or by a look at its functions' help."""
    code = "import sys, qmerge; qmerge.merge, qmerge.Verdict, dir(qmerge); print(sorted({'torch', 'click', 'numpy', 'transformers', 'yaml'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1], timeout=120)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_names_are_the_same_in_both_places():
    """Catches a name that editors offer and Python does not have, or the other way round."""
    assert set(qmerge.__all__) - {"__version__"} == set(api.__all__) and set(qmerge.__all__) <= set(dir(qmerge))
    assert all(getattr(qmerge, name) is getattr(api, name) for name in api.__all__)
    with pytest.raises(AttributeError, match="no attribute 'merj'"):
        _ = qmerge.merj


def test_the_call_writes_the_bytes_of_the_command(made):
    """Catches a second way of merging: other defaults, another order of settings, another file."""
    result, _, command = made
    assert _files(result.out) == _files(command)
    assert result.format == "gptq" and result.nbytes == sum(file.stat().st_size for file in result.out.iterdir())
    assert json.loads((result.out / "manifest.json").read_text())["recipe"] == json.loads((command / "manifest.json").read_text())["recipe"]


def test_the_result_says_what_was_written(made):
    """Catches a survival that is another linear's or is left out, and progress that nobody hears."""
    result, heard, _ = made
    recorded = json.loads((result.out / "manifest.json").read_text())["linears"]
    assert result.delta_survival == {name: row["delta_survival"] for name, row in recorded.items()} and len(result.delta_survival) == 14
    assert any("block" in line for line in heard) and result.elapsed_s > result.floor_s > 0 and result.peak_rss_bytes > 0
    with pytest.raises(FrozenInstanceError):
        result.format = "nf4"


def test_the_call_measures_the_numbers_of_the_command(measured):
    """Catches a second way of measuring, and a value that loses its interval or unit on the way from JSON."""
    result, command = measured
    stored = json.loads(command.read_text())
    assert {key: value for key, value in result.content.items() if key not in ("measured_at", "elapsed_s")} == {key: value for key, value in stored.items() if key not in ("measured_at", "elapsed_s")}
    (arm,) = result.candidates
    for name, row in stored["arms"].items():
        assert {key: metric.to_json() for key, metric in result.arms[name].texts["own"].items()} == row["texts"]["own"]["metrics"]
    assert (arm.kind, arm.nbytes) == ("gptq", stored["arms"][arm.name]["bytes"]) and arm.texts["own"]["kl_mean"].unit == "nats/token"
    assert result.floor["own"].value == stored["noise_floor"]["own"]["value"]
    assert len(result.tokens["own"][arm.name].kl) == arm.texts["own"]["kl_mean"].n


def test_results_read_again_are_the_results(measured):
    """Catches a reader that drops the arrays, or judges by another file."""
    result, _ = measured
    again = qmerge.load_results(result.path)
    assert (again.arms, again.floor, again.verdict, again.content) == (result.arms, result.floor, result.verdict, result.content)
    assert again.tokens["own"].keys() == result.tokens["own"].keys()


@pytest.mark.parametrize(("budget", "code"), [({"kl_mean": {"max": 10.0}}, 0), ({"kl_mean": {"max": 1e-12}}, 3)])
def test_the_verdict_is_the_command_s(measured, cli, tmp_path, budget, code):
    """Catches a verdict by other limits, and an exit code that says something else than the command's."""
    result, command = measured
    (tmp_path / "given.yaml").write_text(json.dumps(budget))
    said = cli("compare", command, "--budget", tmp_path / "given.yaml", "--json")
    for verdict in (qmerge.compare(result, budget=budget), qmerge.compare(command, budget=tmp_path / "given.yaml")):
        row = json.loads(said.out)
        assert said.code == verdict.exit_code == code and EXIT_CODES[code] == verdict.meaning
        assert (verdict.state, list(verdict.reasons), verdict.budget) == (row["state"], row["reasons"], row["budget"])
        assert [check.reason for check in verdict.checks] == [check["reason"] for check in row["checks"]] and verdict.checks[0].limit == budget["kl_mean"]
    if code:
        with pytest.raises(BelowBudget, match="the verdict is fail"):
            verdict.require()
    else:
        verdict.require()


@pytest.mark.parametrize("written", [True, False], ids=["files", "memory"])
def test_a_baseline_is_paired_token_by_token(measured, written, zoo, made):
    """Catches a gate that forgets the per-token numbers of results that were never written, and compares two intervals instead."""
    result, command = measured
    if not written:
        result = qmerge.evaluate(zoo.nf4("llama"), zoo.adapter("llama"), {made[0].out.name: made[0]}, {"own": zoo.held_out}, tokens=64, device="cpu")
        assert result.path is None
    verdict = qmerge.compare(result, budget={"kl_mean": {"max": 10.0}}, baseline=command)
    assert verdict.state == "pass" and any("token by token" in reason for reason in verdict.reasons), verdict.reasons


def test_an_inconclusive_verdict_is_strict_on_request(measured):
    """Catches ``strict`` that is taken and forgotten."""
    result, _ = measured
    divergence = result.candidates[0].texts["own"]["kl_mean"]
    budget = {"kl_mean": {"max": (divergence.value + divergence.ci_high) / 2}}
    assert [qmerge.compare(result, budget=budget, strict=strict).exit_code for strict in (False, True)] == [0, 3]


def test_several_adapters_with_weights_are_the_command_s(zoo, cli, tmp_path):
    """Catches weights that are lost or rounded on the way into a recipe."""
    two = {zoo.adapter("llama"): 0.7, zoo.adapter("llama", "second", seed=2): 1 / 3}
    result = qmerge.merge(zoo.nf4("llama"), two, tmp_path / "call", format="bf16", device="cpu")
    flags = [word for place, weight in two.items() for word in ("--adapter", f"{place}={weight!r}")]
    assert cli("merge", "--base", zoo.nf4("llama"), *flags, "--out", tmp_path / "command", "--format", "bf16", "--device", "cpu").code == 0
    assert _files(result.out) == _files(tmp_path / "command")


def test_a_recipe_gives_what_the_call_leaves_open(zoo, tmp_path):
    """Catches a default of the call that wins over the recipe's format."""
    (tmp_path / "recipe.yaml").write_text("format: fp16\nshard_size: 1MB\ndevice: cpu\n")
    result = qmerge.merge(zoo.nf4("llama"), [zoo.adapter("llama")], tmp_path / "out", recipe=tmp_path / "recipe.yaml", shard_size="5GB")
    assert result.format == "fp16" and (result.out / "model.safetensors").is_file()


def test_errors_are_qmerge_s_and_nothing_is_written(zoo, made, tmp_path):
    """Catches a call that raises another error than the command maps to an exit code, or that leaves something behind."""
    base, adapter = zoo.nf4("llama"), zoo.adapter("llama")
    with pytest.raises(UsageProblem, match="unknown setting 'groupsize'"):
        qmerge.merge(base, adapter, tmp_path / "out", rtn=True, groupsize=64)
    with pytest.raises(UsageProblem, match="one result"):
        qmerge.merge(base, [adapter, zoo.adapter("llama", "second", seed=2)], tmp_path / "out", format="bf16", each=True)
    with pytest.raises(Refused) as refused:
        qmerge.merge(base, adapter, made[0].out, format="bf16", device="cpu")
    assert refused.value.exit_code == 4
    with pytest.raises(UsageProblem, match="no such extra arm"):
        qmerge.evaluate(base, adapter, made[0], zoo.held_out, also="rtm", device="cpu")
    with pytest.raises(UsageProblem, match="the budget is malformed"):
        qmerge.compare(tmp_path / "results.json", budget={"kl": {"max": 1}})
    with pytest.raises(UsageProblem, match="go together"):
        qmerge.verify(made[0].out, base=base)
    assert not (tmp_path / "out").exists()


def test_inspect_and_verify_are_the_commands(zoo, cli, made, tmp_path):
    """Catches a check that passes in Python and fails in the command."""
    import shutil

    assert qmerge.inspect(zoo.adapter("llama")) == json.loads(cli("inspect", zoo.adapter("llama"), "--json").out)
    found = qmerge.verify(made[0].out, base=zoo.nf4("llama"), adapter=zoo.adapter("llama"))
    assert found.passed and len(found.checks) > len(qmerge.verify(made[0].out).checks)
    found.require()
    spoilt = shutil.copytree(made[0].out, tmp_path / "spoilt")
    (spoilt / "generation_config.json").write_text("{}")
    with pytest.raises(CheckFailed, match="checks failed"):
        qmerge.verify(spoilt).require()


def test_every_setting_can_be_given():
    """Catches a setting of the recipe that editors and type checkers do not know, and one that a call takes twice."""
    own, named = set(inspect.signature(qmerge.merge).parameters), set(Settings.__annotations__)
    assert named | own >= {field.name for field in fields(Recipe)} and not named & own and named <= {field.name for field in fields(Recipe)}


def test_every_public_name_has_words():
    """Catches a function that `help(qmerge.merge)` says nothing about."""
    assert all(len(getattr(api, name).__doc__ or "") > 30 and not getattr(api, name).__doc__.startswith(f"{name}(") for name in api.__all__)
