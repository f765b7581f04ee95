"""How far are two next-token distributions apart, in one reading of the logits of both? Compiled for the CPU by numba; ``divergence`` holds the same in torch.

Logits come in tiles of the vocabulary, so that no more than a tile of them need exist. Per row a state of fp64 numbers is carried from tile to tile.
With e_a = exp(a - max a), e_b = exp(b - max b), c = a - b where a is largest, d = (a - b) - c and φ(x) = exp(-x) - 1 + x, the row's sums are
A = Σ e_a, B = Σ e_b, S = Σ e_a·φ(d), T = Σ e_a·d. They give both normalizations, and KL = S/A - φ(log Z_a - log Z_b - c): no term of S is below 0, and what c is
off by costs its square. So fp32 leaves as little as in ``divergence``, where the normalizations are known beforehand. e_a·φ(d) is κ·e_b - e_a + e_a·d,
with a polynomial where d is small and that would cancel: one exponential per logit in all. A tile with a larger a moves c by γ, and S by (exp(γ) - 1)·κB - γA.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

STATE = 13
"""fp64 numbers per row of `compare_tile`: both maxima, A, B, S, T, c, where each maximum is, both logits of the target, and for each model NaN where a logit was not finite"""
ONE_STATE = 4
"""of `loss_tile`: the maximum, A, the target's logit, and NaN where a logit was not finite"""
BLOCK = 512
"""entries whose sums are kept in fp32 before they go to fp64"""
RATIO = 1e30
"""κ beyond which a row is left to the slow way"""
_LOOP = {"contract", "reassoc", "nsz"}
"""sums may be taken in another order; NaN and infinity stay what they are"""


def new_state(rows: int, columns: int = STATE) -> np.ndarray:
    """What the first tile starts from."""
    state = np.zeros((rows, columns))
    state[:, : 2 if columns == STATE else 1] = -np.inf
    return state


@intrinsic
def _float_of(context, bits):  # noqa: ANN001, ANN202  numba's form
    """The float32 whose bits are this int32."""

    def build(context, builder, signature, args):  # noqa: ANN001, ANN202
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.int32), build


@njit(cache=True, nogil=True, fastmath=_LOOP, inline="always")
def _exp(x):  # noqa: ANN001, ANN202  numba infers the types
    """exp of a float32 from -87 to 0, to 2e-7 of its value."""
    n = np.rint(x * np.float32(1.44269504))
    r = (x - n * np.float32(0.693145751953125)) - n * np.float32(1.42860682e-6)  # ln 2 in two parts, the first exact times n
    p = np.float32(1.9841270e-4) * r + np.float32(1.3888889e-3)
    p = p * r + np.float32(8.3333333e-3)
    p = p * r + np.float32(4.1666667e-2)
    p = p * r + np.float32(0.16666667)
    p = p * r + np.float32(0.5)
    p = p * (r * r) + (r + np.float32(1.0))
    return p * _float_of((np.int32(n) + np.int32(127)) << np.int32(23))


@njit(cache=True, nogil=True, fastmath=_LOOP, inline="always")
def _small(d):  # noqa: ANN001, ANN202
    """φ(d) for \\|d\\| < 1 by its series, to 1e-7 of its value."""
    p = np.float32(-2.5052108e-8) * d + np.float32(2.7557319e-7)
    p = p * d + np.float32(-2.7557319e-6)
    p = p * d + np.float32(2.4801587e-5)
    p = p * d + np.float32(-1.9841270e-4)
    p = p * d + np.float32(1.3888889e-3)
    p = p * d + np.float32(-8.3333333e-3)
    p = p * d + np.float32(4.1666667e-2)
    p = p * d + np.float32(-0.16666667)
    p = p * d + np.float32(0.5)
    return p * (d * d)


@njit(nogil=True, forceinline=True)
def _highest(bits):  # noqa: ANN001, ANN202
    """The largest of floats given by their bits, as an integer in the same order: 16 are compared at a time, as floats they would not be."""
    top, fold, sign = np.int32(-2147483648), np.int32(0x7FFFFFFF), np.int32(31)
    for i in range(bits.shape[0]):
        value = bits[i]
        top = max(top, value ^ ((value >> sign) & fold))  # negative floats, whose bits run the other way, turned round
    return top


@njit(nogil=True, forceinline=True)
def _top(row):  # noqa: ANN001, ANN202
    """(the largest entry, its first place); a NaN is above all or, with a sign bit, below."""
    bits = row.view(np.int32)
    top, block = np.int32(-2147483648), 0
    for start in range(0, row.shape[0], BLOCK):
        here = _highest(bits[start : min(start + BLOCK, row.shape[0])])
        if here > top:
            top, block = here, start
    wanted = top ^ ((top >> np.int32(31)) & np.int32(0x7FFFFFFF))
    place = block
    while bits[place] != wanted:
        place += 1
    return _float_of(wanted), place


@njit(nogil=True, fastmath=_LOOP, forceinline=True)
def _sums(a, b, top_a, top_b, c, kappa):  # noqa: ANN001, ANN202
    """A, B, S, T of one block, and for each model NaN where an entry is not finite."""
    zero, low, one = np.float32(0.0), np.float32(-87.0), np.float32(1.0)
    total_a = total_b = total_s = total_t = broken_a = broken_b = zero
    for i in range(a.shape[0]):
        broken_a += a[i] * zero
        broken_b += b[i] * zero
        d = (a[i] - b[i]) - c
        ea, eb = _exp(max(a[i] - top_a, low)), _exp(max(b[i] - top_b, low))
        total_a += ea
        total_b += eb
        total_t += ea * d
        total_s += ea * _small(d) if abs(d) < one else (kappa * eb - ea) + ea * d
    return total_a, total_b, total_s, total_t, broken_a, broken_b


@njit(cache=True, nogil=True)
def compare_tile(ref, cand, first, targets, state):  # noqa: ANN001, ANN201
    """Add entries ``first`` and on of the vocabulary, logits ``[rows, tile]`` of both, to ``state`` ``[rows, STATE]``. ``targets`` int64 ``[rows]``."""
    rows, width = ref.shape
    for row in range(rows):
        a, b, s = ref[row], cand[row], state[row]
        top_a, place_a = _top(a)
        top_b, place_b = _top(b)
        if top_b > s[1]:
            s[3] *= np.exp(s[1] - top_b)
            s[1], s[8] = top_b, first + place_b
        if top_a > s[0]:
            scale, moved = np.exp(s[0] - top_a), np.float32(a[place_a] - b[place_a])
            if first > 0:
                gamma = moved - s[6]
                s[4] += np.expm1(gamma) * np.exp(s[6] - (s[0] - s[1])) * s[3] - gamma * s[2]
                s[5] -= gamma * s[2]
            s[2], s[4], s[5] = s[2] * scale, s[4] * scale, s[5] * scale
            s[0], s[6], s[7] = top_a, moved, first + place_a
        kappa = np.exp(s[6] - (s[0] - s[1]))
        if not kappa < RATIO:
            s[12] = np.nan
        for start in range(0, width, BLOCK):
            stop = min(start + BLOCK, width)
            more_a, more_b, more_s, more_t, broken_a, broken_b = _sums(a[start:stop], b[start:stop], np.float32(s[0]), np.float32(s[1]), np.float32(s[6]), np.float32(kappa))
            s[2] += more_a
            s[3] += more_b
            s[4] += more_s
            s[5] += more_t
            s[11] += broken_a
            s[12] += broken_b
        target = targets[row] - first
        if 0 <= target < width:
            s[9], s[10] = a[target], b[target]


@njit(nogil=True, fastmath=_LOOP, forceinline=True)
def _weights(a, top):  # noqa: ANN001, ANN202
    """A of one block, and NaN where an entry is not finite."""
    zero, low = np.float32(0.0), np.float32(-87.0)
    total = broken = zero
    for i in range(a.shape[0]):
        broken += a[i] * zero
        total += _exp(max(a[i] - top, low))
    return total, broken


@njit(cache=True, nogil=True)
def loss_tile(logits, first, targets, state):  # noqa: ANN001, ANN201
    """`compare_tile` for one model alone; ``state`` ``[rows, ONE_STATE]``."""
    rows, width = logits.shape
    for row in range(rows):
        a, s = logits[row], state[row]
        top, _ = _top(a)
        if top > s[0]:
            s[1] *= np.exp(s[0] - top)
            s[0] = top
        for start in range(0, width, BLOCK):
            more, broken = _weights(a[start : min(start + BLOCK, width)], np.float32(s[0]))
            s[1] += more
            s[3] += broken
        target = targets[row] - first
        if 0 <= target < width:
            s[2] = a[target]


def comparison(state: np.ndarray) -> dict[str, np.ndarray]:
    """Per row, from the state after the last tile: ``nll_ref``, ``nll_cand``, ``kl``, ``delta_p``, ``confidence`` float32, ``agree`` bool; ``finite_ref`` and ``finite`` bool.

    Where a logit of either model was not finite, ``finite`` is False and only ``nll_ref`` and ``confidence`` may mean something: where ``finite_ref``.
    """
    top_a, top_b, a, b, s, t, c, place_a, place_b, target_a, target_b, broken_a, broken_b = state.T
    with np.errstate(all="ignore"):
        log_a, log_b = np.log(a), np.log(b)
        off = (top_a - top_b - c) + (log_a - log_b)
        near = np.where(np.abs(off) < 1e-4, off * off * (0.5 - off / 6), np.expm1(-off) + off)
        # where c was far off, S and what is taken off it are large; T is then the better sum
        kl = np.where(np.abs(off) < 1.0, s / a - near, t / a - off)
        log_p, log_q = target_a - top_a - log_a, target_b - top_b - log_b
        found = {"nll_ref": -log_p, "nll_cand": -log_q, "kl": np.maximum(kl, 0.0), "delta_p": np.exp(log_q) - np.exp(log_p), "confidence": 1 / a}
    found = {name: values.astype(np.float32) for name, values in found.items()}
    return found | {"agree": place_a == place_b, "finite_ref": ~np.isnan(broken_a), "finite": ~np.isnan(broken_a + broken_b)}


def losses(state: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """``-log p(target)`` float64 ``[rows]``, and bool ``[rows]``: every logit was finite. Where that is False the loss means nothing."""
    top, total, target, broken = state.T
    with np.errstate(all="ignore"):
        return top + np.log(total) - target, ~np.isnan(broken)
