"""What a recipe may ask of a format, and what it is told where the format cannot."""

from __future__ import annotations

import pytest

from qmerge.errors import UsageProblem
from qmerge.pipeline.recipe import Recipe, build_recipe

PLACES = {"base": "b", "adapter": ("a",), "out": "o"}


def built(**flags) -> Recipe:
    return build_recipe(None, (), PLACES | flags)


def refused(**flags) -> str:
    with pytest.raises(UsageProblem) as caught:
        built(**flags)
    return str(caught.value)


@pytest.mark.parametrize("fmt, bits", [("gptq", (2, 3, 4, 8)), ("compressed-tensors", (4, 8)), ("awq", (4,)), ("nf4", (4,)), ("fp4", (4,))])
def test_bits_of_each_format(fmt, bits):
    """Bits that are accepted, and fail when they are packed; or refused without a word on what takes them."""
    for wanted in range(1, 10):
        if wanted in bits:
            assert built(format=fmt, bits=wanted).bits == wanted
        else:
            said = refused(format=fmt, bits=wanted)
            assert f"--bits {wanted}" in said and (wanted not in (2, 3) or "gptq" in said)


@pytest.mark.parametrize("flags, says", [
    ({"format": "awq", "symmetric": True}, "asymmetric"),
    ({"format": "gptq", "block_size": 64}, "here it is --group-size"),
    ({"format": "bf16", "double_quant": False}, "--double-quant belongs to"),
    ({"format": "nf4", "block_size": 48}, "32, 64, 128"),
    ({"format": "gptq", "bits_per_weight": 4.25}, "compressed-tensors can mix them"),
    ({"format": "compressed-tensors", "bits_per_weight": 3.0}, "4 to 16"),
    ({"format": "compressed-tensors", "bits_per_weight": 4.5, "rtn": True}, "--rtn uses none"),
    ({"format": "compressed-tensors", "bits_per_weight": 4.5, "symmetric": False}, "leave --asym out"),
    ({"format": "awq", "quantize_head": True}, "gptq or compressed-tensors"),
    ({"format": "gptq", "quantize_head": True, "symmetric": False}, "leave --asym out"),
    ({"format": "bf16", "polish": ("distill",)}, "formats that quantize"),
    ({"format": "gptq", "polish": ("shine",)}, "blocks or distill"),
    ({"format": "gptq", "polish": ("distill",), "rtn": True}, "--rtn uses none"),
    ({"format": "gptq", "low_traffic": "drop"}, "pooled or rtn"),
])  # fmt: skip
def test_what_a_format_cannot_do_is_refused(flags, says):
    """A setting that is silently ignored: the user measures something else than what was asked for."""
    assert says in refused(**flags)


@pytest.mark.parametrize("given", [("distill", "blocks"), ("distill,blocks",), "distill, blocks", ["distill", "blocks", "distill"]])
def test_polish_is_a_list(given):
    """``--polish`` twice, a comma list and YAML meaning different things."""
    assert built(polish=given).polish == ("distill", "blocks")


def test_grids():
    """A grid that the file cannot hold: zeros of 0 in gptq, or a symmetric awq."""
    assert built(format="gptq", symmetric=False).grid.least_zero == 1 and built(format="compressed-tensors", symmetric=False).grid.least_zero == 0
    awq, fp4 = built(format="awq").grid, built(format="fp4", block_size=128, double_quant=False).grid
    assert not awq.symmetric and awq.least_zero == 0 and Recipe(format="awq").grid == awq
    assert (fp4.kind, fp4.group_size, fp4.double_quant) == ("fp4", 128, False)


def test_the_record_says_what_decided():
    """A manifest from which a run cannot be repeated."""
    row = built(format="compressed-tensors", bits_per_weight=4.5, polish=("distill",), quantize_head=True).to_json()
    assert {"bits": 4, "group_size": 128, "symmetric": True, "bits_per_weight": 4.5, "polish": ["distill"], "quantize_head": True, "low_traffic": "pooled"}.items() <= row.items()
    row = built(format="fp4", block_size=128, rtn=True).to_json()
    assert row["block_size"] == 128 and row["double_quant"] is None and "bits" not in row and "polish" not in row
