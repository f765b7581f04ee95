"""``--device-memory``: what lies on the device is moved, bounded and said, and the bytes that come out are the same."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from support.there import digests, runs
from test_estimate import sizes, workload

from qmerge.errors import Refused, UsageProblem
from qmerge.pipeline import memory
from qmerge.pipeline.batches import Shelf, by_slot
from qmerge.pipeline.estimate import estimate
from qmerge.pipeline.fit import check_fit
from qmerge.pipeline.loading import Loader
from qmerge.pipeline.merge import Merged
from qmerge.pipeline.plan import plan
from qmerge.pipeline.recipe import Recipe, build_recipe
from qmerge.pipeline.residence import ASKED, device_limit, device_peak, settled
from qmerge.pipeline.run import run
from qmerge.pipeline.streams import Place
from qmerge.pipeline.timing import Rates

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
RATES = Rates(1e11, 1e9)


@pytest.fixture(scope="module")
def small(zoo):
    """Settings of a merge that takes a moment."""
    base = zoo.float("llama", "device-memory", **SMALL)
    adapter = zoo._once("device-memory-adapter", lambda folder: save(base, folder))
    return {"base": base, "adapter": [adapter], "on": "original", "calibration": zoo.calibration, "samples": 8, "tokens": 32, "curvature_tokens": 0, "group_size": 32, "compute": "fp32"}


def save(base: str, folder: Path) -> str:
    from conftest import TARGETS, save_adapter

    return save_adapter(base, folder, base, 0.05, 3, target_modules=TARGETS["llama"])


def recipe(small, out, **changes) -> Recipe:
    return Recipe(**{**small, "adapter": tuple(small["adapter"]), "out": str(out)} | {"device": "cpu"} | changes)


@pytest.fixture(scope="module")
def usual(small, tmp_path_factory):
    """The files of a run on the CPU, as it always was."""
    out = tmp_path_factory.mktemp("usual") / "out"
    run(plan(recipe(small, out)))
    return digests(out)


@pytest.mark.parametrize("place", [Place(on_host=True), Place(ahead=True), Place(True, True)], ids=["streams on the host", "next block ahead", "both"])
def test_where_things_lie_changes_no_byte(small, usual, tmp_path, place):
    """An activation that is laid away and not brought back, or a block that is read twice and merged otherwise."""
    run(plan(recipe(small, tmp_path / "out")), place=place)
    assert digests(tmp_path / "out") == usual


def on_a_device(small, root, *jobs, **changes) -> list[dict]:
    """Runs on a device beside the CPU (support.there), of (windows, bytes of captured inputs that a block may keep, do streams lie in main memory?)."""
    return runs([{"recipe": small | {"samples": samples, "out": str(root / f"{samples}-{tape}-{host}")} | changes, "on_host": host, "ahead": None if host else False, "batch": 64, "tape": tape} for samples, tape, host in jobs])


@pytest.fixture(scope="module")
def few(small, tmp_path_factory):
    """Streams on the device and in main memory."""
    return on_a_device(small, tmp_path_factory.mktemp("few"), (8, 2**31, False), (8, 2**31, True))


@pytest.fixture(scope="module")
def many(small, tmp_path_factory):
    """The same with slots of several batches; and a short one whose blocks are passed as often as there are groups."""
    return on_a_device(small, tmp_path_factory.mktemp("many"), (80, 2**31, False), (80, 2**31, True), (8, 0, True))


def test_streams_in_main_memory_give_the_same_bytes(few):
    """A sum that is formed in another order, or on the other side, because something lies elsewhere. Every operation that mixes the sides fails."""
    assert few[0]["files"] == few[1]["files"]


def test_the_device_holds_what_was_foreseen(few):
    """Formulas that leave out what is held."""
    assert all(row["peak_bytes"] <= row["foreseen_bytes"] for row in few) and few[1]["peak_bytes"] < few[0]["peak_bytes"], few


@pytest.mark.slow
def test_longer_text_on_a_device(few, many):
    """Streams that are said to lie in main memory and are kept on the device too, or a slot whose batches are summed otherwise."""
    assert many[0]["files"] == many[1]["files"] != few[0]["files"] == many[2]["files"]
    assert all(row["peak_bytes"] <= row["foreseen_bytes"] for row in many), many
    assert many[0]["peak_bytes"] - few[0]["peak_bytes"] > 4 * (many[1]["peak_bytes"] - few[1]["peak_bytes"])


@pytest.mark.slow
def test_gradients_on_a_device(small, few, tmp_path):
    """Hidden states of the gradients' own passes, or curvatures, that lie on the wrong side."""
    rows = on_a_device(small, tmp_path, (8, 2**31, False), (8, 2**31, True), curvature_tokens=64)
    assert rows[0]["files"] == rows[1]["files"] != few[0]["files"] and all(row["peak_bytes"] <= row["foreseen_bytes"] for row in rows), rows


def test_a_batch_comes_to_the_device_and_a_view_is_closed_up():
    """Something computed with where it lies; or a view with holes that lies otherwise once it was in main memory: products may then add up otherwise. ``meta`` is a device of torch's own."""
    meta, whole = torch.device("meta"), torch.arange(24.0).view(4, 6)
    shelf = Shelf(meta)
    assert shelf.take(whole).device == meta and Shelf(torch.device("cpu"), True).put(whole) is whole
    view, turned = whole.to(meta)[:, :3], whole.to(meta).T
    assert shelf.put(view).stride() == view.clone().stride() != view.stride()
    assert shelf.put(turned) is turned


def test_batches_come_slot_by_slot():
    """A slot whose batches come apart, so that a part of its sum is added to those before it."""
    assert list(by_slot([(False, 0), (False, 0), (False, 1), (True, 1), (True, 1)])) == [range(2), range(2, 3), range(3, 5)] and list(by_slot([])) == []


def merged_of(small, out, **changes) -> tuple:
    found = plan(recipe(small, out, **changes))
    return found, Merged(found.base, found.pieces, found.adapters, torch.device("cpu"))


def test_the_next_block_is_read_meanwhile(small, tmp_path):
    """A thread that reads the block that is there already, or one that does not end."""
    found, merged = merged_of(small, tmp_path / "out")
    with Loader(found, merged, ahead=True) as loader:
        first = dict(loader.parameters(0))
        assert list(loader._waiting) == [1]
        second = dict(loader.parameters(1))
        assert loader._waiting == {}
    with Loader(found, merged) as loader:  # beside a CPU: not ahead
        for number, held in enumerate((first, second)):
            plain = dict(loader.parameters(number))
            assert plain.keys() == held.keys() and all(torch.equal(plain[name], held[name]) for name in plain) and loader._waiting == {}


def test_what_reading_ahead_finds_is_raised_where_the_block_is_needed(small, tmp_path):
    """A NaN that a thread meets, and nobody hears of."""
    import shutil

    from safetensors.torch import load_file, save_file

    shutil.copytree(small["base"], tmp_path / "base")
    tensors = load_file(tmp_path / "base" / "model.safetensors")
    tensors["model.layers.1.input_layernorm.weight"][3] = torch.nan
    save_file(tensors, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    found, merged = merged_of(small | {"base": str(tmp_path / "base")}, tmp_path / "out")
    with Loader(found, merged, ahead=True) as loader:
        assert dict(loader.parameters(0))
        with pytest.raises(Refused, match=r"layers\.1\.input_layernorm"):
            dict(loader.parameters(1))


def test_resuming_does_not_mind(small, tmp_path):
    """A run of a night that may not go on because another card has less memory."""
    from qmerge.pipeline.identity import differences, identity

    one, two = (identity(plan(recipe(small, tmp_path / "out", device_memory=size)), None, None, {}) for size in ("20GiB", None))
    assert one["fixed"] == two["fixed"] and differences(one["free"], two["free"]) == ["memory of the device: 20GiB, now none"]


@given(sizes)
@settings(max_examples=200, deadline=None)
def test_streams_in_main_memory_never_need_more_of_the_device(work):
    """A way out that is none."""
    work = replace(work, accelerator=True)
    here, there = (memory.phases(replace(work, streams_on_host=host), 10**9, 10**9) for host in (False, True))
    assert device_peak(there) <= device_peak(here)
    assert all(not part.host for phase in here for part in phase.parts if "streams" in part.name) and all(part.host for phase in there for part in phase.parts if "streams" in part.name)


def test_longer_text_takes_main_memory_and_not_the_device():
    """Streams that are counted on the device though they lie elsewhere. Above 16 batches a slot has several, whose inputs are there together: these grow."""
    few, many = (memory.phases(workload(accelerator=True, streams_on_host=True, train=count, held_out=1, tokens=4096), 10**9, 10**9) for count in (8, 16))
    assert device_peak(few) == device_peak(many)
    lying = [sum(part.nbytes for phase in phases for part in phase.parts if part.name == "streams of hidden states" and part.host) for phases in (few, many)]
    assert lying[1] > lying[0] > 0


def merge_words(small, out, *more):
    given = {name: value for name, value in small.items() if name != "adapter"} | {"adapter": small["adapter"][0], "out": out, "device": "meta"}
    return ["merge", *(part for key, value in given.items() for part in (f"--{key.replace('_', '-')}", str(value))), "--dry-run", *map(str, more)]


def test_the_limit_decides_and_is_said(small, cli, tmp_path):
    """A limit that is read and not held to, or a dry run that does not say what will lie where. ``meta`` stands for a GPU: planning asks of a device only that it is none of the CPU's."""
    import json

    def told(*more):
        answer = cli(*merge_words(small, tmp_path / "out", *more, "--json"))
        assert answer.code == 0, answer.err
        return json.loads(answer.out)["estimate"]

    wide = told("--device-memory", "1TiB")
    assert wide["streams_in"] == "device" and wide["device_limit_bytes"] == 2**40 and told()["streams_in"] == "device"
    tight = told("--device-memory", wide["peak_device_bytes"] - 1)
    assert tight["streams_in"] == "main memory" and tight["peak_device_bytes"] < wide["peak_device_bytes"] and tight["peak_ram_bytes"] > wide["peak_ram_bytes"]
    said = cli(*merge_words(small, tmp_path / "out", "--device-memory", wide["peak_device_bytes"] - 1))
    assert "both streams of activations lie in main memory" in said.out and "allowed by --device-memory" in said.out, said.out
    refused = cli(*merge_words(small, tmp_path / "out", "--device-memory", tight["peak_device_bytes"] // 2))
    assert refused.code == 4 and "more memory than the accelerator has" in refused.err and "activations in main memory" in refused.err and "--device cpu" in refused.err, refused.err
    larger = refused.err.split("--device-memory ")[-1].split()[0]
    assert told("--device-memory", larger)["streams_in"] == "main memory"


def test_a_named_setting_fits(small, tmp_path):
    """A way out that is none: by the same formulas, at a size where statistics decide."""
    found = plan(recipe(small, tmp_path / "out", device="meta", samples=2048, tokens=64, device_memory="1TB", curvature_tokens=0))
    told = estimate([found], base_bytes=0, rates=RATES)
    limit = replace(told, limit=replace(told.limit, free=round(0.9 * told.device_bytes)))
    with pytest.raises(Refused) as refused:
        check_fit(limit, [found])
    assert "--samples" in str(refused.value) or "--format bf16" in str(refused.value)


def test_beside_a_cpu_it_is_said_that_nothing_is_limited(small, tmp_path):
    """A setting that somebody relies on and that does nothing."""
    found = plan(recipe(small, tmp_path / "out", device_memory="1GB"))
    told = estimate([found], base_bytes=0, rates=RATES)
    assert told.device_bytes == 0 and told.limit is None and any("limits nothing here" in word for word in check_fit(told, [found]))


@pytest.mark.parametrize("value, nbytes", [("20GiB", 20 * 2**30), ("16 GB", 16 * 10**9), (12345, 12345), ("1.5GiB", 3 * 2**29)])
def test_sizes(value, nbytes, tmp_path):
    """A unit that is read as another."""
    (tmp_path / "recipe.yaml").write_text(f"device-memory: {value}\n")
    for made in (build_recipe(str(tmp_path / "recipe.yaml"), (), NEEDED), build_recipe(None, (f"device_memory={value}",), NEEDED), build_recipe(None, (), NEEDED | {"device_memory": str(value)})):
        assert made.device_memory_bytes == nbytes and "device_memory" not in made.to_json()
    assert device_limit(made, torch.device("cpu")) is None and device_limit(made, torch.device("meta")).free == nbytes and device_limit(made, torch.device("meta")).limit == ASKED


NEEDED = {"base": "b", "adapter": ("a",), "out": "o"}


@pytest.mark.parametrize("value", ["lots", "0", "-3GB", "20 XB", "1e400", ""])
def test_sizes_that_are_none(value):
    """A run that starts without its limit, or a stack trace."""
    with pytest.raises(UsageProblem, match=r"--device-memory .*expected a size such as 20GiB"):
        build_recipe(None, (f"device_memory='{value}'",), NEEDED)


@pytest.mark.parametrize("value", [True, [1], 1.5])
def test_kinds_that_are_none(value):
    """A list that is taken for a size."""
    with pytest.raises(UsageProblem, match="device_memory: expected a size in bytes"):
        build_recipe(None, (), NEEDED | {"device_memory": value})


def test_a_limit_that_is_not_there_decides_nothing(small, tmp_path):
    """On a CPU the formulas of an accelerator have nothing to say."""
    found = plan(recipe(small, tmp_path / "out", device_memory="1MB"))
    assert not settled([found], torch.device("cpu")).streams_on_host


sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))


def test_a_70b_fits_a_card_of_24_gb():
    """What docs/scale.md says of one GPU: by formula, with 2^18 tokens, within 20 GiB."""
    from scale_plan import MODELS, one_device
    from scale_plan import workload as of

    by_name = {model.name: of(model, 1 << 18) for model in MODELS}
    assert device_peak(memory.phases(replace(by_name["70B"], streams_on_host=True), 5 * 10**9, 4 * 10**10)) <= 20 * 2**30
    told = (Path(__file__).parents[1] / "docs" / "scale.md").read_text("utf-8")
    assert all(line in told for line in one_device(1 << 18))
