"""The dense merge on a GPU gives the CPU's values up to one rounding. Not run yet: no task so far was lent a machine with one."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("feature", [{}, {"use_rslora": True}, {"use_dora": True}], ids=["plain", "rslora", "dora"])
def test_cuda_and_cpu_agree(zoo, cli, tmp_path, feature):
    """TF32 in the product, or a kernel that decodes NF4 otherwise. fp32 products differ in the order of their sums, about 2^-22 of a weight; bf16 then rounds a
    few of them to the other neighbour, never farther."""
    adapter = zoo.adapter("llama", "-".join(feature) or "plain", **feature)
    found = {}
    for device in ("cpu", "cuda"):
        for fmt in ("fp32", "bf16"):
            answer = cli("merge", "--base", zoo.nf4("llama"), "--adapter", adapter, "--out", tmp_path / f"{device}-{fmt}", "--format", fmt, "--device", device)
            assert answer.code == 0, answer.err
            found[device, fmt] = load_file(tmp_path / f"{device}-{fmt}" / "model.safetensors")
    for name, wanted in found["cpu", "fp32"].items():
        torch.testing.assert_close(found["cuda", "fp32"][name], wanted, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found["cuda", "bf16"][name], found["cpu", "bf16"][name], rtol=2**-7, atol=1e-6)
