"""compressed-tensors files: the library itself compresses to our bytes, and decompresses them to our weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from oracles.dequantized import fill, logits
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from qmerge.errors import Refused
from qmerge.formats import compressed_tensors as own
from qmerge.formats.integers import Layout
from qmerge.numerics import grids
from qmerge.quality.arms import load_candidate
from qmerge.quality.plain import dense_weights
from qmerge.types import Grid, QuantizedWeight

pytest.importorskip("compressed_tensors")
SHAPES = [(64, 128, 32), (48, 128, 128), (96, 256, 64), (32, 168, -1)]
CASES = [(*shape, bits, symmetric) for shape in SHAPES for bits in (4, 8) for symmetric in (True, False)]
EVERY = pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))


def solved(out: int, inputs: int, group: int, bits: int, symmetric: bool) -> QuantizedWeight:
    draws = torch.Generator().manual_seed(0)
    grid = Grid("int", bits, group, symmetric, least_zero=0)
    scales, zeros = grids.search_int(torch.randn(out, inputs, generator=draws) * 0.05, torch.ones(inputs), grid, torch.bfloat16)
    codes = torch.randint(0, 2**bits, (out, inputs), generator=draws).to(torch.uint8)
    if not symmetric:
        zeros[0, 0], zeros[-1, -1] = 0, 2**bits - 1
    return QuantizedWeight(codes, grid, scales=scales, zeros=zeros, g_idx=torch.arange(inputs, dtype=torch.int32) // (inputs if group == -1 else group))


def layout(grids_: dict[str, Grid], *floats: str, others: tuple[str, ...] = ()) -> Layout:
    return Layout(grids_, floats, "model.layers", "lm_head", "bfloat16", "1.0", others)


def library(grid: Grid):
    """Their compressor and their scheme, read from our config."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    theirs = QuantizationConfig.model_validate(own.config(layout({"a": grid}, "lm_head")))
    return BaseCompressor.get_value_from_registry(theirs.format), next(iter(theirs.config_groups.values()))


def local(stored: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix("a."): tensor for name, tensor in stored.items()}


@EVERY
def test_round_trip(case):
    """Codes, scales or zeros that do not come back."""
    wanted = solved(*case)
    found = own.unpack("a", own.pack("a", wanted).__getitem__, wanted.grid)
    for part in ("codes", "scales", "zeros", "g_idx"):
        assert torch.equal(getattr(found, part), getattr(wanted, part)), part


@EVERY
def test_the_library_decompresses_our_weight(case):
    """Codes in another order, or zeros off by half the range."""
    quantized = solved(*case)
    compressor, scheme = library(quantized.grid)
    parts = local(own.pack("a", quantized))
    found = compressor.decompress(parts | {"weight_scale": parts["weight_scale"].float()}, scheme)["weight"]
    assert torch.equal(found, own.dequantize(quantized))


@EVERY
def test_the_library_compresses_to_our_bytes(case):
    """Names, shapes, dtypes or padding that differ from what the library writes: an engine that checks shapes would refuse the file."""
    quantized = solved(*case)
    compressor, scheme = library(quantized.grid)
    half = 2 ** (quantized.grid.bits - 1)
    given = {"weight": own.dequantize(quantized), "weight_scale": quantized.scales, "weight_zero_point": (quantized.zeros - half).to(torch.int8)}
    theirs, ours = compressor.compress(given, scheme), local(own.pack("a", quantized, torch.float32))
    assert set(theirs) == set(ours)
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype and torch.equal(tensor, theirs[name]) and tensor.is_contiguous(), name
    assert sum(tensor.nbytes for tensor in own.pack("a", quantized).values()) == own.stored_bytes(case[:2], quantized.grid)


def test_every_linear_gets_its_own_scheme():
    """Mixed bits read with another linear's grid: names that match too much, or a class that wins over a name."""
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
    from torch import nn

    sizes = {"q_proj": Grid("int", 4, 32, True), "k_proj": Grid("int", 8, -1, True), "v_proj": Grid("int", 4, 128, False)}
    names = [f"layers.{index}.{name}" for index in range(12) for name in (*sizes, "o_proj")]
    model = nn.Module()
    model.layers = nn.ModuleList(nn.ModuleDict({name: nn.Linear(128, 128) for name in (*sizes, "o_proj")}) for _ in range(12))
    given = {name: sizes[name.rpartition(".")[2]] for name in names if "o_proj" not in name and name != "layers.1.q_proj"}
    config = own.config(layout(given, "layers.1.q_proj", *(name for name in names if "o_proj" in name)))
    apply_quantization_config(model, QuantizationConfig.model_validate(config))
    for name in names:
        scheme = getattr(model.get_submodule(name), "quantization_scheme", None)
        assert (scheme is None) == (name not in given), name
        if scheme is not None:
            args, grid = scheme.weights, own.grid_of(config, name)
            assert (args.num_bits, args.symmetric, args.group_size or -1) == (given[name].bits, given[name].symmetric, given[name].group_size), name
            assert (grid.bits, grid.symmetric, grid.group_size) == (given[name].bits, given[name].symmetric, given[name].group_size), name


def test_config_of_one_grid():
    """A head or a router that an engine packs because it is not on the list, or a status that makes a loader quantize again."""
    found = own.config(layout({"model.layers.0.a": Grid("int", 4, 128, False)}, "lm_head", others=("model.layers.0.gate",)))
    assert found["ignore"] == ["lm_head", "model.layers.0.gate"] and found["quantization_status"] == "compressed" and found["format"] == "pack-quantized"
    assert [group["targets"] for group in found["config_groups"].values()] == [["Linear"]]


@pytest.mark.parametrize("shape, grid, says", [
    ((64, 172), Grid("int", 4, -1), "whole words of 8 inputs"),
    ((64, 96), Grid("int", 4, 64), "--group-size 32 would fit"),
    ((62, 128), Grid("int", 8, 32, False), "zero points in whole words of 4 outputs"),
])  # fmt: skip
def test_refusals_name_a_format_that_fits(shape, grid, says):
    """A file that no engine loads, found after an hour of solving."""
    with pytest.raises(Refused) as caught:
        own.check_shape("model.layers.0.mlp.down_proj", shape, grid)
    assert says in str(caught.value) and "--format nf4" in str(caught.value) and "model.layers.0.mlp.down_proj" in str(caught.value) and str(list(shape)) in str(caught.value)


def test_pack_refuses_what_the_file_cannot_hold():
    """Scales rounded by the model's dtype behind the solver's back, or zeros beyond the range."""
    quantized = solved(64, 128, 32, 4, False)
    for changed, says in (({"scales": quantized.scales * 1.001}, "bfloat16 exactly"), ({"zeros": quantized.zeros + 16}, "not one of 0..15")):
        with pytest.raises(ValueError, match=says):
            own.pack("a", QuantizedWeight(**vars(quantized) | changed))


def mixed(zoo, folder: Path, kinds: dict[str, Grid]) -> dict[str, torch.Tensor]:
    """A checkpoint whose linears have the grid of their last name; those without one stay float. Gives the weights."""
    source = Path(zoo.float("llama"))
    tensors, given, floats, wanted = load_file(source / "model.safetensors"), {}, ["lm_head"], {}
    for name in [name for name in tensors if "_proj" in name]:
        module = name.removesuffix(".weight")
        grid = kinds.get(module.rpartition(".")[2])
        if grid is None:
            floats.append(module)
            continue
        weight = tensors.pop(name).float()
        scales, zeros = grids.search_int(weight, torch.ones(weight.shape[1]), grid, torch.bfloat16)
        index = torch.arange(weight.shape[1], dtype=torch.int32) // (weight.shape[1] if grid.group_size == -1 else grid.group_size)
        codes = (weight / scales[:, index.long()] + zeros[:, index.long()]).round().clamp(0, 2**grid.bits - 1).to(torch.uint8)
        quantized = QuantizedWeight(codes, grid, scales=scales, zeros=zeros, g_idx=index)
        tensors |= own.pack(module, quantized)
        given[module], wanted[module] = grid, own.dequantize(quantized)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text()) | {"quantization_config": own.config(layout(given, *floats))}
    (folder / "config.json").write_text(json.dumps(config))
    return wanted


def test_mixed_bits_load_in_transformers(zoo, tmp_path):
    """Several bit widths in one file read as the first one: bit for bit, in fp32, and as a plain load runs it."""
    wanted = mixed(zoo, tmp_path, {"q_proj": Grid("int", 4, 32), "up_proj": Grid("int", 4, 128), "k_proj": Grid("int", 8, -1), "down_proj": Grid("int", 8, 64)})
    found = dense_weights(load_candidate("d", str(tmp_path)).model)
    assert len(wanted) == 8 and all(torch.equal(found[name], weight) for name, weight in wanted.items())
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, device_map={"": "cpu"}, dtype=torch.float32)
    theirs = logits(plain, zoo.batch())
    ours = logits(fill(AutoModelForCausalLM.from_pretrained(zoo.float("llama"), dtype=torch.float32), wanted), zoo.batch())
    assert float((theirs - ours).norm() / ours.norm()) < 1e-6


def test_mixed_asymmetric_grids_are_refused(zoo, tmp_path):
    """Weights of one grid read as another's: transformers takes the first group for all when it dequantizes, and reads no packed zero points when it does not."""
    mixed(zoo, tmp_path, {"q_proj": Grid("int", 4, 32, False, least_zero=0), "up_proj": Grid("int", 8, 64, False, least_zero=0)})
    with pytest.raises(Refused, match="several asymmetric grids"):
        load_candidate("d", str(tmp_path))
