"""Which token does a distribution give for a number that was drawn between 0 and 1?

The first one at which the sum of the probabilities exceeds that number. The sum is taken in two steps: over pieces of the vocabulary where the probabilities lie, in an order that is always the same, and within one piece on
the CPU; so a device hands over some hundred numbers per token and not all, and nothing has to be drawn for each word.
"""

from __future__ import annotations

import torch
from torch.nn.functional import pad

PIECE = 512
"""words whose probabilities are summed at first"""


def drawn(probabilities: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """int64 ``[tokens]`` on the device of ``probabilities`` fp32 ``[tokens, vocabulary]``, which need not sum to 1. ``numbers`` fp64 ``[tokens]``, at least 0 and below 1, on the CPU. A token of probability 0 is never given."""
    vocabulary = probabilities.shape[1]
    if rest := -vocabulary % PIECE:
        probabilities = pad(probabilities, (0, rest))
    pieces = probabilities.unflatten(1, (-1, PIECE))
    sums = pieces.sum(-1).double().cpu()
    until = sums.cumsum(1)
    wanted = numbers * until[:, -1]
    piece = _first_above(until, wanted)
    rows = torch.arange(len(sums))
    within = pieces[rows.to(pieces.device), piece.to(pieces.device)].double().cpu().cumsum(1)
    place = _first_above(within, wanted - (until - sums)[rows, piece])
    return (piece * PIECE + place).to(probabilities.device)


def _first_above(rising: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Per row the first place that is above ``wanted``, or where rounding leaves none, the first of those that are the highest."""
    last = torch.searchsorted(rising, rising[:, -1:].contiguous())
    return torch.minimum(torch.searchsorted(rising, wanted.unsqueeze(1), right=True), last).squeeze(1)
