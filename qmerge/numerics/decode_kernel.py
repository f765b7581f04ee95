"""How do 4-bit codes become fp32 at the speed of writing them? Compiled for the CPU by numba; `nf4.decode` holds the same in torch.

Sixteen codes are looked up at once: LLVM makes one permutation of registers of sixteen extractions by a variable index, where the processor has such an instruction (AVX2, AVX-512), and plain loads elsewhere.
On an AMD EPYC (Zen 5) 2^20 codes take one thread 0.05 to 0.06 ms, a fill of the same memory 0.04, a table in memory that is asked byte by byte 0.25, and torch 0.31.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from qmerge.numerics.kernels import compiled

BYTES = 8
"""of packed codes that `_sixteen` takes"""


@intrinsic
def _sixteen(context, packed, levels, out, scale):  # noqa: ANN001, ANN202  numba's form
    """``out[:16] = levels[codes] * scale`` of the 8 bytes at ``packed``, the high nibble first. The first three are addresses."""

    def build(context, builder, signature, args):  # noqa: ANN001, ANN202
        byte, word, single = ir.IntType(8), ir.IntType(32), ir.FloatType()
        eight, codes, floats = ir.VectorType(byte, 8), ir.VectorType(word, 16), ir.VectorType(single, 16)
        source, table, target = (builder.inttoptr(address, kind.as_pointer()) for address, kind in zip(args[:3], (eight, floats, floats), strict=True))
        raw, book = builder.load(source, align=1), builder.load(table, align=4)
        high, low = builder.lshr(raw, ir.Constant(eight, [4] * 8)), builder.and_(raw, ir.Constant(eight, [15] * 8))
        places = builder.zext(builder.shuffle_vector(high, low, ir.Constant(codes, [half + i for i in range(8) for half in (0, 8)])), codes)
        found, scales = ir.Constant(floats, ir.Undefined), ir.Constant(floats, ir.Undefined)
        for i in range(16):
            at = ir.Constant(word, i)
            found = builder.insert_element(found, builder.extract_element(book, builder.extract_element(places, at)), at)
            scales = builder.insert_element(scales, args[3], at)
        builder.store(builder.fmul(found, scales), target, align=4)
        return context.get_dummy_value()

    return types.void(types.uintp, types.uintp, types.uintp, types.float32), build


@compiled(nogil=True)
def decode_blocks(packed, absmax, levels, block_size, out):  # noqa: ANN001, ANN201  numba infers the types
    """``out[i] = levels[code i] * absmax[i // block_size]``, one multiplication in fp32.

    ``packed`` uint8 ``[n]``, ``absmax`` fp32 of at least the blocks of 2n codes, ``levels`` fp32 ``[16]``, ``out`` fp32 ``[2n]``, all contiguous. ``block_size`` is even. Nothing is checked.
    """
    half, count = np.uintp(block_size // 2), np.uintp(packed.shape[0])
    source, table, target = np.uintp(packed.ctypes.data), np.uintp(levels.ctypes.data), np.uintp(out.ctypes.data)
    step, one = np.uintp(BYTES), np.uintp(1)
    block = np.uintp(0)
    i = np.uintp(0)
    while i < count:
        scale = absmax[block]
        stop = min(count, i + half)
        while i + step <= stop:
            _sixteen(source + i, table, target + i * step, scale)
            i += step
        while i < stop:
            byte = packed[i]
            out[i + i] = levels[byte >> 4] * scale
            out[i + i + one] = levels[byte & 15] * scale
            i += one
        block += one
