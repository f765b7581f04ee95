"""Checkpoints that are written while they are computed: the files are what safetensors' own writer would make of the same tensors, or they are not there."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import resource
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from qmerge.errors import Interrupted, Refused
from qmerge.store import direct
from qmerge.store.checkpoint import INDEX
from qmerge.store.stream import OutTensor, ShardStream, cut, in_order

KINDS = (torch.float64, torch.int64, torch.float32, torch.int32, torch.bfloat16, torch.float16, torch.int16, torch.uint8, torch.int8, torch.bool, torch.float8_e4m3fn)


def everything() -> dict[str, torch.Tensor]:
    """All dtypes, odd counts, a scalar, an empty tensor, a name beyond ASCII."""
    dice = torch.Generator().manual_seed(0)
    found = {f"z.{str(dtype).removeprefix('torch.')}": (torch.randn(7, 5, generator=dice) * 4).to(dtype) for dtype in KINDS}
    return found | {"scalar": torch.tensor(2.5), "empty": torch.empty(0, 3), "größe": torch.randn(3, 3, 3, generator=dice), "long": torch.randn(1000, 3, generator=dice).bfloat16()}


def specs(tensors: dict[str, torch.Tensor]) -> list[OutTensor]:
    return [OutTensor(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]


def write(folder: Path, tensors: dict[str, torch.Tensor], rows: int = 10**9, **options: object) -> ShardStream:
    folder.mkdir(exist_ok=True)
    with ShardStream(folder, specs(tensors), **options) as stream:
        for tensor in stream.order:
            value = tensors[tensor.name]
            for part in value.split(rows) if value.dim() else [value]:
                stream.write(part)
        stream.finish()
    return stream


def parts_of(file: Path) -> tuple[dict, bytes, int]:
    raw = file.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + size]), raw[8 + size :], size


def same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> bool:
    return found.keys() == wanted.keys() and all(
        found[name].dtype == wanted[name].dtype and found[name].shape == wanted[name].shape and found[name].view(-1).view(torch.uint8).equal(wanted[name].reshape(-1).view(torch.uint8))
        for name in wanted
    )


def test_safetensors_reads_what_was_written(tmp_path):
    """A dtype spelt wrongly, an offset off by one, a scalar or an empty tensor lost."""
    tensors = everything()
    write(tmp_path / "out", tensors)
    assert same(load_file(tmp_path / "out" / "model.safetensors"), tensors)
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_same_layout_as_safetensors_writes(tmp_path):
    """A layout of our own where a file holds one dtype of each width, as float checkpoints do: header and data are those of safetensors' own writer."""
    tensors = {name: tensor for name, tensor in everything().items() if tensor.dtype in (torch.float64, torch.float32, torch.bfloat16, torch.uint8)}
    write(tmp_path / "out", tensors)
    save_file(tensors, tmp_path / "theirs.safetensors", {"format": "pt"})
    (ours, data, _), (theirs, their_data, _) = parts_of(tmp_path / "out" / "model.safetensors"), parts_of(tmp_path / "theirs.safetensors")
    assert ours == theirs and list(ours)[1:] == list(theirs)[1:] and data == their_data


def test_all_data_is_aligned(tmp_path):
    """A tensor at an odd offset, which readers that map files refuse or read slowly."""
    write(tmp_path / "out", everything())
    table, _, size = parts_of(tmp_path / "out" / "model.safetensors")
    width = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "BF16": 2, "F16": 2, "I16": 2}
    assert size % 8 == 0 and all(entry["data_offsets"][0] % width.get(entry["dtype"], 1) == 0 for name, entry in table.items() if name != "__metadata__")


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_pieces_make_the_same_bytes(tmp_path, rows):
    """Rows that are lost or doubled where a tensor comes in stretches."""
    tensors = everything()
    write(tmp_path / "whole", tensors)
    write(tmp_path / "pieces", tensors, rows)
    assert (tmp_path / "whole" / "model.safetensors").read_bytes() == (tmp_path / "pieces" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("limit", [1, 100, 1000, 6000])
def test_shards(tmp_path, limit):
    """A tensor in two shards or in none, an index that names another file, a shard above its limit with more than one tensor in it."""
    tensors = everything()
    stream = write(tmp_path / "out", tensors, max_shard_bytes=limit)
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    found: dict[str, torch.Tensor] = {}
    for file in sorted((tmp_path / "out").glob("*.safetensors")):
        held = load_file(file)
        assert not held.keys() & found.keys() and all(index["weight_map"][name] == file.name for name in held)
        assert sum(tensor.nbytes for tensor in held.values()) <= limit or sum(tensor.nbytes > 0 for tensor in held.values()) == 1
        found |= held
    assert same(found, tensors) and index["weight_map"].keys() == tensors.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    assert {path.name for path in (tmp_path / "out").iterdir()} == {*index["weight_map"].values(), INDEX} and len(stream.shards) > 1


@pytest.mark.parametrize("shapes", [[(9,), (0,), (9,)], [(0,), (9,)], [(9,), (0,)], [(0,)], [(0,), (0,), (9,), (0,), (0,)]])
def test_empty_tensors_between_shards(tmp_path, shapes):
    """An empty tensor that is alone in its shard: no bytes come for it, and the next tensor's must not be taken for too many."""
    tensors = {f"t{number}": torch.arange(shape[0], dtype=torch.float32) for number, shape in enumerate(shapes)}
    write(tmp_path / "out", tensors, max_shard_bytes=8)
    found: dict[str, torch.Tensor] = {}
    for file in (tmp_path / "out").glob("*.safetensors"):
        found |= load_file(file)
    assert same(found, tensors)


def test_digests_are_those_of_the_files(tmp_path):
    """A digest of other bytes than the disk has: the header left out, or the shards mixed up."""
    stream = write(tmp_path / "out", everything(), max_shard_bytes=500)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert stream.digests == {file.name: {"sha256": hashlib.sha256(file.read_bytes()).hexdigest(), "bytes": file.stat().st_size} for file in files}


def test_order_does_not_depend_on_the_shard_size(tmp_path):
    """Tensors that are computed in another order for another shard size; and what is given in another order."""
    tensors = specs(everything())
    order = in_order(tensors)
    assert order == in_order(tensors[::-1])
    assert all([tensor for shard in cut(order, limit) for tensor in shard] == order for limit in (1, 100, 10**9))


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_modes_follow_the_umask(tmp_path, umask):
    """Files that only their owner can serve, whatever the umask says."""
    before = os.umask(umask)
    try:
        write(tmp_path / "out", everything(), max_shard_bytes=500)
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "out").iterdir()} == {0o666 & ~umask}


def test_too_few_and_too_many_bytes(tmp_path):
    """A header that promises what the file does not hold."""
    tensors = {"a": torch.ones(4), "b": torch.ones(4)}
    with ShardStream(tmp_path, specs(tensors)) as stream:
        stream.write(tensors["a"])
        with pytest.raises(RuntimeError, match="not written to its end"):
            stream.finish()
        with pytest.raises(ValueError, match="more bytes"):
            stream.write(torch.ones(5))


def test_a_tensor_named_twice(tmp_path):
    """The second of two tensors of one name shadows the first."""
    with pytest.raises(Refused, match="twice"):
        ShardStream(tmp_path, [OutTensor("a", torch.float32, (1,))] * 2)


def test_nothing_is_overwritten(tmp_path):
    """A file that is there already written over."""
    write(tmp_path / "out", {"a": torch.ones(3)})
    with pytest.raises(FileExistsError):
        write(tmp_path / "out", {"a": torch.zeros(3)})
    assert load_file(tmp_path / "out" / "model.safetensors")["a"].equal(torch.ones(3))


@contextlib.contextmanager
def largest_file(limit: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_file_larger_than_the_file_system_takes(tmp_path):
    """A traceback where a shard of 5 GB meets a file system that ends at 4: interrupted, with the way out."""
    with largest_file(2000), pytest.raises(Interrupted) as caught:
        write(tmp_path / "out", everything())
    assert "--shard-size" in str(caught.value)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("call", ["open", "write", "fsync"])
def test_no_room_is_interrupted_wherever_it_shows(tmp_path, monkeypatch, call, code):
    """A full disk that shows late (at fsync, in the thread that writes) and is taken for success or for a bug."""
    monkeypatch.setattr(direct, "BUFFER_BYTES", 100)
    inner, count = getattr(os, call), [0]

    def full(*arguments: object) -> object:
        count[0] += 1
        if count[0] > 1:
            raise OSError(code, os.strerror(code))
        return inner(*arguments)

    monkeypatch.setattr(direct.os, call, full)
    with pytest.raises(Interrupted):
        write(tmp_path / "out", everything() | {"more": torch.ones(5000)}, 10, max_shard_bytes=2000)


def test_handles_are_closed_after_a_failure(tmp_path, monkeypatch):
    """A file handle per failed run that a long-lived process never gets back."""
    before = len(os.listdir("/proc/self/fd"))
    for number in range(3):
        with largest_file(1000), pytest.raises(Interrupted):
            write(tmp_path / f"out{number}", everything())
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("size", [16, 4096, 12288])
@pytest.mark.parametrize("start", [0, 1 << 40], ids=["past the cache", "through it"])
def test_buffers_and_the_cache_change_nothing(tmp_path, monkeypatch, size, start):
    """Bytes lost or doubled where a buffer ends, or the padding of a direct write left in the file."""
    tensors = everything() | {"long": torch.arange(20000, dtype=torch.float32)}
    write(tmp_path / "plain", tensors, 1, max_shard_bytes=30000)
    monkeypatch.setattr(direct, "BUFFER_BYTES", size)
    monkeypatch.setattr(direct, "DIRECT_BYTES", start)
    write(tmp_path / "other", tensors, 1, max_shard_bytes=30000)
    files = sorted(path.name for path in (tmp_path / "plain").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "other").iterdir())
    assert all((tmp_path / "plain" / name).read_bytes() == (tmp_path / "other" / name).read_bytes() for name in files)


def test_a_file_system_that_refuses_direct_writes(tmp_path, monkeypatch):
    """EINVAL from a file system that takes the flag and not the writes: the same bytes the ordinary way, or a failed run."""
    monkeypatch.setattr(direct, "DIRECT_BYTES", 0)
    monkeypatch.setattr(direct, "BUFFER_BYTES", 4096)
    inner, refused = os.write, []

    def write_once(handle: int, view: object) -> int:
        if not refused:
            refused.append(handle)
            raise OSError(errno.EINVAL, "no")
        return inner(handle, view)

    monkeypatch.setattr(direct.os, "write", write_once)
    tensors = everything() | {"long": torch.arange(20000, dtype=torch.float32)}
    write(tmp_path / "out", tensors)
    assert refused and all(torch.equal(load_file(tmp_path / "out" / "model.safetensors")[name], tensor) for name, tensor in tensors.items())
