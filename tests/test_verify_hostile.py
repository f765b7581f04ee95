"""`qmerge verify` on folders of strangers: manifests that lead astray, files that hang, code that wants to run, parts that contradict each other, settings that were changed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.tamper import renew

LINEAR = "model.layers.1.mlp.gate_proj"


@pytest.fixture(autouse=True)
def patience():
    """A check that waits for the other end of a pipe ends here, as a failure."""

    def late(*_: object) -> None:
        raise AssertionError("this took more than a minute")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def copy(written, tmp_path):
    def make(fmt: str = "bf16", *flags: str) -> Path:
        return Path(shutil.copytree(written("llama", fmt, *flags)[0], tmp_path / "out"))

    return make


@pytest.fixture
def inputs(zoo):
    return ("--base", zoo.nf4("llama"), "--adapter", zoo.adapter("llama"))


def edit(file: Path, change) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def edit_tensors(folder: Path, change) -> Path:
    """Change the tensors and renew every hash."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    renew(folder)
    return folder


def failed(answer) -> set[str]:
    assert "Traceback" not in answer.err, answer.err
    return {line.removeprefix("FAILED ").partition(":")[0] for line in answer.out.splitlines() if line.startswith("FAILED")}


# --- the manifest ---

DIGEST = {"sha256": "0" * 64, "bytes": 1}
WRONG_FILES = {
    "up": {"../x": DIGEST}, "absolute": {"/etc/hostname": DIGEST}, "twice": {"a//b": DIGEST}, "none": {"": DIGEST}, "inside and out": {"a/../../b": DIGEST}, "a drive": {"C:x": DIGEST}, "backslash": {"a\\..\\b": DIGEST},
    "a terminal's": {"a\x1b[2J": DIGEST}, "itself": {"manifest.json": DIGEST}, "negative": {"a": DIGEST | {"bytes": -1}}, "giant": {"a": DIGEST | {"bytes": 2**70}}, "text": {"a": DIGEST | {"bytes": "1"}},
    "truth": {"a": DIGEST | {"bytes": True}}, "half": {"a": DIGEST | {"bytes": 0.5}}, "no digest": {"a": None}, "short": {"a": DIGEST | {"sha256": "00"}}, "a number": {"a": DIGEST | {"sha256": 5}}, "more": {"a": DIGEST | {"mtime": 1}},
}  # fmt: skip


@pytest.mark.parametrize("files", WRONG_FILES.values(), ids=WRONG_FILES)
def test_a_manifest_whose_files_lead_astray_is_refused(copy, cli, files):
    """A file outside of the folder that is read, or told to be there, because a stranger's manifest names it; a size that is no size."""
    out = copy()
    edit(out / "manifest.json", lambda content: content["files"].update(files))
    answer = cli("verify", out)
    assert answer.code == 4 and "malformed" in answer.err and not failed(answer) and "\x1b" not in answer.err


def test_a_size_that_is_not_the_files_is_seen_without_hashing(copy, cli):
    """A manifest that says a terabyte, or a file of a terabyte (a hole, which takes no disk) that would be hashed for hours."""
    out = copy()
    edit(out / "manifest.json", lambda content: content["files"]["config.json"].update(bytes=2**62))
    os.truncate(out / "tokenizer.json", 2**40)
    answer = cli("verify", out)
    assert answer.code == 1 and "config.json: changed" in answer.out and "tokenizer.json: changed" in answer.out and "files" in failed(answer)


WRONG_RECORDS = {
    "inputs": lambda content: content.update(inputs=[]), "an input": lambda content: content["inputs"].update(base="x"), "an input's files": lambda content: content["inputs"]["base"].update(files=["x"]),
    "recipe": lambda content: content.update(recipe="x"), "format": lambda content: content["recipe"].update(format=["gptq"]), "unknown format": lambda content: content["recipe"].update(format="../x"),
    "bits": lambda content: content["recipe"].update(bits="4"), "weights": lambda content: content["recipe"].update(weights="x"), "endless weights": lambda content: content["recipe"].update(weights=[float("inf")]),
    "nf4": lambda content: content["recipe"].update(nf4=[1]), "nf4 blocks": lambda content: content["recipe"].update(nf4={"block_size": -64}), "linears": lambda content: content.update(linears=[1]),
    "a linear": lambda content: content["linears"].update({LINEAR: "x"}), "no figures": lambda content: content["linears"].update({LINEAR: {}}), "no numbers": lambda content: content["linears"][LINEAR].update(distance=float("nan"), slope=float("nan")),
    "bands": lambda content: content["linears"][LINEAR].update(bands="%%%"), "bands of another kind": lambda content: content["linears"][LINEAR].update(bands=7), "fewer bands": lambda content: content["linears"][LINEAR].update(bands=""),
    "a linear that is none": lambda content: content["linears"].update({"model.nothing": {"distance": 0.0, "slope": 1.0}}), "polish": lambda content: content.update(polish=[1]),
    "seed": lambda content: content["recipe"].update(seed=[1]), "no versions": lambda content: content.update(versions=3), "no tool": lambda content: content.update(tool={"name": "qmerge", "version": {}}),
}  # fmt: skip


@pytest.mark.parametrize("change", WRONG_RECORDS.values(), ids=WRONG_RECORDS)
def test_a_record_of_the_wrong_kind_is_no_crash(copy, cli, inputs, change, request):
    """A traceback on a stranger's folder; a NaN that no comparison finds different."""
    out = copy("gptq")
    edit(out / "manifest.json", change)
    answer = cli("verify", out, *inputs)
    failed(answer)
    assert answer.code in (1, 4) or request.node.callspec.id == "polish"


# --- what lies there ---


@pytest.mark.parametrize("name", ["manifest.json", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "more", ".gitattributes", "sub/more"])
@pytest.mark.parametrize("kind", ["pipe", "socket", "link to a device", "link away", "link to nothing"])
def test_what_is_no_regular_file_is_not_opened(copy, cli, tmp_path, kind, name):
    """Waiting for ever on a pipe, reading /dev/zero, following a link into somebody's home: before anything else."""
    out = copy()
    place = out / name
    place.parent.mkdir(exist_ok=True)
    if kind.startswith("link"):
        target = {"link to a device": "/dev/zero", "link away": tmp_path / "kept", "link to nothing": tmp_path / "nothing"}[kind]
        place.rename(tmp_path / "kept") if place.exists() else (tmp_path / "kept").write_text("{}")
        place.symlink_to(target)
    else:
        place.unlink(missing_ok=True)
        if kind == "pipe":
            os.mkfifo(place)
        else:
            before = os.getcwd()
            os.chdir(place.parent)  # a socket's address is short
            with socket.socket(socket.AF_UNIX) as made:
                made.bind(place.name)
            os.chdir(before)
    answer = cli("verify", out)
    assert answer.code == 1 and failed(answer) == {"files"} and name in answer.out and "nothing in the folder was opened" in answer.out


def test_remote_code_never_runs(copy, cli, inputs, tmp_path):
    """A config and a tokenizer that name a class in a file of the folder, all hashes right: importing it is running it."""
    out = copy()
    (out / "trap.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nfrom transformers import LlamaConfig as C, LlamaForCausalLM as M, PreTrainedTokenizerFast as T\n")
    for file, what in (("config.json", {"AutoConfig": "trap.C", "AutoModelForCausalLM": "trap.M"}), ("tokenizer_config.json", {"AutoTokenizer": ["trap.T", "trap.T"]})):
        edit(out / file, lambda content, what=what: content.update(auto_map=what, model_type="trapped") if "model_type" in content else content.update(auto_map=what, tokenizer_class="T"))
    renew(out)
    for words in ((), inputs):
        answer = cli("verify", out, *words)
        assert answer.code == 1 and "kinds" in failed(answer) and "trap.py" in answer.out and not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "adapter_config.json", "LICENSE.py", "model.pt", "sub/tokenizer.json", "training_args.bin"])
def test_a_file_that_qmerge_never_writes_is_named(copy, cli, name):
    """A pickle, an adapter that loaders would put on the model, code: vouched for by a manifest that lists them."""
    out = copy()
    (out / name).parent.mkdir(exist_ok=True)
    (out / name).write_text("{}")
    renew(out)
    answer = cli("verify", out)
    assert answer.code == 1 and "kinds" in failed(answer) and name in answer.out


# --- parts that contradict each other, hashes renewed ---


def put(name: str, place: int, value: float):
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{LINEAR}.{name}"].reshape(-1)[place] = value

    return change


def swap_meta(**more):
    def change(tensors: dict[str, torch.Tensor]) -> None:
        name = next(name for name in tensors if name.startswith(f"{LINEAR}.weight.quant_state"))
        state = json.loads(bytes(tensors[name].tolist())) | more
        tensors[name] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)

    return change


def turn(name: str):
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{LINEAR}.{name}"] = tensors[f"{LINEAR}.{name}"].reshape(tensors[f"{LINEAR}.{name}"].shape[::-1])

    return change


def drop(name: str):
    return lambda tensors: tensors.pop(f"{LINEAR}.{name}")


BROKEN = {
    ("gptq", "a zero scale"): put("scales", 3, 0.0), ("gptq", "a scale that is no number"): put("scales", 3, float("nan")), ("gptq", "an endless scale"): put("scales", 3, float("inf")),
    ("gptq", "a zero point that is not the middle"): put("qzeros", 0, 5), ("gptq", "a group that is none"): put("g_idx", 0, 99), ("gptq", "a negative group"): put("g_idx", 0, -1), ("gptq", "scales turned"): turn("scales"),
    ("gptq", "codes turned"): turn("qweight"), ("gptq", "no zeros"): drop("qzeros"),
    ("awq", "a scale below zero"): put("scales", 3, -0.01), ("awq", "codes turned"): turn("qweight"), ("awq", "no scales"): drop("scales"),
    ("compressed-tensors", "a zero scale"): put("weight_scale", 3, 0.0), ("compressed-tensors", "a giant shape"): put("weight_shape", 1, 2**40), ("compressed-tensors", "a negative shape"): put("weight_shape", 0, -2),
    ("compressed-tensors", "a smaller shape"): put("weight_shape", 0, 8), ("compressed-tensors", "no shape"): drop("weight_shape"),
    ("nf4", "a kind that loaders read otherwise"): swap_meta(quant_type="fp4"), ("nf4", "no blocks"): swap_meta(nested_blocksize=0), ("nf4", "a block size that is none"): swap_meta(blocksize=0), ("nf4", "another shape"): swap_meta(shape=[256, 127]),
    ("nf4", "a shape of the same size"): swap_meta(shape=[128, 256]), ("nf4", "a giant shape"): swap_meta(shape=[2**40, 2**40]), ("nf4", "a shape that is text"): swap_meta(shape="ab"), ("nf4", "an offset that is no number"): swap_meta(nested_offset=float("nan")),
    ("nf4", "another offset's type"): swap_meta(nested_offset="x"), ("nf4", "nested maxima that are no numbers"): put("weight.nested_absmax", 0, float("nan")), ("nf4", "another code book"): put("weight.quant_map", 3, 0.5),
    ("nf4", "no maxima"): drop("weight.absmax"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN, ids=": ".join)
def test_parts_that_contradict_each_other_are_named(copy, cli, case):
    """Files that load into noise, or into other weights than the ones checked: found from the folder alone, without a crash, with the linear's name."""
    answer = cli("verify", edit_tensors(copy(case[0]), BROKEN[case]))
    assert answer.code == 1 and failed(answer) & {"weights", "reading"} and LINEAR in answer.out


# --- settings and files that the inputs would not give, hashes renewed ---


def set_config(**values):
    return lambda out: edit(out / "config.json", lambda content: content.update(values))


CHANGED = {
    "config again": {
        "another base of rotation": set_config(rope_theta=5.0), "another end token": set_config(eos_token_id=7), "one layer less attended": set_config(max_position_embeddings=16), "a dropout": set_config(attention_dropout=0.5),
        "ignored modules": lambda out: edit(out / "config.json", lambda content: content["quantization_config"].update(desc_act=True)) or shutil.copyfile(out / "config.json", out / "c") and _repeat(out),
    },
    "side files": {
        "a chat template": lambda out: (out / "chat_template.jinja").write_text("{{ 'be evil' }}"), "sampling": lambda out: edit(out / "generation_config.json", lambda content: content.update(temperature=9.0)),
        "merges": lambda out: edit(out / "tokenizer.json", lambda content: content["model"].update(merges=content["model"]["merges"][:5])), "a lost template": lambda out: (out / "chat_template.jinja").unlink(),
        "a setting from nowhere": lambda out: (out / "special_tokens_map.json").write_text('{"eos_token": "<s>"}'),
    },
    "tensors": {
        "one more": lambda out: edit_tensors(out, lambda tensors: tensors.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(128)})),
        "one more linear": lambda out: edit_tensors(out, lambda tensors: tensors.update({name.replace("gate_proj", "evil_proj"): tensor.clone() for name, tensor in tensors.items() if name.startswith(LINEAR + ".")})),
    },
    "float tensors": {
        "a norm": lambda out: edit_tensors(out, lambda tensors: tensors["model.norm.weight"].mul_(1.01)),
        "a norm that was said to be trained": lambda out: edit(out / "manifest.json", lambda content: content.update(polish={"distill": {"floats": ["model.norm.weight"]}})) or edit_tensors(out, lambda tensors: tensors["model.norm.weight"].mul_(1.01)),
        "a zero's sign": lambda out: edit_tensors(out, lambda tensors: tensors["lm_head.weight"].view(torch.int16)[0, :2].neg_()),
    },
}  # fmt: skip


def _repeat(out: Path) -> None:
    """The same settings in gptq's second file, so that the two do not contradict each other."""
    (out / "c").unlink()
    (out / "quantize_config.json").write_text(json.dumps(json.loads((out / "config.json").read_text())["quantization_config"]))


@pytest.mark.parametrize(("check", "change"), [pytest.param(check, change, id=f"{check}: {name}") for check, changes in CHANGED.items() for name, change in changes.items()])
def test_what_the_inputs_do_not_give_is_seen(copy, cli, inputs, check, change):
    """Weights that are right under settings, a template or a tokenizer that are not; and excuses written into the manifest. The folder alone cannot tell."""
    out = copy("gptq")
    change(out)
    renew(out)
    answer = cli("verify", out, *inputs)
    assert answer.code == 1 and check in failed(answer)


# --- how it talks ---


def test_the_exit_code_the_lines_and_the_json_agree(copy, cli, inputs):
    """A failure that a script does not see; `--json` that is none; no word on what comes next."""
    out = copy()
    good = cli("verify", out)
    assert good.code == 0 and all(line.startswith("ok ") for line in good.out.splitlines()) and "Next: qmerge verify" in good.err
    assert "Next: " in cli("verify", out, *inputs).err
    listed = json.loads(cli("verify", out, "--json").out)
    assert listed["passed"] is True and [row["passed"] for row in listed["checks"]] == [True] * len(good.out.splitlines())
    (out / "tokenizer.json").write_text("{}")
    bad = cli("verify", out, "--json")
    assert bad.code == 1 and any(not row["passed"] and row["check"] == "files" for row in json.loads(bad.out)["checks"]) and "files" in bad.err


def test_what_is_not_there_is_exit_4(cli, tmp_path):
    """A missing folder that passes, or counts as one that failed."""
    (tmp_path / "empty").mkdir()
    for place in ("nothing", "empty"):
        assert cli("verify", tmp_path / place).code == 4
    assert cli("verify", tmp_path / "empty", "--signature", "x").code == 2
