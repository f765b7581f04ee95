"""What serving costs: every arm through its real loader in a real process of its own, and what cannot run does not hide the rest."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import threading
import time
from pathlib import Path

import pytest
import torch
from oracles.dequantized import load_public

from qmerge.quality.serving import ask, public
from qmerge.quality.serving_process import greedy, kernel

pytest.importorskip("gptqmodel")
pytest.importorskip("compressed_tensors")
MEASURED = ("separate", "merged", "gptq", "nf4", "ct")
NUMBERS = {"import_s", "load_s", "time_to_first_token_s", "prefill_tokens_per_s", "decode_tokens_per_s", "peak_load_bytes", "peak_prefill_bytes", "peak_decode_bytes"}


@pytest.fixture(scope="module")
def places(zoo, written, tmp_path_factory) -> dict[str, Path]:
    """Good candidates of each format, one without weights, one whose loader's package is not installed, and the float merge."""
    root = tmp_path_factory.mktemp("secret-place")
    made = {name: Path(shutil.copytree(written("llama", fmt)[0], root / name)) for name, fmt in (("gptq", "gptq"), ("nf4", "nf4"), ("ct", "compressed-tensors"), ("float", "bf16"))}
    made["weightless"] = Path(shutil.copytree(made["nf4"], root / "weightless"))
    (made["weightless"] / "model.safetensors").unlink()
    made["alien"] = Path(shutil.copytree(made["float"], root / "alien"))
    config = json.loads((made["alien"] / "config.json").read_text())
    (made["alien"] / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "aqlm"}}))
    return made | {"results": root / "results.json"}


def words(zoo, *more: object) -> list:
    return ["bench", "--base", zoo.nf4("llama"), "--adapter", zoo.adapter("llama"), "--device", "cpu", "--prompt-tokens", 16, *more]


@pytest.fixture(scope="module")
def bench(zoo, places, cli):
    """One real run into the results of a real evaluation: (answer, results before, results after)."""
    inputs = ("--base", zoo.nf4("llama"), "--adapter", zoo.adapter("llama"), "--device", "cpu")
    assert cli("eval", *inputs, "--candidate", places["gptq"], "--text", zoo.held_out, "--tokens", 64, "--out", places["results"]).code == 0
    before = json.loads(places["results"].read_text())
    candidates = [part for name in ("gptq", "weightless", "nf4", "alien", "ct") for part in ("--candidate", places[name])]
    answer = cli(*words(zoo, *candidates, "--merged", places["float"], "--batches", "1,8", "--new-tokens", 8, "--repeats", 2, "--rounds", 1, "--into", places["results"]))
    assert answer.code == 0, answer.err
    return answer, before, json.loads(places["results"].read_text())


@pytest.fixture(scope="module")
def section(bench) -> dict:
    return bench[2]["serving"]


@pytest.mark.slow
@pytest.mark.alone
def test_every_arm_that_runs_has_every_number(section):
    """A column that is empty for one format, or a number without its spread and count."""
    for name in MEASURED:
        row = section["rows"][name]
        assert set(row) >= NUMBERS | {"bytes", "packages", "kernel", "hot_swap"}, name
        metrics = [row["time_to_first_token_s"], *row["prefill_tokens_per_s"].values(), *row["decode_tokens_per_s"].values()]
        assert all(metric["n"] == 2 and 0 <= metric["ci_low"] <= metric["value"] <= metric["ci_high"] for metric in metrics), name
        assert row["load_s"]["n"] == 1 and row["load_s"]["value"] > 0 and set(row["decode_tokens_per_s"]) == {"1", "8"}
        assert row["import_s"]["value"] > 0.5, name
    assert section["threads"] >= 1


@pytest.mark.slow
@pytest.mark.alone
def test_bytes_are_those_of_the_folder(section, places, zoo):
    """The size of something else than what is on the disk; the adapter's bytes forgotten."""
    for name, folder in (("gptq", "gptq"), ("nf4", "nf4"), ("ct", "ct"), ("merged", "float")):
        assert section["rows"][name]["bytes"] == (places[folder] / "model.safetensors").stat().st_size
    parts = Path(zoo.nf4("llama")) / "model.safetensors", Path(zoo.adapter("llama")) / "adapter_model.safetensors"
    assert section["rows"]["separate"]["bytes"] == sum(part.stat().st_size for part in parts)


@pytest.mark.slow
@pytest.mark.alone
def test_a_larger_batch_gives_more_tokens(section):
    """Rates per sequence taken for rates of the batch, or batches mixed up."""
    for name in MEASURED:
        rates = section["rows"][name]["decode_tokens_per_s"]
        assert rates["8"]["value"] > rates["1"]["value"], name


@pytest.mark.slow
@pytest.mark.alone
def test_memory_is_what_processes_of_torch_take(section):
    """kB taken for bytes, a peak of 0, or the memory of this process instead of the arm's."""
    for name in MEASURED:
        row = section["rows"][name]
        assert all(2e8 < row[f"peak_{phase}_bytes"] < 5e9 for phase in ("load", "prefill", "decode")), name
        assert row["process_bytes"] < row["peak_load_bytes"], name


@pytest.mark.slow
@pytest.mark.alone
def test_kernels_and_packages_are_those_of_the_loaded_modules(section):
    """A name taken from the config: the file says gptq, and what runs is whatever the library chose on this machine, or a fall-back that dequantizes."""
    rows = section["rows"]
    assert re.match(r"Torch\w*Linear \(gptqmodel\): ", rows["gptq"]["kernel"]) and rows["gptq"]["packages"] == ["gptqmodel", "optimum"]
    assert rows["nf4"]["kernel"].startswith("Linear4bit (bitsandbytes): ") and rows["nf4"]["packages"] == ["bitsandbytes"]
    assert rows["separate"]["kernel"].startswith("Linear4bit (peft) on Linear4bit (bitsandbytes): ") and rows["separate"]["packages"] == ["peft", "bitsandbytes"]
    assert rows["ct"]["kernel"] == "Linear (torch), compressed-tensors decompressed: aten::linear" and rows["ct"]["packages"] == ["compressed-tensors"]
    assert rows["merged"]["kernel"] == "Linear (torch): aten::linear" and rows["merged"]["packages"] == []
    assert [name for name in MEASURED if rows[name]["hot_swap"]] == ["separate"]


def test_a_kernel_that_falls_back_says_so(written):
    """gptqmodel's plain torch kernel has the same file and another cost; the name must be that of the module, and dequantizing must not pass for a fused product."""
    model = load_public(str(written("llama", "gptq")[0]))
    chosen = type(model.model.layers[0].mlp.up_proj).__name__
    found = kernel(model, 4)
    assert found.startswith(f"{chosen} (gptqmodel): dequantized at every call, then aten::")


@pytest.mark.slow
@pytest.mark.alone
def test_what_cannot_be_measured_says_why_and_hides_nothing(bench, section):
    """One folder without weights, or a package that is not installed, and an hour of measuring is lost; or the arm silently missing from the table."""
    for name, reason in (("weightless", "no weights"), ("alien", "aqlm")):
        row = section["rows"][name]
        assert not set(row) & NUMBERS and reason in row["note"] and f"{name}: not measured" in bench[0].err, row
    assert list(section["rows"]) == ["separate", "merged", "gptq", "weightless", "nf4", "alien", "ct"]


@pytest.mark.slow
@pytest.mark.alone
def test_the_rest_of_the_results_stays(bench):
    """Results that lose an evaluation because serving was measured afterwards."""
    _, before, after = bench
    assert {key: value for key, value in after.items() if key != "serving"} == before and after["serving"]["settings"]["repeats"] == 2


@pytest.mark.slow
@pytest.mark.alone
def test_stdout_shows_the_tables_and_stderr_the_talk(bench):
    """Progress among the results, or a table without the arms."""
    answer = bench[0]
    assert all(name in answer.out for name in (*MEASURED, "tokens per second", "gptqmodel")) and "round 1" not in answer.out
    assert "gptq, round 1 of 1" in answer.err and "qmerge report" in answer.err


@pytest.mark.slow
@pytest.mark.alone
def test_nothing_local_is_in_the_json(section, places):
    """Folders, the user or the machine's name in a file that people publish."""
    text = json.dumps(section, allow_nan=False)
    assert not any(word in text for word in (str(places["gptq"].parent), "secret-place", str(Path.home()) + "/", socket.gethostname(), os.getcwd()))


def test_folders_are_cut_off_messages():
    """A loader's error names its file by the whole path."""
    assert public("OSError: no file /home/me/models/x/model.safetensors in /home/me/models/x.") == "OSError: no file model.safetensors in x."
    assert public("see https://huggingface.co/a/b, aten::mm, 1/2 and a/b \x1b[31m") == "see https://huggingface.co/a/b, aten::mm, 1/2 and a/b  [31m"


def children_of_this_process() -> set[int]:
    return {int(number) for task in Path("/proc/self/task").iterdir() for number in (task / "children").read_text().split()}


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="skipped: needs /proc")
def test_a_killed_process_is_reported(places):
    """The kernel's out-of-memory killer leaves no JSON and no traceback: the others must not wait for ever, nor see a Python error of ours."""
    found, earlier = {}, children_of_this_process()
    job = {"path": str(places["gptq"])}
    thread = threading.Thread(target=lambda: found.update(ask(job, 60)))
    thread.start()
    while not (mine := children_of_this_process() - earlier):
        time.sleep(0.005)
    os.kill(mine.pop(), 9)
    thread.join(30)
    assert "killed by SIGKILL (out of memory, perhaps)" in found["error"]


def test_a_process_that_hangs_is_stopped(places):
    """A kernel that compiles for ever: stopped, said, and gone."""
    earlier = children_of_this_process()
    assert ask({"path": str(places["gptq"])}, 0.2)["error"] == "it was stopped after 0.2 s"
    assert children_of_this_process() == earlier


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2"])
def test_the_loop_decodes_what_generate_does(zoo, kind):
    """A cache that is not used, or a position that is off: fast, and another computation than the one that is served."""
    from transformers import AutoModelForCausalLM

    model, ids = AutoModelForCausalLM.from_pretrained(zoo.float(kind), dtype=torch.float32).eval(), zoo.batch(3, 40)
    marks = []
    found = greedy(model, ids, 7, lambda: marks.append(1))
    wanted = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, min_new_tokens=8, do_sample=False, temperature=None, eos_token_id=None, pad_token_id=0)[:, 40:]
    assert torch.equal(found, wanted) and len(marks) == 3


@pytest.mark.parametrize(("flags", "says"), [
    (("--batches", "0,8"), "--batches"), (("--batches", "8,8"), "--batches"), (("--batches", "many"), "--batches"), (("--batches", ""), "--batches"), (("--timeout", "nan"), "--timeout"), (("--timeout", "inf"), "--timeout"),
    (("--repeats", 0), "--repeats"), (("--rounds", 0), "--rounds"), (("--prompt-tokens", 0), "--prompt-tokens"), (("--new-tokens", 0), "--new-tokens"),
    (("--prompt-tokens", 100, "--new-tokens", 29), "up to 128"), (("--out", "{root}"), "names a folder"), (("--out", "x.json", "--into", "y.json"), "--into"),
    (("--into", "{root}/none.json"), "no such results"), (("--merged", "m", "--without-merged"), "--without-merged"),
])  # fmt: skip
def test_bad_requests_are_refused_before_anything_is_measured(zoo, places, cli, flags, says):
    """Minutes of measuring, and then a message that could have come at once."""
    flags = [str(flag).replace("{root}", str(places["gptq"].parent)) for flag in flags]
    answer = cli(*words(zoo, "--candidate", places["gptq"], *flags))
    assert answer.code == 2 and says in answer.err and "round 1" not in answer.err


def test_what_is_no_candidate_is_refused(zoo, places, cli, tmp_path):
    """No candidate at all, a folder that is no checkpoint, or results of another model that would get these figures."""
    assert cli(*words(zoo)).code == 2
    answer = cli(*words(zoo, "--candidate", tmp_path))
    assert answer.code == 4 and "no checkpoint here" in answer.err
    other = tmp_path / "results.json"
    other.write_text(json.dumps({"schema_version": 1, "arms": {"separate": {}, "mine": {}}}))
    answer = cli(*words(zoo, "--candidate", places["gptq"], "--into", other))
    assert answer.code == 4 and "other candidates" in answer.err and "serving" not in other.read_text()
