"""How much of what an adapter adds to a weight is left in the weight that is served?"""

from __future__ import annotations

import torch


def delta_survival(out: torch.Tensor, base: torch.Tensor, delta: torch.Tensor) -> float:
    """``<W_out - W_base, ΔW> / <ΔW, ΔW>``: 1 the fine-tune is kept in full, 0 it is gone. All ``[out, in]``."""
    size = float((delta.double() * delta.double()).sum())
    return float(((out.double() - base.double()) * delta.double()).sum()) / size if size else float("nan")
