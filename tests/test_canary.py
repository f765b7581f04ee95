"""Nothing of the machine or its user in what people publish: tokens, user and host names, folders, planted and then looked for in every byte of every output file."""

from __future__ import annotations

import json
import os
import platform
import shutil
import socket
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

TOKENS = {name: f"hf_CANARY{name}0123456789" for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_HUB_TOKEN", "WANDB_API_KEY", "OPENAI_API_KEY", "GITHUB_TOKEN")}
NAMES = {"USER": "canaryuser", "LOGNAME": "canaryuser", "USERNAME": "canaryuser", "HOSTNAME": "canaryhost", "HOST": "canaryhost"}
FOLDERS = ("canaryinputs", "canaryoutputs", "canarycwd", "canaryhome", "canaryelsewhere")


class Planted:
    """Inputs and outputs below folders with telling names; the working directory and the home are others of them."""

    def __init__(self, root: Path, zoo: Any, cli: Any) -> None:
        self.root, self.cli, self.said = root, cli, ""
        self.inputs, self.outputs, self.cwd, self.home, self.elsewhere = (root / name / "inner" for name in FOLDERS)
        for folder in (self.inputs, self.outputs, self.cwd, self.home, self.elsewhere):
            folder.mkdir(parents=True)
        shutil.copytree(zoo.nf4("llama"), self.inputs / "base")
        shutil.copytree(zoo.adapter("llama"), self.inputs / "adapter")
        for source in (zoo.calibration, zoo.held_out):
            shutil.copy(source, self.inputs)
        config = self.inputs / "adapter" / "adapter_config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": str(self.elsewhere / "somebase"), "revision": None}))
        for name in ("base/config.json", "adapter/adapter_config.json"):
            path = self.inputs / name
            path.write_text(json.dumps(json.loads(path.read_text()) | ({"_name_or_path": str(self.elsewhere / "somebase")} if "base" in name else {})))
        (self.inputs / "budget.yaml").write_text("kl_mean: {max: 100}\n")
        self.pair = ("--base", self.inputs / "base", "--adapter", self.inputs / "adapter")

    def __call__(self, *words: object, code: int = 0) -> Any:
        answer = self.cli(*words)
        assert answer.code == code, answer.err
        self.said += answer.out + answer.err
        return answer

    def files(self) -> Iterator[tuple[str, bytes]]:
        """Name and bytes of every file outside of the inputs; the members of archives unpacked."""
        for path in sorted(self.root.rglob("*")):
            if path.is_file() and not {self.inputs, self.root / "broken"} & set(path.parents):
                yield str(path.relative_to(self.root)), path.read_bytes()
                if zipfile.is_zipfile(path):
                    with zipfile.ZipFile(path) as archive:
                        yield from ((f"{path.name}:{name}", archive.read(name)) for name in archive.namelist())

    def check(self) -> int:
        """How many files were searched."""
        words = [*TOKENS.values(), *dict.fromkeys(NAMES.values()), *FOLDERS]
        words += [word for word in (socket.gethostname(), os.path.expanduser("~"), str(Path(__file__).parents[1])) if len(word) > 6]
        found = [(name, word) for name, content in self.files() for word in words if word.encode() in content or word.encode("utf-16-le") in content]
        assert not found, found[:10]
        assert not [word for word in TOKENS.values() if word in self.said], "a token on the terminal"
        return sum(1 for _ in self.files())


@pytest.fixture
def planted(zoo, cli, tmp_path, monkeypatch):
    made = Planted(tmp_path, zoo, cli)
    for name, value in (TOKENS | NAMES | {"HOME": str(made.home), "TMPDIR": str(made.elsewhere)}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(socket, "gethostname", lambda: "canaryhost")
    monkeypatch.setattr(platform, "node", lambda: "canaryhost")
    monkeypatch.chdir(made.cwd)
    return made


def test_a_run_and_all_that_is_made_of_it(planted):
    """A folder, a user or a host in a manifest, a config, results, a report, a card or a baseline; a token anywhere."""
    out, text = planted.outputs / "merged", planted.inputs / "held_out.jsonl"
    small = ("--device", "cpu", "--samples", 6, "--tokens", 32, "--curvature-tokens", 0)
    planted("run", *planted.pair, "--out", out, "--format", "gptq", "--calibration", planted.inputs / "calibration.jsonl", "--text", f"own={text}", "--also", "rtn", "--generate", 2, "--new-tokens", 4,
            "--perplexity", f"strided,tokens=32,stride=16:{text}", "--junit", planted.outputs / "run.xml", "--budget", planted.inputs / "budget.yaml", *small)  # fmt: skip
    results = planted.outputs / "merged.eval" / "results.json"
    limits = ("--budget", planted.inputs / "budget.yaml")
    planted("compare", results, *limits, "--junit", planted.outputs / "junit.xml", "--save-baseline", planted.outputs / "baseline.json", "--recompute")
    planted("compare", results, *limits, "--baseline", planted.outputs / "baseline.json", "--json")
    planted("report", results, "--out", planted.outputs / "report", "--junit", planted.outputs / "report.xml")
    planted("report", "--history", planted.outputs, "--out", planted.outputs / "history")
    planted("card", out, *planted.pair, "--results", results)
    planted("verify", out, *planted.pair)
    planted("inspect", planted.inputs / "adapter", "--json")
    assert planted.check() > 15


def test_a_merge_with_paths_of_all_kinds(planted):
    """Relative places, places through the home, and a failed command that names what it was given."""
    os.symlink(planted.inputs, planted.cwd / "linked")
    planted("merge", "--base", "linked/base", "--adapter", "linked/adapter", "--out", "out", "--format", "bf16", "--device", "cpu")
    planted("merge", *planted.pair, "--out", planted.outputs / "nf4", "--format", "nf4", "--rtn", "--device", "cpu")
    planted("merge", *planted.pair, "--out", planted.outputs / "none", "--format", "bf16", "--base", planted.elsewhere / "nothing", code=4)
    os.unlink(planted.cwd / "linked")
    assert planted.check() > 10


@pytest.mark.slow
def test_figures_of_a_benchmark(planted):
    """A folder in the last words of a process that failed, or in a loader's note. Slow: each arm imports torch anew."""
    planted("merge", *planted.pair, "--out", planted.outputs / "merged", "--format", "bf16", "--device", "cpu")
    shutil.copytree(planted.outputs / "merged", planted.root / "broken")
    config = planted.root / "broken" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"hidden_act": str(planted.elsewhere / "nothing")}))
    planted("bench", *planted.pair, "--candidate", planted.outputs / "merged", "--candidate", planted.root / "broken", "--without-merged", "--rounds", 1, "--repeats", 1, "--batches", 1,
            "--prompt-tokens", 4, "--new-tokens", 2, "--device", "cpu", "--out", planted.outputs / "bench.json")  # fmt: skip
    assert "note" in json.loads((planted.outputs / "bench.json").read_text())["serving"]["rows"]["broken"]
    assert planted.check() >= 8
