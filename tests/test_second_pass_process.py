"""What surrounds the process is not as it should be: streams that are closed or full, signals that a shell ignores, limits, folders that went away, names that are no UTF-8."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from support.forked import ended_within, fork

from qmerge.pipeline import run as running
from qmerge.store.manifest import verify_files


class Child:
    """`qmerge …` in a fork of this process, after ``prepare`` has done to it what a shell or a system does; ``said`` is what reached its standard streams."""

    def __init__(self, zoo, root: Path) -> None:
        self.root, self.log, self.out = root, root / "log", root / "place" / "out"
        (root / "place").mkdir()
        self.words = ("merge", "--base", zoo.nf4("llama"), "--adapter", zoo.adapter("llama"), "--device", "cpu", "--format", "bf16", "--out", str(self.out))

    def __call__(self, prepare: Callable[[], object], *words: str) -> int:
        from qmerge.cli.main import main

        def work() -> None:
            sys.stdout, sys.stderr = (open(number, "w", closefd=False) for number in (1, 2))  # noqa: SIM115  pytest has put others there
            sys.argv = ["qmerge", *(words or self.words)]
            prepare()
            main()

        return ended_within(fork(work, self.log), 200)

    @property
    def said(self) -> str:
        return self.log.read_text()

    def whole(self) -> bool:
        return verify_files(self.out) == [] and os.listdir(self.out.parent) == ["out"]


@pytest.fixture
def child(zoo, tmp_path):
    return Child(zoo, tmp_path)


def onto(number: int, place: str | None) -> None:
    """Standard stream ``number`` becomes ``place``, or a pipe that nobody reads."""
    if place is None:
        reading, writing = os.pipe()
        os.close(reading)
    else:
        writing = os.open(place, os.O_WRONLY)
    os.dup2(writing, number)
    os.close(writing)
    setattr(sys, {1: "stdout", 2: "stderr"}[number], open(number, "w", closefd=False))


@pytest.mark.parametrize("place", [None, "/dev/full"], ids=["nobody reads it", "full"])
def test_talk_that_nobody_hears_ends_no_work(child, place):
    """A terminal that was closed, or a full disk behind `2> log`, ended the run at its next line of progress, without a word."""
    assert child(lambda: onto(2, place)) == 0
    assert child.whole()


def test_a_result_that_cannot_be_given_away(child):
    """The output was whole, and the message said: no room left on the disk, nothing written, run it again."""
    assert child(lambda: onto(1, "/dev/full")) == 1
    assert child.whole() and "the work is done" in child.said and "Traceback" not in child.said and "written:    nothing" not in child.said


def test_streams_that_are_closed_from_the_start(child, monkeypatch):
    """`2>&-`: the next file that is opened is number 2, and what a library says on stderr is written into the weights."""
    inner = running.write_dense

    def write_dense(*args):
        os.write(1, b"a library's talk")
        os.write(2, b"a library's talk")
        return inner(*args)

    monkeypatch.setattr(running, "write_dense", write_dense)

    def closed() -> None:
        for number in (0, 1, 2):
            os.close(number)
        sys.stdout = sys.stderr = None

    assert child(closed) == 0
    assert child.whole()


def test_a_locale_without_our_letters(child):
    """`×` in a line of progress, and a terminal in ASCII: a traceback, or a line that is lost."""

    def ascii_only() -> None:
        sys.stdout, sys.stderr = (open(number, "w", encoding="ascii", closefd=False) for number in (1, 2))  # noqa: SIM115

    assert child(ascii_only, *child.words[:-1], str(child.out.with_name("ou×"))) == 0
    assert "ou\\xd7" in child.said and "delta survival" in child.said


@pytest.mark.parametrize(("ignored", "code"), [(True, 0), (False, 75)])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP, signal.SIGTERM])
def test_signals_that_the_caller_ignores_stay_ignored(child, monkeypatch, number, ignored, code):
    """nohup, and Ctrl-C meant for what is in front of a script's background job; and a closed terminal, which must leave as little as Ctrl-C does."""
    inner = running.write_dense

    def write_dense(*args):
        os.kill(os.getpid(), number)
        return inner(*args)

    monkeypatch.setattr(running, "write_dense", write_dense)
    assert child(lambda: signal.signal(number, signal.SIG_IGN if ignored else signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)) == code, child.said
    assert child.whole() if ignored else os.listdir(child.out.parent) == []


@pytest.mark.parametrize("more", [3, 20, 60])
@pytest.mark.parametrize("flags", [(), ("--no-fit-check",)], ids=["", "unchecked"])
def test_hardly_any_address_space(child, more, flags):
    """A traceback where memory ends before the estimate can say so: while the machine's rate is measured, while a library is imported."""

    def limited() -> None:
        held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + more * 1_000_000
        resource.setrlimit(resource.RLIMIT_AS, (held, held))

    code = child(limited, *child.words, *flags)
    assert "Traceback" not in child.said, child.said
    assert code in ((4, 75) if not flags else (0, 75)), child.said
    assert child.whole() if code == 0 else os.listdir(child.out.parent) == []


def test_a_working_folder_that_is_gone(child, tmp_path):
    """A traceback instead of the reason."""

    def away() -> None:
        (tmp_path / "here").mkdir()
        os.chdir(tmp_path / "here")
        (tmp_path / "here").rmdir()

    assert child(away, *child.words[:-1], "out") == 1
    assert "not there any more" in child.said and "Traceback" not in child.said


@pytest.mark.parametrize("what", ["base", "adapter"])
def test_names_that_are_no_utf_8(cli, zoo, tmp_path, what):
    """A file of another country's computer: all was computed, and the manifest could not be written, with --resume either."""
    odd = tmp_path / os.fsdecode(b"caf\xe9")
    places = {"base": zoo.nf4("llama"), "adapter": zoo.adapter("llama")}
    places[what] = shutil.copytree(places[what], odd)
    out = tmp_path / "place" / "out"
    answer = cli("merge", "--base", places["base"], "--adapter", places["adapter"], "--device", "cpu", "--format", "bf16", "--out", out)
    assert answer.code == 0, answer.err
    assert verify_files(out) == [] and "caf\\\\udce9" in (out / "manifest.json").read_text()


def test_an_output_whose_name_is_no_utf_8(cli, zoo, tmp_path):
    """A checkpoint that no library can open, as their file names are UTF-8."""
    answer = cli("merge", "--base", zoo.nf4("llama"), "--adapter", zoo.adapter("llama"), "--device", "cpu", "--format", "bf16", "--out", tmp_path / os.fsdecode(b"caf\xe9"))
    assert answer.code == 4 and "not UTF-8" in answer.err and list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become a user who may write nowhere")
def test_a_user_without_a_place_for_compiled_code(tmp_path):
    """A container that runs as a user without a home, over a package that root has installed: numba raised before anything was said."""

    def work() -> None:
        os.environ |= {"HOME": "/nonexistent", "XDG_CACHE_HOME": "/nonexistent"}
        os.environ.pop("NUMBA_CACHE_DIR", None)
        os.setgid(12345)
        os.setuid(12345)
        sys.modules.pop("qmerge.numerics.kernels", None)
        from qmerge.numerics import kernels

        assert kernels.np is not None

    assert ended_within(fork(work, tmp_path / "log"), 100) == 0, (tmp_path / "log").read_text()
