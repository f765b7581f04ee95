"""AWQ files: gptqmodel packs the same words and reads the same weights."""

from __future__ import annotations

import pytest
import torch

from qmerge.errors import Refused
from qmerge.formats import awq
from qmerge.formats.integers import Layout
from qmerge.numerics import grids
from qmerge.types import Grid, QuantizedWeight

CASES = [(64, 128, 32), (40, 128, 128), (96, 256, 64), (32, 176, -1)]
EVERY = pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))


def solved(out: int, inputs: int, group: int) -> QuantizedWeight:
    draws = torch.Generator().manual_seed(0)
    grid = Grid("int", 4, group, False, least_zero=0)
    scales, zeros = grids.search_int(torch.randn(out, inputs, generator=draws) * 0.05, torch.ones(inputs), grid, torch.bfloat16)
    zeros[0, 0], zeros[-1, -1] = 0, 15
    codes = torch.randint(0, 16, (out, inputs), generator=draws).to(torch.uint8)
    return QuantizedWeight(codes, grid, scales=scales, zeros=zeros, g_idx=torch.arange(inputs, dtype=torch.int32) // (inputs if group == -1 else group))


@EVERY
def test_round_trip(case):
    """Codes, scales or zeros that do not come back, or a plan that announces another size."""
    wanted = solved(*case)
    stored = awq.pack("a", wanted)
    found = awq.unpack("a", stored.__getitem__, wanted.grid)
    for part in ("codes", "scales", "zeros", "g_idx"):
        assert torch.equal(getattr(found, part), getattr(wanted, part)), part
    assert sum(tensor.nbytes for tensor in stored.values()) == awq.stored_bytes(case[:2], wanted.grid)


@EVERY
def test_gptqmodel_reads_the_same_weight(case):
    """Outputs interleaved in another order than the kernels', or zeros of another group."""
    pytest.importorskip("gptqmodel")
    from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm

    wanted = solved(*case)
    stored = awq.pack("a", wanted)
    size = case[1] if case[2] == -1 else case[2]
    found = dequantize_gemm(stored["a.qweight"], stored["a.qzeros"], stored["a.scales"].float(), 4, size)
    assert torch.equal(found.T, awq.dequantize(wanted))


def test_config_says_what_loaders_ask():
    """A linear that stays float and is packed by the loader, or a layout that is guessed."""
    grid = Grid("int", 4, 64, False, least_zero=0)
    found = awq.config(Layout({"model.layers.0.a": grid}, ("lm_head", "model.layers.0.b"), "model.layers", "lm_head", "bfloat16", "1.0", ("model.layers.0.mlp.gate",)))
    assert {"quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": True, "version": "gemm"}.items() <= found.items()
    assert found["modules_to_not_convert"] == ["lm_head", "model.layers.0.b"]  # not the router: vLLM would find its name in mlp.gate_proj
    awq.check_settings(found, "config.json")


@pytest.mark.parametrize("shape, group, says", [((60, 128), 32, "words of 8"), ((64, 96), 64, "--group-size 32 would fit")])
def test_refusals_name_a_format_that_fits(shape, group, says):
    """A crash while packing, after an hour of solving."""
    with pytest.raises(Refused) as caught:
        awq.check_shape("model.layers.0.mlp.down_proj", shape, Grid("int", 4, group, False))
    assert says in str(caught.value) and "--format nf4" in str(caught.value) and "down_proj" in str(caught.value)
