"""How much of what an adapter adds to a weight is left in the weight that is served?"""

from __future__ import annotations

import torch

ROWS = 512
"""of a weight that are compared in fp64 together"""


def delta_survival(out: torch.Tensor, base: torch.Tensor, delta: torch.Tensor) -> float:
    """``<W_out - W_base, ΔW> / <ΔW, ΔW>``: 1 the fine-tune is kept in full, 0 it is gone. All ``[out, in]``."""
    kept = size = 0.0
    for rows in zip(*(part.split(ROWS) for part in (out, base, delta)), strict=True):
        there, before, added = (part.double() for part in rows)
        size += float((added * added).sum())
        kept += float(((there - before) * added).sum())
    return kept / size if size else float("nan")
