"""Up to which rank does torch on this CPU sum a product of low rank from its first to its last, one fused multiply-add after the other, as the kernel for GPUs does?

    python scripts/sum_order.py      # one line for each library: the ranks at which some element of some shape differs in a bit
"""

from __future__ import annotations

from contextlib import nullcontext

import torch

from qmerge.device import exact_products

RANKS = (1, 4, 8, 13, 16, 32, 64, 96, 128, 160, 192, 224, 256, 320, 384, 448, 512, 640, 768)
SHAPES = ((256, 1024), (73, 1536), (100, 100), (32, 64), (16, 48))


def in_order(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """fp64 holds each product whole; what it rounds of a sum turns the fp32 result once in 2^29."""
    total = torch.zeros(left.shape[0], right.shape[1])
    for k in range(right.shape[0]):
        total = (left[:, k : k + 1].double() * right[k].double() + total).float()
    return total


def differs(rank: int, rows: int, columns: int) -> int:
    generator = torch.Generator().manual_seed(rank)
    left, right = torch.randn(rows, rank, generator=generator), torch.randn(rank, columns, generator=generator)
    return int((torch.mm(left, right) != in_order(left, right)).sum())


def main() -> None:
    torch.set_num_threads(1)
    for name, context in (("torch as it comes", nullcontext()), ("as qmerge takes products here", exact_products())):
        with context:
            found = {rank: sum(differs(rank, *shape) for shape in SHAPES) for rank in RANKS}
        total = sum(rows * columns for rows, columns in SHAPES)
        print(f"{name}: " + (", ".join(f"rank {rank}: {count} of {total} differ" for rank, count in found.items() if count) or "none differs"))


if __name__ == "__main__":
    main()
