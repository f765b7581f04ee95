"""How is the triangular root of an inverse found in the memory of the matrix itself?

A matrix of the widest inputs is gigabytes in fp64, so nothing here makes a second one: the library's factorization works in place, and the triangle is inverted by halves, a strip at a time.
"""

from __future__ import annotations

import torch

LEAF = 128
"""columns of a triangular matrix that are inverted by substitution"""
STRIP = 512
"""rows or columns of a product that replaces one of its factors"""


def inverse_root(matrix: torch.Tensor) -> torch.Tensor | None:
    """Upper triangular U with ``UᵀU = M⁻¹`` for symmetric ``matrix`` M ``[n, n]``, in its dtype; None where M is not positive definite."""
    work = matrix.flip(0, 1)
    return work.T.flip(0, 1).contiguous() if invert_flipped_(work) else None


def invert_flipped_(work: torch.Tensor) -> bool:
    """``work`` is a symmetric matrix M with its rows and columns in reverse, contiguous; it becomes Uᵀ in reverse, with U as in `inverse_root`: ``U = work.T.flip(0, 1)``. False where M is not
    positive definite; ``work`` then holds nothing of use.

    M is so taken apart from its last column to its first (M = R Rᵀ, R upper triangular); U is R⁻¹, and no inverse of M is formed.
    """
    info = torch.empty((), dtype=torch.int32, device=work.device)
    lower = work.T  # the library's order: columns one after the other
    torch.linalg.cholesky_ex(lower, out=(lower, info))
    if int(info):
        return False
    _invert_upper_(work)
    return True


def _invert_upper_(upper: torch.Tensor) -> None:
    """An upper triangular matrix becomes its inverse: two products a level, and little work on zeros."""
    size = upper.shape[0]
    if size <= LEAF:
        upper.copy_(torch.linalg.solve_triangular(upper, torch.eye(size, dtype=upper.dtype, device=upper.device), upper=True))
        return
    half = size // 2
    first, last, corner = upper[:half, :half], upper[half:, half:], upper[:half, half:]
    _invert_upper_(first)
    _invert_upper_(last)
    for start in range(0, half, STRIP):  # first @ corner: what a row needs of the corner lies in it and below it
        corner[start : start + STRIP] = first[start : start + STRIP, start:] @ corner[start:]
    for start in reversed(range(0, size - half, STRIP)):  # -corner @ last: what a column needs lies in it and to its left
        stop = min(start + STRIP, size - half)
        corner[:, start:stop] = (corner[:, :stop] @ last[:stop, start:stop]).neg_()
