"""A journal's record is there whole or not at all, whatever is done to its file; and solved linears come back from it as the very same tensors."""

from __future__ import annotations

import errno
import os

import pytest
import torch

from qmerge.errors import Interrupted
from qmerge.pipeline.solved_record import laid_back, laid_flat
from qmerge.store import durable
from qmerge.store.journal import Journal

FACTS = {"block": 3, "loss": 0.1 + 0.2, "names": ["ä"], "none": None, "far": float("inf")}


@pytest.fixture
def journal(tmp_path):
    return Journal(tmp_path)


def tensors():
    generator = torch.Generator().manual_seed(0)
    return {"codes": torch.randint(0, 16, (3, 5), generator=generator, dtype=torch.uint8), "scales": torch.randn(4, generator=generator), "half": torch.randn(2, 2, generator=generator).bfloat16(), "empty": torch.zeros(0, 3)}


def test_round_trip(journal):
    """A float that JSON rounds, a dtype or an empty tensor that gets lost."""
    journal.put("unit-3", FACTS, tensors())
    facts, found = journal.get("unit-3")
    assert facts == FACTS == journal.facts("unit-3") and list(found) == list(tensors())
    for name, tensor in tensors().items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)
        assert torch.equal(journal.later("unit-3")[1][name](), tensor)


def test_any_flipped_bit_makes_a_record_absent(journal, tmp_path):
    """A damaged record that is gone on with gives a checkpoint whose manifest says that all is well. Every byte of a record in turn, and every length."""
    journal.put("unit-0", FACTS, tensors())
    raw = (tmp_path / "unit-0").read_bytes()
    for place in range(len(raw)):
        (tmp_path / "unit-0").write_bytes(raw[:place] + bytes([raw[place] ^ (1 << place % 8)]) + raw[place + 1 :])
        assert journal.get("unit-0") is None and journal.later("unit-0") is None, place
    for length in range(len(raw)):
        (tmp_path / "unit-0").write_bytes(raw[:length])
        assert journal.get("unit-0") is None and journal.later("unit-0") is None, length
    (tmp_path / "unit-0").write_bytes(raw + b"x")
    assert journal.get("unit-0") is None


def test_what_was_not_renamed_is_not_there(journal, tmp_path, monkeypatch):
    """The half record of a process that died while it wrote; and the next one must be able to put it."""
    (tmp_path / "unit-0.new").write_bytes(b"half")
    assert journal.names() == [] and journal.get("unit-0") is None
    journal.put("unit-0", {"second": True})
    assert journal.names() == ["unit-0"] and journal.facts("unit-0") == {"second": True}


def test_a_record_that_finds_no_room_leaves_the_old_one(journal, tmp_path, monkeypatch):
    """A full disk that costs what was there before; or a fragment that keeps it full."""
    journal.put("streams", {"passed": 1})

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(durable.os, "fsync", full)
    with pytest.raises(Interrupted):
        journal.put("streams", {"passed": 2})
    monkeypatch.undo()
    assert journal.facts("streams") == {"passed": 1} and os.listdir(tmp_path) == ["streams"]


def test_order_of_syncs_and_renames(journal, monkeypatch):
    """A record must be on the disk before it has its name, and its name before anything is built on it."""
    events, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (events.append(os.path.basename(os.readlink(f"/proc/self/fd/{handle}"))), fsync(handle)))
    monkeypatch.setattr(os, "replace", lambda *pair: (events.append("rename"), replace(*pair)))
    journal.put("unit-0", {})
    assert events == ["unit-0.new", "rename", journal.folder.name]


def test_modes_follow_the_umask(journal, tmp_path):
    """A colleague of the group resumes the run."""
    before = os.umask(0o027)
    try:
        journal.put("unit-0", {})
    finally:
        os.umask(before)
    assert (tmp_path / "unit-0").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("make", [
    lambda: torch.randn(3, 5), lambda: torch.randn(3, 5).T, lambda: torch.randn(2, 3, 4).permute(2, 0, 1), lambda: torch.randn(1, 5).T, lambda: torch.randn(7), lambda: torch.tensor(1.5),
    lambda: torch.randn(6, 8)[:, :4],
], ids=["rows", "columns", "axes", "one column", "vector", "scalar", "part"])  # fmt: skip
def test_layouts_come_back(make):
    """A product with a matrix that lies otherwise adds up in another order: other bits in every block that follows."""
    tensor = make()
    back = laid_back(*laid_flat(tensor))
    assert torch.equal(back, tensor)
    if tensor.is_contiguous() or tensor.permute(*reversed(range(tensor.dim()))).is_contiguous():
        assert back.stride() == tensor.stride() or 1 in tensor.shape
