"""How does a model answer at chosen positions, without the logits of whole windows, and without running the reference anew for every arm?

A model's last hidden states are narrow where logits are as wide as the vocabulary. They are taken where they enter the output head (which is
stood in for, so that the wide logits are never made), and the head is applied to a few rows of them at a time. What some models do behind
their head (soft-capping, scaling) is read from their config, and believed only if a first short run gives the model's own logits bit for bit.
Where it does not, the whole model runs and its logits stay whole (``whole`` says so).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

CACHE_BYTES = 3 * 2**30
PROBE_TOKENS = 8
"""as many tokens of the first window show whether the head is the last step"""
Step = Callable[[torch.Tensor], torch.Tensor]


class Answers:
    """One model: ``states`` runs it over windows, ``logits`` turns chosen rows of the states into logits.

    With ``cache_bytes`` the states are kept under the ``key`` given with them; equal keys must mean equal ids."""

    def __init__(self, model: Any, cache_bytes: int = 0) -> None:
        self.model, self.room = model, cache_bytes
        self.kept: dict[object, torch.Tensor] = {}
        self.head: Any = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        self.width = 0
        """logits per position; known after the first ``states``"""
        self.after: Step | None = None
        """what follows the head, where that is known"""

    @property
    def whole(self) -> bool:
        """True where the logits of whole windows had to be held."""
        return bool(self.width) and self.after is None

    @property
    def splits(self) -> bool:
        """True where logits of a part of the vocabulary come from a part of the head. Known after the first ``states``."""
        bare = type(self.head) is nn.Linear and not (self.head._forward_hooks or self.head._forward_pre_hooks or "forward" in self.head.__dict__)
        return self.after is not None and bare and self.head.weight.shape[0] == self.width

    def prepare(self, ids: torch.Tensor) -> None:
        """Find out ``width`` and ``whole`` from the first tokens of ids int64 ``[B, T]``, where that is not yet known."""
        if not self.width:
            self._probe(ids[:1, :PROBE_TOKENS])

    def states(self, ids: torch.Tensor, key: object = None) -> torch.Tensor:
        """``[B, T, hidden]``, or ``[B, T, V]`` where ``whole``, for ids int64 ``[B, T]``."""
        if key is not None and key in self.kept:
            return self.kept[key]
        self.prepare(ids)
        if self.after is None:
            logits: torch.Tensor = self.model(input_ids=ids, use_cache=False).logits
            return logits
        with self._seen_by_head(narrow=True) as seen:
            self.model(input_ids=ids, use_cache=False)
        if key is not None and seen[0].nbytes <= self.room:
            self.kept[key] = seen[0]
            self.room -= seen[0].nbytes
        return seen[0]

    def logits(self, states: torch.Tensor, first: int = 0, stop: int | None = None) -> torch.Tensor:
        """``[..., V]`` from ``[..., hidden]`` rows of what ``states`` gave, in the model's dtype; of the entries from ``first`` to ``stop`` alone."""
        if self.after is None:
            return states[..., first:stop]
        if not self.splits or (first == 0 and stop in (None, self.width)):
            return self.after(self.head(states))[..., first:stop]
        bias = None if self.head.bias is None else self.head.bias[first:stop]
        return self.after(nn.functional.linear(states, self.head.weight[first:stop], bias))

    def _probe(self, ids: torch.Tensor) -> None:
        with self._seen_by_head(narrow=False) as seen:
            logits = self.model(input_ids=ids, use_cache=False).logits
        self.width = logits.shape[-1]
        # the head must see every position, once
        if len(seen) == 1 and seen[0].shape[:2] == logits.shape[:2]:
            self.after = next((step for step in _steps(self.model) if _same(step(self.head(seen[0])), logits)), None)

    @contextmanager
    def _seen_by_head(self, narrow: bool) -> Iterator[list[torch.Tensor]]:
        """What the head gets, while this lasts. ``narrow``: the head gives back a single column instead of logits."""
        seen: list[torch.Tensor] = []
        if self.head is None:
            yield seen
            return
        before = self.head.__dict__.get("forward")
        inner = self.head.forward

        def stand_in(states: torch.Tensor, *args: object, **options: object) -> torch.Tensor:
            seen.append(states)
            return states[..., :1] if narrow else inner(states, *args, **options)

        self.head.forward = stand_in
        try:
            yield seen
        finally:
            del self.head.forward
            if before is not None:
                self.head.forward = before


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Bit for bit; a NaN (a broken model's answer) is like another."""
    return one.shape == other.shape and bool(((one == other) | (one.isnan() & other.isnan())).all())


def _steps(model: nn.Module) -> Iterator[Step]:
    """What may follow a head, by the names that transformers' configs have for it."""
    config = getattr(model, "config", None)
    cap, scale, divisor = (getattr(config, name, None) for name in ("final_logit_softcapping", "logit_scale", "logits_scaling"))
    yield lambda logits: logits
    if cap:
        yield lambda logits: torch.tanh(logits / cap) * cap
    if scale:
        yield lambda logits: logits * scale
    if divisor:
        yield lambda logits: logits / divisor
