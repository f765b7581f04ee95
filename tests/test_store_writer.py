"""Written shards are read back by safetensors itself, bit for bit, with the names, sizes and modes that loaders expect."""

import errno
import json
import os
import stat

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from qmerge.errors import Interrupted, Refused
from qmerge.store import durable
from qmerge.store.checkpoint import open_checkpoint
from qmerge.store.headers import TORCH_DTYPES, read_header
from qmerge.store.writer import ShardWriter


def bits(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def write(folder, tensors, **options):
    folder.mkdir(exist_ok=True)
    writer = ShardWriter(folder, **options)
    for name, tensor in tensors.items():
        writer.add(name, tensor)
    return writer.finish()


@pytest.fixture
def tensors():
    generator = torch.Generator().manual_seed(0)
    made = {name: torch.randint(0, 2, (3, 5), generator=generator).to(dtype) for name, dtype in TORCH_DTYPES.items()}
    return made | {"scalar": torch.tensor(1.5), "empty": torch.zeros(0, 3), "odd": torch.arange(7, dtype=torch.uint8)}


def test_single_file(tmp_path, tensors):
    """A padding or order mistake shifts every tensor after it."""
    weight_map = write(tmp_path / "out", tensors)
    assert set(weight_map.values()) == {"model.safetensors"} and os.listdir(tmp_path / "out") == ["model.safetensors"]
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"} and set(file.keys()) == set(tensors)
        for name, tensor in tensors.items():
            got = file.get_tensor(name)
            assert got.dtype == tensor.dtype and got.shape == tensor.shape and bits(got).equal(bits(tensor)), name


def test_same_data_layout_as_safetensors(tmp_path, tensors):
    """Data that is not aligned to its dtype loads slowly or not at all; the reference orders by width, and so must we."""
    write(tmp_path / "out", tensors)
    save_file(tensors, tmp_path / "theirs.safetensors")
    specs = read_header(tmp_path / "out" / "model.safetensors")[0].values()
    assert all(spec.start % TORCH_DTYPES[spec.dtype].itemsize == 0 for spec in specs if spec.nbytes)
    theirs = read_header(tmp_path / "theirs.safetensors")[0].values()
    assert sum(spec.nbytes for spec in theirs) == sum(spec.nbytes for spec in specs)


def test_shards(tmp_path):
    """A wrong count in the names, or a wrong index, is a model that does not load."""
    tensors = {f"layer.{index}": torch.full((10,), float(index)) for index in range(7)}
    weight_map = write(tmp_path / "out", tensors, max_shard_bytes=100)
    files = sorted(os.listdir(tmp_path / "out"))
    assert files == [f"model-0000{index}-of-00004.safetensors" for index in (1, 2, 3, 4)] + ["model.safetensors.index.json"]
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index == {"metadata": {"total_size": 280}, "weight_map": weight_map}
    for name, file in weight_map.items():
        with safe_open(tmp_path / "out" / file, "pt") as opened:
            assert opened.get_tensor(name).equal(tensors[name])
    (tmp_path / "out" / "config.json").write_text("{}")
    assert set(open_checkpoint(tmp_path / "out").specs) == set(tensors)


def test_shards_hold_no_more_than_asked(tmp_path):
    """A shard over the limit breaks hubs and file systems with a cap; a larger tensor still has to go somewhere."""
    sizes = [30, 30, 30, 200, 10, 90, 100]
    weight_map = write(tmp_path / "out", {f"t{index}": torch.zeros(size, dtype=torch.uint8) for index, size in enumerate(sizes)}, max_shard_bytes=100)
    held = {}
    for index, size in enumerate(sizes):
        held.setdefault(weight_map[f"t{index}"], []).append(size)
    assert list(held.values()) == [[30, 30, 30], [200], [10, 90], [100]]


def test_same_input_same_bytes(tmp_path, tensors):
    """Without this, no resumed run can be compared to an uninterrupted one."""
    for name in ("one", "two"):
        write(tmp_path / name, tensors, max_shard_bytes=64)
    for file in os.listdir(tmp_path / "one"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


@pytest.mark.parametrize("held", [0, 40, 10**6])
def test_what_waits_in_memory_does_not_change_the_bytes(tmp_path, tensors, held):
    """A shard whose tensors come back from the wrong place of the file they waited in; a file that is left behind."""
    write(tmp_path / "usual", tensors, max_shard_bytes=200)
    write(tmp_path / "other", tensors, max_shard_bytes=200, held_bytes=held)
    files = sorted(os.listdir(tmp_path / "usual"))
    assert files == sorted(os.listdir(tmp_path / "other")) and len(files) > 1
    assert all((tmp_path / "usual" / file).read_bytes() == (tmp_path / "other" / file).read_bytes() for file in files)


def test_a_copy_is_taken(tmp_path):
    """A buffer that the caller reuses must not change what was added; views and transposes are written as they look."""
    folder = tmp_path / "out"
    folder.mkdir()
    writer, buffer = ShardWriter(folder), torch.arange(6.0).reshape(2, 3)
    writer.add("t", buffer.T)
    writer.add("grad", buffer.clone().requires_grad_())
    buffer.zero_()
    writer.finish()
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert file.get_tensor("t").equal(torch.arange(6.0).reshape(2, 3).T)


def test_duplicates_and_bad_names(tmp_path):
    """A second tensor of one name would replace the first without a word."""
    writer = ShardWriter(tmp_path, max_shard_bytes=1)
    writer.add("a", torch.ones(2))
    writer.add("b", torch.ones(2))
    for name in ("a", "b", "", "__metadata__"):
        with pytest.raises(Refused):
            writer.add(name, torch.ones(2))
    with pytest.raises(Refused, match="cannot hold"):
        writer.add("c", torch.ones(2, dtype=torch.complex64))


def test_nothing_to_write(tmp_path):
    """An empty model file would load as a model of random weights."""
    with pytest.raises(Refused, match="no tensors"):
        ShardWriter(tmp_path).finish()


def test_finished_means_finished(tmp_path):
    """A tensor added late would be in no file."""
    writer = ShardWriter(tmp_path)
    writer.add("a", torch.ones(2))
    writer.finish()
    for late in (lambda: writer.add("b", torch.ones(2)), writer.finish):
        with pytest.raises(RuntimeError):
            late()


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_modes_follow_the_umask(tmp_path, umask):
    """safetensors writes 0600: a server under another user cannot read the model."""
    before = os.umask(umask)
    try:
        write(tmp_path / "out", {"a": torch.ones(9), "b": torch.ones(9)}, max_shard_bytes=40)
    finally:
        os.umask(before)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "out").iterdir()}
    assert modes == {0o666 & ~umask}


def test_no_final_name_before_finish(tmp_path):
    """A killed run must not leave a file that looks complete."""
    writer = ShardWriter(tmp_path, max_shard_bytes=8)
    for name in "abc":
        writer.add(name, torch.ones(2))
    assert not list(tmp_path.glob("model*"))


def test_disk_full_is_interrupted(tmp_path, monkeypatch):
    """ENOSPC is no defect of the input: exit 75, run again after making room."""

    def full(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(durable.os, "fsync", full)
    with pytest.raises(Interrupted, match="no room"):
        write(tmp_path / "out", {"a": torch.ones(2)})
    monkeypatch.setattr(durable.os, "fsync", lambda handle: (_ for _ in ()).throw(OSError(errno.EIO, "broken")))
    with pytest.raises(OSError, match="broken"):
        write(tmp_path / "other", {"a": torch.ones(2)})


def test_every_file_is_synced_before_it_is_renamed(tmp_path, monkeypatch):
    """A rename that reaches the disk before the data is an empty file after a power loss."""
    events = []
    fsync, rename = os.fsync, os.rename
    monkeypatch.setattr(os, "fsync", lambda handle: (events.append(("sync", os.path.basename(os.readlink(f"/proc/self/fd/{handle}")))), fsync(handle)))
    monkeypatch.setattr(os, "rename", lambda source, target: (events.append(("rename", os.path.basename(source))), rename(source, target)))
    write(tmp_path / "out", {"a": torch.ones(9), "b": torch.ones(9)}, max_shard_bytes=40)
    for name in (".shard-00001.tmp", ".shard-00002.tmp"):
        assert events.index(("sync", name)) < events.index(("rename", name))
    assert events[-1] == ("sync", "out")
