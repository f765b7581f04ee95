"""How far are two next-token distributions apart, from the logits of both? In torch, on any device; `qmerge.quality.fused` has the same in one reading on a CPU."""

from __future__ import annotations

import math

import torch


def compare_logits(ref: torch.Tensor, cand: torch.Tensor, targets: torch.Tensor) -> dict[str, torch.Tensor]:
    """The per-token numbers from logits ``[n, V]`` of both models and targets ``[n]``: log-softmax in fp32, the sum of KL in fp64.

    KL is summed as ``p·(log p - log q) - p + q``: the same number, as both sum to 1, but no term is below 0, and an error ε in a
    normalization costs ε² instead of ε. In the plain form fp32 leaves 1e-7, which is more than some noise floors.

    >>> r = compare_logits(torch.zeros(1, 2), torch.zeros(1, 2), torch.tensor([0]))
    >>> float(r["kl"]), round(float(r["nll_ref"]), 4)
    (0.0, 0.6931)
    """
    log_p, log_q = ref.float().log_softmax(-1), cand.float().log_softmax(-1)
    p = log_p.exp()
    top, first = p.max(-1)
    target_p, target_q = (x.gather(-1, targets[:, None]).squeeze(-1) for x in (log_p, log_q))
    return {
        "nll_ref": -target_p,
        "nll_cand": -target_q,
        "kl": divergence(log_p, log_q).float(),
        "agree": first == log_q.argmax(-1),
        "delta_p": target_q.exp() - target_p.exp(),
        "confidence": top,
    }


def divergence(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """KL(p ‖ q) float64 ``[n]`` from log-probabilities ``[n, V]``, in the form that `compare_logits` tells of."""
    p, q, difference = log_p.exp(), log_q.exp(), log_p - log_q
    terms = torch.where(difference.abs() < 1.0, p * (torch.expm1(-difference) + difference), p * difference - p + q)
    # What p excludes (log p = -inf) adds only q; 0 * inf would be NaN. NaN itself stays, to be counted.
    terms = torch.where(p == 0, q, terms)
    return terms.sum(-1, dtype=torch.float64).clamp_min(0.0)  # rounding can leave -1e-9


def support_divergence(ref: torch.Tensor, cand: torch.Tensor) -> torch.Tensor:
    """Jensen-Shannon divergence float32 ``[n]``, nats, from logits ``[n, V]`` and ``[n, V']``, where one model gives a token no probability at all and the
    other does (it lacks it, or its logit is -inf); NaN elsewhere. KL is infinite there, or blind to what was cut; this is at most log 2.

    >>> support_divergence(torch.zeros(1, 1), torch.tensor([[-torch.inf, 0.0]])).item() == torch.tensor(2.0).log().item()
    True
    """
    differ = supports_differ(ref, cand)
    width = max(ref.shape[-1], cand.shape[-1])
    found = torch.full(differ.shape, torch.nan, device=ref.device)
    if differ.any():
        log_p, log_q = (torch.nn.functional.pad(x[differ].float().log_softmax(-1), (0, width - x.shape[-1]), value=-torch.inf) for x in (ref, cand))
        middle = torch.logaddexp(log_p, log_q) - math.log(2)
        found[differ] = (0.5 * (divergence(log_p, middle) + divergence(log_q, middle))).float()
    return found


def supports_differ(ref: torch.Tensor, cand: torch.Tensor) -> torch.Tensor:
    """Bool ``[n]``: one of the models gives a token no probability at all, and the other does."""
    width = max(ref.shape[-1], cand.shape[-1])
    without = [torch.nn.functional.pad(logits.isneginf(), (0, width - logits.shape[-1]), value=True) for logits in (ref, cand)]
    return (without[0] != without[1]).any(-1)
