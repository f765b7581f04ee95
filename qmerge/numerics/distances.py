"""How far apart are two distributions over the vocabulary?"""

from __future__ import annotations

import torch


def token_divergence(reference: torch.Tensor, candidate: torch.Tensor) -> torch.Tensor:
    """KL(reference ‖ candidate) per token in nats, fp32 ``[tokens]``, from logits ``[tokens, vocabulary]``; log-softmax in fp32, sum in fp64."""
    p, q = reference.float().log_softmax(-1), candidate.float().log_softmax(-1)
    return (p.double().exp() * (p.double() - q.double())).sum(-1).float()
