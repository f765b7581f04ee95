"""Do the Triton kernels that decode and merge give the values of the plain code? In Triton's interpreter and by its compiler: no device is needed, and none has run them yet."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qmerge import device

pytest.importorskip("triton")
TESTS = Path(__file__).parent


def told(script: str, *words: str, **environment: str) -> Any:
    done = subprocess.run([sys.executable, str(TESTS / "support" / script), *words], env=os.environ | {"PYTHONPATH": str(TESTS.parent), "OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"} | environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def found() -> Any:
    return told("interpreted_merge.py", TRITON_INTERPRET="1")


def test_decoding_gives_the_bits_of_the_plain_code(found) -> None:
    """A high nibble taken for a low one, a block's maximum of the neighbour where rows are no whole blocks, a short last block, an edge of a tile written past, a lost -0."""
    assert len(found["cases"]) == 22
    for case, row in found["cases"].items():
        assert row["decoded"] == row["before"] == row["fp16"] == 0, case
        assert row["bf16"] < 2**-7, case


def test_decoding_gives_the_bits_of_bitsandbytes(found) -> None:
    """A layout that only our own code packs and reads, at every block size that bitsandbytes has."""
    assert found["bitsandbytes"] == dict.fromkeys(("32", "64", "128", "256", "512", "1024", "2048", "4096"), 0)


def test_merging_sums_in_order(found) -> None:
    """A rank cut off at a tile, a scaling that joins the sum before it is rounded, the same rows as floats merged to other bits; sums that lie farther from the CPU library's than its own rounding."""
    for case, row in found["cases"].items():
        assert row["merged"] == row["from floats"] == 0, case
        assert row["far from the CPU's"] < 1e-6 and row["changed"] > 0.5, case


@pytest.mark.parametrize("target", [80, 90], ids=["A100", "H100"])
def test_the_compiler_takes_the_kernels_and_rounds_as_written(target, tmp_path) -> None:
    """A kernel that only the interpreter takes; TF32 in the product; ``level · absmax + …`` joined into one rounding, which gives other bytes than a CPU; loads of one byte where four lie together."""
    made = told("compiled_kernels.py", str(target), TRITON_CACHE_DIR=str(tmp_path))
    assert len(made) == 28
    for name, count in made.items():
        assert not any(word.startswith(("mma", "wgmma", "tcgen")) or "tf32" in word for word in count), name
        if name.startswith("merge"):
            assert set(count) & {"fma.rn.f32", "mul.rn.f32", "add.rn.f32", "mul.f32", "add.f32", "fma.f32"} == {"fma.rn.f32", "mul.rn.f32", "add.rn.f32"}, name
            assert count["fma.rn.f32"] == count["add.rn.f32"] == 16, name
        if name.startswith("decode"):
            assert not any(word.startswith("fma") for word in count) and "ld.global.b8" not in count, name


def test_without_a_compiler_triton_is_left_alone(monkeypatch, tmp_path) -> None:
    """A slim container: Triton imports, and the first launch ends the run with "Failed to find C compiler"."""
    monkeypatch.setenv("CC", "cc")
    assert device._triton_starts.__wrapped__()
    monkeypatch.delenv("CC")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not device._triton_starts.__wrapped__()


@pytest.mark.parametrize(("where", "starts", "said"), [("cuda", False, True), ("cuda:1", False, True), ("cuda", True, False), ("cpu", False, False)])
def test_a_gpu_without_triton_is_said(monkeypatch, where, starts, said) -> None:
    """Hours instead of minutes, and nobody told why; or a word about GPUs to somebody who has none."""
    monkeypatch.setattr(device, "_triton_starts", lambda: starts)
    word = device.without_triton(torch.device(where))
    assert bool(word) is said and ("C compiler" in word) is said


def test_a_merge_as_on_a_gpu(zoo, cli, tmp_path) -> None:
    """Rows of the wrong stretch, Conv1D's turned, a second adapter's output that starts from the first one's, a path that an accident of the inputs chooses. Last bits apart it is the CPU's merge."""
    adapter, other, dora = zoo.adapter("llama"), zoo.adapter("llama", "rslora-fused", seed=5, use_rslora=True), zoo.adapter("llama", "dora-fused", use_dora=True)
    base, plain, conv = zoo.nf4("llama"), zoo.float("llama"), zoo.nf4("gpt2")
    runs = {
        "one": (base, adapter), "other": (base, other), "sum": (base, f"{adapter}=0.5", "--adapter", other), "each": (base, adapter, "--adapter", other, "--each"),
        "dora": (base, dora), "float": (plain, adapter, "--on", "original"), "conv": (conv, zoo.adapter("gpt2")),
    }  # fmt: skip
    words = {name: ["merge", "--base", base, "--adapter", *flags, "--format", "fp32", "--device", "cpu"] for name, (base, *flags) in runs.items()}
    seen = dict(zip(words, told("interpreted_merge.py", json.dumps([[*line, "--out", str(tmp_path / f"gpu-{name}")] for name, line in words.items()]), TRITON_INTERPRET="1"), strict=True))
    for name, line in words.items():
        assert seen[name]["code"] == 0, seen[name]["said"]
        assert cli(*line, "--out", tmp_path / f"cpu-{name}").code == 0
        for theirs in (tmp_path / f"cpu-{name}").rglob("model.safetensors"):
            ours, theirs = load_file(tmp_path / f"gpu-{name}" / theirs.relative_to(tmp_path / f"cpu-{name}")), load_file(theirs)
            for tensor, wanted in theirs.items():
                torch.testing.assert_close(ours[tensor], wanted, rtol=1e-6, atol=1e-7)
    each = sorted(path.read_bytes() for path in (tmp_path / "gpu-each").rglob("model.safetensors"))
    assert each == sorted((tmp_path / f"gpu-{name}" / "model.safetensors").read_bytes() for name in ("one", "other"))
    kinds = {name: sorted(row.keys() - {"code", "said"}) for name, row in seen.items()}
    assert kinds == {"one": ["stored"], "other": ["stored"], "sum": ["stored"], "each": ["floats", "stored"], "dora": [], "float": ["floats"], "conv": ["stored"]}
