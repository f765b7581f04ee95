"""On CUDA the same bits as on the CPU."""

from __future__ import annotations

import pytest
import torch
from bitsandbytes import functional

from qmerge.formats.base import quantize_as_bitsandbytes
from qmerge.formats.nf4_recipe import Nf4Recipe
from qmerge.numerics import nf4
from qmerge.types import QuantState

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("nested", [True, False], ids=["double", "single"])
@pytest.mark.parametrize("shape, block_size", [((256, 256), 64), ((96, 172), 128), ((300, 260), 64)])
def test_cuda_dequantizes_as_the_cpu(shape, block_size, nested):
    """bitsandbytes' CUDA kernel and the plain-torch decode disagreeing: the merge would depend on the machine."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.05
    packed, state = functional.quantize_4bit(weight.cuda(), blocksize=block_size, compress_statistics=nested, quant_type="nf4")
    inner = state.state2
    extra = {"nested_absmax": inner.absmax.cpu(), "nested_code": inner.code.float().cpu(), "nested_block_size": inner.blocksize, "offset": float(state.offset)} if nested else {}
    ours = QuantState(state.absmax.cpu(), state.code.float().cpu(), state.blocksize, shape, "float32", **extra)
    codes = nf4.unpack_nibbles(packed.cpu(), weight.numel())
    theirs = functional.dequantize_4bit(packed, state).cpu()
    assert torch.equal(nf4.dequantize(codes, ours), theirs)
    on_device = QuantState(state.absmax, state.code.float(), state.blocksize, shape, "float32",
                           **({"nested_absmax": inner.absmax, "nested_code": inner.code.float(), "nested_block_size": inner.blocksize, "offset": float(state.offset)} if nested else {}))
    assert torch.equal(nf4.dequantize(codes.cuda(), on_device).cpu(), theirs)


def test_cuda_quantizes_as_the_cpu():
    """A float base quantized on the fly on a GPU giving other codes than on a CPU. Decision bounds may round apart: 1 code in 10000."""
    weight = (torch.randn(512, 512, generator=torch.Generator().manual_seed(0)) * 0.05).bfloat16()
    here, there = (quantize_as_bitsandbytes(weight, Nf4Recipe(), device) for device in ("cpu", "cuda"))
    assert float((here.codes != there.codes).float().mean()) < 1e-4
    torch.testing.assert_close(nf4.effective_absmax(here.state), nf4.effective_absmax(there.state), rtol=1e-2, atol=1e-3)
