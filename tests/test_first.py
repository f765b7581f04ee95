"""Is a misspelt word refused before torch is imported, which takes longer than everything that is then said?"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qmerge.device import COMPUTE
from qmerge.device_names import TYPES, is_device_name
from qmerge.pipeline.recipe_values import COMPUTES

DEMO = Path(__file__).parents[1] / "examples" / "demo"
MERGE = ("--base", DEMO / "base-nf4", "--adapter", DEMO / "adapter", "--out", "out", "--calibration", DEMO / "calibration.jsonl")
EVAL = ("--base", DEMO / "base-nf4", "--adapter", DEMO / "adapter", "--candidate", DEMO / "base-nf4", "--text", DEMO / "eval-prose.jsonl", "--out", "results.json")
MISTAKES: dict[str, tuple[tuple[object, ...], int, str]] = {
    "format": (("merge", *MERGE, "--format", "gptqq"), 2, "gptqq"),
    "compute": (("merge", *MERGE, "--compute", "fp17"), 2, "fp17"),
    "bits": (("merge", *MERGE, "--bits", 5), 2, "--bits 5"),
    "device": (("merge", *MERGE, "--device", "cup"), 2, "cup"),
    "weight": (("merge", *MERGE, "--adapter", "a=heavy"), 2, "no number"),
    "base": (("merge", *MERGE, "--base", "./nowhere"), 4, "./nowhere"),
    "base like an id": (("merge", *MERGE, "--base", "nowhere/base"), 4, "nowhere/base"),
    "adapter": (("merge", *MERGE[:2], "--adapter", "./nowhere#name", *MERGE[4:]), 4, "./nowhere"),
    "calibration": (("merge", *MERGE, "--calibration", "calib.jsonl"), 4, "calib.jsonl"),
    "no calibration": (("merge", *MERGE[:6]), 4, "no calibration text was given"),
    "NF4 recipe": (("merge", *MERGE, "--nf4-recipe", "dobble"), 2, "dobble"),
    "OUT is there": (("merge", *MERGE, "--out", DEMO), 4, "An input lies inside the output"),
    "text": (("run", *MERGE, "--text", "evl.jsonl"), 4, "evl.jsonl"),
    "the calibration text": (("run", *MERGE, "--text", DEMO / "calibration.jsonl"), 4, "is the calibration text"),
    "budget": (("run", *MERGE, "--budget", "strikt"), 2, "strikt"),
    "extra arm": (("run", *MERGE, "--also", "rtm"), 2, "rtm"),
    "suite": (("run", *MERGE, "--suite", "nosuch.yaml"), 2, "nosuch.yaml"),
    "protocol": (("run", *MERGE, "--perplexity", "gptqq:wiki.txt"), 2, "gptqq"),
    "protocol's text": (("run", *MERGE, "--perplexity", "gptq:wiki.txt"), 4, "wiki.txt"),
    "baseline": (("run", *MERGE, "--baseline", "nosuch.json"), 2, "nosuch.json"),
    "eval's budget": (("eval", *EVAL, "--budget", "strikt"), 2, "strikt"),
    "eval's combination": (("eval", *EVAL, "--combine", "tise"), 2, "tise"),
    "eval's device": (("eval", *EVAL, "--device", "cup"), 2, "cup"),
    "eval's extra arm": (("eval", *EVAL, "--also", "rtm"), 2, "rtm"),
    "candidate": (("eval", *EVAL, "--candidate", "./nowhere"), 4, "./nowhere"),
    "bench's candidate": (("bench", *EVAL[:4], "--candidate", "./nowhere"), 4, "./nowhere"),
    "results": (("compare", "nosuch.json"), 2, "nosuch.json"),
    "engine": (("advise", "nosuch.json", "--engine", "vlm"), 2, "vlm"),
    "inspect": (("inspect", "./nowhere"), 4, "./nowhere"),
    "verify": (("verify", "./nowhere"), 4, "./nowhere"),
    "card": (("card", "./nowhere"), 4, "./nowhere"),
    "push": (("push", "./nowhere", "--repo", "a/b"), 4, "./nowhere"),
    "recipe": (("merge", "--recipe", "nosuch.yaml"), 2, "nosuch.yaml"),
}
RUNNER = """
import contextlib, io, json, sys
from qmerge.cli.main import main
answers = {}
for name, words in json.load(sys.stdin).items():
    sys.argv, said = ["qmerge", *words], io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        try:
            main()
        except SystemExit as stop:
            answers[name] = stop.code, said.getvalue(), sorted({"torch", "transformers", "peft"} & set(sys.modules))
print(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """All mistakes in one process, which has imported nothing else: exit code, stderr, and which heavy libraries are there by then."""
    asked = json.dumps({name: list(map(str, words)) for name, (words, _, _) in MISTAKES.items()})
    place = tmp_path_factory.mktemp("first")
    done = subprocess.run([sys.executable, "-c", RUNNER], input=asked, capture_output=True, text=True, timeout=120, cwd=place, env=os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(DEMO.parents[1])})
    assert done.returncode == 0, done.stderr
    assert list(place.iterdir()) == []
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_refused_without_torch(answers, name):
    """Seconds of imports, up to twenty on a cold disk, before a typing mistake is told."""
    code, said, heavy = answers[name]
    assert (code, heavy) == (MISTAKES[name][1], []) and MISTAKES[name][2] in said, said


def test_the_light_list_of_devices_is_torch_s():
    """A device that torch knows and that is refused by a list of names, or a misspelt one that is found out after torch is imported."""
    with pytest.raises(RuntimeError) as told:
        torch.device("cup")
    assert set(TYPES) >= set(str(told.value).removeprefix("Expected one of ").partition(" device type")[0].split(", "))
    for name in ("cuda:0", "cuda:12", "cpu", "cuda:", "cuda:01", "cuda:-1", "cup", "cpux"):
        try:
            torch.device(name)
        except RuntimeError:
            assert not is_device_name(name)
        else:
            assert is_device_name(name)


def test_the_light_list_of_computes_is_the_heavy_one():
    """A word that the recipe takes and the device does not know, or the other way round."""
    assert set(COMPUTES) == {"auto", *COMPUTE}
