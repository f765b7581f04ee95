"""experts.py against PEFT: its deltas, and its model's answers against those of a file that was changed tensor by tensor.

Tolerances: deltas 1e-6 relative (fp32, another order of summation); logits 2e-5 absolute on logits up to 2.5. Measured: deltas up to 5e-8; logits 0 for new
adapters, 2e-6 for old ones. The zeros are no sign of a shared path: PEFT folds with baddbmm, which on CPU rounds as W + s * (u @ v) does at these sizes
only (from 256 x 512 on they differ). Moving one parameter by 1e-6 moves the logits by 3e-5, so the comparison would see it.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_adapters_names import disk_of, load, meta_model, save_tiny

from qmerge.adapters.experts import expert_edits, expert_factors, expert_pairs, split_lowrank, targeted_parameters
from qmerge.adapters.names import relate, saved_shapes
from qmerge.adapters.regions import Region
from qmerge.errors import Refused

FUSED = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
CASES = {
    "llama": {"target_parameters": ["q_proj.weight", "down_proj.weight"]},
    "mixtral": {"target_parameters": [*FUSED, "q_proj.weight", "mlp.gate.weight"]},
    "qwen3_moe": {"target_parameters": FUSED, "rank_pattern": {"down_proj": 5}, "alpha_pattern": {"experts.gate_up_proj": 3}, "use_rslora": True},
    "gpt_oss": {"target_parameters": FUSED},
    "hrm_text": {"target_parameters": ["q_proj.weight", "self_attn.gate_proj.weight", "mlp.up_proj.weight"]},
    "qwen3_vl_moe": {"target_parameters": FUSED},
}
IDS = torch.arange(2, 42).reshape(2, 20) % 59


def answers(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def train(kind: str, folder: str, out: Path, **lora):
    """A PEFT model with random A and B, and its adapter saved in ``out``."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    model = get_peft_model(load(folder, kind), LoraConfig(**{"r": 3, "lora_alpha": 5, "target_modules": [], "init_lora_weights": False} | lora)).eval()
    model.save_pretrained(out)
    return model


def adapter_of(out: Path) -> tuple[dict, dict[str, torch.Tensor]]:
    return json.loads((out / "adapter_config.json").read_text()), load_file(out / "adapter_model.safetensors")


def wrappers(model) -> dict[str, torch.nn.Module]:
    from peft.tuners.lora.layer import ParamWrapper

    return {f"{name.removeprefix('base_model.model.').replace('.base_layer', '')}.{module.parameter_name}": module
            for name, module in model.named_modules() if isinstance(module, ParamWrapper)}  # fmt: skip


def pairs_of(kind: str, config: dict, tensors: dict[str, torch.Tensor]) -> dict:
    model, shapes = meta_model(kind), {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    return {name: pair for module in targeted_parameters(config, model) for name, pair in expert_pairs(config, module, shapes, model).items()}


def merged_file(source: str, out: Path, kind: str, config: dict, tensors: dict[str, torch.Tensor]) -> str:
    """The base with each disk tensor changed by its own low-rank factors, and nothing else."""
    shutil.copytree(source, out)
    disk = disk_of(source)
    names = relate(meta_model(kind), {name: tensor.shape for name, tensor in disk.items()})
    for parameter, pair in pairs_of(kind, config, tensors).items():
        left, right = expert_factors(tensors[pair.a], tensors[pair.b], pair.experts, pair.swapped)
        for region in names.regions_of_parameter(parameter):
            u, v = split_lowrank(left, right, region, pair.shape)
            disk[region.disk] = disk[region.disk] + pair.scaling * (u @ v).reshape(region.shape)
    save_file({name: tensor.contiguous() for name, tensor in disk.items()}, out / "model.safetensors", metadata={"format": "pt"})
    return str(out)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    made: dict[str, str] = {}

    def get(kind: str) -> str:
        if kind not in made:
            made[kind] = save_tiny(kind, tmp_path_factory.mktemp(kind))
        return made[kind]

    return get


@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory):
    made: dict[str, tuple] = {}

    def get(kind: str) -> tuple:
        if kind not in made:
            out = tmp_path_factory.mktemp(kind + "-adapter")
            made[kind] = (train(kind, tiny(kind), out, **CASES[kind]), *adapter_of(out))
        return made[kind]

    return get


@pytest.mark.parametrize("kind", CASES)
def test_factors_give_peft_s_delta(kind, trained):
    """Gate and down take each other's factors, in and out are mixed up, or experts and ranks are counted in the wrong order."""
    model, config, tensors = trained(kind)
    pairs, wanted = pairs_of(kind, config, tensors), wrappers(model)
    assert set(pairs) == set(wanted)
    for name, pair in pairs.items():
        left, right = expert_factors(tensors[pair.a], tensors[pair.b], pair.experts, pair.swapped)
        made, delta = pair.scaling * (left @ right).reshape(pair.shape), wanted[name].get_delta_weight("default").detach()
        assert float((made - delta).norm() / delta.norm()) < 1e-6, name


@pytest.mark.parametrize("kind", CASES)
def test_merged_file_answers_as_peft(kind, tiny, trained, tmp_path):
    """Any mistake between the adapter's key and the disk tensor: PEFT's model and the loaded file disagree."""
    model, config, tensors = trained(kind)
    merged = load(merged_file(tiny(kind), tmp_path / "merged", kind, config, tensors), kind)
    wanted = answers(model)
    assert float((wanted - answers(load(tiny(kind), kind))).abs().max()) > 1e-2, "the adapter changes nothing"
    assert float((answers(merged) - wanted).abs().max()) < 2e-5


@pytest.mark.parametrize("kind", CASES)
def test_every_adapter_tensor_is_claimed_once(kind, trained):
    """A nested wrapper is overlooked, and half of the fine-tune is lost."""
    _, config, tensors = trained(kind)
    claimed = [key for pair in pairs_of(kind, config, tensors).values() for key in (pair.a, pair.b)]
    assert sorted(claimed) == sorted(tensors)


OLD = {
    "mixtral": ("block_sparse_moe.experts.{}.{}", {"w1": (48, 32), "w3": (48, 32), "w2": (32, 48)}),
    "qwen3_moe": ("mlp.experts.{}.{}", {"gate_proj": (24, 32), "up_proj": (24, 32), "down_proj": (32, 24)}),
}


def save_old(kind: str, out: Path, **lora) -> tuple[dict, dict[str, torch.Tensor]]:
    """An adapter as PEFT wrote it when the experts were linears of their own: one pair each, q_proj beside them."""
    from peft import LoraConfig

    pattern, linears = OLD[kind]
    LoraConfig(**{"r": 3, "lora_alpha": 5, "target_modules": [*linears, "q_proj"]} | lora).save_pretrained(out)
    torch.manual_seed(2)
    tensors = {}
    for layer in range(2):
        shapes = {pattern.format(expert, name): shape for expert in range(4) for name, shape in linears.items()} | {"self_attn.q_proj": (32, 32)}
        for module, (rows, cols) in shapes.items():
            stem = f"base_model.model.model.layers.{layer}.{module}.lora_"
            tensors |= {f"{stem}A.weight": 0.2 * torch.randn(3, cols), f"{stem}B.weight": 0.2 * torch.randn(rows, 3)}
    save_file(tensors, out / "adapter_model.safetensors", metadata={"format": "pt"})
    return json.loads((out / "adapter_config.json").read_text()), tensors


def old_deltas(tensors: dict[str, torch.Tensor], scaling: float) -> dict[str, torch.Tensor]:
    stems = {key.removesuffix(".lora_A.weight") for key in tensors if key.endswith(".lora_A.weight")}
    return {stem.removeprefix("base_model.model.") + ".weight": scaling * tensors[f"{stem}.lora_B.weight"] @ tensors[f"{stem}.lora_A.weight"] for stem in stems}


@pytest.mark.parametrize("kind", OLD)
def test_old_adapter_on_the_file_is_what_peft_makes_of_it(kind, tiny, tmp_path):
    """PEFT fuses an old adapter's pairs into one of twice the rank; merged tensor by tensor, with the old rank, it must come to the same."""
    from peft import PeftModel

    _, tensors = save_old(kind, tmp_path / "old")
    wanted = answers(PeftModel.from_pretrained(load(tiny(kind), kind), tmp_path / "old").eval())
    shutil.copytree(tiny(kind), tmp_path / "merged")
    disk = disk_of(tiny(kind))
    for name, delta in old_deltas(tensors, 5 / 3).items():
        disk[name] = disk[name] + delta
    save_file(disk, tmp_path / "merged" / "model.safetensors", metadata={"format": "pt"})
    assert float((answers(load(str(tmp_path / "merged"), kind)) - wanted).abs().max()) < 2e-5
    assert float((answers(load(tiny(kind), kind)) - wanted).abs().max()) > 1e-2


@pytest.mark.parametrize("kind", OLD)
def test_old_adapter_reaches_the_fused_parameters_in_memory(kind, tiny, tmp_path):
    """The separate arm of an old adapter on a fused model: an expert's change lands on another expert, or up on gate."""
    from peft import PeftModel

    _, tensors = save_old(kind, tmp_path / "old")
    wanted = answers(PeftModel.from_pretrained(load(tiny(kind), kind), tmp_path / "old").eval())
    model, names = load(tiny(kind), kind), relate(meta_model(kind), saved_shapes(meta_model(kind)))
    for disk, delta in old_deltas(tensors, 5 / 3).items():
        (region,) = names.regions_of_disk(disk)
        parameter = model.get_parameter(region.parameter)
        change = torch.zeros_like(parameter)
        region.write(change, delta)
        parameter.data += change
    assert float((answers(model) - wanted).abs().max()) < 2e-5


@pytest.mark.parametrize("kind", OLD)
def test_scaling_of_a_config_that_peft_converted(kind, tiny, tmp_path):
    """Targets named as old linears are saved as fused parameters of twice the rank, with patterns for rank and alpha: scaling off by two."""
    model = train(kind, tiny(kind), tmp_path / "new", target_modules=[*OLD[kind][1], "q_proj"])
    config, tensors = adapter_of(tmp_path / "new")
    assert sorted(config["target_parameters"]) == ["down_proj", "gate_up_proj"]
    pairs, wanted = pairs_of(kind, config, tensors), wrappers(model)
    assert set(pairs) == set(wanted) and len(pairs) == 4
    for name, pair in pairs.items():
        assert (pair.rank, pair.scaling) == (wanted[name].r["default"], wanted[name].scaling["default"]), name
    assert {pair.rank for pair in pairs.values()} == {3, 6}


def test_edits_of_an_opened_adapter(tiny, tmp_path):
    """The pieces fit PEFT, but not the adapter reader: keys and parameters are confused on the way to an edit."""
    from qmerge.adapters.adapter import open_adapter
    from qmerge.adapters.lowrank import Experts, LowRank

    wanted = wrappers(train("mixtral", tiny("mixtral"), tmp_path / "new", **CASES["mixtral"]))
    edits = expert_edits(open_adapter(tmp_path / "new"), (), meta_model("mixtral"), {}, Experts, LowRank)
    assert {parameter for parameter, _ in edits.values()} == set(wanted)
    for parameter, edit in edits.values():
        rows = torch.zeros(edit.shape)
        delta = wanted[parameter].get_delta_weight("default").detach()
        assert float((edit.load(torch.device("cpu")).apply(rows, 0) - delta).norm() / delta.norm()) < 1e-6


def test_factors_of_another_layout_are_refused_by_key(trained):
    """A of [rank * experts, out], as other versions of PEFT wrote it: multiplied all the same where the sides happen to fit."""
    _, config, tensors = trained("qwen3_moe")
    key = "base_model.model.model.layers.1.mlp.experts.base_layer.lora_A.weight"
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()} | {key: (12, 48)}
    with pytest.raises(Refused, match="layers.1.mlp.experts.base_layer.lora_A"):
        expert_pairs(config, "model.layers.1.mlp.experts", shapes, meta_model("qwen3_moe"))


def test_a_missing_factor_is_refused_by_key(trained):
    """A cut file: the parameter keeps the base's values without a word."""
    _, config, tensors = trained("gpt_oss")
    key = "base_model.model.model.layers.0.mlp.experts.lora_B.weight"
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items() if name != key}
    with pytest.raises(Refused, match="layers.0.mlp.experts.lora_B"):
        expert_pairs(config, "model.layers.0.mlp.experts", shapes, meta_model("gpt_oss"))


def test_split_follows_every_kind_of_region():
    """A tensor that stacks experts in two axes, one that lies turned, and a shared one: factors of the wrong rows or the wrong side."""
    left, right = torch.randn(3, 4, 2), torch.randn(3, 2, 6)
    delta = left @ right
    some = torch.tensor([6, 7, 10, 11])  # rows 2 and 3 of experts 1 and 2
    kinds = [
        (Region("d", "p", (12, 6), (3, 4, 6)), delta.reshape(12, 6)),
        (Region("d", "p", (3, 6, 4), (3, 4, 6), turned=True), delta.transpose(1, 2)),
        (Region("d", "p", (4, 6), (3, 4, 6), rows=some), delta.reshape(12, 6)[some]),
        (Region("d", "p", (2, 3), (3, 4, 6), rows=torch.tensor([5, 4]), cols=torch.tensor([5, 0, 2])), delta[1][[1, 0]][:, [5, 0, 2]]),
        (Region("d", "p", (3, 4), (3, 4, 6), rows=torch.arange(8, 12), cols=torch.tensor([1, 3, 5]), turned=True), delta[2][:, [1, 3, 5]].T),
        (Region("d", "p", (1, 4, 6), (3, 4, 6), rows=torch.arange(4)), delta[:1]),
    ]
    for region, wanted in kinds:
        u, v = split_lowrank(left, right, region, (3, 4, 6))
        assert torch.allclose((u @ v).reshape(region.shape), wanted, atol=1e-6), region
    shared = Region("d", "p", (6, 6), (4, 6), into_rows=torch.tensor([5, 4, 1, 0]))
    u, v = split_lowrank(left[:1], right[:1], shared, (4, 6))
    wanted = torch.zeros(6, 6)
    wanted[[5, 4, 1, 0]] = delta[0]
    assert torch.allclose(u @ v, wanted, atol=1e-6)


def test_rows_of_several_experts_in_unequal_parts_are_refused():
    """A region that has no low-rank form gets the factors of its first expert."""
    region = Region("d", "p", (3, 6), (3, 4, 6), rows=torch.tensor([0, 4, 5]))
    with pytest.raises(Refused, match="mixes rows"):
        split_lowrank(torch.randn(3, 4, 2), torch.randn(3, 2, 6), region, (3, 4, 6))


def test_single_transposed_expert_is_refused():
    """PEFT adds B @ A of a lone expert as [out, in] to a parameter that is [in, out]."""
    model = meta_model("gpt_oss", num_local_experts=1, num_experts_per_tok=1)
    with pytest.raises(Refused, match="single fused expert"):
        expert_pairs({"r": 3, "lora_alpha": 5, "target_parameters": FUSED}, "model.layers.0.mlp.experts", {}, model)
