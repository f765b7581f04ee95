"""What does a LoRA pair add to a weight, and was it added?"""

from __future__ import annotations

import torch


def lora_delta(a: torch.Tensor, b: torch.Tensor, scaling: float) -> torch.Tensor:
    """``scaling * B @ A`` in fp32. A ``[rank, in]``, B ``[out, rank]``, result ``[out, in]``. Source: LoRA (Hu et al., 2021)."""
    return (b.float() @ a.float()) * scaling


def merge_error(before: torch.Tensor, after: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float, seed: int = 0) -> float:
    """Independent proof of a merge: ``‖(W' - W)x - s·B(Ax)‖ / ‖s·B(Ax)‖`` on random x, in fp64; it never forms ``B @ A``.

    ``before`` and ``after`` are ``[out, in]``. 0 where the adapter adds nothing and nothing was added; inf where only one of the two is zero.
    """
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(before.shape[1], 4, generator=generator, dtype=torch.float64).to(before.device)
    added = (after.double() - before.double()) @ x
    wanted = scaling * (b.double() @ (a.double() @ x))
    size, error = float(wanted.norm()), float((added - wanted).norm())
    if size == 0.0:
        return 0.0 if error == 0.0 else float("inf")
    return error / size


def delta_survival(out: torch.Tensor, base: torch.Tensor, delta: torch.Tensor) -> float:
    """``<W_out - W_base, ΔW> / <ΔW, ΔW>``: 1 the fine-tune is kept in full, 0 it is gone. All ``[out, in]``."""
    size = float((delta.double() * delta.double()).sum())
    return float(((out.double() - base.double()) * delta.double()).sum()) / size if size else float("nan")
