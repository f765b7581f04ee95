"""What transformers, PEFT, gptqmodel, lm-eval and datasets open on the way of an evaluation: read strictly before them, led nowhere, no code of the folder run."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from test_hostile_inputs import Case, Trap
from test_merge_refusals import digests

from qmerge.errors import Refused
from qmerge.store import unpickle_child
from qmerge.store.foreign import check_model_folder
from qmerge.store.inert import inert

EVIL = "from pathlib import Path\nPath({!r}).touch()\nfrom transformers import LlamaConfig as Evil\n"
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True}


class Candidate(Case):
    """A third folder, which a stranger calls a merged model."""

    def __init__(self, root: Path, cli: Callable) -> None:
        super().__init__(root, cli)
        self.candidate = root / "candidate"
        shutil.copytree(self.base, self.candidate)
        (root / "text.jsonl").write_text('{"text": "one two three"}\n')

    def shard(self, file: str) -> None:
        (self.candidate / "model.safetensors").unlink()
        self.json("candidate/model.safetensors.index.json", {"weight_map": dict.fromkeys(self.tensors, file)})

    def only_pickle(self) -> None:
        (self.candidate / "model.safetensors").unlink()
        torch.save({"x": Trap(self.marker)}, self.candidate / "pytorch_model.bin")

    def trapped(self, **keys: Any) -> None:
        """Beside good weights, a pickle that the config asks for."""
        torch.save({"x": Trap(self.marker)}, self.candidate / "pytorch_model.bin")
        self.change("candidate/config.json", **keys)

    def with_adapter(self) -> None:
        """transformers puts an adapter that lies beside a config on the model, from a pickle too."""
        shutil.copy(self.adapter / "adapter_config.json", self.candidate)
        torch.save({"x": Trap(self.marker)}, self.candidate / "adapter_model.bin")


HARM: dict[str, tuple[Callable[[Candidate], Any], str]] = {
    "a shard outside": (lambda c: c.shard("../victim/model.safetensors"), "not a plain file name"),
    "a link outside": (lambda c: c.link("candidate/model.safetensors", "../victim/model.safetensors"), "leads out"),
    "a tokenizer that links outside": (lambda c: c.link("candidate/tokenizer.json", "../victim/secret.json"), "leads out"),
    "a pickle alone": (lambda c: c.only_pickle(), "as pickle only"),
    "a pickle that the config asks for": (lambda c: c.trapped(transformers_weights="pytorch_model.bin"), "transformers_weights"),
    "another index that the config asks for": (lambda c: c.trapped(transformers_weights="evil.safetensors.index.json"), "transformers_weights"),
    "an adapter beside the model": (lambda c: c.with_adapter(), "holds an adapter as well"),
    "a kernel of the hub": (lambda c: c.change("candidate/config.json", attn_implementation="evil/kernel"), "attn_implementation"),
    "a kernel of the hub, deeper": (lambda c: c.change("candidate/config.json", text_config={"attn_implementation": {"": "evil/kernel@main"}}), "text_config.attn_implementation"),
    "kernels by a mapping": (lambda c: c.change("candidate/config.json", kernel_config={"RMSNorm": "evil/kernel:RMSNorm"}), "kernel_config"),
    "another folder as gptqmodel's adapter": (lambda c: c.change("candidate/config.json", quantization_config=GPTQ | {"adapter": {"name": "lora", "path": "../victim"}}), "adapter"),
    "the same in gptqmodel's own file": (lambda c: c.json("candidate/quantize_config.json", GPTQ | {"adapter": {"name": "lora", "path": "../victim"}}), "quantize_config.json in candidate"),
    "a pipe as gptqmodel's own file": (lambda c: c.pipe("candidate/quantize_config.json"), "a pipe"),
    "a pipe as tokenizer": (lambda c: c.pipe("candidate/tokenizer_config.json"), "a pipe"),
    "a folder as tokenizer": (lambda c: (c.candidate / "tokenizer.json").mkdir(), "a pipe, a device or a folder"),
    "a tokenizer of 201 MB": (lambda c: (c.text("candidate/tokenizer.json", "{}"), os.truncate(c.candidate / "tokenizer.json", 201_000_000)), "too large"),
    "a tokenizer's config of many brackets": (lambda c: c.text("candidate/tokenizer_config.json", '{"a":' + "[" * 100_000), "JSON"),
    "a generation config with a key twice": (lambda c: c.text("candidate/generation_config.json", '{"a": 1, "a": 2}'), "appears twice"),
    "a key twice in a header": (lambda c: c.header("candidate/model.safetensors", b'{"w":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"w":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}', None, b"ab"), "appears twice"),
    "a quantization that is a list": (lambda c: c.change("candidate/config.json", quantization_config=[1]), "malformed"),
}


@pytest.fixture
def case(tmp_path, cli):
    return Candidate(tmp_path, cli)


@pytest.fixture
def no_library(monkeypatch):
    """Whoever builds a model or a tokenizer has opened what should have been refused before."""
    import transformers

    for name in ("AutoModelForCausalLM", "AutoTokenizer", "AutoConfig"):
        monkeypatch.setattr(getattr(transformers, name), "from_pretrained", lambda *_, **__: pytest.fail("a library opened the folder"))


@pytest.mark.parametrize("name", HARM)
def test_a_candidate_is_refused_before_any_library_opens_it(case, no_library, name):
    """transformers 5.23 follows an index out of the folder, takes the weight file that the config names, and loads an adapter that lies there, pickle or not."""
    harm, word = HARM[name]
    harm(case)
    big = name == "a tokenizer of 201 MB"
    before = None if big else digests(case.candidate)
    with pytest.raises(Refused):
        check_model_folder(case.candidate)
    common = ("--base", case.base, "--adapter", case.adapter, "--candidate", case.candidate, "--on", "original")
    case.ended(case.cli("eval", *common, "--text", case.root / "text.jsonl", "--out", case.place / "results.json"), 4, word)
    case.ended(case.cli("bench", *common, "--out", case.place / "bench.json"), 4, word)
    assert list(case.place.iterdir()) == [] and (big or digests(case.candidate) == before)


@pytest.mark.parametrize("role", ["base", "original"])
def test_so_is_a_base(case, no_library, role):
    """The same traps in the folder that the reference is loaded from: for eval, and for run before hours of merging."""
    case.with_adapter()
    where = {"base": ("--base", case.candidate), "original": ("--base", case.base, "--original", case.candidate, "--also", "original")}[role]
    text = case.root / "text.jsonl"
    case.ended(case.cli("eval", *where, "--adapter", case.adapter, "--candidate", case.base, "--on", "original", "--text", text, "--out", case.place / "results.json"), 4, "holds an adapter as well")
    where = {"base": where, "original": ("--base", case.base, "--original", case.candidate)}[role]
    case.ended(case.cli("run", *where, "--adapter", case.adapter, "--out", case.place / "out", "--format", "bf16", "--on", "original", "--text", text), 4, "holds an adapter as well")
    assert list(case.place.iterdir()) == []


def test_a_whole_folder_passes(case):
    """Ordinary keys refused: a model that names code which transformers does not need, as many do."""
    case.change("candidate/config.json", auto_map={"AutoConfig": "x.Y"}, _name_or_path="org/model", attn_implementation="sdpa", use_cache=True, quantization_config=GPTQ)
    case.text("candidate/tokenizer.json", "{}")
    assert len(check_model_folder(case.candidate).specs) == 2


def test_what_names_code_goes_and_the_rest_stays():
    """A key that is dropped without a reason, or one deep inside that is kept."""
    config = {"hidden_size": 8, "auto_map": {}, "_x": 1, "layers": [{"attn_implementation": "a/b", "kind": "full"}], "rope": {"type": "yarn", "trust_remote_code": True}, "adapter": None}
    assert inert(config) == {"hidden_size": 8, "layers": [{"kind": "full"}], "rope": {"type": "yarn"}, "adapter": None}


def test_code_beside_a_model_is_not_run_by_an_evaluation(zoo, written, cli, tmp_path):
    """auto_map in a base, a candidate and an adapter, with code that would leave a mark; through every loader of an evaluation and of a card."""
    marker, made = tmp_path / "marker", {}
    sources = {"base": zoo.nf4("llama"), "adapter": zoo.adapter("llama"), "candidate": written("llama", "bf16")[0]}
    for role, source in sources.items():
        made[role] = tmp_path / role
        shutil.copytree(source, made[role])
        for name in ("modeling_evil.py", "tokenization_evil.py"):
            (made[role] / name).write_text(EVIL.format(str(marker)))
        for name, key in (("config.json", "AutoModelForCausalLM"), ("config.json", "AutoConfig"), ("tokenizer_config.json", "AutoTokenizer"), ("generation_config.json", "AutoModel")):
            path = made[role] / name
            if path.is_file():
                content = json.loads(path.read_text())
                content.setdefault("auto_map", {})[key] = ["modeling_evil.Evil", None] if key == "AutoTokenizer" else "modeling_evil.Evil"
                path.write_text(json.dumps(content | {"trust_remote_code": True}))
    answer = cli("eval", "--base", made["base"], "--adapter", made["adapter"], "--candidate", made["candidate"], "--text", zoo.held_out, "--tokens", 64, "--device", "cpu", "--out", tmp_path / "results.json")
    assert answer.code == 0, answer.err
    answer = cli("merge", "--base", made["base"], "--adapter", made["adapter"], "--out", tmp_path / "out", "--format", "gptq", "--calibration", zoo.calibration, "--samples", 4, "--tokens", 32, "--curvature-tokens", 0, "--device", "cpu")
    assert answer.code == 0, answer.err
    assert not marker.exists() and not any(b"evil" in path.read_bytes() for path in (tmp_path / "out").iterdir())


def test_a_module_that_an_adapter_names_is_not_imported(tmp_path, monkeypatch):
    """PEFT imports the module that ``megatron_core`` names as soon as ``megatron_config`` is set."""
    from qmerge.quality.attach import _config

    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 1, "lora_alpha": 1, "megatron_config": {"x": 1}, "megatron_core": "antigravity"}))
    assert _config(tmp_path, keep=False).megatron_config is None


@pytest.mark.parametrize("content", ["task: x\ndoc_to_text: \"{{ cycler.__init__.__globals__.os.popen('touch MARKER') }}\"\n", "task: x\nprocess_docs: !function evil.run\n"])
def test_task_files_of_lm_eval_are_code(case, content):
    """A suite from a stranger whose task file runs code through Jinja, which lm-eval does not put into a sandbox, or by naming a function."""
    pytest.importorskip("lm_eval")
    (case.root / "tasks").mkdir()
    case.text("tasks/x.yaml", content.replace("MARKER", str(case.marker)))
    case.text("tasks/evil.py", EVIL.format(str(case.marker)))
    case.text("suite.yaml", "tasks: [x]\ninclude_path: tasks\n")
    answer = case.cli("eval", "--base", case.base, "--adapter", case.adapter, "--candidate", case.candidate, "--on", "original", "--text", case.root / "text.jsonl", "--suite", case.root / "suite.yaml", "--out", case.place / "r.json")
    case.ended(answer, 4, "--allow-task-code")
    assert list(case.place.iterdir()) == []


# ---- the child that reads pickles

WALLS = """
import json, os, socket, sys, threading
sys.path.insert(0, sys.argv[1])
import unpickle_child as child
def tried(what):
    try:
        what()
    except OSError as error:
        return error.errno
    return "done"
found = {"walls": [getattr(child, name)() for name in sys.argv[3].split(",")]}
thread = threading.Thread(target=lambda: found.update(thread=True)); thread.start(); thread.join()
def connect():
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as line:
        line.settimeout(5)
        line.connect(("127.0.0.1", int(sys.argv[2])))
found |= {"connect": tried(connect), "run": tried(lambda: os.posix_spawn("/bin/true", ["true"], {})), "fork": tried(lambda: os.fork() or os._exit(0)), "write": tried(lambda: open("made", "w")), "append": tried(lambda: open("kept", "a")),
          "remove": tried(lambda: os.remove("kept")), "rename": tried(lambda: os.rename("kept", "other")), "mode": tried(lambda: os.chmod("kept", 0o777)), "read": tried(lambda: open("kept").close())}
os.write(1, json.dumps(found).encode())
"""


def behind(walls: str, port: int, folder: Path) -> dict[str, Any]:
    (folder / "kept").write_text("x")
    done = subprocess.run([sys.executable, "-c", WALLS, str(Path(unpickle_child.__file__).parent), str(port), walls], cwd=folder, capture_output=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="skipped: the walls are Linux'")
def test_the_child_can_do_nothing_but_read(tmp_path):
    """A pickle that gets past weights_only (CVE-2025-32434, CVE-2026-24747) and sends a token away, starts a program, or changes a file."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        filtered = behind("forbid_calls", port, tmp_path)
        (tmp_path / "alone").mkdir()
        alone = behind("leave_network", port, tmp_path / "alone")
    if filtered["walls"] == [True]:
        assert filtered["thread"] and filtered["read"] == "done", "torch needs both"
        assert {key: filtered[key] for key in ("connect", "run", "fork", "write", "append", "remove", "rename", "mode")} == dict.fromkeys(("connect", "run", "fork", "write", "append", "remove", "rename", "mode"), 1)
        assert (tmp_path / "kept").read_text() == "x" and not (tmp_path / "made").exists()
    if alone["walls"] == [True]:
        assert alone["connect"] not in ("done", 1), "its own network has no road to this one's"
    assert filtered["walls"] == [True] or alone["walls"] == [True], "this system grants neither wall: then pickles are refused"


def test_without_a_wall_no_pickle_is_opened(tmp_path, monkeypatch):
    """A system that grants neither wall, and a child that opens the pickle all the same."""
    torch.save({"x": torch.ones(2)}, tmp_path / "adapter_model.bin")
    code = "import json, sys, io\nsys.path.insert(0, sys.argv[1])\nimport unpickle_child as child\nchild.leave_network = child.forbid_calls = lambda: False\nchild.main()\n"
    job = json.dumps({"pickle": str(tmp_path / "adapter_model.bin"), "path": sys.path})
    done = subprocess.run([sys.executable, "-c", code, str(Path(unpickle_child.__file__).parent)], input=job.encode(), capture_output=True, timeout=120, check=False)
    assert done.returncode == 1 and b"not opened" in done.stderr and done.stdout == b""


def test_the_child_knows_no_home_and_no_token(tmp_path, monkeypatch):
    """A token in the environment of the process that reads a stranger's pickle."""
    from qmerge.store import unpickle

    (tmp_path / "child.py").write_text("import json, os, sys\nsys.exit(json.dumps(dict(os.environ)) + os.getcwd())\n")
    monkeypatch.setenv("HF_TOKEN", "hf_canary"), monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "canary"), monkeypatch.setenv("SSH_AUTH_SOCK", "/canary")
    monkeypatch.setattr(unpickle, "CHILD", tmp_path / "child.py")
    torch.save({"x": torch.ones(2)}, tmp_path / "adapter_model.bin")
    with pytest.raises(Refused) as caught:
        unpickle.as_safetensors(tmp_path / "adapter_model.bin")
    assert "canary" not in str(caught.value) and os.path.expanduser("~") not in str(caught.value) and "PATH" in str(caught.value)


def test_a_child_that_does_not_end_is_ended(tmp_path, monkeypatch):
    """A pickle that keeps the command waiting for ever."""
    from qmerge.store import unpickle

    (tmp_path / "child.py").write_text("import time\ntime.sleep(1000)\n")
    monkeypatch.setattr(unpickle, "CHILD", tmp_path / "child.py"), monkeypatch.setattr(unpickle, "LIMIT_S", 1)
    torch.save({"x": torch.ones(2)}, tmp_path / "adapter_model.bin")
    with pytest.raises(Refused, match="safely") as caught:
        unpickle.as_safetensors(tmp_path / "adapter_model.bin")
    assert "nothing within 1 s" in str(caught.value)


def test_a_folder_of_weights_that_only_transformers_would_read(case):
    """Two weight files of which the loaders take different ones."""
    save_file(case.tensors, case.candidate / "model-00001-of-00001.safetensors")
    case.json("candidate/model.safetensors.index.json", {"weight_map": dict.fromkeys(case.tensors, "model-00001-of-00001.safetensors")})
    with pytest.raises(Refused, match="unclear which"):
        check_model_folder(case.candidate)
