"""int32 packing, one value at a time, in Python integers."""

from __future__ import annotations


def pack(values: list[list[int]], bits: int) -> list[list[int]]:
    """``values[n][m]`` to signed 32-bit words ``[n * bits / 32][m]``: value ``i`` of a column goes to word ``i // (32 / bits)``, lowest bits first."""
    per_word = 32 // bits
    words = [[0] * len(values[0]) for _ in range(len(values) // per_word)]
    for i, row in enumerate(values):
        for m, value in enumerate(row):
            words[i // per_word][m] |= value << (bits * (i % per_word))
    return [[word - 2**32 if word >= 2**31 else word for word in row] for row in words]
