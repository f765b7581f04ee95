"""Integers in int32 words."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import packing_slow

from qmerge.numerics.packing import pack_rows, unpack_rows


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_pack_is_the_slow_packer(bits):
    """Words filled from the top, or a sign bit that overflows int32."""
    values = torch.randint(0, 2**bits, (64, 5), generator=torch.Generator().manual_seed(bits))
    values[-8:] = 2**bits - 1
    packed = pack_rows(values, bits)
    assert packed.dtype == torch.int32 and packed.tolist() == packing_slow.pack(values.tolist(), bits)


@settings(max_examples=60, deadline=None)
@given(bits=st.sampled_from([2, 3, 4, 8]), rows=st.integers(1, 100), columns=st.integers(1, 7), seed=st.integers(0, 2**31))
def test_round_trip(bits, rows, columns, seed):
    """A shape or a value for which unpacking is not the inverse of packing: an odd last word, three bits across two words."""
    values = torch.randint(0, 2**bits, (rows, columns), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    packed = pack_rows(values, bits)
    assert packed.shape == (-(-rows * bits // 32), columns) and torch.equal(unpack_rows(packed, bits, rows), values)
