"""What an interruption leaves, what it says, and on what ``--resume`` goes on: the same bytes, or a refusal by name."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TARGETS, save_adapter
from support.forked import ended_within, fork
from support.resume import SMALL, Jobs

from qmerge.pipeline import before, dense, identity, kept, run, streams, tensors
from qmerge.store.runs import find_runs


@pytest.fixture(scope="module")
def jobs(zoo, tmp_path_factory):
    return Jobs(zoo, tmp_path_factory.mktemp("resume"))


@pytest.fixture
def always(monkeypatch):
    """Activations are kept after every block, however long that takes."""
    monkeypatch.setattr(kept, "SHARE", 1e9)


class At:
    """Raises ``problem`` at the call number ``fatal`` of a function, and counts the calls."""

    def __init__(self, monkeypatch: Any, owner: Any, name: str, fatal: int | None, problem: Any = KeyboardInterrupt) -> None:
        self.count, inner = 0, getattr(owner, name)

        def called(*args: Any, **options: Any) -> Any:
            self.count += 1
            if self.count == fatal:
                raise problem
            return inner(*args, **options)

        monkeypatch.setattr(owner, name, called)


GROUPS = 4
"""of linears in a block of the model: q k v, o, gate up, down"""


def interrupted(jobs: Jobs, cli: Any, fmt: str, *flags: object, block: int = 3, problem: Any = KeyboardInterrupt, out: Path | None = None) -> tuple[Path, Any]:
    """A run that ends in the middle of a block: OUT, and what was said."""
    out = out or jobs.place() / "out"
    with pytest.MonkeyPatch.context() as patch:
        if fmt == "bf16":
            At(patch, dense.ShardStream, "write", 12, problem)
        elif "--rtn" in flags:
            At(patch, tensors, "round_to_nearest", 7 * (block - 1) + 3, problem)
        else:
            At(patch, streams, "requantize_group", GROUPS * (block - 1) + 2, problem)
        answer = cli(*jobs.words(out, fmt, *flags))
    assert answer.code == 75 and not out.exists(), answer.err
    return out, answer


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


KINDS = [
    ("gptq", ()), ("nf4", ()), ("gptq", ("--polish", "blocks")), ("nf4", ("--polish", "distill")), ("compressed-tensors", ("--bits-per-weight", 9, "--quantize-head", "--group-size", 32)),
    ("gptq", ("--asym", "--curvature-tokens", 0)), ("nf4", ("--shard-size", "5GB")), ("gptq", ("--quick",)),
]  # fmt: skip
QUICK = [(*KINDS[0], 1e9), (*KINDS[0], -1.0), (*KINDS[1], 1e9), (*KINDS[3], -1.0), (*KINDS[4], 1e9), (*KINDS[5], -1.0), (*KINDS[6], 1e9), (*KINDS[7], -1.0)]
CASES = [
    pytest.param(*case, id=" ".join(map(str, (case[0], *case[1], "with activations" if case[2] > 0 else "without"))), marks=[] if case in QUICK else [pytest.mark.slow])
    for case in ((*kind, share) for kind in KINDS for share in (1e9, -1.0))
]  # fmt: skip


@pytest.mark.parametrize("fmt, flags, share", CASES)
def test_same_bytes(jobs, cli, monkeypatch, fmt, flags, share):
    """Activations that a replay gives in other bits, a choice or a record that the journal forgets, a tensor that comes back in another layout: the file differs in some bit."""
    monkeypatch.setattr(kept, "SHARE", share)
    whole = jobs.place() / "out"
    assert cli(*jobs.words(whole, fmt, *flags)).code == 0
    out, _ = interrupted(jobs, cli, fmt, *flags)
    answer = cli(*jobs.words(out, fmt, *flags, "--resume"))
    assert answer.code == 0 and "goes on with" in answer.err, answer.err
    assert content(out) == content(whole) and os.listdir(out.parent) == ["out"]


def test_same_bytes_without_calibration(jobs, cli):
    """``--rtn`` has no activations to keep; its linears are kept all the same."""
    whole = jobs.place() / "out"
    words = [word for word in jobs.words(whole, "gptq", "--rtn") if word not in ("--calibration", jobs.zoo.calibration)]
    assert cli(*words).code == 0
    out = jobs.place() / "out"
    words[words.index(whole)] = out
    with pytest.MonkeyPatch.context() as patch:
        At(patch, tensors, "round_to_nearest", 17)
        assert cli(*words).code == 75
    with pytest.MonkeyPatch.context() as patch:
        again = At(patch, tensors, "round_to_nearest", None)
        assert cli(*words, "--resume").code == 0
    assert content(out) == content(whole) and again.count == 7


@pytest.mark.parametrize("share", [1e9, -1.0], ids=["activations kept", "none kept"])
def test_at_most_one_block_is_solved_again(jobs, cli, monkeypatch, share):
    """A resume that starts over: hours of solving for the user to find out by the clock."""
    monkeypatch.setattr(kept, "SHARE", share)
    out, _ = interrupted(jobs, cli, "gptq", block=3)
    again, gradients = At(monkeypatch, streams, "requantize_group", None), At(monkeypatch, before, "curvatures", None)
    assert cli(*jobs.words(out, "gptq", "--resume")).code == 0
    assert again.count == GROUPS and gradients.count == 0


def test_finished_shards_are_not_written_again(jobs, cli, monkeypatch):
    """A float merge of 140 GB that starts at its first byte."""
    whole = jobs.place() / "out"
    assert cli(*jobs.words(whole, "bf16")).code == 0
    out, _ = interrupted(jobs, cli, "bf16")
    (left,) = find_runs(out)
    done = {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in (left.home / "out").iterdir()}
    count = sum(name.startswith("shard-") for name in left.journal.names())
    assert count >= 2
    assert cli(*jobs.words(out, "bf16", "--resume")).code == 0
    assert content(out) == content(whole)
    untouched = [name for name, was in done.items() if ((out / name).stat().st_ino, (out / name).stat().st_mtime_ns) == was]
    assert len(untouched) == count


def test_several_adapters_in_one_pass(jobs, cli, monkeypatch):
    """With ``--each`` one output may be whole when the process ends: it must be left alone, and the other one finished."""
    other = jobs.zoo._once("halted-other", lambda folder: save_adapter(jobs.zoo.float("llama", "halted", **SMALL), folder, jobs.base, 0.05, 2, target_modules=TARGETS["llama"]))

    def words(out: Path, *flags: object) -> list[object]:
        return [*jobs.words(out, "bf16"), "--adapter", other, "--each", *flags]

    whole, out = jobs.place() / "out", jobs.place() / "out"
    assert cli(*words(whole)).code == 0
    with pytest.MonkeyPatch.context() as patch:
        At(patch, run, "build_manifest", 2)
        assert cli(*words(out)).code == 75
    first = sorted(path.name for path in out.iterdir() if not path.name.startswith("."))
    assert len(first) == 1
    untouched = {path: path.stat().st_mtime_ns for path in (out / first[0]).iterdir()}
    answer = cli(*words(out, "--resume"))
    assert answer.code == 0, answer.err
    assert content(out) == content(whole) and {path: path.stat().st_mtime_ns for path in untouched} == untouched


FAULTS = {
    "memory": (MemoryError(), "not enough memory"), "accelerator memory": (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "not enough memory"),
    "accelerator": (RuntimeError("CUDA error: an illegal memory access was encountered"), "accelerator failed"), "disk full": (OSError(errno.ENOSPC, "No space left on device"), "no room left"),
    "disk broken": (OSError(errno.EIO, "Input/output error"), "disk or the system failed"), "signal": (KeyboardInterrupt(), "interrupted"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_what_an_interruption_says(jobs, cli, fault):
    """A traceback, or a message after which nobody knows whether anything is left, where, and what to type."""
    problem, says = FAULTS[fault]
    out, answer = interrupted(jobs, cli, "gptq", block=2, problem=problem)
    (left,) = find_runs(out)
    for part in (says, "--resume", "block 2/3", left.home.name, "kB in", "nothing at the output"):
        assert part in answer.err, answer.err
    assert "Traceback" not in answer.err and str(jobs.root) not in answer.err.split("error:")[1]
    assert cli(*jobs.words(out, "gptq", "--resume")).code == 0


def test_a_refusal_leaves_nothing(jobs, cli, monkeypatch):
    """Bad inputs give the same refusal however often they are resumed: what was begun of them is rubbish on the disk."""
    from qmerge.errors import CheckFailed

    out = jobs.place() / "out"
    At(monkeypatch, streams, "requantize_group", 6, CheckFailed("no candidate has a finite error"))
    assert cli(*jobs.words(out, "gptq")).code == 1 and list(out.parent.iterdir()) == []


CHANGES = {
    "recipe": (["--seed", 3], "recipe seed: 0, now 3"), "bits": (["--bits", 8], "recipe bits: 4, now 8"), "calibration": (["--calibration", "OTHER"], "calibration token_ids_sha256"),
    "adapter": (["--adapter", "CHANGED"], "input adapter adapter_model.safetensors"),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_what_decides_the_result_may_not_change(jobs, cli, change):
    """Half of the blocks by one recipe, half by another, in one checkpoint with one manifest. And the run that may still be resumed rightly must not suffer."""
    flags, says = CHANGES[change]
    out, _ = interrupted(jobs, cli, "gptq")
    words = jobs.words(out, "gptq", "--resume")
    if "CHANGED" in flags:
        adapter = jobs.place() / Path(jobs.adapter).name
        shutil.copytree(jobs.adapter, adapter)
        raw = bytearray((adapter / "adapter_model.safetensors").read_bytes())
        raw[-1] ^= 1
        (adapter / "adapter_model.safetensors").write_bytes(raw)
        words[words.index(jobs.adapter)] = adapter
    else:
        words += [jobs.zoo.other if flag == "OTHER" else flag for flag in flags]
    before = content(out.parent)
    answer = cli(*words)
    assert answer.code == 4 and says in answer.err, answer.err
    assert content(out.parent) == before
    assert cli(*jobs.words(out, "gptq", "--resume")).code == 0


@pytest.mark.parametrize("name, owner, value", [("versions torch", "versions", lambda *_: {"torch": "1.0"}), ("solver code", "solver_digest", lambda: "another")])
def test_versions_may_not_change(jobs, cli, monkeypatch, name, owner, value):
    """A pip install between the two: half of the blocks by one solver, half by another."""
    out, _ = interrupted(jobs, cli, "gptq")
    monkeypatch.setattr(identity, owner, value)
    answer = cli(*jobs.words(out, "gptq", "--resume"))
    assert answer.code == 4 and name in answer.err and not out.exists(), answer.err


def test_places_and_threads_may_change_and_that_is_said(jobs, cli, monkeypatch, always):
    """A moved disk must not lose the night; a silent move would hide that it is another file after all."""
    whole = jobs.place() / "out"
    assert cli(*jobs.words(whole, "gptq")).code == 0
    out, _ = interrupted(jobs, cli, "gptq")
    moved = jobs.place() / Path(jobs.base).name
    shutil.copytree(jobs.base, moved)
    words = jobs.words(out, "gptq", "--resume")
    words[words.index(jobs.base)] = moved
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        answer = cli(*words)
    finally:
        torch.set_num_threads(threads)
    assert answer.code == 0 and "the place of the base" in answer.err and f"threads: {threads}, now {threads + 1}" in answer.err, answer.err
    assert content(out) == content(whole)


def test_smaller_shards_where_a_file_could_not_grow(jobs, cli):
    """The way out that the message names must lead out: solved blocks are written into other shards."""
    import resource

    whole, out = jobs.place() / "out", jobs.place() / "out"
    words = [word if word != "40kB" else "300kB" for word in jobs.words(out, "gptq")]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, before[1]))
    try:
        answer = cli(*words)
        assert answer.code == 75 and "--shard-size" in answer.err and "--resume" in answer.err, answer.err
        answer = cli(*jobs.words(out, "gptq", "--resume"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert answer.code == 0 and "shard size" in answer.err, answer.err
    assert cli(*jobs.words(whole, "gptq")).code == 0 and content(out) == content(whole)


def test_nothing_to_resume(jobs, cli):
    """A job that always runs with --resume must start somewhere."""
    out = jobs.place() / "out"
    answer = cli(*jobs.words(out, "bf16", "--resume"))
    assert answer.code == 0 and "from the beginning" in answer.err and out.exists()


def test_resume_of_what_is_there(jobs, cli):
    """The job's next turn: not an error, no new work, and not a byte touched. But an OUT of other settings is not taken for it."""
    out = jobs.place() / "out"
    assert cli(*jobs.words(out, "gptq")).code == 0
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    answer = cli(*jobs.words(out, "gptq", "--resume"))
    assert answer.code == 0 and "there already" in answer.err and {path: path.stat().st_mtime_ns for path in out.iterdir()} == before
    answer = cli(*jobs.words(out, "gptq", "--resume", "--seed", 3))
    assert answer.code == 4 and "seed: 0, now 3" in answer.err, answer.err
    (out / "config.json").write_text("{}")
    answer = cli(*jobs.words(out, "gptq", "--resume"))
    assert answer.code == 4 and "config.json: changed" in answer.err, answer.err
    assert cli(*jobs.words(out, "gptq", "--resume", "--overwrite")).code == 0 and cli("verify", out).code == 0


def test_a_new_run_beside_an_interrupted_one(jobs, cli):
    """Without --resume the interrupted run is not touched, and the user is told of it: before, and when it is of no use any more."""
    out, _ = interrupted(jobs, cli, "gptq")
    (left,) = find_runs(out)
    before = content(left.home)
    answer = cli(*jobs.words(out, "gptq"))
    assert answer.code == 0 and answer.err.count(left.home.name) == 2 and "--resume" in answer.err and "delete it" in answer.err, answer.err
    assert content(left.home) == before


def test_a_damaged_journal_is_not_gone_on_with(jobs, cli, always):
    """A bit that the disk lost, in a weight of block 1: it would be in the checkpoint, with a digest that fits."""
    whole = jobs.place() / "out"
    assert cli(*jobs.words(whole, "gptq")).code == 0
    out, _ = interrupted(jobs, cli, "gptq")
    (left,) = find_runs(out)
    for name in ("shard-0", "unit-1", "streams-2-0"):
        raw = bytearray((left.home / "journal" / name).read_bytes())
        raw[len(raw) // 2] ^= 16
        (left.home / "journal" / name).write_bytes(raw)
    answer = cli(*jobs.words(out, "gptq", "--resume"))
    assert answer.code == 0 and content(out) == content(whole), answer.err


def test_a_damaged_shard_is_not_kept(jobs, cli):
    """The same in a shard that was finished."""
    whole = jobs.place() / "out"
    assert cli(*jobs.words(whole, "bf16")).code == 0
    out, _ = interrupted(jobs, cli, "bf16")
    (left,) = find_runs(out)
    shard = sorted((left.home / "out").glob("*.safetensors"))[0]
    raw = bytearray(shard.read_bytes())
    raw[-1] ^= 1
    shard.write_bytes(raw)
    assert cli(*jobs.words(out, "bf16", "--resume")).code == 0 and content(out) == content(whole)


def wait_for(log: Path, text: str) -> None:
    limit = time.monotonic() + 60
    while text not in (log.read_text(errors="replace") if log.exists() else ""):
        assert time.monotonic() < limit, log.read_text(errors="replace")[-2000:]
        time.sleep(0.002)


def test_first_signal_finishes_the_block(jobs, cli, tmp_path):
    """A signal that loses the block, that is not heard before the end, or after which nobody knows what happens."""
    jobs.reference("gptq")
    out, log = jobs.place() / "out", tmp_path / "log"

    def work() -> None:
        inner, count = streams.requantize_group, [0]

        def slow(*args: Any, **options: Any) -> Any:
            count[0] += 1
            if count[0] == GROUPS + 2:
                os.kill(os.getpid(), signal.SIGTERM)
            return inner(*args, **options)

        streams.requantize_group = slow
        jobs.leave(out, "gptq")

    assert ended_within(fork(work, log), 60) == 75
    said = log.read_text()
    assert "finishing block 2/3" in said and "at block 3/3" in said and "--resume" in said and "block 2/3: held-out" in said and "Traceback" not in said, said
    assert ended_within(fork(lambda: jobs.leave(out, "gptq", "--resume"), log), 60) == 0 and jobs.files(out) == jobs.reference("gptq")


def test_second_signal_stops_at_once(jobs, tmp_path):
    """A user who cannot wait reaches for kill -9; the second Ctrl-C must be as quick and leave as much."""
    jobs.reference("gptq")
    out, log = jobs.place() / "out", tmp_path / "log"

    def work() -> None:
        def stuck(*args: Any, **options: Any) -> Any:
            os.write(2, b"stuck\n")
            for _ in range(6000):
                time.sleep(0.01)
            return None

        inner, count = streams.requantize_group, [0]

        def once(*args: Any, **options: Any) -> Any:
            count[0] += 1
            return (stuck if count[0] == GROUPS + 2 else inner)(*args, **options)

        streams.requantize_group = once
        jobs.leave(out, "gptq")

    child = fork(work, log)
    wait_for(log, "stuck")
    os.kill(child, signal.SIGINT)
    time.sleep(0.3)  # two at once are one
    assert os.waitpid(child, os.WNOHANG) == (0, 0), "the first signal waits for the block"
    os.kill(child, signal.SIGINT)
    assert ended_within(child, 20) == 75
    said = log.read_text()
    assert "once more to stop at once" in said and "at block 2/3" in said and "Traceback" not in said
    assert ended_within(fork(lambda: jobs.leave(out, "gptq", "--resume"), log), 60) == 0 and jobs.files(out) == jobs.reference("gptq")


def test_signal_in_a_float_merge_finishes_the_shard(jobs, tmp_path):
    """A float merge that throws away the gigabytes it has written."""
    jobs.reference("bf16")
    out, log = jobs.place() / "out", tmp_path / "log"

    def work() -> None:
        inner, count = dense.ShardStream.write, [0]

        def write(self: Any, rows: torch.Tensor) -> None:
            count[0] += 1
            if count[0] == 12:
                os.kill(os.getpid(), signal.SIGINT)
            inner(self, rows)

        dense.ShardStream.write = write
        jobs.leave(out, "bf16")

    assert ended_within(fork(work, log), 60) == 75
    said = log.read_text()
    assert "finishing shard" in said and "--resume" in said, said
    assert ended_within(fork(lambda: jobs.leave(out, "bf16", "--resume"), log), 60) == 0 and jobs.files(out) == jobs.reference("bf16")


def test_the_manifest_says_nothing_of_it(jobs, cli):
    """The same inputs give the same manifest: evidence must not depend on a night's power cut. And no path of this machine is in the journal, which a user may send us."""
    out, _ = interrupted(jobs, cli, "gptq")
    (left,) = find_runs(out)
    assert str(jobs.root).encode() not in b"".join(content(left.home).values())
    assert cli(*jobs.words(out, "gptq", "--resume")).code == 0
    assert "resume" not in json.dumps(json.loads((out / "manifest.json").read_text()))
