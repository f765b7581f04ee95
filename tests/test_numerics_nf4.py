"""The plain-torch NF4 equals bitsandbytes, bit for bit."""

from __future__ import annotations

import pytest
import torch
from bitsandbytes import functional
from support.blocks import block_maxima

from qmerge.numerics import nf4
from qmerge.types import QuantState

# shape, block size; the third and fourth end in a short block, the last ones in a short block of nested maxima (256) too
CASES = [((64, 64), 64), ((128, 96), 128), ((10, 30), 64), ((7, 90), 128), ((130, 130), 64), ((48, 100), 256), ((96, 172), 4096), ((300, 260), 64)]


def quantized(shape, block_size, nested, dtype=torch.float32, seed=0):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).mul_(0.05).to(dtype)
    packed, state = functional.quantize_4bit(weight, blocksize=block_size, compress_statistics=nested, quant_type="nf4")
    return weight, packed, state


def as_ours(state) -> QuantState:
    inner = state.state2
    nested = {"nested_absmax": inner.absmax, "nested_code": inner.code.float(), "nested_block_size": inner.blocksize, "offset": float(state.offset)} if inner else {}
    return QuantState(state.absmax, state.code.float(), state.blocksize, tuple(state.shape), "float32", **nested)


def dequantized_flat(packed, state) -> torch.Tensor:
    """bitsandbytes' answer for the same bytes as one row. Blocks run over the flat weight, so it must not differ; yet its AVX512 kernel (0.50.2) gives
    wrong values for [out, in] where 16 divides ``in`` and the block size does not."""
    shape, state.shape = state.shape, torch.Size((1, shape_count(state.shape)))
    try:
        return functional.dequantize_4bit(packed, state).reshape(shape)
    finally:
        state.shape = shape


def shape_count(shape) -> int:
    return shape[0] * shape[1]


@pytest.mark.parametrize("nested", [True, False], ids=["double", "single"])
@pytest.mark.parametrize("shape, block_size", CASES)
def test_dequantize_is_bitsandbytes(shape, block_size, nested):
    """Swapped nibbles, a lost offset, absmax applied after a cast, or the short last block read past its end."""
    _, packed, state = quantized(shape, block_size, nested)
    count = shape[0] * shape[1]
    ours = nf4.dequantize(nf4.unpack_nibbles(packed, count), as_ours(state))
    assert torch.equal(ours, dequantized_flat(packed, state))
    if shape[1] % block_size == 0:
        assert torch.equal(ours, functional.dequantize_4bit(packed, state))


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("shape, block_size", [*CASES, ((7, 65), 64), ((600, 1024), 64), ((3, 100), 96)])
def test_decode_is_dequantize(shape, block_size, kind):
    """Decoding two codes at a time, in pieces, giving another bit than one code after the other: swapped halves of a byte, a piece that ends inside a block."""
    count = shape_count(shape)
    packed = torch.randint(0, 256, ((count + 1) // 2,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    state = QuantState(torch.rand(-(-count // block_size)), nf4.code_book(kind), block_size, shape, "float32", kind)
    wanted = nf4.dequantize(nf4.unpack_nibbles(packed, count), state).reshape(-1)
    found = nf4.decode(packed, state.absmax, nf4.pair_table(state.code), block_size, count)
    assert torch.equal(found.view(torch.int32), wanted.view(torch.int32))


def assert_same_codes(ours, theirs, scaled, levels) -> None:
    """Equal but for a few, where bitsandbytes' C++ (0.50) takes a level up to 3.2e-5 farther than the nearest: it looks codes up in 2^16 bins of [-1, 1]."""
    assert float((ours != theirs).float().mean()) < 0.02
    own, other = ((scaled - levels[codes.long()]).abs() for codes in (ours, theirs))
    assert bool((own <= other + 1e-7).all()) and float((other - own).max()) < 3.2e-5


@pytest.mark.parametrize("blocks", [2, 255, 256, 257, 512, 1000, 4096])
@pytest.mark.parametrize("skew", [1, 4])
def test_double_quantize_is_compress_statistics(blocks, skew):
    """Another rounding of the maxima than bitsandbytes', most of all in the short last nested block."""
    absmax = torch.rand(blocks, generator=torch.Generator().manual_seed(blocks)) ** skew * 0.1 + 0.02
    offset = absmax.mean()
    theirs, state = functional.quantize_blockwise(absmax - offset, blocksize=256)
    codes, maxima, own_offset = nf4.double_quantize(absmax, state.code.float())
    assert torch.equal(maxima, state.absmax) and own_offset == float(offset)
    assert_same_codes(codes, theirs, (absmax - offset) / nf4.spread(maxima, 256, blocks), state.code.float())


@pytest.mark.parametrize("blocks", [1, 256, 300])
def test_double_quantize_of_equal_maxima(blocks):
    """0 / 0 where every block has the same maximum, or there is one block only: it must come back exactly."""
    _, _, state = quantized((64, 64), 64, nested=True)
    made = nf4.with_absmax(as_ours(state), torch.full((blocks,), 0.0625))
    assert torch.equal(nf4.effective_absmax(made), torch.full((blocks,), 0.0625))


@pytest.mark.parametrize("shape, block_size", CASES)
def test_with_absmax_equals_quantize_4bit(shape, block_size):
    """A template state whose code book or nesting is not carried over to new maxima."""
    weight, _, state = quantized(shape, block_size, nested=True)
    _, _, template = quantized(shape, block_size, nested=True, seed=9)
    maxima = block_maxima(weight, block_size)
    made, wanted = nf4.with_absmax(as_ours(template), maxima), as_ours(state)
    assert torch.equal(made.nested_absmax, wanted.nested_absmax) and made.offset == wanted.offset and made.nested_block_size == wanted.nested_block_size
    assert_same_codes(made.absmax, wanted.absmax, (maxima - made.offset) / nf4.spread(made.nested_absmax, 256, maxima.numel()), made.nested_code)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape, block_size", CASES)
def test_nearest_is_quantize_4bit(shape, block_size, dtype):
    """Decision bounds that differ from bitsandbytes' in a last bit, or ties that go up."""
    weight, packed, state = quantized(shape, block_size, nested=False, dtype=dtype)
    wide = weight.float()
    maxima = block_maxima(wide, block_size)
    assert torch.equal(maxima, state.absmax)
    codes = nf4.nearest(wide, maxima, nf4.code_book("nf4"), block_size)
    assert torch.equal(codes.reshape(-1), nf4.unpack_nibbles(packed, wide.numel()))


def test_nearest_on_a_bound():
    """Dividing where bitsandbytes multiplies by the reciprocal puts one weight in a million on the other side of a bound."""
    for seed in range(12):
        weight, packed, state = quantized((512, 512), 64, nested=False, seed=seed)
        assert torch.equal(nf4.nearest(weight, state.absmax, nf4.code_book("nf4"), 64).reshape(-1), nf4.unpack_nibbles(packed, weight.numel()))


def test_nearest_of_an_empty_block():
    """0 / 0 in a block of zeros."""
    codes = nf4.nearest(torch.zeros(2, 64), torch.zeros(2), nf4.code_book("nf4"), 64)
    assert codes.unique().tolist() == [7]


@pytest.mark.parametrize("count", [2, 7, 64])
def test_nibbles_round_trip(count):
    """The odd last code lost, or high and low nibble swapped."""
    codes = torch.arange(count, dtype=torch.uint8) % 16
    packed = nf4.pack_nibbles(codes)
    assert packed.shape == ((count + 1) // 2, 1) and packed[0, 0] == (codes[0] << 4 | codes[1])
    assert torch.equal(nf4.unpack_nibbles(packed, count), codes)


def test_code_book_is_bitsandbytes():
    """A level mistyped by one unit in the last place."""
    assert torch.equal(nf4.code_book("nf4"), functional.get_4bit_type("nf4", device="cpu").float())
