"""Inputs that change, vanish or fail while a run reads them: done to real files, between two of its reads."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qmerge.pipeline import run as running


@pytest.fixture
def pair(zoo, tmp_path):
    shutil.copytree(zoo.nf4("llama"), tmp_path / "base")
    shutil.copytree(zoo.adapter("llama"), tmp_path / "adapter")
    (tmp_path / "place").mkdir()
    return tmp_path


def merge(cli, root: Path, *flags: object):
    return cli("merge", "--base", root / "base", "--adapter", root / "adapter", "--out", root / "place" / "out", "--device", "cpu", "--format", "bf16", *flags)


def before_reading(monkeypatch, do: Callable[[], object]) -> None:
    """Once the headers are read and all bytes are hashed, and before the first tensor is."""
    inner = running.write_dense

    def write_dense(jobs, *rest):
        while not jobs[0].kept._ready():
            pass
        do()
        return inner(jobs, *rest)

    monkeypatch.setattr(running, "write_dense", write_dense)


def flip(file: Path, keep_date: bool = False) -> None:
    """64 bytes in the middle, in place."""
    date = os.stat(file)
    with file.open("r+b") as handle:
        handle.seek(date.st_size // 2)
        was = handle.read(64)
        handle.seek(date.st_size // 2)
        handle.write(bytes(byte ^ 1 for byte in was))
    if keep_date:
        os.utime(file, ns=(date.st_atime_ns, date.st_mtime_ns))


@pytest.mark.parametrize("keep_date", [False, True], ids=["", "its date set back"])
@pytest.mark.parametrize("name", ["base/model.safetensors", "adapter/adapter_model.safetensors"])
def test_bytes_that_change_between_the_digest_and_the_reading(cli, pair, monkeypatch, name, keep_date):
    """A manifest that vouches for bytes that the output was not made of: found by nobody, as every digest fits."""
    before_reading(monkeypatch, lambda: flip(pair / name, keep_date))
    answer = merge(cli, pair)
    assert answer.code == 4 and "changed while the run was at work" in answer.err and "Traceback" not in answer.err, answer.err
    assert list((pair / "place").iterdir()) == []


def test_a_header_that_changes_after_the_plan(cli, pair, zoo, monkeypatch):
    """Somebody saves the base again with a longer header: read at the old places, hashed as the new file."""
    for name in ("model.safetensors", "config.json"):  # a float base, in which every byte is a number
        shutil.copy(Path(zoo.float("llama")) / name, pair / "base")
    file, inner = pair / "base" / "model.safetensors", running.check_adapters

    def changed(plan):
        if file.stat().st_ino == inode:
            save_file(load_file(file), pair / "new", {"format": "pt", "saved": "again" * 40})
            os.replace(pair / "new", file)
        inner(plan)

    inode = file.stat().st_ino
    monkeypatch.setattr(running, "check_adapters", changed)
    answer = merge(cli, pair, "--on", "original")
    assert answer.code == 4 and "changed while the run was at work" in answer.err, answer.err
    assert list((pair / "place").iterdir()) == []


def test_the_same_bytes_in_another_place_are_no_change(cli, pair, monkeypatch):
    """A backup's hard links, a date, a copy put in place of itself: a night's work thrown away for nothing."""
    file = pair / "base" / "model.safetensors"

    def harmless():
        os.link(pair / "base" / "config.json", pair / "link")
        shutil.copy(file, pair / "copy")
        os.replace(pair / "copy", file)
        os.utime(pair / "adapter" / "adapter_model.safetensors")

    before_reading(monkeypatch, harmless)
    answer = merge(cli, pair)
    assert answer.code == 0, answer.err


def test_a_base_that_goes_away_can_be_gone_on_with(cli, pair, zoo, monkeypatch):
    """A disk that was unmounted in the ninth hour: what is solved was thrown away, as if the inputs had been bad."""
    from qmerge.pipeline import streams

    inner, calls = streams.requantize_group, []

    def requantize_group(*args, **options):
        calls.append(1)
        if len(calls) == 5:  # the second block
            (pair / "base").rename(pair / "gone")
        return inner(*args, **options)

    flags = ("merge", "--base", pair / "base", "--adapter", pair / "adapter", "--out", pair / "place" / "out", "--device", "cpu", "--format", "gptq", "--group-size", 32, "--calibration", zoo.calibration,
             "--samples", 8, "--tokens", 64, "--curvature-tokens", 0, "--shard-size", "40kB")
    with monkeypatch.context() as patch:
        patch.setattr(streams, "requantize_group", requantize_group)
        answer = cli(*flags)
    assert answer.code == 75 and "--resume" in answer.err and "Traceback" not in answer.err, answer.err
    (pair / "gone").rename(pair / "base")
    answer = cli(*flags, "--resume")
    assert answer.code == 0 and "goes on with" in answer.err, answer.err


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool], ids=str)
def test_an_adapter_on_whole_numbers_is_refused(cli, pair, zoo, dtype):
    """W + ΔW cut to whole numbers in a file that looks well: int8 weights whose scales the config does not explain."""
    tensors = load_file(Path(zoo.float("llama")) / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    save_file(tensors | {name: (tensors[name].float() * 10).to(dtype)}, pair / "base" / "model.safetensors", {"format": "pt"})
    shutil.copy(Path(zoo.float("llama")) / "config.json", pair / "base")
    answer = merge(cli, pair, "--on", "original")
    assert answer.code == 4 and name in answer.err and "does not decode" in answer.err, answer.err
    assert list((pair / "place").iterdir()) == []


def test_eight_bits_with_a_scale_that_nothing_applies(cli, pair, zoo):
    """An fp8 weight beside its `weight_scale_inv`, and a config that does not name the method: merged at 1/scale of its size."""
    tensors = load_file(Path(zoo.float("llama")) / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    save_file(tensors | {name: tensors[name].to(torch.float8_e4m3fn), f"{name}_scale_inv": torch.ones(1)}, pair / "base" / "model.safetensors", {"format": "pt"})
    shutil.copy(Path(zoo.float("llama")) / "config.json", pair / "base")
    answer = merge(cli, pair, "--on", "original")
    assert answer.code == 4 and "weight_scale_inv" in answer.err, answer.err


def test_nothing_is_kept_of_what_has_changed(cli, pair, zoo, monkeypatch):
    """A block solved from other bytes, in a run that is then killed: gone on with, once the input is again what it was."""
    from qmerge.pipeline import streams

    inner, calls = streams.requantize_group, []

    def requantize_group(*args, **options):
        calls.append(1)
        if len(calls) == 5:  # the second block
            flip(pair / "base" / "model.safetensors")
        return inner(*args, **options)

    monkeypatch.setattr(streams, "requantize_group", requantize_group)
    answer = merge(cli, pair, "--format", "gptq", "--group-size", 32, "--calibration", zoo.calibration, "--samples", 8, "--tokens", 64, "--curvature-tokens", 0)
    assert answer.code == 4 and "changed while the run was at work" in answer.err, answer.err
    assert list((pair / "place").iterdir()) == []
