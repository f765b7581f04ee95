"""Is what a run needs foreseen: whole, in the right direction, and refused with a setting that then does?"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qmerge.pipeline import memory
from qmerge.pipeline.timing import Rates, operations, seconds
from qmerge.pipeline.workload import Linears, Workload

DEMO = Path(__file__).parents[1] / "examples" / "demo"
RATES = Rates(1e11, 1e9)


def workload(hidden=512, inner=1024, blocks=4, train=20, held_out=4, tokens=256, threads=2, curvature=8192, **changes):
    groups = (Linears(hidden, (hidden, hidden // 2, hidden // 2)), Linears(hidden, (hidden,), True), Linears(hidden, (inner, inner)), Linears(inner, (hidden,), True))
    block = sum(group.elements for group in groups) + 2 * hidden
    vocabulary = 8 * hidden
    rows = Workload(threads, False, "gptq", hidden, vocabulary, 2 * vocabulary * hidden, vocabulary * hidden, blocks, block, groups, None, inner, 4, False, True, train, held_out, tokens, curvature, 1024,
                    blocks * block, blocks * block + 2 * vocabulary * hidden, 0, inner * hidden)  # fmt: skip
    return replace(rows, **changes)


def peak(work, shard=5 * 10**9, polish=()):
    return max(phase.ram(work.accelerator) for phase in memory.phases(work, shard, work.quantized // 2 + 2 * work.ends, polish))


sizes = st.builds(
    workload, hidden=st.sampled_from([64, 256, 1024, 4096]), inner=st.sampled_from([128, 512, 2048, 14336]), blocks=st.integers(1, 80), train=st.integers(1, 500), held_out=st.integers(1, 80),
    tokens=st.sampled_from([64, 256, 2048]), threads=st.integers(1, 64), curvature=st.sampled_from([0, 2048, 8192]), accelerator=st.booleans(), format=st.sampled_from(["gptq", "nf4"]), eager=st.booleans(),
)  # fmt: skip


@given(sizes, st.integers(1, 500))
@settings(max_examples=200, deadline=None)
def test_more_samples_never_need_less_memory(work, more):
    """A `--samples` that is named as the way out, and needs more than what it replaces. Where activations no longer fit the tape less is held; nobody is sent there by fewer samples."""
    larger = replace(work, train=work.train + more)
    if (memory.inside_bytes(larger) <= memory.TAPE_BYTES) == (memory.inside_bytes(work) <= memory.TAPE_BYTES):
        assert peak(larger) >= peak(work)


@given(sizes, st.integers(10**6, 10**10), st.integers(10**6, 10**10))
@settings(max_examples=200, deadline=None)
def test_smaller_shards_never_need_more_memory(work, one, other):
    """A `--shard-size` that is named and makes it worse."""
    assert peak(work, min(one, other)) <= peak(work, max(one, other))


@given(sizes)
@settings(max_examples=200, deadline=None)
def test_polishing_and_curvatures_never_need_less(work):
    """A step that is free on paper."""
    assert peak(work, polish=("distill", "blocks")) >= peak(work, polish=("blocks",)) >= peak(work) >= peak(replace(work, curvature_tokens=0)) >= peak(replace(work, curvature_tokens=0, quick=True))


@given(sizes)
@settings(max_examples=200, deadline=None)
def test_time_grows_with_tokens_and_falls_with_speed(work):
    """An estimate in which a longer run ends sooner."""
    larger = replace(work, train=2 * work.train)
    assert operations(larger) >= operations(work) > 0
    assert seconds(larger, RATES, 10**9, 10**9) >= seconds(work, RATES, 10**9, 10**9) >= seconds(work, Rates(2e11, 2e9), 10**9, 10**9)


@given(sizes)
@settings(max_examples=200, deadline=None)
def test_an_accelerator_holds_what_main_memory_then_does_not(work):
    """Bytes counted on both sides, or on none."""
    on_cpu, on_device = replace(work, accelerator=False), replace(work, accelerator=True)
    for phase in memory.phases(on_device, 10**9, 10**9):
        assert phase.ram(True) + phase.on_device(True) == phase.ram(False)
    assert all(phase.on_device(False) == 0 for phase in memory.phases(on_cpu, 10**9, 10**9))


def words(zoo, out, fmt="gptq", **more):
    given = {"base": zoo.nf4("llama"), "adapter": zoo.adapter("llama"), "out": out, "format": fmt, "device": "cpu"} | ({} if fmt == "bf16" else {"calibration": zoo.calibration, "samples": 8, "tokens": 64}) | more
    return ["merge", *(part for key, value in given.items() for part in (f"--{key.replace('_', '-')}", str(value)))]


@pytest.mark.parametrize("kind, fmt", [("llama", "gptq"), ("llama", "nf4"), ("llama", "bf16"), ("qwen2", "compressed-tensors"), ("gpt2", "gptq")])
def test_bytes_written_are_foreseen(zoo, cli, tmp_path, kind, fmt):
    """Files beside the weights forgotten, or tensors counted in another dtype than they are written in: within one percent."""
    given = words(zoo, tmp_path / "out", fmt, base=zoo.nf4(kind), adapter=zoo.adapter(kind), **({} if fmt == "bf16" else {"curvature_tokens": 0}))
    answer = cli(*given, "--json")
    assert answer.code == 0, answer.err
    written = sum(path.stat().st_size for path in (tmp_path / "out").rglob("*"))
    foreseen = json.loads(answer.out)["estimate"]["bytes_written"]
    assert abs(foreseen - written) <= 0.01 * written, (foreseen, written)


def test_every_start_says_what_it_needs(zoo, cli, tmp_path):
    """A run of a night whose needs nobody was told."""
    answer = cli(*words(zoo, tmp_path / "out", "bf16"))
    assert answer.code == 0 and "writes" in answer.err and "of memory at its fullest" in answer.err and "takes     about" in answer.err


def test_a_dry_run_tells_all_and_writes_nothing(zoo, cli, tmp_path):
    """An estimate without its basis, or one that leaves a file behind."""
    answer = cli(*words(zoo, tmp_path / "out"), "--dry-run")
    assert answer.code == 0, answer.err
    for said in ("reads", "of disk", "of memory", "GFLOP/s", "this process with its libraries", "solved blocks", "embedding"):
        assert said in answer.out, said
    assert list(tmp_path.iterdir()) == []
    found = json.loads(cli(*words(zoo, tmp_path / "out"), "--dry-run", "--json").out)["estimate"]
    assert found["peak_ram_bytes"] > found["process_bytes"] > 10**8 and found["peak_device_bytes"] == 0 and found["fullest_phase"] in found["phases"]


def test_a_dry_run_opens_all_that_the_run_opens(zoo, cli, tmp_path):
    """A dry run that is content with an adapter full of NaN, or with text that is too short, which the run then refuses."""
    import shutil

    import torch
    from safetensors.torch import load_file, save_file

    shutil.copytree(zoo.adapter("llama"), tmp_path / "spoilt")
    tensors = load_file(tmp_path / "spoilt" / "adapter_model.safetensors")
    next(iter(tensors.values()))[0, 0] = torch.nan
    save_file(tensors, tmp_path / "spoilt" / "adapter_model.safetensors", {"format": "pt"})
    spoilt = cli(*words(zoo, tmp_path / "out", adapter=tmp_path / "spoilt"), "--dry-run")
    (tmp_path / "short.txt").write_text("a few words")
    short = cli(*words(zoo, tmp_path / "out", calibration=tmp_path / "short.txt"), "--dry-run")
    assert spoilt.code == 4 and "lora_" in spoilt.err
    assert short.code == 4 and "shorter than one window" in short.err
    assert not (tmp_path / "out").exists()


LIMITED = """
import importlib, resource, sys
from qmerge import room
from qmerge.cli import merge
real = merge.foreseen
def limited(*args, **options):
    importlib.import_module("qmerge.numerics.kernels")
    resource.setrlimit(resource.RLIMIT_AS, (room._status("VmSize") + {room}, resource.RLIM_INFINITY))
    return real(*args, **options)
merge.foreseen = limited
from qmerge.cli.main import main
sys.argv = ["qmerge", *sys.argv[1:]]
main()
"""
"""the limit is the system's own (`ulimit -v`); it is set once the libraries are there, because how much address space they take differs between machines"""


def demo(out, *more):
    return ["merge", "--base", f"{DEMO}/base-nf4", "--adapter", f"{DEMO}/adapter", "--out", str(out), "--calibration", f"{DEMO}/calibration.jsonl", "--device", "cpu", "--curvature-tokens", "0", *more]


def started(code, words, **options):
    return subprocess.run([sys.executable, "-c", code.strip(), *map(str, words)], capture_output=True, text=True, timeout=280, check=False, **options)


def named(text, flag):
    """The value that a message names for a flag."""
    return text.split(f"{flag} ")[1].split()[0].rstrip(",;")


@pytest.mark.slow
def test_too_little_memory_is_refused_and_the_named_setting_does(tmp_path):
    """An hour's work that ends in the kernel's killer, or a way out that is none: under a real limit of address space."""
    from qmerge.room import ARENAS_BYTES

    code = LIMITED.format(room=ARENAS_BYTES + 250_000_000)
    refused = started(code, demo(tmp_path / "out", "--samples", "127", "--tokens", "256"))
    assert refused.returncode == 4, refused.stderr
    assert "more memory than there is" in refused.stderr and "address space" in refused.stderr and "written:    nothing" in refused.stderr
    assert list(tmp_path.iterdir()) == []
    done = started(code, demo(tmp_path / "out", "--samples", named(refused.stderr, "--samples"), "--tokens", "256"))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "manifest.json").exists()


@pytest.mark.slow
def test_the_check_can_be_overruled(tmp_path):
    """A machine whose system tells less than there is, on which nothing can be started."""
    from qmerge.room import ARENAS_BYTES

    room = ARENAS_BYTES + 10_000_000
    found = started(LIMITED.format(room=room), demo(tmp_path / "out", "--samples", "8", "--tokens", "64", "--dry-run"))
    assert found.returncode == 4 and "--no-fit-check" in found.stderr
    assert started(LIMITED.format(room=room), demo(tmp_path / "out", "--samples", "8", "--tokens", "64", "--dry-run", "--no-fit-check")).returncode == 0


def mounts() -> bool:
    import shutil

    return shutil.which("unshare") is not None and subprocess.run(["unshare", "-rm", "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True, check=False).returncode == 0


@pytest.mark.slow
@pytest.mark.skipif(not mounts(), reason="this machine does not let us mount a tmpfs")
def test_too_little_disk_is_refused_and_the_named_setting_does(tmp_path):
    """Hours of merging, and then a full disk; or a way out that fills it all the same: on a real small disk."""
    place = tmp_path / "disk"
    place.mkdir()
    script = f'mount -t tmpfs -o size=5600k none "{place}" && "$0" -m qmerge "$@"; code=$?; ls -A "{place}"; exit $code'
    ran = [demo(place / "out", "--samples", "8", "--tokens", "64", *more) for more in ((), ("--shard-size", "1MB"))]
    refused, done = (subprocess.run(["unshare", "-rm", "sh", "-c", script, sys.executable, *words], capture_output=True, text=True, timeout=280, check=False) for words in ran)
    assert refused.returncode == 4 and "does not fit on the disk" in refused.stderr and refused.stdout == "", refused.stderr
    assert named(refused.stderr, "--shard-size") == "1MB"
    assert done.returncode == 0 and done.stdout.split()[-1] == "out", done.stderr


def test_control_groups_are_asked(tmp_path):
    """A container that is ended because the machine has more than it: the tightest of all groups up to the root, with cache that nobody uses counted as free. Both versions' files as the kernel writes them."""
    from qmerge.room import _cgroup_rooms

    for folder, files in {"memory/a/b": {"memory.limit_in_bytes": "9223372036854771712", "memory.usage_in_bytes": "5", "memory.stat": "total_inactive_file 1"},
                          "memory/a": {"memory.limit_in_bytes": "1000", "memory.usage_in_bytes": "400", "memory.stat": "cache 3\ntotal_inactive_file 100\n"},
                          "x": {"memory.max": "900", "memory.current": "500", "memory.stat": "anon 1\ninactive_file 50\n"}, "x/y": {"memory.max": "max", "memory.current": "5", "memory.stat": ""}}.items():  # fmt: skip
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (tmp_path / folder / name).write_text(text)
    (tmp_path / "one").write_text("4:memory:/a/b\n3:cpu:/\n")
    (tmp_path / "two").write_text("0::/x/y\n")
    assert _cgroup_rooms(tmp_path, tmp_path / "one") == [700]
    assert _cgroup_rooms(tmp_path, tmp_path / "two") == [450]
    assert _cgroup_rooms(tmp_path, tmp_path / "three") == []
