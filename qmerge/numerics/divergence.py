"""How far is one next-token distribution from another, and in which direction does that fall?"""

from __future__ import annotations

import torch


def divergence(teacher: torch.Tensor, student: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits ``[..., V]`` of both to (KL(teacher ‖ student) in nats ``[...]`` fp64, its gradient by the student's logits ``[..., V]`` fp32).

    Summed as ``p·(log p - log q) - p + q``: the same number, but no term is below 0 and an error of a normalization costs its square. The gradient is q - p.

    >>> divergence(torch.tensor([0.0, 0.0]), torch.tensor([0.0, 0.0]))[1].tolist()
    [0.0, 0.0]
    """
    log_p, log_q = teacher.float().log_softmax(-1), student.float().log_softmax(-1)
    p, q, difference = log_p.exp(), log_q.exp(), log_p - log_q
    terms = torch.where(difference.abs() < 1.0, p * (torch.expm1(-difference) + difference), p * difference - p + q)
    return torch.where(p == 0, q, terms).sum(-1, dtype=torch.float64).clamp_min(0.0), q - p
