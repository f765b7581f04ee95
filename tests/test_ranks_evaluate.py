"""Several processes that share an evaluation find the numbers of one, bit for bit, and end together."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import run_cli
from support.ranks import end, free_port, start

from qmerge.quality import generation, measure, running
from qmerge.quality.sharing import share_of, share_of_all
from qmerge.quality.task_batches import scored, written
from qmerge.ranks import Ranks

LIMIT_S = 240
ROOT = Path(__file__).parents[1]


class Measured:
    """An evaluation in small batches, so that every rank has some."""

    def __init__(self, zoo: Any, candidate: Path, root: Path) -> None:
        self.zoo, self.candidate, self.root, self.log, self.count = zoo, candidate, root, root / "log", 0
        self._alone: dict[tuple, Path] = {}

    def place(self) -> Path:
        self.count += 1
        folder = self.root / str(self.count)
        folder.mkdir()
        return folder / "results.json"

    def words(self, out: Path, *flags: object) -> list[object]:
        return ["eval", "--base", self.zoo.nf4("llama"), "--adapter", self.zoo.adapter("llama"), "--candidate", self.candidate, "--text", self.zoo.held_out, "--tokens", 32, "--out", out, "--device", "cpu", *flags]

    def leave(self, out: Path, *flags: object) -> None:
        answer = run_cli(*self.words(out, *flags))
        os.write(2, answer.err.encode())
        raise SystemExit(answer.code)

    def ended(self, size: int, out: Path, *flags: object) -> list[int]:
        return end(start([lambda: self.leave(out, *flags)] * size, self.log), LIMIT_S)

    def alone(self, *flags: object) -> Path:
        if flags not in self._alone:
            out = self.place()
            answer = run_cli(*self.words(out, *flags))
            assert answer.code == 0, answer.err
            self._alone[flags] = out
        return self._alone[flags]

    def last_words(self, most: int = 3000) -> str:
        return self.log.read_text(errors="replace")[-most:] if self.log.exists() else ""


@pytest.fixture(scope="module")
def small():
    """Batches of two windows and of two prompts, here and in the children."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "BATCH_TOKENS", 64)
        patch.setattr(generation, "BATCH", 2)
        yield


@pytest.fixture(scope="module")
def measured(small, zoo, written, tmp_path_factory):
    return Measured(zoo, written("llama", "bf16")[0], tmp_path_factory.mktemp("evaluated"))


def content(out: Path) -> dict[str, Any]:
    """All but when and how long."""
    found = json.loads(out.read_text())
    return {key: value for key, value in found.items() if key not in ("elapsed_s", "measured_at")}


def same(one: Path, other: Path) -> None:
    apart = [f"{ours} | {theirs}" for ours, theirs in zip(*(json.dumps(content(out), indent=0).splitlines() for out in (one, other)), strict=False) if ours != theirs]
    assert content(one) == content(other) and not apart, apart[:3]  # also the order of arms and metrics
    ours, theirs = np.load(one.with_suffix(".npz")), np.load(other.with_suffix(".npz"))
    assert ours.files == theirs.files
    for name in ours.files:
        assert ours[name].dtype == theirs[name].dtype and ours[name].tobytes() == theirs[name].tobytes(), name
    assert samples(one) == samples(other)


def samples(out: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(out.with_suffix(".samples").glob("*"))}


def test_two_ranks_measure_what_one_does(measured):
    """Batches that nobody measures, or two; tokens out of order; a number that depends on who had it."""
    flags = ("--perplexity", f"gptq,tokens=64:{measured.zoo.other}", "--generate", 7, "--new-tokens", 8)
    wanted, out = measured.alone(*flags), measured.place()  # one first: its children then need not import and compile
    assert measured.ended(2, out, *flags) == [0, 0], measured.last_words()
    same(out, wanted)
    assert len(np.load(out.with_suffix(".npz"))["held_out/window"]) > 4 * 64, "several batches"


@pytest.mark.slow
@pytest.mark.parametrize("size", [3, 20])
def test_any_number_of_ranks_measures_what_one_does(measured, size):
    """More ranks than batches, where arms are spread too: an arm that nobody loads, or whose row the first rank does not get."""
    flags = ("--also", "rtn", "--text", f"other={measured.zoo.other}")
    wanted, out = measured.alone(*flags), measured.place()
    assert measured.ended(size, out, *flags) == [0] * size, measured.last_words()
    same(out, wanted)


def test_two_ranks_answer_the_items_of_one(measured, tmp_path):
    """lm-eval's own way of sharing draws other examples for each rank, and its prompts are then not those of one rank."""
    pytest.importorskip("lm_eval")
    from test_quality_tasks import write_files

    flags = ("--suite", write_files(tmp_path))
    wanted, out = measured.alone(*flags), measured.place()  # one first: its children then need not import and compile
    assert measured.ended(2, out, *flags) == [0, 0], measured.last_words()
    same(out, wanted)
    assert len(samples(out)) == 12


def test_a_killed_rank_ends_all(measured):
    """Ranks that wait for ever for the numbers of one that is dead; a results.json in which they are missing."""
    out = measured.place()

    def dies() -> None:
        inner = running.Run.add

        def add(self: Any, name: str, *rest: Any) -> None:
            if name == "merged":
                os.kill(os.getpid(), signal.SIGKILL)
            inner(self, name, *rest)

        running.Run.add = add
        measured.leave(out)

    for victim in (0, 1):
        works = [lambda: measured.leave(out)] * 2
        works[victim] = dies
        began = time.monotonic()
        codes = end(start(works, measured.log), LIMIT_S)
        assert codes[victim] == -9 and codes[1 - victim] == 75, (codes, measured.last_words())
        assert time.monotonic() - began < 60 and not list(out.parent.iterdir())


def test_an_error_on_one_rank_ends_all_alike(measured):
    """A rank that fails alone, while the others measure on and write."""
    out = measured.place()

    def fails() -> None:
        from qmerge.errors import Refused

        def add(*_: Any) -> None:
            raise Refused("this arm cannot be read")

        running.Run.add = add
        measured.leave(out)

    assert end(start([lambda: measured.leave(out), fails], measured.log), LIMIT_S) == [4, 4]
    assert "rank 1: this arm cannot be read" in measured.last_words() and not list(out.parent.iterdir())


def test_ranks_with_other_settings_are_refused(measured):
    """Half of the windows of one length, half of another."""
    out = measured.place()
    works = [lambda: measured.leave(out), lambda: measured.leave(out, "--generate", 2)]
    assert end(start(works, measured.log), LIMIT_S) == [2, 2]
    assert "rank 1" in measured.last_words() and "generate" in measured.last_words() and not list(out.parent.iterdir())


@pytest.mark.parametrize("what", ["candidate", "text"])
def test_ranks_with_other_files_are_refused(measured, tmp_path, what):
    """An old copy on one host: half of the table would be of another model, or of other text."""
    if what == "candidate":
        other = tmp_path / measured.candidate.name
        shutil.copytree(measured.candidate, other)
        weights = other / "model.safetensors"
        raw = bytearray(weights.read_bytes())
        raw[-5] ^= 1
        weights.write_bytes(raw)
        words = [other if word == measured.candidate else word for word in measured.words(measured.place())]
    else:
        other = tmp_path / Path(measured.zoo.held_out).name
        other.write_text(Path(measured.zoo.held_out).read_text().replace("rain", "snow", 1))
        words = [str(other) if word == measured.zoo.held_out else word for word in measured.words(measured.place())]

    def differs() -> None:
        answer = run_cli(*words)
        os.write(2, answer.err.encode())
        raise SystemExit(answer.code)

    out = measured.place()
    assert end(start([lambda: measured.leave(out), differs], measured.log), LIMIT_S) == [4, 4], measured.last_words()
    assert "rank 1" in measured.last_words() and ("model.safetensors" if what == "candidate" else "held_out") in measured.last_words() and not list(out.parent.iterdir())


@pytest.mark.slow
def test_torchrun(measured):
    """What the manual tells people to type."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    one, two = measured.place(), measured.place()
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port())]
    for out, before in ((one, []), (two, launcher)):
        found = subprocess.run([sys.executable, *before, "-m", "qmerge", *map(str, measured.words(out, "--generate", 20))], env=environment, capture_output=True, text=True, timeout=LIMIT_S)
        assert found.returncode == 0, found.stderr[-3000:]
    same(two, one)


@pytest.mark.slow
def test_a_whole_run_is_shared(measured, tmp_path):
    """A second rank that measures what is not there yet, or writes beside the first."""
    def words(out: Path) -> list[object]:
        return ["run", "--base", measured.zoo.nf4("llama"), "--adapter", measured.zoo.adapter("llama"), "--calibration", measured.zoo.calibration, "--samples", 8, "--tokens", 32, "--out", out, "--device", "cpu", "--budget", "lenient",
                "--allow-overlap"]  # fmt: skip

    def work() -> None:
        answer = run_cli(*words(tmp_path / "two" / "out"))
        os.write(2, answer.err.encode())
        raise SystemExit(answer.code)

    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    code = run_cli(*words(tmp_path / "one" / "out")).code
    codes = end(start([work] * 2, measured.log), LIMIT_S)
    assert codes == [code, 0] and code in (0, 3), measured.last_words()
    one, two = tmp_path / "one", tmp_path / "two"
    assert [path.relative_to(one).as_posix() for path in sorted(one.rglob("*"))] == [path.relative_to(two).as_posix() for path in sorted(two.rglob("*"))]
    same(two / "out.eval" / "results.json", one / "out.eval" / "results.json")
    assert all((one / "out" / path.name).read_bytes() == path.read_bytes() for path in (two / "out").iterdir())


@pytest.mark.parametrize("size", [1, 2, 3, 8])
@pytest.mark.parametrize("batches", [0, 1, 2, 3, 8, 50])
def test_every_batch_is_one_ranks(size, batches):
    """A batch that two ranks count, or none; a rank that loads a model of which it measures nothing."""
    for model in range(5):
        shares = [share_of(Ranks(rank, size), model, batches) for rank in range(size)]
        for turn in (0, 1, 7):
            for number in range(batches):
                assert sum(share.later(turn).has(number) for share in shares if not share.empty) == 1
        assert sum(not share.empty for share in shares) == max(1, min(size, batches))
    loads = [sum(not share_of(Ranks(rank, size), model, 1).empty for model in range(2 * size)) for rank in range(size)]
    assert loads == [2] * size, "models of one batch are spread evenly"
    assert {share_of_all(Ranks(rank, size)).members for rank in range(size)} == {tuple(range(size))}


def test_batches_of_items_are_those_of_lm_eval():
    """Other batches have other padding, and their numbers other last bits."""
    requests = [(("", ""), [1, 2], [3]), (("", ""), [1, 2], [4]), (("", ""), [5] * 6, [1, 2]), (("", ""), [7], [8])]
    assert scored(requests, 2) == [[2, 0, 1], [3]] and scored(requests, 1) == [[2], [0, 1], [3]]
    prompts = [("aa", {"until": ["."]}), ("b", {"until": [".", "!"]}), ("cccc", {"until": ["."]}), ("d", {"until": ["."]})]
    assert written(prompts, 2, list) == [[2, 0], [3], [1]]
