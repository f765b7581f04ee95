"""scripts/bench_merge.py: is its base one that bitsandbytes loads, and do its numbers and words follow from what was measured?"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPTS = Path(__file__).parent.parent / "scripts"
SIZES = {"layers": 2, "hidden": 128, "ffn": 256, "heads": 4, "kv_heads": 2, "vocab": 512, "rank": 4, "shard_bytes": 100_000}


@pytest.fixture(scope="module")
def parts():
    """The script's modules, which import each other by their bare names."""
    sys.path.insert(0, str(SCRIPTS))
    try:
        import bench_merge
        import bench_merge_arms
        import bench_merge_page
        import bench_merge_process
        import synthetic_llama
    finally:
        sys.path.remove(str(SCRIPTS))
    return argparse.Namespace(
        main=bench_merge, arms=bench_merge_arms, page=bench_merge_page, process=bench_merge_process, made=synthetic_llama, shape=synthetic_llama.Shape(**SIZES)
    )


@pytest.fixture(scope="module")
def made(parts, tmp_path_factory):
    """A tiny base and its adapter."""
    root = tmp_path_factory.mktemp("synthetic")
    parts.made.write_base(root / "base", parts.shape)
    parts.made.write_adapter(root / "adapter", parts.shape, "base")
    return root


@pytest.fixture(scope="module")
def loaded(made):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(made / "base", dtype=torch.bfloat16, device_map={"": "cpu"})


@pytest.mark.parametrize("module", ["model.layers.0.self_attn.k_proj", "model.layers.1.mlp.down_proj"])
def test_transformers_loads_the_base_as_qmerge_reads_it(parts, made, loaded, module):
    """Would catch quant states that only this project understands: the loader would fail, or fill in other weights."""
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit

    from qmerge.formats import nf4
    from qmerge.numerics.nf4 import dequantize

    linear, stored = loaded.get_submodule(module), parts.arms.Stored(str(made / "base"))
    assert isinstance(linear, Linear4bit)
    state = linear.weight.quant_state
    state.dtype = torch.float32
    quantized = nf4.unpack(f"{module}.weight", stored.get, stored.shapes)
    torch.testing.assert_close(dequantize_4bit(linear.weight.data, state), dequantize(quantized.codes, quantized.state), rtol=0, atol=0)


def test_the_base_has_the_size_that_the_room_check_counts(parts, made):
    """Would catch a disk that runs full in the middle: the sizes come from the shape, not from what was written."""
    stored = parts.arms.Stored(str(made / "base"))
    written = sum(path.stat().st_size for path in (made / "base").glob("*.safetensors"))
    specs = parts.made.base_specs(parts.shape)
    assert {name: spec.shape for name, spec in specs.items()} == {name: shape for name, (shape, _) in stored.shapes.items()}
    assert len(list((made / "base").glob("*.safetensors"))) > 2 and 0 <= written - parts.made.base_bytes(parts.shape) < 0.2 * written


def test_the_full_shape_is_llama_3_8b(parts):
    """Would catch a smaller model under that name: 8,030,261,248 weights, two bytes each when merged."""
    assert parts.made.merged_bytes(parts.made.Shape()) == 2 * 8_030_261_248


def test_the_adapter_moves_each_weight_by_one_percent(parts, made):
    """Would catch a delta that vanishes in bf16, with which outputs agree whatever was added."""
    base, adapter = parts.arms.Stored(str(made / "base")), parts.arms.Stored(str(made / "adapter"))
    for module in parts.made.linears(parts.shape):
        a, b = (adapter.get(f"base_model.model.{module}.lora_{side}.weight") for side in "AB")
        relative = (b @ a).norm() * parts.made.ALPHA / parts.shape.rank / parts.arms.dequantized(base, f"{module}.weight").norm()
        assert 0.008 < float(relative) < 0.012


@pytest.mark.slow
def test_the_benchmark_runs_from_base_to_page(parts, tmp_path):
    """Would catch a benchmark that has rotted: an arm missing, an option renamed, a page that cannot be written. Every process is real."""
    found = parts.main.bench(tmp_path, parts.shape, repeats=2, peft_repeats=1, threads=1)
    assert {arm: row["n"] for arm, row in found["arms"].items()} == {"qmerge": 2, "read": 2, "copy": 2, "peft": 1}
    args = argparse.Namespace(layers=2, repeats=2, peft_repeats=1, threads=1)
    page = parts.page.markdown(parts.main.about(args) | found)
    assert "2 of 32 layers" in page and str(tmp_path.parent) not in page and os.uname().nodename not in page


def test_the_measuring_process_stays_small():
    """Would catch ru_maxrss inherited from a parent that loaded torch: half a gigabyte would stand in every row."""
    check = "import sys, bench_merge; sys.exit(bool({'torch', 'numpy', 'safetensors'} & set(sys.modules)))"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(SCRIPTS), str(SCRIPTS.parent)))}
    assert subprocess.run([sys.executable, "-c", check], env=environment).returncode == 0


def test_peak_memory_and_seconds_are_the_childs(parts, tmp_path):
    """Would catch units mixed up (kilobytes, clock ticks), and a sampler that sees nothing."""
    work = "import time; held = b'x' * 1_000_000_000; time.sleep(0.5)"
    cost = parts.process.measure([sys.executable, "-c", work], dict(os.environ), tmp_path / "log.txt")
    assert 1.0e9 < cost.peak_rss_bytes < 3.0e9 and 1.0e9 < cost.anonymous_bytes <= cost.peak_rss_bytes and 0.5 < cost.wall_s < 60


def test_the_copy_is_whole(parts, made, tmp_path):
    """Would catch a floor that is too fast because it leaves bytes out."""
    parts.arms.copy(str(made), str(tmp_path / "copy"))
    assert parts.process.size(tmp_path / "copy") == parts.process.size(made) > 0
    assert all((tmp_path / "copy" / path.relative_to(made)).read_bytes() == path.read_bytes() for path in parts.process.files(made))


def test_dropped_files_are_read_from_the_disk_again(parts, made, tmp_path):
    """Would catch runs on a warm cache called cold. Skipped where the kernel keeps what it is asked to forget."""
    place = parts.main.Workplace(tmp_path, threads=1)
    place.adapter.symlink_to(made / "adapter")
    if not place.can_drop():
        pytest.skip("posix_fadvise drops nothing on this file system")
    warm, _ = place.arm("read", folders=[str(place.adapter)])
    assert warm.disk_read_bytes < 0.5 * parts.process.size(place.adapter)


def test_a_wrong_merge_is_seen(parts, made, tmp_path):
    """Would catch a comparison that passes anything: an output without the delta is no merge."""
    from safetensors.torch import save_file

    base, module = parts.arms.Stored(str(made / "base")), "model.layers.0.mlp.up_proj"
    adapter = parts.arms.Stored(str(made / "adapter"))
    weight = parts.arms.dequantized(base, f"{module}.weight")
    a, b = (adapter.get(f"base_model.model.{module}.lora_{side}.weight") for side in "AB")
    scaling = parts.made.ALPHA / parts.shape.rank
    errors = {}
    for case, tensor in {"right": weight + scaling * b @ a, "without": weight, "nan": weight * float("nan")}.items():
        (tmp_path / case).mkdir()
        unchanged = {name: base.get(name) for name in parts.arms.UNCHANGED}
        save_file(unchanged | {f"{module}.weight": tensor.to(torch.bfloat16)}, tmp_path / case / "model.safetensors")
        result = parts.arms.compare(str(made / "base"), str(made / "adapter"), str(tmp_path / case), None, scaling, [module])
        errors[case] = result["merged"][0]["error"]["qmerge"]
        assert all(result["unchanged"].values())
    assert errors["right"] <= 1 < errors["without"] and errors["nan"] == float("inf")


def run_of(arm: str, number: int, wall: float, rss: float) -> dict:
    return {"arm": arm, "round": number, "wall_s": wall, "peak_rss_bytes": rss}


@pytest.mark.parametrize(
    ("walls", "rss", "words"),
    [
        ((12.0, 12.0, 12.0), 1e9, ["met", "met", "met", "met"]),
        ((12.0, 13.0, 40.0), 3e9, ["missed", "met (some runs lie on the other side)", "met (some runs lie on the other side)", "missed"]),
        ((40.0, 41.0, 42.0), 1e9, ["met", "missed", "missed", "met"]),
    ],
)
def test_a_limit_is_judged_by_its_number(parts, walls, rss, words):
    """Would catch a table that says "met" whatever was measured: copy + read is 10 s, PEFT 30 s and 10 GB."""
    runs = [run_of("qmerge", i, wall, rss) for i, wall in enumerate(walls)]
    runs += [run_of(arm, i, wall, 1e7) for arm, wall in (("copy", 8.0), ("read", 2.0)) for i in range(len(walls))]
    assert [row["state"] for row in parts.page.limits([*runs, run_of("peft", 0, 30.0, 10e9)])] == words


def test_a_failing_process_stops_the_benchmark(parts, tmp_path):
    """Would catch the time of a crash in the table."""
    with pytest.raises(SystemExit, match="exit code 3"):
        parts.process.measure([sys.executable, "-c", "raise SystemExit(3)"], dict(os.environ), tmp_path / "log.txt")
