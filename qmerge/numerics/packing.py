"""How do small integers lie in int32 words?"""

from __future__ import annotations

import torch


def pack_rows(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Integers ``[n, m]`` to int32 ``[n * bits / 32, m]``; value ``i`` of a column fills bits ``i * bits`` upward of its word.

    ``n`` must be a multiple of ``32 / bits``, and ``bits`` must divide 32.
    """
    per_word = 32 // bits
    words = values.to(torch.int64).reshape(-1, per_word, values.shape[1])
    shifts = (torch.arange(per_word, device=values.device) * bits).view(1, -1, 1)
    packed = (words << shifts).sum(dim=1)
    return torch.where(packed >= 2**31, packed - 2**32, packed).to(torch.int32)


def unpack_rows(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """The inverse of `pack_rows`: int32 ``[k, m]`` to uint8 ``[k * 32 / bits, m]``."""
    per_word = 32 // bits
    shifts = (torch.arange(per_word, device=packed.device) * bits).view(1, -1, 1)
    values = (packed.to(torch.int64).unsqueeze(1) >> shifts) & (2**bits - 1)
    return values.reshape(-1, packed.shape[1]).to(torch.uint8)
