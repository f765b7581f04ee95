"""Processes on two hosts that share an evaluation find the numbers of one, and end together when a host or the cable is gone."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import OWN, sentences, write_rows
from support.hosts import ends, environment, on_hosts, pull, torchrun_on_hosts, two_hosts
from test_ranks_evaluate import same

LIMIT_S = 300
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def words(zoo, written, tmp_path_factory):
    """Of an evaluation in several batches, into a folder that it makes."""
    text = write_rows(tmp_path_factory.mktemp("texts") / "held_out.jsonl", sentences(OWN, 300, 7))
    candidate = written("llama", "bf16")[0]

    def given(out: Path, *flags: object) -> list[str]:
        out.parent.mkdir()
        found = ["-m", "qmerge", "eval", "--base", zoo.nf4("llama"), "--adapter", zoo.adapter("llama"), "--candidate", candidate, "--text", text, "--tokens", 32, "--out", out, "--device", "cpu", *flags]
        return [str(word) for word in found]

    return given


def alone(words: list[str], code: int = 0) -> None:
    """One process, with as many threads as each rank has."""
    found = subprocess.run([sys.executable, *words], env=environment(), capture_output=True, text=True, timeout=LIMIT_S)
    assert found.returncode == code, found.stderr[-3000:]


def test_torchrun_on_two_hosts_measures_what_one_process_does(words, zoo, tmp_path):
    """What the manual tells people to type: a rank that looks for the others at its own address, or numbers that stay on the other host."""
    flags = ("--perplexity", f"gptq,tokens=64:{zoo.other}", "--generate", 20, "--new-tokens", 8)
    one, two = tmp_path / "one" / "results.json", tmp_path / "two" / "results.json"
    alone(words(one, *flags))
    with two_hosts() as names:
        codes, told = ends(torchrun_on_hosts(names, words(two, *flags)), LIMIT_S)
    assert codes == [0, 0], told
    same(two, one)


def test_a_whole_run_on_two_hosts(zoo, tmp_path):
    """A rank of the other host that measures before OUT is there, or is told nothing of what was held out. Both see one disk, as `run` asks for."""

    def words(name: str) -> list[str]:
        (tmp_path / name).mkdir()
        found = ["-m", "qmerge", "run", "--base", zoo.nf4("llama"), "--adapter", zoo.adapter("llama"), "--calibration", zoo.calibration, "--samples", 8, "--tokens", 32, "--curvature-tokens", 64,
                 "--out", tmp_path / name / "out", "--device", "cpu", "--budget", "lenient", "--allow-overlap"]  # fmt: skip
        return [str(word) for word in found]

    found = subprocess.run([sys.executable, *words("one")], env=environment(), capture_output=True, text=True, timeout=LIMIT_S)
    assert found.returncode in (0, 3), found.stderr[-3000:]
    with two_hosts() as names:
        codes, told = ends(on_hosts(names, words("two")), LIMIT_S)
    assert codes == [found.returncode, 0], told
    one, two = tmp_path / "one", tmp_path / "two"
    assert [path.relative_to(one).as_posix() for path in sorted(one.rglob("*"))] == [path.relative_to(two).as_posix() for path in sorted(two.rglob("*"))]
    same(two / "out.eval" / "results.json", one / "out.eval" / "results.json")
    assert all((one / "out" / path.name).read_bytes() == path.read_bytes() for path in (two / "out").iterdir())


def under_way(both: list[subprocess.Popen]) -> None:
    """Returns when the first host has measured its share of an arm; others follow."""
    told = []
    for line in both[0].stderr:
        told.append(line)
        if " on held_out" in line:
            return
    raise AssertionError(f"ended before anything was measured: {told}")


@pytest.mark.parametrize("victim", [0, 1])
def test_a_host_that_is_killed_ends_the_other(words, tmp_path, victim):
    """A host that waits for ever for the numbers of one that is gone, or writes results.json without them. Where the ranks meet goes with the first."""
    out = tmp_path / "two" / "results.json"
    with two_hosts() as names:
        both = on_hosts(names, words(out))
        under_way(both)
        both[victim].kill()
        began = time.monotonic()
        codes, told = ends(both, 200)
    assert codes[victim] == -9 and codes[1 - victim] == 75, (codes, told)
    assert time.monotonic() - began < 60 and not list(out.parent.iterdir())


def test_a_cable_that_is_pulled_ends_both(words, tmp_path):
    """It closes no connection: the first host would wait for numbers, and the other for its thanks, for ever."""
    out = tmp_path / "two" / "results.json"
    with two_hosts() as names:
        both = on_hosts(names, words(out))
        under_way(both)
        pull(names[1])
        codes, told = ends(both, 200)
    assert codes == [75, 75], (codes, told)
    assert not list(out.parent.iterdir())
