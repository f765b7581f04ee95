"""Several processes that share a merge write the bytes that one would have written, and end together."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest
from conftest import OWN, sentences, write_rows
from support.ranks import end, start
from support.resume import Jobs

from qmerge.errors import UsageProblem
from qmerge.launch import Launch, first_host, launched, tasks_on
from qmerge.pipeline import batches, gradients, kept

LIMIT_S = 240


class Ranked(Jobs):
    """The jobs of `Jobs` on more text, so that every rank has some: each batch is one window."""

    def words(self, out, fmt, *flags):
        if not hasattr(self, "text"):
            self.text = write_rows(self.root / "text.jsonl", sentences(OWN, 200, 5))
        if "--rtn" in flags:
            return [*super().words(out, "bf16"), "--format", fmt, "--group-size", 32, *flags]
        words = super().words(out, fmt, "--samples", 12, "--curvature-tokens", 64, *flags) if fmt != "bf16" else super().words(out, fmt, *flags)
        return [self.text if word == self.zoo.calibration else word for word in words]

    def run(self, out, fmt, *flags):
        batches.TOKENS_PER_BATCH = gradients.BATCH = 32
        return super().run(out, fmt, *flags)

    def works(self, size: int, out: Path, fmt: str, *flags: object):
        return [lambda: self.leave(out, fmt, *flags)] * size

    def ended(self, size: int, out: Path, fmt: str, *flags: object) -> list[int]:
        return end(start(self.works(size, out, fmt, *flags), self.log), LIMIT_S)

    def alone(self, fmt: str, *flags: object) -> dict[str, str]:
        """The files that one process writes: this one, so that its children need not import and compile."""
        key = f"{fmt} {flags}"
        if key not in self._files:
            out = self.place() / "out"
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(kept, "SHARE", 0.04)
                patch.setattr(batches, "TOKENS_PER_BATCH", 0)
                patch.setattr(gradients, "BATCH", 0)
                assert self.run(out, fmt, *flags) == 0
            self._files[key] = self.files(out)
        return self._files[key]


@pytest.fixture(scope="module")
def jobs(zoo, tmp_path_factory):
    return Ranked(zoo, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("fmt", ["gptq", "bf16"])
def test_two_ranks_write_the_bytes_of_one(jobs, fmt):
    """A sum whose order follows the number of ranks, a linear solved on half of the text, or a file that nobody writes."""
    out, wanted = jobs.place() / "out", jobs.alone(fmt)
    assert jobs.ended(2, out, fmt) == [0, 0], jobs.last_words()
    assert jobs.files(out) == wanted


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3, 4, 20])
@pytest.mark.parametrize("fmt", ["gptq", "nf4", "bf16"])
def test_any_number_of_ranks_writes_the_bytes_of_one(jobs, fmt, size):
    """More ranks than batches, than linears in a group, or than files; numbers that do not divide the slots."""
    out = jobs.place() / "out"
    assert jobs.ended(size, out, fmt) == [0] * size, jobs.last_words()
    assert jobs.files(out) == jobs.alone(fmt)


@pytest.mark.slow
@pytest.mark.parametrize(("fmt", "flags"), [
    ("gptq", ("--rtn",)), ("gptq", ("--quantize-head",)), ("gptq", ("--curvature-tokens", 0)), ("gptq", ("--curvature-tokens", 0, "--quick")), ("gptq", ("--polish", "distill")), ("compressed-tensors", ("--group-size", 32, "--bits-per-weight", 6)),
], ids=lambda value: value if isinstance(value, str) else value[-2 + len(value) % 2].lstrip("-"))  # fmt: skip
def test_options_that_several_ranks_can_share(jobs, fmt, flags):
    """A step that another rank's text, or another rank's linears, are missing in."""
    out, wanted = jobs.place() / "out", jobs.alone(fmt, *flags)
    assert jobs.ended(2, out, fmt, *flags) == [0, 0], jobs.last_words()
    assert jobs.files(out) == wanted


def test_what_is_not_shared_is_refused_by_name(jobs):
    """An option that several ranks would each do by themselves, on a part of the text."""
    out = jobs.place() / "out"
    assert jobs.ended(2, out, "gptq", "--polish", "blocks") == [2, 2]
    assert "--polish blocks" in jobs.last_words() and not out.exists()


def test_ranks_with_other_settings_are_refused(jobs):
    """Two hosts, two versions of a script: half of the linears in one way, half in another."""
    out = jobs.place() / "out"
    works = [lambda: jobs.leave(out, "gptq"), lambda: jobs.leave(out, "gptq", "--seed", 7)]
    assert end(start(works, jobs.log), LIMIT_S) == [2, 2]
    assert "rank 1" in jobs.last_words() and "seed" in jobs.last_words() and list(out.parent.iterdir()) == []


@pytest.mark.slow
def test_another_file_of_the_same_size_is_refused_by_name(jobs, tmp_path):
    """An old copy of the base on one host: everything looks alike but the weights."""
    import shutil

    copy = tmp_path / "base"
    shutil.copytree(jobs.base, copy)
    weights = copy / "model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-5] ^= 1
    weights.write_bytes(raw)
    out = jobs.place() / "out"
    works = [lambda: jobs.leave(out, "gptq"), lambda: jobs.leave(out, "gptq", "--base", copy)]
    assert end(start(works, jobs.log), LIMIT_S) == [4, 4]
    assert "model.safetensors" in jobs.last_words() and list(out.parent.iterdir()) == []


def killed(jobs: Ranked, fmt: str, size: int, victim: int, after_s: float) -> tuple[Path, list[int]]:
    """``after_s``: from the time that all ranks have come."""
    out, before = jobs.place() / "out", len(jobs.last_words(10**9))
    children = start(jobs.works(size, out, fmt), jobs.log)
    until = time.monotonic() + LIMIT_S
    while time.monotonic() < until and "output  " not in jobs.last_words(10**9)[before:]:
        time.sleep(0.01)
    time.sleep(after_s)
    os.kill(children[victim], signal.SIGKILL)
    return out, end(children, 90)


def resumed(jobs: Ranked, out: Path, fmt: str, size: int) -> None:
    assert jobs.ended(size, out, fmt, "--resume") == [0] * size, jobs.last_words()
    assert jobs.files(out) == jobs.alone(fmt)


@pytest.mark.slow
@pytest.mark.parametrize("fmt", ["gptq", "bf16"])
@pytest.mark.parametrize("victim", [0, 1, 2])
def test_a_killed_rank_ends_all_and_any_number_goes_on(jobs, fmt, victim):
    """Ranks that wait for ever for one that is dead; a working folder that only as many ranks can go on with."""
    dice, took = random.Random(victim), 3.0 if fmt == "gptq" else 0.4
    wanted = jobs.alone(fmt)
    for size in (1, 2, 3):
        out, codes = killed(jobs, fmt, 3, victim, dice.uniform(0, took))
        assert codes == [0, 0, 0] or (codes[victim] == -9 and all(code == 75 for rank, code in enumerate(codes) if rank != victim)), (codes, jobs.last_words())
        assert not out.exists() or jobs.files(out) == wanted
        resumed(jobs, out, fmt, size)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_signal_to_one_rank_stops_all_after_the_block(jobs, victim):
    """Ranks that wait for one which has left, or lose the block that they were at."""
    out = jobs.place() / "out"
    children = start(jobs.works(2, out, "gptq"), jobs.log)
    until = time.monotonic() + LIMIT_S
    while time.monotonic() < until and not any(out.parent.glob(".out.qmerge-run-*/journal/unit-0")):
        time.sleep(0.01)
    os.kill(children[victim], signal.SIGTERM)
    assert end(children, 90) == [75, 75], jobs.last_words()
    assert not out.exists() and len(list(out.parent.glob(".out.qmerge-run-*/journal/unit-*"))) >= 1
    resumed(jobs, out, "gptq", 1)


def test_torchrun_says_who_one_is():
    """A rank that takes itself for the only one, and writes beside the others."""
    variables = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "29500", "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "1"}
    assert launched(variables) == Launch(3, 8, 1, 2, "a", 29500, True, "1")
    assert launched({"WORLD_SIZE": "1"}) is None and launched({}) is None
    with pytest.raises(UsageProblem, match="LOCAL_RANK"):
        launched({"RANK": "0", "WORLD_SIZE": "2"})


def test_slurm_says_who_one_is():
    """A batch script that starts one process in a large allocation and waits for the others; a master on the wrong host."""
    allocation = {"SLURM_JOB_ID": "17", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"}
    assert launched(allocation) is None
    step = allocation | {"SLURM_STEP_NUM_TASKS": "5", "SLURM_STEP_ID": "0", "SLURM_PROCID": "4", "SLURM_LOCALID": "0", "SLURM_NODEID": "1", "SLURM_STEP_NODELIST": "gpu[07-09,12],login1", "SLURM_STEP_TASKS_PER_NODE": "4,1"}
    assert launched(step) == Launch(4, 5, 0, 1, "gpu07", 20_272)
    assert [first_host(nodes) for nodes in ("one", "a1,a2", "n[3,5]-ib", "n[3-5]")] == ["one", "a1", "n3-ib", "n3"]
    assert [tasks_on("4(x2),1", node) for node in (0, 1, 2)] == [4, 4, 1]


def test_other_commands_are_refused_among_several(jobs, monkeypatch, cli):
    """Eight processes that measure the same thing and write one file."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    answer = cli("verify", jobs.base)
    assert answer.code == 2 and "qmerge verify" in answer.err


