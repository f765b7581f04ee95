"""Routed experts: requantized one by one, on the tokens that reach them, under names that loaders read; kept float, and said so, where no loader takes them."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from conftest import Zoo, build_tokenizer, run_cli, save_float, save_nf4
from oracles.dequantized import divergence, logits
from safetensors.torch import load_file, save_file
from support.architectures import ARCHITECTURES, requantized_config
from support.bases import KINDS, save_moving_adapter, write_base
from test_requantize_architectures import CALIBRATED, GROUP, Inputs, Shop, distance, expert_slice, filled, public, put, rounded
from torch import nn

from qmerge.pipeline.experts import expert_inputs
from qmerge.pipeline.experts_names import float_experts, held_one_by_one
from qmerge.pipeline.skeleton import build_skeleton
from qmerge.store.checkpoint import open_checkpoint
from qmerge.store.manifest import read_manifest

ROUTED = pytest.mark.parametrize("key", ["mixtral", "qwen3_moe"])
HUB = {"mixtral": "model.layers.1.block_sparse_moe.experts.3.w1", "qwen3_moe": "model.layers.1.mlp.experts.3.gate_proj"}
TREE = "model.layers.1.mlp.experts.3.gate_proj"


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory, zoo: Zoo) -> Shop:
    return Shop(tmp_path_factory.mktemp("experts"), zoo)


def one_by_one(shop: Shop, key: str) -> str:
    """The base as transformers 4 saved it: experts one by one, each in NF4."""
    folder = shop.root / key / "apart"
    if not folder.exists():
        source = Path(shop.inputs(key).floats)
        write_base(ARCHITECTURES[key], KINDS["nf4-experts"], source, folder, shop.root / key / "twin")
        build_tokenizer().save_pretrained(folder)
    return str(folder)


def with_own_experts(shop: Shop, key: str) -> nn.Module:
    """`Shop.merged` on the base with experts one by one: theirs are in NF4, those of the usual base float."""
    model, twin, floats = copy.deepcopy(shop.merged(key)), load_file(shop.root / key / "twin" / "model.safetensors"), load_file(Path(shop.inputs(key).floats) / "model.safetensors")
    for name, weight in twin.items():
        found = expert_slice(model, name)
        if found is not None:
            found += weight - floats[name].float()
    return model


def starved(shop: Shop) -> str:
    """A model of four experts, one for each token, the first of which none reaches: its router row is the mean of the others', which is never the largest."""
    key = "starved"
    if key not in shop._inputs:
        config = requantized_config("qwen3_moe")
        config.num_experts_per_tok = 1
        floats = save_float(shop.root / key / "float", config)
        tensors = load_file(Path(floats) / "model.safetensors")
        for name in [name for name in tensors if name.endswith("mlp.gate.weight")]:
            tensors[name][0] = tensors[name][1:].float().mean(0).to(tensors[name].dtype)
        save_file(tensors, Path(floats) / "model.safetensors", {"format": "pt"})
        base = save_nf4(floats, shop.root / key / "nf4", True)
        shop._inputs[key] = Inputs(base, floats, save_moving_adapter(floats, shop.root / key / "adapter", base))
    return key


def arriving(model: nn.Module, ids: torch.Tensor, layer: int = 0) -> torch.Tensor:
    """What comes to the experts of a layer, ``[tokens, hidden]``."""
    found = []
    handle = model.model.layers[layer].mlp.experts.register_forward_pre_hook(lambda _, args: found.append(args[0]))
    logits(model, ids)
    handle.remove()
    return found[0]


@ROUTED
@pytest.mark.parametrize("fmt", ["gptq", "compressed-tensors"])
def test_names_are_the_loaders(shop, key, fmt):
    """Experts under names that no engine looks for: gptqmodel knows the module tree's, transformers and vLLM read compressed-tensors under the hub's, the router's among them."""
    names = set(open_checkpoint(shop.output(key, fmt).folder).specs)
    expert, router = (TREE, "model.layers.1.mlp.gate.weight") if fmt == "gptq" else (HUB[key], HUB[key].partition(".experts")[0] + ".gate.weight")
    assert f"{expert}.{'qweight' if fmt == 'gptq' else 'weight_packed'}" in names and router in names
    assert not any("gate_up_proj" in name for name in names)


@ROUTED
@pytest.mark.parametrize("apart", [False, True], ids=["fused", "one-by-one"])
def test_compressed_tensors_reads_in_transformers(shop, zoo, key, apart):
    """An expert read into another one's place, or gate and up swapped, from a base that holds experts fused or one by one."""
    made = shop.output(key, "compressed-tensors", base=one_by_one(shop, key) if apart else None)
    assert len(made.weights) == 2 * (4 + 3 * 4)
    ids = zoo.batch()
    assert distance(logits(public(made.folder), ids), logits(filled(shop, key, "compressed-tensors", made.weights), ids)) < 1e-4


@ROUTED
def test_base_with_experts_one_by_one(shop, zoo, key):
    """4-bit experts of an older base merged from other weights than the base's own, or with another expert's delta."""
    made = shop.output(key, "gptq", base=one_by_one(shop, key))
    ids = zoo.batch()
    assert distance(logits(public(made.folder), ids), logits(filled(shop, key, "gptq", made.weights), ids)) < 1e-4
    wanted, rows = with_own_experts(shop, key), read_manifest(made.folder)["linears"]
    for name, weight in made.weights.items():
        found = expert_slice(wanted, name)
        if found is not None:  # how far the solved weight is from W + ΔW, as recorded and as derived here
            assert abs(distance(weight, found) - rows[name.removesuffix(".weight")]["distance"]) < 1e-4, name


@ROUTED
def test_nf4_keeps_experts_float_under_the_bases_names(shop, zoo, key):
    """Experts in 4 bits that bitsandbytes' loader reads nowhere, or a plan that keeps quiet about two thirds of a model staying float."""
    for base in (None, one_by_one(shop, key)):
        made = shop.output(key, "nf4", base=base)
        names = open_checkpoint(made.folder).specs
        assert "experts' weights stay float" in made.said and not [name for name in names if "experts" in name and "quant_state" in name]
        assert ("model.layers.1.mlp.experts.gate_up_proj" if base is None else HUB[key] + ".weight") in names
    model = with_own_experts(shop, key)
    for parameter in model.parameters():
        if parameter.dim() == 3:
            parameter.data = parameter.data.bfloat16().float()
    assert distance(logits(public(made.folder), zoo.batch()), logits(put(model, made.weights), zoo.batch())) < 1e-4


@ROUTED
@pytest.mark.parametrize("fmt", ["gptq", "compressed-tensors"])
def test_every_expert_is_solved(shop, zoo, key, fmt):
    """An expert that was only rounded, or solved on another's tokens: on tokens not seen that reach it, each weight must be nearer to the merged one's answers than plain rounding."""
    made, merged, ids = shop.output(key, fmt), shop.merged(key), zoo.batch(8)
    model = filled(shop, key, fmt, made.weights)
    ratios = {}
    for layer in (0, 1):
        teacher, runtime = arriving(merged, ids, layer), arriving(model, ids, layer)
        chosen = model.model.layers[layer].mlp.gate(runtime)[2]
        for name in [name for name in made.weights if f"layers.{layer}." in name and expert_slice(merged, name) is not None]:
            expert, whole = int(name.split(".experts.")[1].partition(".")[0]), expert_slice(merged, name)
            rows = (chosen == expert).any(1)
            x, aim = runtime[rows], teacher[rows]
            if whole.shape[0] == 64:  # down: its inputs by hand
                x, aim = (half(m, layer, expert, part) for m, part in ((model, x), (merged, aim)))
            plain = rounded(whole, fmt)
            solved, nearest = (float((weight @ x.T - whole @ aim.T).square().sum()) for weight in (made.weights[name], plain))
            ratios[name] = solved / nearest
            assert float((made.weights[name] != plain).float().mean()) > 0.1, name
    values = sorted(ratios.values())
    assert len(values) == 24 and values[len(values) // 2] < 0.9 and values[-1] < 1.1, ratios


def half(model: nn.Module, layer: int, expert: int, x: torch.Tensor) -> torch.Tensor:
    """What an expert's down projection receives."""
    gate, up = (x @ model.model.layers[layer].mlp.experts.gate_up_proj[expert].T).chunk(2, dim=-1)
    return nn.functional.silu(gate) * up


@ROUTED
def test_sums_are_those_of_the_tokens_that_the_router_sends(shop, tmp_path, monkeypatch, key):
    """An expert solved on another one's tokens: in a random model that costs too little to show in its errors."""
    from qmerge.pipeline import streams
    from qmerge.pipeline.plan import plan
    from qmerge.pipeline.recipe import Recipe
    from qmerge.pipeline.run import calibration_for

    sums, inner, found = {}, streams.requantize_group, shop.inputs(key)

    def keep(linears: list, grid: object, train: object, *rest: object, **more: object) -> list:
        sums[linears[0].name] = copy.deepcopy(train)  # the solver uses it up
        return inner(linears, grid, train, *rest, **more)

    monkeypatch.setattr(streams, "requantize_group", keep)
    made = shop._write(key, "gptq", ("--compute", "fp32"), None, None)  # as the models here compute
    recipe = Recipe(base=found.base, adapter=(found.adapter,), out=str(tmp_path / "o"), group_size=GROUP, calibration=shop.zoo.calibration, samples=24, tokens=64)
    ids, model, merged = calibration_for(plan(recipe)).train, filled(shop, key, "gptq", made.weights), shop.merged(key)
    runtime, teacher = arriving(model, ids), arriving(merged, ids)
    chosen = model.model.layers[0].mlp.gate(runtime)[2]
    for expert in range(4):
        rows = (chosen == expert).any(1)
        for name, x, own in (("gate_proj", runtime[rows], teacher[rows]), ("down_proj", half(model, 0, expert, runtime[rows]), half(merged, 0, expert, teacher[rows]))):
            train = sums[f"model.layers.0.mlp.experts.{expert}.{name}.weight"]
            assert abs(train.tokens - int(rows.sum())) <= 1  # a tie may fall otherwise in another order of summation
            assert distance(train.hessian, x.T @ x / len(x)) < 5e-3 and distance(train.drift, (own - x).T @ x / len(x)) < 0.05


def test_inputs_are_what_the_experts_compute(shop, zoo):
    """Inputs captured of another expert, in another order, or before the activation."""
    merged = copy.deepcopy(shop.merged("mixtral"))
    merged.set_experts_implementation("eager")
    tokens = arriving(merged, zoo.batch(1))
    found = expert_inputs(merged.model.layers[0].mlp.experts, 2, "down_proj", tokens)
    assert list(found) == ["gate_up_proj", "down_proj"] and torch.equal(found["gate_up_proj"], tokens)
    torch.testing.assert_close(found["down_proj"], half(merged, 0, 2, tokens))


def test_starved_expert_is_pooled_and_named(shop, zoo):
    """An expert that nothing reached, left as it was rounded without a word; or solved on nothing, worse than rounding."""
    key = starved(shop)
    made, merged = shop.output(key, "gptq"), shop.merged(key)
    rows = read_manifest(made.folder)["linears"]
    few = {name: row for name, row in rows.items() if row.get("statistics") == "pooled"}
    assert {name for name in few if ".experts.0." in name} == {name for name in rows if ".experts.0." in name} and all(row["tokens"] == 0 for name, row in few.items() if ".experts.0." in name)
    assert "experts saw fewer than" in made.said and "model.layers.0.mlp.experts.0 (0)" in made.said
    assert {row["statistics"] for name, row in rows.items() if ".experts." in name} >= {"own", "pooled"}
    name = "model.layers.0.mlp.experts.0.up_proj.weight"
    tokens, whole = arriving(merged, zoo.batch(8)), expert_slice(merged, name)
    solved, plain = (float(((weight - whole) @ tokens.T).square().sum()) for weight in (made.weights[name], rounded(whole, "gptq")))
    assert solved < 0.8 * plain


def test_starved_expert_rounded_where_asked(shop):
    """A recipe's ``low_traffic: rtn`` that is read and not followed."""
    key = starved(shop)
    made = shop.output(key, "gptq", "--set", "low_traffic=rtn")
    rows = read_manifest(made.folder)["linears"]
    assert rows["model.layers.0.mlp.experts.0.up_proj"]["statistics"] == "rtn" and "rounded to nearest" in made.said
    name = "model.layers.0.mlp.experts.0.up_proj.weight"
    assert torch.equal(made.weights[name], rounded(expert_slice(shop.merged(key), name), "gptq"))


def test_model_answers_better_than_rounded(shop, zoo):
    """Experts whose weights are each better and that together answer worse."""
    ids, wanted = zoo.batch(8), logits(shop.merged("qwen3_moe"), zoo.batch(8))
    solved, plain = (filled(shop, "qwen3_moe", "gptq", shop.output("qwen3_moe", "gptq", *flags).weights) for flags in ((), ("--set", "low_traffic=rtn", "--samples", "2")))
    assert divergence(wanted, logits(solved, ids)) < divergence(wanted, logits(plain, ids))


def test_quick_takes_experts_too(shop):
    """A teacher's tokens that are asked for where no teacher runs."""
    assert read_manifest(shop.output("qwen3_moe", "gptq", "--quick").folder)["recipe"]["quick"] is True


def test_same_bytes_whatever_the_threads(shop):
    """Sums over an expert's tokens whose order depends on how many threads there are."""
    threads = torch.get_num_threads()
    first = shop.output("qwen3_moe", "gptq")
    try:
        torch.set_num_threads(3 if threads != 3 else 2)
        again = shop._write("qwen3_moe", "gptq", (), None, None)
    finally:
        torch.set_num_threads(threads)
    assert (first.folder / "model.safetensors").read_bytes() == (again.folder / "model.safetensors").read_bytes()


@ROUTED
def test_plan_promises_what_is_written(shop, tmp_path, key):
    """A dry run that leaves the experts out of its count or of its bytes."""
    made, found = shop.output(key, "gptq"), shop.inputs(key)
    answer = run_cli("merge", "--base", found.base, "--adapter", found.adapter, "--out", tmp_path / "o", "--format", "gptq", "--group-size", GROUP, "--calibration", shop.zoo.calibration, *CALIBRATED, "--dry-run", "--json")
    row, held = json.loads(answer.out), sum(spec.nbytes for spec in open_checkpoint(made.folder).specs.values())
    assert row["linears_requantized"] == len(made.weights) == 32 and abs(row["bytes_out"] - held) < 0.02 * held


@ROUTED
def test_awq_reads_in_gptqmodel(shop, zoo, key):
    """Experts of the asymmetric container under names that gptqmodel, the only loader here that reads them, does not look for."""
    made, ids = shop.output(key, "awq"), zoo.batch()
    assert distance(logits(public(made.folder), ids), logits(filled(shop, key, "awq", made.weights), ids)) < 1e-4


@ROUTED
@pytest.mark.parametrize("fmt", ["gptq", "compressed-tensors"])
def test_experts_one_by_one_are_none_missing(shop, key, fmt):
    """A whole checkpoint taken for one without experts, or one that lacks an expert taken for whole."""
    skeleton = build_skeleton(open_checkpoint(shop.inputs(key).base))
    held = set(shop.output(key, fmt).weights)
    assert held_one_by_one(skeleton, held) == set(float_experts(skeleton, ()))
    lost = next(name for name in held if ".experts.3." in name and "layers.1" in name)
    assert len(held_one_by_one(skeleton, held - {lost})) == 3


@ROUTED
@pytest.mark.parametrize("fmt", ["gptq", "compressed-tensors"])
def test_asymmetric_experts_are_refused_in_the_plan(shop, tmp_path, key, fmt):
    """A checkpoint that no loader reads, found out after the run."""
    found = shop.inputs(key)
    answer = run_cli("merge", "--base", found.base, "--adapter", found.adapter, "--out", tmp_path / "o", "--format", fmt, "--asym", "--group-size", GROUP, "--calibration", shop.zoo.calibration, "--dry-run")
    assert answer.code == 4 and "experts" in answer.err and "--format awq" in answer.err


def test_shapes_that_do_not_fit_are_refused_in_the_plan(shop, tmp_path):
    """An expert too narrow for the groups that turns up after hours."""
    found = shop.inputs("qwen3_moe")
    answer = run_cli("merge", "--base", found.base, "--adapter", found.adapter, "--out", tmp_path / "o", "--format", "gptq", "--group-size", "64", "--calibration", shop.zoo.calibration, "--dry-run")
    assert answer.code == 4 and "experts.0.down_proj" in answer.err
