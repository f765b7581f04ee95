"""The kernel that decodes and merges, on a GPU: the bits of the CPU, and of bitsandbytes. Not run yet: no task so far was lent a machine with one."""

from __future__ import annotations

import threading

import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
pytest.importorskip("triton")


@pytest.mark.parametrize("block_size", [64, 128, 256, 512, 1024, 2048, 4096])
def test_decodes_as_bitsandbytes_does_there(block_size):
    """Two decodings on one device: which of them a merge takes would be seen in its bytes."""
    from bitsandbytes import functional

    from qmerge.numerics import merge_kernels
    from qmerge.types import CodedRows

    weight = torch.randn(300, 520, generator=torch.Generator().manual_seed(0)).cuda() * 0.05
    packed, state = functional.quantize_4bit(weight, blocksize=block_size, quant_type="nf4")
    coded = CodedRows(packed.reshape(-1), state.absmax, state.code.float(), block_size, *weight.shape)
    assert torch.equal(merge_kernels.decode(coded), functional.dequantize_4bit(packed, state))


@pytest.mark.parametrize("shape, rank", [((4096, 4096), 16), ((300, 260), 7), ((73, 14336), 64), ((23, 129), 5), ((40, 1), 3), ((256, 1024), 192)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_merges_to_the_bits_of_sums_in_order(shape, rank, dtype):
    """A compiler that joins a product and a sum which the CPU rounds apart, sums in another order, TF32, denormals flushed."""
    from support.interpreted_merge import drawn, in_order, plain

    from qmerge.numerics import merge_kernels
    from qmerge.types import CodedRows

    coded, generator = drawn(shape, 64, "nf4", 1), torch.Generator().manual_seed(2)
    left, right = torch.randn(shape[0], rank, generator=generator) * 0.1, torch.randn(rank, shape[1], generator=generator) * 0.1
    base = plain(coded)
    there = CodedRows(coded.packed.cuda(), coded.absmax.cuda(), coded.levels.cuda(), 64, *shape)
    wanted = in_order(base, left, right, 0.3).to(dtype)
    for source in (there, base.cuda()):
        before, out = merge_kernels.merge(source, left.cuda(), right.cuda(), 0.3, dtype)
        assert torch.equal(before.cpu(), base) and torch.equal(out.cpu(), wanted)
    assert torch.equal(merge_kernels.decode(there, dtype).cpu(), base.to(dtype))


def test_two_threads_on_the_last_device():
    """Triton launches on the thread's own current device, which in a new thread is the first; and two threads compile at once."""
    from support.interpreted_merge import drawn, plain

    from qmerge.numerics import merge_kernels
    from qmerge.types import CodedRows

    device = torch.device("cuda", torch.cuda.device_count() - 1)
    coded, found = drawn((64, 514), 64, "nf4", 3), {}
    there = CodedRows(coded.packed.to(device), coded.absmax.to(device), coded.levels.to(device), 64, 64, 514)
    threads = [threading.Thread(target=lambda number=number: found.update({number: merge_kernels.decode(there).cpu()})) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == [0, 1] and all(torch.equal(one, plain(coded)) for one in found.values())


def test_verify_finds_on_the_cpu_what_a_gpu_merged(zoo, cli, tmp_path):
    """Float tensors are derived again on the CPU and compared bit for bit: a merge on a GPU whose last bits differ would be called a forgery."""
    base, adapter = zoo.nf4("llama"), zoo.adapter("llama")
    answer = cli("merge", "--base", base, "--adapter", adapter, "--out", tmp_path / "out", "--format", "bf16", "--device", "cuda")
    assert answer.code == 0, answer.err
    answer = cli("verify", tmp_path / "out", "--base", base, "--adapter", adapter)
    assert answer.code == 0, answer.out + answer.err
