"""How do small integers lie in int32 words?

Value ``i`` of a column fills bits ``i * bits`` upward of the column's words, the lowest bits of a word first. Where ``bits`` does not divide 32 (3 bits:
32 values in 3 words) a value may lie across two words.
"""

from __future__ import annotations

from math import gcd

import torch


def _period(bits: int) -> int:
    """Values until a word begins with a value again."""
    return 32 // gcd(32, bits)


def words(count: int, bits: int) -> int:
    """int32 words that ``count`` values fill."""
    return -(-count * bits // 32)


def pack_rows(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Integers 0..2^bits-1 ``[n, m]`` to int32 ``[ceil(n * bits / 32), m]``; what is left of the last word is zero."""
    period, count = _period(bits), words(values.shape[0], bits)
    wide = torch.nn.functional.pad(values.to(torch.int32), (0, 0, 0, -values.shape[0] % period)).reshape(-1, period, values.shape[1])
    packed = torch.zeros(wide.shape[0], period * bits // 32, values.shape[1], dtype=torch.int32, device=values.device)
    for i in range(period):
        word, shift = divmod(i * bits, 32)
        packed[:, word] |= wide[:, i] << shift
        if shift + bits > 32:
            packed[:, word + 1] |= wide[:, i] >> (32 - shift)
    return packed.reshape(-1, values.shape[1])[:count].contiguous()


def unpack_rows(packed: torch.Tensor, bits: int, count: int | None = None) -> torch.Tensor:
    """The inverse of `pack_rows`: int32 ``[k, m]`` to uint8 ``[count, m]``; ``count`` is by default all that the words hold."""
    count = packed.shape[0] * 32 // bits if count is None else count
    values = torch.empty(count, packed.shape[1], dtype=torch.uint8, device=packed.device)
    period = _period(bits)
    words = period * bits // 32
    for i in range(min(period, count)):
        word, shift = divmod(i * bits, 32)
        into = values[i::period]
        value = packed[word::words][: into.shape[0]] >> shift
        if shift:
            value &= (1 << (32 - shift)) - 1  # the shift brings copies of the sign along
        if shift + bits > 32:
            value |= packed[word + 1 :: words][: into.shape[0]] << (32 - shift)
        into.copy_(value & (2**bits - 1))
    return values
