"""On CUDA products of bf16 factors are handed out as they were summed, in fp32."""

from __future__ import annotations

import pytest
import torch

from qmerge.numerics.products import add_product, times

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("exact", [True, False])
def test_a_sum_of_bf16_products_is_an_fp32_sum(exact):
    """A result that was rounded to bf16 (2e-3), or an operation that this torch does not have."""
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(4096, 300, generator=generator).bfloat16().cuda(), torch.randn(4096, 200, generator=generator).bfloat16().cuda()
    total = torch.zeros(400, 300, device="cuda")
    add_product(total[50:350, :200], left.T, right, exact)
    wanted = left.double().T @ right.double()
    assert float((total[50:350, :200].double() - wanted).abs().max() / wanted.abs().max()) < 1e-5
    assert not total[:50].any() and not total[:, 200:].any()


def test_a_judge_multiplies_so_too():
    """fp32 weights that meet a bf16 matrix and come back rounded twice."""
    generator = torch.Generator().manual_seed(1)
    weight, matrix = torch.randn(64, 512, generator=generator).cuda(), torch.randn(512, 512, generator=generator).bfloat16().cuda()
    wanted = weight.bfloat16().double() @ matrix.double()
    found = times(weight, matrix)
    assert found.dtype == torch.float32 and float((found.double() - wanted).abs().max() / wanted.abs().max()) < 1e-5
