"""What a run keeps and writes goes on beside the next block, in order, and no error of it is lost."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from conftest import OWN, run_cli, sentences, write_rows

from qmerge.pipeline import stepwise
from qmerge.pipeline.behind import Behind
from qmerge.store.journal import Journal

LIMIT_S = 60


def words(zoo, out: Path, text: Path) -> list[object]:
    return ["merge", "--base", zoo.nf4("llama"), "--adapter", zoo.adapter("llama"), "--out", out, "--format", "gptq", "--device", "cpu", "--calibration", text, "--samples", 8, "--tokens", 64, "--curvature-tokens", 64]


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    return write_rows(tmp_path_factory.mktemp("behind") / "text.jsonl", sentences(OWN, 100, 5))


def test_order_is_that_of_the_caller():
    """A unit that is packed before it is kept, so that a process that dies in between has it in the output only."""
    seen = []
    with Behind() as behind:
        for number in range(50):
            behind.do(lambda number=number: seen.append((number, threading.current_thread() is threading.main_thread())))
    assert seen == [(number, False) for number in range(50)]


def test_nothing_runs_beside_where_it_must_not():
    """Ranks whose collectives are called by two threads wait for each other for ever."""
    seen = []
    with Behind(beside=False) as behind:
        behind.do(lambda: seen.append(threading.current_thread()))
        assert seen == [threading.main_thread()]


def test_an_error_ends_what_comes_after_it_and_reaches_the_caller():
    """A full disk that is noticed at the end of the run, or a block written behind one that could not be kept."""
    seen = []

    def fail() -> None:
        raise OSError("no room")

    with pytest.raises(OSError, match="no room"), Behind() as behind:
        behind.do(fail)
        behind.do(lambda: seen.append(1))
        behind.wait()
    assert seen == []


def test_an_error_is_raised_on_leaving_where_nobody_asked():
    """A last shard that was never written, in a run that says that it was."""
    with pytest.raises(OSError, match="no room"), Behind() as behind:
        behind.do(lambda: (_ for _ in ()).throw(OSError("no room")))


def test_the_callers_own_error_waits_for_what_is_under_way():
    """A thread that still writes into a folder which the end of the run takes away."""
    ended, begun = threading.Event(), threading.Event()

    def slow() -> None:
        begun.set()
        ended.wait(0.3)
        ended.set()

    with pytest.raises(KeyboardInterrupt), Behind() as behind:
        behind.do(slow)
        assert begun.wait(LIMIT_S)
        raise KeyboardInterrupt
    assert ended.is_set()


def test_threads_that_come_later_have_all_cores():
    """A run after which every new thread of the program computes on one core."""
    before, found = torch.get_num_threads(), []
    torch.set_num_threads(2)
    try:
        with Behind() as behind:
            behind.do(lambda: found.append(torch.get_num_threads()))
        thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
        thread.start()
        thread.join()
    finally:
        torch.set_num_threads(before)
    assert found == [1, 2]


def test_text_passes_the_next_block_while_one_is_kept(zoo, tmp_path, text, monkeypatch):
    """A run whose cores, or GPU, wait for the disk after each block. Keeping waits here until the next block's pass has begun, which it never would if that waited too."""
    put, enter, blocks, waited = Journal.put, stepwise.Walk.__enter__, [], []
    second = threading.Event()

    def slow_put(self: Journal, name: str, *rest: object) -> int:
        if name == "unit-0":
            waited.append(second.wait(LIMIT_S))
        return put(self, name, *rest)

    def noticed(self: stepwise.Walk) -> stepwise.Walk:
        blocks.append(len(blocks))
        if len(blocks) == 2:
            second.set()
        return enter(self)

    monkeypatch.setattr(Journal, "put", slow_put)
    monkeypatch.setattr(stepwise.Walk, "__enter__", noticed)
    answer = run_cli(*words(zoo, tmp_path / "out", text))
    assert answer.code == 0, answer.err
    assert waited[0]


def test_no_linear_is_solved_before_the_block_before_is_kept(zoo, tmp_path, text, monkeypatch):
    """Two blocks' work lost by a process that dies, and the memory of two at the fullest moment."""
    from qmerge.pipeline import streams

    put, solve, happened = Journal.put, streams.requantize_group, []

    def noted_put(self: Journal, name: str, *rest: object) -> int:
        found = put(self, name, *rest)
        happened.append(name)
        return found

    def noted_solve(linears: list, *rest: object, **named: object) -> object:
        happened.append(linears[0].name)
        return solve(linears, *rest, **named)

    monkeypatch.setattr(Journal, "put", noted_put)
    monkeypatch.setattr(streams, "requantize_group", noted_solve)
    answer = run_cli(*words(zoo, tmp_path / "out", text))
    assert answer.code == 0, answer.err
    first = next(place for place, name in enumerate(happened) if ".layers.1." in name)
    assert "unit-0" in happened[:first]


def test_a_full_disk_ends_the_run_at_the_block_that_found_it(zoo, tmp_path, text, monkeypatch):
    """An error beside the run that is not told, told without the way to go on, or only when all blocks are solved."""
    from qmerge.errors import Interrupted
    from qmerge.pipeline import streams

    put, solve, solved = Journal.put, streams.requantize_group, []

    def failing(self: Journal, name: str, *rest: object) -> int:
        if name == "unit-0":
            raise Interrupted("The disk is full.", where=name)
        return put(self, name, *rest)

    def noted(linears: list, *rest: object, **named: object) -> object:
        solved.append(linears[0].name)
        return solve(linears, *rest, **named)

    monkeypatch.setattr(Journal, "put", failing)
    monkeypatch.setattr(streams, "requantize_group", noted)
    answer = run_cli(*words(zoo, tmp_path / "out", text))
    assert answer.code == 75 and "The disk is full." in answer.err and not (tmp_path / "out").exists()
    assert all(".layers.0." in name for name in solved)
