"""What is the largest magnitude of each block of a weight, in plain tensor code?"""

from __future__ import annotations

import torch


def block_maxima(weight: torch.Tensor, block_size: int) -> torch.Tensor:
    """``max|w|`` of each run of ``block_size`` elements of the flattened weight, fp32 ``[blocks]``."""
    flat = weight.reshape(-1)
    return torch.nn.functional.pad(flat, (0, -flat.numel() % block_size)).reshape(-1, block_size).abs().amax(dim=1).float()
