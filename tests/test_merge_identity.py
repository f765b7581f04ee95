"""The same inputs give the same bytes: whatever the number of threads, the size of shards or stretches, and however often; and a run that ends early leaves nothing."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles.dequantized import logits
from safetensors.torch import load_file
from test_merge_refusals import digests
from transformers import AutoModelForCausalLM

from qmerge.pipeline import merge as merging

RICH = {"target_modules": ["q_proj", "o_proj", "up_proj", "down_proj"], "modules_to_save": ["lm_head"]}
REPOSITORY = Path(__file__).parent.parent


class Runs:
    def __init__(self, zoo: Any, cli: Any, root: Path) -> None:
        self.zoo, self.cli, self.root, self.count = zoo, cli, root, 0
        self.base, self.adapter = zoo.nf4("llama"), zoo.adapter("llama", "identity", relative=0.05, **RICH)
        self.light = zoo.adapter("llama", "identity light", relative=0.05, target_modules=["q_proj", "down_proj"])
        """merged without transformers, which takes seconds to import: for processes"""

    def arguments(self, *flags: object, base: str | None = None, adapter: str | None = None, fmt: str = "bf16", name: str | None = None) -> tuple[list[str], Path]:
        self.count += 1
        out = self.root / (name or f"out{self.count}")
        words = ["merge", "--base", base or self.base, "--adapter", adapter or self.adapter, "--out", out, "--format", fmt, "--device", "cpu", *flags]
        return [str(word) for word in words], out

    def __call__(self, *flags: object, **options: Any) -> Path:
        words, out = self.arguments(*flags, **options)
        answer = self.cli(*words)
        assert answer.code == 0, answer.err
        return out


@pytest.fixture
def runs(zoo, cli, tmp_path):
    return Runs(zoo, cli, tmp_path)


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def bits_differ(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> list[str]:
    assert first.keys() == second.keys()
    return [name for name in first if not torch.equal(first[name].view(torch.uint8), second[name].view(torch.uint8)) or first[name].dtype != second[name].dtype]


def files_of(folder: Path) -> dict[str, str]:
    return {Path(path).relative_to(folder).as_posix(): digest for path, digest in digests(folder).items()}


def test_repeated_runs_give_the_same_folder(runs):
    """A time, a path, an order of a set in the weights, in a config or in the manifest."""
    first = files_of(runs())
    second = files_of(runs())
    assert first == second and "manifest.json" in first


@pytest.mark.parametrize("stretch", [1 << 22, 1 << 10])
def test_threads_do_not_change_the_bytes(runs, monkeypatch, stretch):
    """A product that torch splits among threads, or stretches that are written in the order in which they are finished."""
    monkeypatch.setattr(merging, "STRETCH", stretch)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            found.append(files_of(runs(fmt="fp32")))
            assert torch.get_num_threads() == threads, "the caller's number of threads was changed"
    finally:
        torch.set_num_threads(before)
    assert found[0] == found[1] == found[2]


def test_threads_by_the_environment_do_not_change_the_bytes(runs):
    """The same in a process of its own, whose libraries read another number of threads when they start."""
    expected = files_of(runs(fmt="fp32", adapter=runs.light))
    words, out = runs.arguments(fmt="fp32", adapter=runs.light)
    threads = "4" if torch.get_num_threads() != 4 else "1"
    environment = {**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    done = subprocess.run([sys.executable, "-m", "qmerge", *words], env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert files_of(out) == expected


def test_shard_sizes(runs):
    """A tensor that changes, is lost or is named in the wrong file for another shard size; a checkpoint that transformers does not load."""
    whole = runs("--shard-size", "5GB")
    for size, most in (("100kB", 100_000), ("300kB", 300_000)):
        cut = runs("--shard-size", size)
        index, files = json.loads((cut / "model.safetensors.index.json").read_text()), sorted(cut.glob("model-*.safetensors"))
        assert len(files) > 2 and not bits_differ(tensors_of(whole), tensors_of(cut))
        assert index["weight_map"] == {name: file.name for file in files for name in load_file(file)}
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors_of(whole).values())
        assert all(sum(tensor.nbytes for tensor in held.values()) <= most or len(held) == 1 for held in map(load_file, files))
        batch, (first, second) = runs.zoo.batch(), (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval() for folder in (whole, cut))
        assert torch.equal(logits(first, batch), logits(second, batch))
        assert runs.cli("verify", cut, "--base", runs.base, "--adapter", runs.adapter).code == 0


@pytest.mark.parametrize("size, says", [("0", "--shard-size"), ("-5GB", "--shard-size"), ("big", "--shard-size"), ("5 parsecs", "--shard-size")])
def test_shard_sizes_that_are_none(runs, size, says):
    """A shard per tensor, or all in one, because a size was not understood."""
    words, out = runs.arguments(f"--shard-size={size}")
    answer = runs.cli(*words)
    assert answer.code == 2 and says in answer.err and not out.exists()


def stretched(runs: Runs, monkeypatch: pytest.MonkeyPatch, stretch: int, **options: Any) -> dict[str, torch.Tensor]:
    with monkeypatch.context() as patch:
        patch.setattr(merging, "STRETCH", stretch)
        return tensors_of(runs(fmt="fp32", **options))


def test_stretches_differ_by_fp32_rounding_at_most(runs, monkeypatch):
    """A stretch that starts at the wrong row. How many rows a product has may change the order in which BLAS adds: a few ulps of |W| + |ΔW|, never more."""
    whole = stretched(runs, monkeypatch, 1 << 22)
    for stretch in (1 << 9, 1 << 12):
        pieces = stretched(runs, monkeypatch, stretch)
        for name, tensor in whole.items():
            assert float((tensor - pieces[name]).abs().max()) <= 4 * 2**-24 * float(tensor.abs().max()), name


def test_stretches_of_exact_products_are_bit_identical(runs, monkeypatch, tmp_path):
    """With factors of few bits and a scaling that is a power of two, every product and sum is exact: then the size of a stretch must not show at all."""
    from safetensors.torch import save_file

    adapter = tmp_path / "adapter"
    shutil.copytree(runs.adapter, adapter)
    lora, dice = load_file(adapter / "adapter_model.safetensors"), torch.Generator().manual_seed(0)
    lora = {name: torch.randint(-3, 4, tensor.shape, generator=dice) / 64 if "lora_" in name else tensor for name, tensor in lora.items()}
    save_file({name: tensor.contiguous() for name, tensor in lora.items()}, adapter / "adapter_model.safetensors", {"format": "pt"})
    whole = stretched(runs, monkeypatch, 1 << 22, adapter=str(adapter))
    for stretch in (1 << 9, 1 << 12):
        assert not bits_differ(whole, stretched(runs, monkeypatch, stretch, adapter=str(adapter)))


@pytest.mark.parametrize("kind, lora", [("llama", {"use_dora": True}), ("gpt2", {}), ("qwen2", {"lora_bias": True, "target_modules": ["q_proj", "v_proj"]})])
def test_stretches_of_other_edits(runs, monkeypatch, kind, lora):
    """DoRA's magnitudes, biases, and Conv1D whose rows lie across the file: a stretch must take its own part of them."""
    adapter = runs.zoo.adapter(kind, f"identity {kind}", relative=0.05, **lora)
    options = {"base": runs.zoo.nf4(kind), "adapter": adapter}
    whole, pieces = stretched(runs, monkeypatch, 1 << 22, **options), stretched(runs, monkeypatch, 1 << 9, **options)
    for name, tensor in whole.items():
        assert float((tensor - pieces[name]).abs().max()) <= 8 * 2**-24 * float(tensor.abs().max()), name


def test_manifest_has_the_digests_of_the_files(runs):
    """Digests that were computed on the way out and are not those of what lies on the disk."""
    out = runs("--shard-size", "200kB")
    manifest = json.loads((out / "manifest.json").read_text())
    held = {path.name: {"sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "bytes": path.stat().st_size} for path in out.iterdir() if path.name != "manifest.json"}
    assert manifest["files"] == held and sum(name.endswith(".safetensors") for name in held) > 2


# ---- runs that end early

SLOW = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # tests that a shell runs in the background inherit it ignored
from qmerge.store.stream import ShardStream
inner, count = ShardStream.write, [0]
def write(self, rows):
    inner(self, rows)
    count[0] += 1
    if count[0] == 5:
        print("in the middle", file=sys.__stderr__, flush=True)
        for _ in range(12000):  # short ones: a signal between the last look for it and a long sleep would be heard at its end
            time.sleep(0.05)
ShardStream.write = write
from qmerge.cli.main import main
sys.argv = ["qmerge", *sys.argv[1:]]
main()
"""


def started(words: list[str]) -> subprocess.Popen:
    """A merge in a process of its own that stands still after its fifth tensor."""
    process = subprocess.Popen([sys.executable, "-c", SLOW, *words], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    for line in process.stderr:
        if "in the middle" in line:
            return process
    raise AssertionError(f"ended with {process.wait()}")


def test_kill_9_leaves_no_out(runs):
    """A folder with half of the shards under the name that a server would load. The next run works beside what is left."""
    words, out = runs.arguments("--shard-size", "100kB", name="killed", adapter=runs.light)
    before = digests(runs.base, runs.light)
    process = started(words)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not out.exists() and digests(runs.base, runs.light) == before
    left = [path.name for path in runs.root.iterdir()]
    assert all(re.fullmatch(r"\.killed\.qmerge-run-\w+", name) for name in left)
    assert runs.cli(*words).code == 0 and runs.cli("verify", out).code == 0


@pytest.mark.parametrize("sent", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_signals_leave_nothing(runs, sent):
    """A temporary folder of gigabytes after Ctrl-C, or exit code 1 for what can simply be run again."""
    words, _ = runs.arguments(name="stopped", adapter=runs.light)
    process = started(words)
    process.send_signal(sent)
    _, err = process.communicate(timeout=240)  # less than it stands still; machines are busy
    assert process.returncode == 75 and "interrupted" in err and "Traceback" not in err and list(runs.root.iterdir()) == []


def mounts() -> bool:
    return shutil.which("unshare") is not None and subprocess.run(["unshare", "-rm", "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True, check=False).returncode == 0


@pytest.mark.skipif(not mounts(), reason="this machine does not let us mount a tmpfs")
@pytest.mark.parametrize("size", ["350k", pytest.param("764k", marks=pytest.mark.slow)])
def test_disk_full(runs, size, tmp_path):
    """A disk that fills in the middle of the weights, or only at the side files, whatever the plan foresaw: exit 75, and nothing but the run's own folder, which --resume goes on from."""
    place = tmp_path / "disk"
    place.mkdir()
    blind = "import sys; from qmerge.pipeline import plan; plan.check_room = lambda *_: None; from qmerge.cli.main import main; sys.argv = ['qmerge', *sys.argv[1:]]; main()"
    words = ["merge", "--base", runs.base, "--adapter", runs.light, "--out", str(place / "out"), "--format", "bf16", "--device", "cpu", "--shard-size", "100kB"]
    script = f'mount -t tmpfs -o size={size} none "{place}" && "$0" "$@"; code=$?; ls -A "{place}"; exit $code'
    done = subprocess.run(["unshare", "-rm", "sh", "-c", script, sys.executable, "-c", blind, *words], capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 75, done.stderr
    assert re.fullmatch(r"\.out\.qmerge-run-\w+\n", done.stdout) and "room left on the disk" in done.stderr and "--resume" in done.stderr and "Traceback" not in done.stderr


def test_a_file_that_may_not_grow_any_further(runs):
    """A file system that ends at some file size (FAT at 4 GB) is no bug of qmerge's: exit 75, nothing left, and the way out."""
    import resource

    words, _ = runs.arguments()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, before[1]))
    try:
        answer = runs.cli(*words)
        left = list(runs.root.iterdir())
        smaller = runs.cli(*runs.arguments("--shard-size", "200kB")[0])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert answer.code == 75 and "--shard-size" in answer.err and "Traceback" not in answer.err and left == []
    assert smaller.code == 0, smaller.err
