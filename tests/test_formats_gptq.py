"""GPTQ files: read back bit for bit by us, and to the same weights by gptqmodel."""

from __future__ import annotations

import pytest
import torch

from qmerge.errors import Refused
from qmerge.formats import gptq
from qmerge.formats.integers import Layout
from qmerge.numerics import grids
from qmerge.types import Grid, QuantizedWeight

SHAPES = [(64, 128, 32, True), (64, 128, 128, True), (96, 256, 64, False), (32, 128, -1, True), (32, 256, -1, False)]
CASES = [(*shape, bits) for bits in (2, 3, 4, 8) for shape in SHAPES]


def solved(out: int, inputs: int, group: int, symmetric: bool, bits: int = 4) -> QuantizedWeight:
    draws = torch.Generator().manual_seed(0)
    grid = Grid("int", bits, group, symmetric)
    scales, zeros = grids.search_int(torch.randn(out, inputs, generator=draws) * 0.05, torch.ones(inputs), grid, torch.bfloat16)
    codes = torch.randint(0, 2**bits, (out, inputs), generator=draws).to(torch.uint8)
    if not symmetric:
        zeros[0, 0], zeros[-1, -1] = 1, 2**bits - 1  # the ends of what v1 can hold
    return QuantizedWeight(codes, grid, scales=scales, zeros=zeros, g_idx=torch.arange(inputs, dtype=torch.int32) // (inputs if group == -1 else group))


@pytest.mark.parametrize("case", CASES)
def test_round_trip(case):
    """Codes, scales or zeros that do not come back: rows and columns swapped, or a zero that borrowed from its neighbour."""
    wanted = solved(*case)
    stored = gptq.pack("a.b", wanted)
    found = gptq.unpack("a.b", stored.__getitem__, wanted.grid)
    for part in ("codes", "scales", "zeros", "g_idx"):
        assert torch.equal(getattr(found, part), getattr(wanted, part)), part


@pytest.mark.parametrize("case", CASES)
def test_names_shapes_and_bytes(case):
    """A layout that loaders refuse or misread, or a plan that announces another size."""
    out, inputs, group, _, bits = case
    quantized = solved(*case)
    stored = gptq.pack("a.b", quantized)
    groups = 1 if group == -1 else inputs // group
    assert {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in stored.items()} == {
        "a.b.qweight": ((inputs * bits // 32, out), torch.int32), "a.b.qzeros": ((groups, out * bits // 32), torch.int32),
        "a.b.scales": ((groups, out), torch.float16), "a.b.g_idx": ((inputs,), torch.int32),
    }  # fmt: skip
    assert sum(tensor.nbytes for tensor in stored.values()) == gptq.stored_bytes((out, inputs), quantized.grid)
    assert all(tensor.is_contiguous() for tensor in stored.values())


def their_layer(out: int, inputs: int, group: int, symmetric: bool, bits: int):
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear

    return TorchLinear(bits=bits, group_size=group, desc_act=False, sym=symmetric, in_features=inputs, out_features=out, bias=False, register_buffers=True, dtype=torch.float16)


@pytest.mark.parametrize("case", CASES)
def test_gptqmodel_reads_the_same_weight(case):
    """An off-by-one in v1's zeros, or codes in another order than the engines', three bits across two words above all."""
    pytest.importorskip("gptqmodel")
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module

    quantized, layer = solved(*case), their_layer(*case)
    for name, tensor in gptq.pack("a", quantized).items():
        assert getattr(layer, name.removeprefix("a.")).shape == tensor.shape
        getattr(layer, name.removeprefix("a.")).data = tensor
    convert_gptq_v1_to_v2_format_module(layer, bits=case[-1], pack_dtype=torch.int32)
    layer.post_init()
    layer.scales.data = layer.scales.data.float()
    theirs = TorchLinear.dequantize_weight(layer).T.float()
    assert torch.equal(theirs, gptq.dequantize(quantized))


@pytest.mark.parametrize("case", CASES)
def test_gptqmodel_packs_the_same_words(case):
    """A file that one loader forgives: its own packer must make the very words that ours makes of the same codes, scales and zeros."""
    pytest.importorskip("gptqmodel")
    from gptqmodel import QuantizeConfig
    from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module

    quantized, layer = solved(*case), their_layer(*case)
    inner = torch.nn.Linear(case[1], case[0], bias=False)
    inner.weight.data = gptq.dequantize(quantized)
    layer.pack_original(linear=inner, scales=quantized.scales, zeros=quantized.zeros, g_idx=quantized.g_idx)
    convert_gptq_v2_to_v1_format_module(layer, quantize_config=QuantizeConfig(bits=case[-1]))
    for name, tensor in gptq.pack("a", quantized).items():
        assert torch.equal(getattr(layer, name.removeprefix("a.")), tensor), name


def test_pack_refuses_what_the_file_cannot_hold():
    """Scales rounded by the file behind the solver's back, a zero of 0, or one that a symmetric config denies."""
    quantized = solved(32, 64, 32, True)
    for changed, says in (({"scales": quantized.scales * 1.0001}, "float16 exactly"), ({"zeros": quantized.zeros * 0}, "not one of 1..15"), ({"zeros": quantized.zeros - 1}, "not its middle")):
        with pytest.raises(ValueError, match=says):
            gptq.pack("a", QuantizedWeight(**vars(quantized) | changed))


@pytest.mark.parametrize("shape, group, says", [((64, 172), 128, "multiples of 32"), ((172, 64), 32, "multiples of 32"), ((64, 96), 64, "--group-size 32 would fit"), ((64, 96), 128, "groups of 128")])
def test_refusals_name_a_format_that_fits(shape, group, says):
    """A crash while packing, after an hour of solving; or a refusal that leaves the reader without a way on."""
    with pytest.raises(Refused) as caught:
        gptq.check_shape("model.layers.0.mlp.down_proj", shape, Grid("int", 4, group))
    message = str(caught.value)
    assert says in message and "--format nf4" in message and "model.layers.0.mlp.down_proj" in message and str(list(shape)) in message


def test_shapes_that_fit_are_not_refused():
    """-1 read as a group of minus one inputs."""
    for shape, group in (((64, 128), 128), ((32, 96), 32), ((32, 96), -1)):
        gptq.check_shape("a", shape, Grid("int", 4, group))


def layout(grids: dict[str, Grid], *floats: str, blocks: str = "model.layers", head: str | None = "lm_head") -> Layout:
    return Layout(grids, floats, blocks, head, "bfloat16", "1.0")


def test_config_says_what_loaders_ask():
    """A field that transformers, gptqmodel or vLLM read and would guess otherwise."""
    grid = Grid("int", 3, 64, False)
    found = gptq.config(layout({"model.layers.0.a": grid}, "lm_head"))
    wanted = {"quant_method": "gptq", "bits": 3, "group_size": 64, "sym": False, "desc_act": False, "checkpoint_format": "gptq", "lm_head": False}
    assert wanted.items() <= found.items() and "modules_in_block_to_quantize" not in found
    assert gptq.config(layout({"model.layers.0.a": grid, "lm_head": grid}))["lm_head"] is True
    assert gptq.config(layout({"h.0.attn.c": grid, "h.1.attn.c": grid}, "h.0.mlp", "h.1.mlp", blocks="h"))["modules_in_block_to_quantize"] == [["attn.c"]]
    read = gptq.grid_of(found, "model.layers.0.a")
    assert (read.bits, read.group_size, read.symmetric) == (3, 64, False)


def test_config_refuses_blocks_that_differ():
    """A loader that packs a linear of every block where the file has it float in one: that one would be random."""
    with pytest.raises(Refused, match="all blocks or in none") as caught:
        gptq.config(layout({"model.layers.0.a": Grid("int")}, "model.layers.1.a"))
    assert "model.layers.1.a" in str(caught.value) and "compressed-tensors" in str(caught.value)


def test_config_refuses_mixed_grids():
    """One bit width written over another's codes."""
    with pytest.raises(ValueError, match="2 kinds of grids"):
        gptq.config(layout({"model.layers.0.a": Grid("int"), "model.layers.0.b": Grid("int", 8)}))
