"""How is a product of bf16 matrices added to an fp32 sum, where the library rounds each product to bf16?

A CPU's matrix units sum in fp32, but torch hands the result out in bf16 only. What that rounding took away is had from a second product, which starts at minus the first one's
result: together they hold some 17 bits. A GPU's are handed out as they were summed (`device.wide_product`).
"""

from __future__ import annotations

import torch

from qmerge.device import wide_product

PIECE = 512
"""tokens whose product is rounded at a time; with fewer, adding takes longer than multiplying"""


def add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor, exact: bool = True) -> None:
    """``total += left @ right``; ``total`` fp32 ``[m, n]``, ``left`` ``[m, k]`` and ``right`` ``[k, n]`` both fp32 or both bf16. Not ``exact``: a bf16 product is rounded to bf16 first,
    for half the time; that is 2⁻⁹ of each element, which averages out over the batches that are summed."""
    if left.dtype == torch.float32:
        total.addmm_(left, right)
        return
    if (whole := wide_product(left, right)) is not None:
        total.add_(whole)
        return
    first = torch.mm(left, right)
    total.add_(first)
    if exact:
        total.add_(torch.addmm(first, left, right, beta=-1))


def add_in_pieces(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """`add_product` for half the time where a bf16 product is rounded to bf16: ``PIECE`` of the inner dimension at a time, so that what rounding takes from each piece averages out over them. Of 32,768 tokens
    it leaves 2⁻¹² of each element."""
    if left.dtype == torch.float32 or left.device.type != "cpu":
        add_product(total, left, right)
        return
    for one, other in zip(left.split(PIECE, 1), right.split(PIECE), strict=True):
        add_product(total, one, other, exact=False)


def times(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """``left @ right`` fp32 for ``left`` fp32 ``[m, k]``. Where ``right`` ``[k, n]`` is bf16, so are both factors and, on a CPU, what comes out: 2⁻⁹ of each element, which averages out where many of them are summed."""
    if right.dtype == torch.float32:
        return left @ right
    left = left.to(right.dtype)
    return (left @ right).float() if (whole := wide_product(left, right)) is None else whole
