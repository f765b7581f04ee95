"""Divergences of two answers, token by token and entry by entry, in fp64 and plain Python."""

from __future__ import annotations

import math
from typing import Any


def probabilities(logits: list[float]) -> list[float]:
    top = max(logits)
    parts = [math.exp(x - top) for x in logits]
    return [part / math.fsum(parts) for part in parts]


def kl(p: list[float], q: list[float]) -> float:
    return math.fsum(a * math.log(a / b) if b else math.inf for a, b in zip(p, q, strict=True) if a)


def js(p: list[float], q: list[float]) -> float:
    """p and q over their own vocabularies; what one lacks has probability 0."""
    size = max(len(p), len(q))
    p, q = p + [0.0] * (size - len(p)), q + [0.0] * (size - len(q))
    middle = [(a + b) / 2 for a, b in zip(p, q, strict=True)]
    return (kl(p, middle) + kl(q, middle)) / 2


def quantile(values: list[float], level: float) -> float:
    """The smallest value that at least this share of the values does not exceed."""
    ranked = sorted(values)
    return ranked[max(0, math.ceil(level * len(ranked) - 1e-9) - 1)]


def summary(reference: list[list[float]], candidate: list[list[float]], targets: list[int], edges: tuple[float, ...]) -> dict[str, Any]:
    """Everything that a text's row says about tokens, from logits of both models and the tokens that came."""
    kls, hits, moves, buckets, bad = [], 0, [], [[] for _ in edges[1:]], 0
    for ref, cand, target in zip(reference, candidate, targets, strict=True):
        if not all(map(math.isfinite, (*ref, *cand))):
            bad += 1
            continue
        p, q = probabilities(ref), probabilities(cand)
        kls.append(kl(p, q))
        hits += p.index(max(p)) == q.index(max(q))
        moves.append(q[target] - p[target])
        buckets[next(i for i, high in enumerate(edges[1:]) if max(p) < high or high == edges[-1])].append(kls[-1])
    return {
        "kl_mean": math.fsum(kls) / len(kls),
        **{name: quantile(kls, level) for name, level in (("kl_median", 0.5), ("kl_p90", 0.9), ("kl_p99", 0.99), ("kl_p999", 0.999))},
        "top1_agreement": hits / len(kls),
        "delta_p_rms": math.sqrt(math.fsum(move * move for move in moves) / len(moves)),
        "nonfinite": bad,
        "buckets": [(len(rows), math.fsum(rows) / len(rows) if rows else None) for rows in buckets],
    }
