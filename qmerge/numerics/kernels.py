"""The inner loops that a matrix library has no call for: rounding column after column, coordinate descent, scale search. Compiled for the CPU by numba.

Every row of a weight is solved by itself, so the bits do not depend on how rows are spread over threads. All arrays are C-contiguous numpy
arrays of fp32 unless said otherwise; all loops release the GIL. Grids: value = ``scale * (code - zero)`` for integers, ``scale * levels[code]``
for code books with sorted levels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit

TILE = 32
"""rows of a weight that are rounded side by side: two AVX-512 registers"""


def compiled(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """numba's ``njit``, with the machine code kept on the disk where there is a place for it: beside this file, or in the user's cache. In a container whose user may write to neither numba
    would raise; there it is compiled anew in each process, which takes some seconds."""

    def compile_it(function: Callable[..., Any]) -> Any:
        try:
            return njit(cache=True, **options)(function)
        except RuntimeError:
            return njit(**options)(function)

    return compile_it


@compiled(nogil=True, fastmath={"contract"})
def round_block_int(work, scale, zero, top, upper, inverse, codes, errors):  # noqa: ANN001, ANN201  numba infers the types
    """Round ``work`` ``[columns, rows]`` (changed), one column after the other, feeding errors on within the block.

    ``upper`` ``[columns, columns]``: the block's part of U; ``inverse`` 1 / diag(U). Fills ``codes`` uint8 and ``errors``, both ``[columns, rows]``.
    """
    columns, rows = work.shape
    for left in range(0, rows, TILE):
        right = min(left + TILE, rows)
        for j in range(columns):
            for r in range(left, right):
                z = zero[j, r]
                c = np.rint(work[j, r] / scale[j, r]) + z
                c = min(max(c, np.float32(0)), top)
                codes[j, r] = np.uint8(c)
                errors[j, r] = (work[j, r] - (c - z) * scale[j, r]) * inverse[j]
            for k in range(j + 1, columns):
                u = upper[j, k]
                for r in range(left, right):
                    work[k, r] -= errors[j, r] * u


@compiled(nogil=True, fastmath={"contract"})
def round_block_book(work, scale, levels, bounds, upper, inverse, codes, errors):  # noqa: ANN001, ANN201
    """`round_block_int` for a code book: ``levels`` sorted, ``bounds`` the midpoints between them; a value on a bound goes to the lower level."""
    columns, rows = work.shape
    scaled, value, code = np.empty(TILE, np.float32), np.empty(TILE, np.float32), np.empty(TILE, np.int32)
    for left in range(0, rows, TILE):
        right = min(left + TILE, rows)
        for j in range(columns):
            for r in range(left, right):
                scaled[r - left] = work[j, r] / scale[j, r]
                value[r - left] = levels[0]
                code[r - left] = 0
            for b in range(bounds.shape[0]):  # bound by bound: the inner loop then runs 16 rows at a time
                bound, level = bounds[b], levels[b + 1]
                for r in range(right - left):
                    above = scaled[r] > bound
                    value[r] = level if above else value[r]
                    code[r] += np.int32(above)
            for r in range(left, right):
                codes[j, r] = np.uint8(code[r - left])
                errors[j, r] = (work[j, r] - value[r - left] * scale[j, r]) * inverse[j]
            for k in range(j + 1, columns):
                u = upper[j, k]
                for r in range(left, right):
                    work[k, r] -= errors[j, r] * u


@compiled(nogil=True, fastmath={"contract", "reassoc"}, inline="always")
def _nearest(wanted, scale, zero, top, levels, bounds):  # noqa: ANN001, ANN202
    """(code uint8, value) of the grid value nearest to ``wanted``, which is in units of ``scale``; ``levels`` empty: an integer grid."""
    if levels.shape[0] == 0:
        c = min(max(np.rint(wanted) + zero, np.float32(0)), top)
        return np.uint8(c), (c - zero) * scale
    found = 0
    for bound in bounds:
        found += np.int32(wanted > bound)
    return np.uint8(found), levels[found] * scale


@compiled(nogil=True, fastmath={"contract", "reassoc"})
def descend_rows(codes, current, gradient, matrix, steps, order, scale, zero, top, levels, bounds, sweeps):  # noqa: ANN001, ANN201
    """Coordinate descent on codes: per row, each column in ``order`` moves to its best grid value with all others fixed.

    ``codes`` uint8, ``current`` (the values), ``gradient`` = (Q - target) M, ``scale``, ``zero``: ``[rows, columns]``; the first three are changed.
    ``matrix`` M symmetric ``[columns, columns]``, ``steps`` 1 / diag(M). ``levels`` empty: an integer grid. Returns the number of codes moved.
    """
    rows, columns = codes.shape
    integers = levels.shape[0] == 0
    moved = 0
    for r in range(rows):
        for _ in range(sweeps):
            before = moved
            for place in range(columns):
                j = order[place]
                s = scale[r, j]
                wanted = (current[r, j] - gradient[r, j] * steps[j]) / s
                code, value = _nearest(wanted, s, zero[r, j] if integers else s, top, levels, bounds)
                if code != codes[r, j]:
                    change = value - current[r, j]
                    codes[r, j] = code
                    current[r, j] = value
                    moved += 1
                    for k in range(columns):
                        gradient[r, k] += change * matrix[j, k]
            if moved == before:
                break
    return moved


float32 = np.float32


@compiled(nogil=True, fastmath={"contract", "reassoc"})
def best_int(groups, cost, scales, zeros, top):  # noqa: ANN001, ANN201
    """Per group, the index (int64) of the trial whose round-to-nearest has the least weighted squared error; the first of equals.

    ``groups`` ``[n, size]``, ``cost`` ``[m, size]`` (group i has row i mod m), ``scales`` and ``zeros`` ``[trials, n]``.
    """
    count, size = groups.shape
    found = np.zeros(count, np.int64)
    for i in range(count):
        least = np.float32(np.inf)
        for trial in range(scales.shape[0]):
            step, zero = scales[trial, i], zeros[trial, i]
            inverse = np.float32(1) / step
            total = np.float32(0)
            for k in range(size):
                c = min(max(np.rint(groups[i, k] * inverse) + zero, np.float32(0)), top)
                error = (c - zero) * step - groups[i, k]
                total += error * error * cost[i % cost.shape[0], k]
            if total < least:
                least = total
                found[i] = trial
    return found


@compiled(nogil=True, fastmath={"contract", "reassoc"})
def best_book(groups, cost, scales, levels, bounds):  # noqa: ANN001, ANN201
    """`best_int` for a code book with sorted ``levels`` and the midpoints ``bounds``."""
    count, size = groups.shape
    found = np.zeros(count, np.int64)
    value = np.empty(size, np.float32)
    for i in range(count):
        least = np.float32(np.inf)
        for trial in range(scales.shape[0]):
            step = scales[trial, i]
            for k in range(size):
                value[k] = levels[0]
            for b in range(bounds.shape[0]):  # bound by bound: the inner loop then runs 16 weights at a time
                bound, level = bounds[b] * step, levels[b + 1]
                for k in range(size):
                    value[k] = level if groups[i, k] > bound else value[k]
            total = np.float32(0)
            for k in range(size):
                error = value[k] * step - groups[i, k]
                total += error * error * cost[i % cost.shape[0], k]
            if total < least:
                least = total
                found[i] = trial
    return found


@compiled(nogil=True, fastmath={"contract"})
def round_tile_int(work, target, scale, zero, top, upper, inverse, feed, codes, errors, misses):  # noqa: ANN001, ANN201
    """`round_block_int` for rows that count together. ``target`` is ``work`` before any column's error came in; what row r misses of it, as moved by the rows
    before r, comes off row k's by ``feed[r, k]`` ``[rows, rows]`` and goes into ``misses`` ``[columns, rows]``.
    """
    columns, rows = work.shape
    shift = np.empty(rows, np.float32)
    for j in range(columns):
        shift[:] = 0
        for r in range(rows):
            wanted, z = work[j, r] - shift[r], zero[j, r]
            c = np.rint(wanted / scale[j, r]) + z
            c = min(max(c, np.float32(0)), top)
            codes[j, r] = np.uint8(c)
            value = (c - z) * scale[j, r]
            errors[j, r] = (wanted - value) * inverse[j]
            miss = target[j, r] - shift[r] - value
            misses[j, r] = miss
            for k in range(r + 1, rows):
                shift[k] += feed[r, k] * miss
        for k in range(j + 1, columns):
            u = upper[j, k]
            for r in range(rows):
                work[k, r] -= errors[j, r] * u


@compiled(nogil=True, fastmath={"contract"})
def round_tile_book(work, target, scale, levels, bounds, upper, inverse, feed, codes, errors, misses):  # noqa: ANN001, ANN201
    """`round_tile_int` for a code book with sorted ``levels`` and the midpoints ``bounds``."""
    columns, rows = work.shape
    shift = np.empty(rows, np.float32)
    for j in range(columns):
        shift[:] = 0
        for r in range(rows):
            wanted = work[j, r] - shift[r]
            scaled = wanted / scale[j, r]
            found = 0
            for bound in bounds:
                found += np.int32(scaled > bound)
            codes[j, r] = np.uint8(found)
            value = levels[found] * scale[j, r]
            errors[j, r] = (wanted - value) * inverse[j]
            miss = target[j, r] - shift[r] - value
            misses[j, r] = miss
            for k in range(r + 1, rows):
                shift[k] += feed[r, k] * miss
        for k in range(j + 1, columns):
            u = upper[j, k]
            for r in range(rows):
                work[k, r] -= errors[j, r] * u


@compiled(nogil=True, fastmath={"contract", "reassoc"})
def descend_tile(codes, current, pull, base, share, matrix, steps, order, scale, zero, top, levels, bounds):  # noqa: ANN001, ANN201
    """`descend_rows` for rows that count together, one after the other, each swept three times.

    ``pull`` = E M of the rows (changed), ``base`` what rows outside pull with, ``share`` ``[rows, rows]`` = G / diag(G). Returns the number of codes moved.
    """
    rows, columns = codes.shape
    integers = levels.shape[0] == 0
    moved = 0
    gradient = np.empty(columns, np.float32)
    for r in range(rows):
        for k in range(columns):
            gradient[k] = base[r, k]
        for q in range(rows):
            weight = share[r, q]
            for k in range(columns):
                gradient[k] += weight * pull[q, k]
        for _ in range(3):
            before = moved
            for place in range(columns):
                j = order[place]
                s = scale[r, j]
                wanted = (current[r, j] - gradient[j] * steps[j]) / s
                code, value = _nearest(wanted, s, zero[r, j] if integers else s, top, levels, bounds)
                if code != codes[r, j]:
                    change = value - current[r, j]
                    codes[r, j] = code
                    current[r, j] = value
                    moved += 1
                    for k in range(columns):
                        step = change * matrix[j, k]
                        gradient[k] += step
                        pull[r, k] += step
            if moved == before:
                break
    return moved
