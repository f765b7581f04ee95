"""One byte of one input is another: caught, or exactly the merge of those bytes. And of one output: always caught.

The merge runs in this process (imports cost ten seconds, a merge of these files ten milliseconds). Default: a sample spread over every file; all bytes under slow.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from oracles import merge_slow
from safetensors.torch import load_file, save_file
from support.blocks import block_maxima

from qmerge.errors import QmergeError, Refused
from qmerge.formats import nf4
from qmerge.numerics import nf4 as grid
from qmerge.pipeline.plan import plan
from qmerge.pipeline.recipe import build_recipe
from qmerge.pipeline.run import run
from qmerge.store.manifest import seal_fault, verify_files
from qmerge.types import Grid, QuantizedWeight, QuantState

Q, O, NORM, HEAD = "model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.o_proj.weight", "model.norm.weight", "lm_head.weight"
SAMPLE = 17
"""in default runs every so manyth byte"""


def packed(weight: str, shape: tuple[int, int]) -> dict[str, torch.Tensor]:
    """A doubly quantized NF4 weight as bitsandbytes saves it."""
    values = torch.randn(shape) * 0.1
    maxima, code = block_maxima(values, 64), grid.code_book("nf4")
    table = torch.linspace(-1, 1, 256)
    steps, nested, offset = grid.double_quantize(maxima, table)
    state = QuantState(steps, code, 64, shape, "bfloat16", "nf4", nested, table, 256, offset)
    return nf4.pack(weight, QuantizedWeight(grid.nearest(values, grid.effective_absmax(state), code, 64), Grid("nf4", 4, 64), state=state))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base of two shards (an NF4 linear, a float one, norms, a head) and an adapter of rank 1 on both linears."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("flips")
    base, adapter = root / "base", root / "adapter"
    base.mkdir(), adapter.mkdir()
    shards = {"model-00001-of-00002.safetensors": packed(Q, (16, 64)), "model-00002-of-00002.safetensors": {name: (torch.randn(shape) * 0.1).bfloat16() for name, shape in ((O, (8, 16)), (NORM, (8,)), (HEAD, (4, 8)))}}
    for file, tensors in shards.items():
        save_file(tensors, base / file, {"format": "pt"})
    (base / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": {name: file for file, tensors in shards.items() for name in tensors}}))
    (base / "config.json").write_text(json.dumps({"model_type": "toy", "hidden_size": 8, "dtype": "bfloat16", "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}))
    (base / "generation_config.json").write_text('{"eos_token_id": 1}')
    (base / "LICENSE").write_text("free")
    names = {Q: (16, 64), O: (8, 16)}
    factors = {f"base_model.model.{name.removesuffix('weight')}lora_{side}.weight": torch.randn(shape) * 0.3 for name, (out, width) in names.items() for side, shape in (("A", (1, width)), ("B", (out, 1)))}
    save_file(factors, adapter / "adapter_model.safetensors", {"format": "pt"})
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 1, "lora_alpha": 2, "target_modules": ["q_proj", "o_proj"], "bias": "none", "use_rslora": False}))
    return base, adapter


class Merges:
    """Merges of a changed copy of the inputs; each outcome is counted."""

    def __init__(self, inputs: tuple[Path, Path], root: Path) -> None:
        self.base, self.adapter = root / "base", root / "adapter"
        for source, target in zip(inputs, (self.base, self.adapter), strict=True):
            shutil.copytree(source, target)
        self.out, self.counts = root / "out", Counter()

    def __call__(self, what: object) -> None:
        """A refusal that says where and leaves nothing, or the oracle's bits. Anything else that is raised ends the test with its traceback."""
        try:
            run(plan(build_recipe(None, (), {"base": str(self.base), "adapter": (str(self.adapter),), "out": str(self.out), "format": "bf16", "device": "cpu"})))
        except QmergeError as problem:
            assert isinstance(problem, Refused) and problem.where and len(problem.what) > 10, (what, problem)
            assert sorted(path.name for path in self.out.parent.iterdir()) == ["adapter", "base"], (what, "something was left behind")
            self.counts["refused"] += 1
            return
        found, wanted = load_file(self.out / "model.safetensors"), merge_slow.merged(self.base, self.adapter)
        assert found.keys() == wanted.keys(), what
        for name, tensor in wanted.items():
            assert tensor.dtype == found[name].dtype and torch.equal(tensor.reshape(-1).view(torch.uint8), found[name].reshape(-1).view(torch.uint8)), (what, name)
        assert not verify_files(self.out), what
        self.counts["merged as the bytes say"] += 1
        shutil.rmtree(self.out)

    def flips(self, path: Path, step: int, pattern: int | None = None) -> Iterator[int]:
        """``path`` with each ``step``-th byte changed in turn (by one bit, another one each time, or by ``pattern``), and whole again at the end."""
        whole = path.read_bytes()
        for index in range(step // 2, len(whole), step):
            path.write_bytes(whole[:index] + bytes([whole[index] ^ (pattern or 1 << (index // step) % 8)]) + whole[index + 1 :])
            yield index
        path.write_bytes(whole)


@pytest.fixture
def merges(inputs):
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # every merge syncs its files; here that costs nothing
    with tempfile.TemporaryDirectory(dir=memory) as root:
        made = Merges(inputs, Path(root))
        made("unchanged")
        assert made.counts == {"merged as the bytes say": 1}
        made.counts.clear()
        yield made


FILES = ("base/model-00001-of-00002.safetensors", "base/model-00002-of-00002.safetensors", "adapter/adapter_model.safetensors", "base/model.safetensors.index.json", "base/config.json", "adapter/adapter_config.json")


@pytest.mark.parametrize("file", FILES)
def test_a_flipped_byte_of_an_input(merges, file):
    """A crash without a message; or a wrong weight that is neither refused nor what the changed bytes say (a default in the place of a lost value, a part left out)."""
    for index in merges.flips(merges.base.parent / file, SAMPLE):
        merges((file, index))
    print(file, dict(merges.counts))
    assert merges.counts.total() > 5 and merges.counts["refused"]


@pytest.mark.slow
@pytest.mark.parametrize("pattern", [None, 0xFF, 0x20], ids=["a bit", "all bits", "another case"])
@pytest.mark.parametrize("file", FILES)
def test_every_flipped_byte_of_an_input(merges, file, pattern, capsys):
    """The same for every byte, three ways."""
    for index in merges.flips(merges.base.parent / file, 1, pattern):
        merges((file, index))
    with capsys.disabled():
        print(f"\n{file}, {pattern and hex(pattern)}: {dict(merges.counts)}")
    assert merges.counts.total() == (merges.base.parent / file).stat().st_size


@pytest.mark.parametrize("file", FILES[:3])
def test_every_length_that_a_header_may_be_cut_to(merges, file):
    """A download that stopped inside the header, and the last byte missing: read as fewer tensors, or an exception of a JSON parser."""
    path = merges.base.parent / file
    whole = path.read_bytes()
    length = 8 + struct.unpack("<Q", whole[:8])[0]
    for kept in (*range(0, length + 1, 1 if length < 600 else 3), len(whole) - 1):
        path.write_bytes(whole[:kept])
        with pytest.raises(Refused, match=path.name):
            plan(build_recipe(None, (), {"base": str(merges.base), "adapter": (str(merges.adapter),), "out": str(merges.out), "format": "bf16"}))
    path.write_bytes(whole)


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES[:3])
def test_every_length_at_all(merges, file, capsys):
    """The same for every length of the file, header and data."""
    path = merges.base.parent / file
    whole = path.read_bytes()
    for kept in range(len(whole)):
        path.write_bytes(whole[:kept])
        merges((file, kept))
    with capsys.disabled():
        print(f"\n{file}, cut: {dict(merges.counts)}")
    assert merges.counts == {"refused": len(whole)}


OPTIONAL = {"generation_config.json", "LICENSE"}


def test_each_file_of_each_input_is_missing_in_turn(merges):
    """A smaller model for a lost shard; a crash for a lost config."""
    for path in sorted([*merges.base.iterdir(), *merges.adapter.iterdir()]):
        whole = path.read_bytes()
        path.unlink()
        before = merges.counts["refused"]
        merges(path.name)
        assert (merges.counts["refused"] > before) == (path.name not in OPTIONAL), path.name
        path.write_bytes(whole)
    assert merges.counts == {"refused": 6, "merged as the bytes say": 2}


def test_each_file_of_a_single_shard_base_is_missing_in_turn(merges):
    """The same where the base is one file."""
    tensors = merge_slow.tensors_of(merges.base, "model.safetensors")
    for path in merges.base.glob("model*"):
        path.unlink()
    save_file(tensors, merges.base / "model.safetensors", {"format": "pt"})
    merges("whole")
    for name in ("model.safetensors", "config.json"):
        whole = (merges.base / name).read_bytes()
        (merges.base / name).unlink()
        merges(name)
        (merges.base / name).write_bytes(whole)
    assert merges.counts == {"refused": 2, "merged as the bytes say": 1}


@pytest.mark.parametrize("step", [SAMPLE, pytest.param(1, marks=pytest.mark.slow)], ids=["a sample", "all"])
def test_bytes_of_every_file_of_an_output(merges, step):
    """A changed output that `qmerge verify` calls whole."""
    run(plan(build_recipe(None, (), {"base": str(merges.base), "adapter": (str(merges.adapter),), "out": str(merges.out), "format": "bf16", "device": "cpu"})))
    counts = Counter()
    for path in sorted(merges.out.iterdir()):
        for index in merges.flips(path, step):
            problems = verify_files(merges.out) or seal_fault(merges.out)
            counts[path.name, bool(problems)] += 1
            assert problems, (path.name, index)
    print({f"{name}, {'seen' if seen else 'not seen'}": count for (name, seen), count in counts.items()})
    assert not verify_files(merges.out) and counts["model.safetensors", True] >= (merges.out / "model.safetensors").stat().st_size // step
