"""Several processes at one OUT: one wins whole, the others say so; with locks that work, and with locks that lie as on some network file systems."""

from __future__ import annotations

import fcntl
import os
import signal
import time
from pathlib import Path

import pytest
from support.forked import ended_within, fork
from support.resume import Jobs

from qmerge.pipeline import streams
from qmerge.store.runs import find_runs


@pytest.fixture(scope="module")
def jobs(zoo, tmp_path_factory):
    return Jobs(zoo, tmp_path_factory.mktemp("together"))


def lie() -> None:
    """Every lock is granted to everybody."""
    fcntl.flock = lambda *_: None


def started(jobs: Jobs, out: Path, fmt: str, count: int, locks: bool, *flags: object) -> tuple[list[int], str]:
    """Exit codes of ``count`` runs that start together, and what they said."""
    log, gate = out.parent / "said", out.parent / "gate"

    def work() -> None:
        if not locks:
            lie()
        while not gate.exists():
            time.sleep(0.001)
        jobs.leave(out, fmt, *flags)

    children = [fork(work, log) for _ in range(count)]
    gate.write_text("")
    return [ended_within(child, 180) for child in children], log.read_text(errors="replace")


@pytest.mark.parametrize("locks", [True, False], ids=["locks", "locks that lie"])
@pytest.mark.parametrize("fmt, count", [("bf16", 2), ("bf16", 4), ("gptq", 2), pytest.param("gptq", 4, marks=pytest.mark.slow)])
def test_new_runs(jobs, fmt, count, locks):
    """Two outputs mixed in one folder, two winners, or a loser that says nothing."""
    jobs.reference(fmt)
    out = jobs.place() / "out"
    codes, said = started(jobs, out, fmt, count, locks)
    assert sorted(codes) == [0] + [4] * (count - 1), said
    assert jobs.files(out) == jobs.reference(fmt) and "Traceback" not in said
    assert not find_runs(out), "a loser left its folder"
    assert said.count("The output exists.") + said.count("Another run finished first") == count - 1


@pytest.mark.parametrize("locks", [True, False], ids=["locks", "locks that lie"])
@pytest.mark.parametrize("count", [2, 4])
def test_several_resume_one_run(jobs, locks, count):
    """Two processes that write into one folder. One goes on with it; another one refuses, or takes it from the first, which then says so; the last one has it whole."""
    jobs.reference("gptq")
    out = jobs.place() / "out"

    def killed() -> None:
        inner, calls = streams.requantize_group, [0]

        def fatal(*args: object, **options: object) -> object:
            calls[0] += 1
            if calls[0] == 6:
                os.kill(os.getpid(), signal.SIGKILL)
            return inner(*args, **options)

        streams.requantize_group = fatal
        jobs.leave(out, "gptq")

    assert ended_within(fork(killed, jobs.log), 60) == -signal.SIGKILL
    codes, said = started(jobs, out, "gptq", count, locks, "--resume")
    assert 0 in codes and set(codes) <= {0, 4, 75} and "Traceback" not in said, said
    assert jobs.files(out) == jobs.reference("gptq") and not find_runs(out)
    if locks:
        assert 75 not in codes


def test_resume_beside_a_living_run(jobs):
    """A cron job that starts while the last one still computes: with locks it is told so. Where locks lie it takes the work over, and the other one ends in words."""
    jobs.reference("gptq")
    for locks, code, says in ((True, 4, "is at work"), (False, 0, "goes on with")):
        out = jobs.place() / "out"
        first, second = out.parent / "first", out.parent / "second"

        def slow(out: Path = out, locks: bool = locks) -> None:
            inner = streams.requantize_group

            def waits(*args: object, **options: object) -> object:
                while not (out.parent / "go").exists() and len(list(out.parent.glob(".out*/journal/unit-0"))) == 1:
                    time.sleep(0.002)
                return inner(*args, **options)

            streams.requantize_group = waits
            if not locks:
                lie()
            jobs.leave(out, "gptq")

        def other(out: Path = out, locks: bool = locks) -> None:
            if not locks:
                lie()
            jobs.leave(out, "gptq", "--resume")

        child = fork(slow, first)
        while not list(out.parent.glob(".out*/journal/unit-0")):
            time.sleep(0.002)
        time.sleep(0.2)
        found = ended_within(fork(other, second), 60)
        (out.parent / "go").write_text("")
        ends = ended_within(child, 60)
        assert found == code and says in second.read_text(), second.read_text()
        assert ends == (0 if locks else 75), first.read_text()
        assert "Traceback" not in first.read_text() and jobs.files(out) == jobs.reference("gptq")
        if not locks:
            assert "another process goes on with it" in first.read_text()
