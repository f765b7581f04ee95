"""Does the compiled loop decode 4-bit codes to the bits of torch's, and is it taken only where numba is there anyway?"""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest
import torch

from qmerge.numerics import nf4

BLOCK_SIZES = (16, 20, 22, 32, 64, 96, 128, 256, 512, 1024, 2048, 4096)


def stored(count: int, block_size: int, kind: str = "nf4") -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random bytes, block maxima (some of which no arithmetic keeps) and the table, of ``count`` codes."""
    source = torch.Generator().manual_seed(count + block_size)
    packed = torch.randint(0, 256, ((count + 1) // 2,), dtype=torch.uint8, generator=source)
    absmax = torch.rand(-(-count // block_size), generator=source) * 0.1
    odd = torch.tensor([0.0, -0.0, 1e-42, 1.2e-38, 3e38, float("inf"), float("nan")])
    absmax[1 : 1 + odd.numel()] = odd[: max(absmax.numel() - 1, 0)]
    return packed, absmax, nf4.pair_table(nf4.code_book(kind))


def both(packed: torch.Tensor, absmax: torch.Tensor, table: torch.Tensor, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Bits by the kernel and by torch. What the kernel leaves out stays at a value that no code has."""
    kernel, plain = torch.full((packed.numel() * 2,), 7.0), torch.full((packed.numel() * 2,), 7.0)
    nf4.decode_by_kernel(packed, absmax, table, block_size, kernel)
    nf4.decode_in_torch(packed, absmax, table, block_size, plain)
    return kernel.view(torch.int32), plain.view(torch.int32)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_kernel_is_torch(block_size, kind):
    """Swapped nibbles or bytes of the sixteen, the scale of a neighbouring block, a block's last bytes left out where sixteen do not divide it, FP4's levels in sorted order, -0 or a subnormal flushed."""
    for count in (1, 2, 15, 17, block_size - 1, block_size, block_size + 3, 9 * block_size, 9 * block_size + 18, 20_001):
        kernel, plain = both(*stored(count, block_size, kind), block_size)
        assert torch.equal(kernel, plain), count


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("count", [2, 4096, 3 * 4096 + 18, 1_000_001])
def test_threads_do_not_show(monkeypatch, threads, count):
    """Threads that share a block, begin at the wrong scale, or leave the last blocks to nobody."""
    monkeypatch.setattr(nf4, "_SHARE", 5000)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for block_size in (64, 4096):
            kernel, plain = both(*stored(count, block_size), block_size)
            assert torch.equal(kernel, plain), block_size
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("change", ["strided codes", "strided maxima", "odd blocks", "half maxima"])
def test_what_the_kernel_does_not_take(monkeypatch, change):
    """Memory read as if it lay together, or as another type: the kernel checks nothing itself."""
    nf4.load_kernel()
    monkeypatch.setattr(nf4, "_WORTH", 0)
    size = 65 if change == "odd blocks" else 64
    packed, absmax, table = stored(130 * 64, size)
    wanted = both(packed, absmax, table, size)[1] if size == 64 else None
    if change == "strided codes":
        packed = packed.repeat_interleave(2)[::2]
    elif change == "strided maxima":
        absmax = absmax.repeat_interleave(2)[::2]
    elif change == "half maxima":
        absmax = absmax.half()
        wanted = both(packed, absmax.float(), table, size)[1]
    else:
        codes = nf4.unpack_nibbles(packed, 130 * 64).long()
        wanted = (nf4.code_book("nf4")[codes] * nf4.spread(absmax, size, 130 * 64)).view(torch.int32)
    assert torch.equal(nf4.decode(packed, absmax, table, size, 130 * 64).view(torch.int32), wanted)


def test_too_few_maxima_are_an_error(monkeypatch):
    """Scales read past the end of the array: values of whatever lies there."""
    nf4.load_kernel()
    monkeypatch.setattr(nf4, "_WORTH", 0)
    packed, absmax, table = stored(64 * 64, 64)
    with pytest.raises((RuntimeError, IndexError)):
        nf4.decode(packed, absmax[:-1], table, 64, 64 * 64)


def test_large_outputs_are_aligned_and_writable():
    """An output in numpy's memory that begins between two of torch's boundaries, or ends before its last value."""
    count = nf4._MAPPED // 4 + 2
    packed, absmax, table = stored(count, 4096)
    found = nf4.decode(packed, absmax, table, 4096, count)
    assert found.shape == (count,) and found.data_ptr() % 64 == 0
    found[-1] = 3.0
    assert float(found.add_(1.0)[-1]) == 4.0


def told(code: str, **settings: str) -> str:
    """What a process of its own prints."""
    return subprocess.run([sys.executable, "-c", code], env=os.environ | settings, capture_output=True, text=True, check=True).stdout.strip()


def test_torch_alone_imports_no_numba():
    """A merge of a small model that waits for numba: its import takes longer than the merge."""
    code = "import sys, torch; from qmerge.numerics import nf4; " \
        "nf4.decode(torch.zeros(1 << 19, dtype=torch.uint8), torch.ones(1 << 14), nf4.pair_table(nf4.code_book('nf4')), 64, 1 << 20); print([name for name in sys.modules if 'numba' in name or 'kernel' in name and 'qmerge' in name])"
    assert told(code) == "[]"


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="names a processor of this family")
def test_processors_without_a_permutation(tmp_path):
    """Code that is right only where LLVM makes one instruction of the sixteen look-ups."""
    code = "import test_numerics_decode_kernel as here, torch; print([torch.equal(*here.both(*here.stored(20_001, size), size)) for size in here.BLOCK_SIZES])"
    found = told(code, NUMBA_CPU_NAME="x86-64", NUMBA_CPU_FEATURES="", NUMBA_CACHE_DIR=str(tmp_path), PYTHONPATH=os.pathsep.join([os.path.dirname(__file__), *sys.path]))
    assert found == str([True] * len(BLOCK_SIZES))
