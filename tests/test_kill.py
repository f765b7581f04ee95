"""A run that is killed at any call or moment leaves OUT absent or whole, and ``--resume`` ends it in the very bytes of a run that nobody disturbed."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from support.forked import Hooked, ended, ended_within, fork
from support.resume import FORMATS, Jobs

HOOKS, MOMENTS = 4, 2
"""per format, in a default run"""


@pytest.fixture(scope="module")
def jobs(zoo, tmp_path_factory):
    return Jobs(zoo, tmp_path_factory.mktemp("kill"))


SLACK = 4
"""calls by which runs of one job differ: a shard is noted when the inputs' digests are known, which a thread of its own computes"""


def killed_at(jobs: Jobs, fmt: str, out: Path, fatal: int | None) -> int:
    """The exit code of a run that is killed at one of its calls; with None it only counts them, into ``count`` beside OUT."""

    def work() -> None:
        hooked = Hooked(out.parent, fatal)
        with hooked:
            jobs.work(out, fmt)
        (out.parent / "count").write_text(str(hooked.count))

    return ended_within(fork(work, jobs.log), 120)


def resumed(jobs: Jobs, fmt: str, out: Path) -> None:
    assert not out.exists() or jobs.files(out) == jobs.reference(fmt), "half of an output"
    assert ended_within(fork(lambda: jobs.work(out, fmt, resume=True), jobs.log), 120) == 0, jobs.last_words()
    assert jobs.files(out) == jobs.reference(fmt), "other bytes"


def count_of(jobs: Jobs, fmt: str) -> int:
    jobs.reference(fmt)
    out = jobs.place() / "out"
    assert killed_at(jobs, fmt, out, None) == 0, jobs.last_words()
    return int((out.parent / "count").read_text())


def hooks(jobs: Jobs, fmt: str, chosen: Any) -> int:
    count = count_of(jobs, fmt)
    points = list(chosen(count))
    for fatal in points:
        out = jobs.place() / "out"
        code = killed_at(jobs, fmt, out, fatal)
        if code == 0 and fatal > count - SLACK:  # it made fewer calls, and was through before this one
            assert jobs.files(out) == jobs.reference(fmt), "other bytes"
            continue
        assert code == -signal.SIGKILL
        resumed(jobs, fmt, out)
    return len(points)


def moments(jobs: Jobs, fmt: str, count: int, seed: int) -> None:
    dice, took = random.Random(seed), jobs.seconds(fmt)
    for _ in range(count):
        out = jobs.place() / "out"
        child = fork(lambda out=out: jobs.work(out, fmt), jobs.log)
        time.sleep(dice.uniform(0, took))
        os.kill(child, signal.SIGKILL)
        ended(child)
        resumed(jobs, fmt, out)


def again_and_again(jobs: Jobs, fmt: str, seed: int) -> int:
    """Kill, resume, kill, resume: how many kills it took. The last resume is left alone."""
    dice, took, kills = random.Random(seed), jobs.seconds(fmt), 0
    out = jobs.place() / "out"
    while kills < 12:
        child = fork(lambda: jobs.work(out, fmt, resume=True), jobs.log)
        code = ended_within(child, dice.uniform(0.1, 0.9) * took)
        if code == 0:
            break
        assert code == -signal.SIGKILL, jobs.last_words()
        assert not out.exists() or jobs.files(out) == jobs.reference(fmt)
        kills += 1
    resumed(jobs, fmt, out)
    return kills


@pytest.mark.parametrize("fmt", FORMATS)
def test_sigkill_at_some_calls(jobs, fmt):
    """A rename before an fsync, a record that names what is not there yet, a half file taken for a whole one: seen only where the kill falls between two calls."""
    assert hooks(jobs, fmt, lambda count: sorted(random.Random(1).sample(range(1, count + 1), HOOKS))) == HOOKS


@pytest.mark.parametrize("fmt", FORMATS)
def test_sigkill_at_some_moments(jobs, fmt):
    """A state between two calls, in a thread, or inside a write."""
    moments(jobs, fmt, MOMENTS, 2)


def test_killed_again_and_again(jobs):
    """A resumed run that loses what it resumed from, or starts over each time: it would never end."""
    again_and_again(jobs, "gptq", 3)


@pytest.mark.slow
@pytest.mark.parametrize("fmt", FORMATS)
def test_sigkill_at_every_call(jobs, fmt, capsys):
    """As `test_sigkill_at_some_calls`, at all of them."""
    found = hooks(jobs, fmt, lambda count: range(1, count + 1))
    with capsys.disabled():
        print(f"\n{fmt}: killed at each of {found} calls")


@pytest.mark.slow
@pytest.mark.parametrize("fmt", FORMATS)
def test_sigkill_at_many_moments(jobs, fmt, capsys):
    """As `test_sigkill_at_some_moments`, 80 per format, and ten runs that are killed again and again."""
    moments(jobs, fmt, 80, 5)
    kills = sum(again_and_again(jobs, fmt, seed) for seed in range(10))
    with capsys.disabled():
        print(f"\n{fmt}: killed at 80 moments, and {kills} times in ten runs that were resumed each time")
