"""How does the reference answer every arm without running anew for each of them?

Its last hidden states are kept (they are narrow where logits are as wide as the vocabulary) and its own head is applied to them again. Where a
model does more after its head (soft-capping, say) the first batch shows it, and the whole model runs each time.
"""

from __future__ import annotations

import torch
from torch import nn

CACHE_BYTES = 3 * 2**30


class Reference:
    """``logits(ids, key)`` of one model; equal ``key`` must mean equal ``ids``."""

    def __init__(self, model: nn.Module, cache_bytes: int = CACHE_BYTES) -> None:
        self.model, self.room = model, cache_bytes
        self.kept: dict[object, torch.Tensor] = {}
        self.head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        self.usable: bool | None = None if self.head is not None else False

    def logits(self, ids: torch.Tensor, key: object) -> torch.Tensor:
        """fp32 or fp16 ``[B, T, V]`` for ids int64 ``[B, T]``."""
        if key in self.kept:
            return self.head(self.kept[key])
        seen: list[torch.Tensor] = []
        handle = self.head.register_forward_pre_hook(lambda _, args: seen.append(args[0])) if self.usable is not False else None
        try:
            logits = self.model(input_ids=ids, use_cache=False).logits
        finally:
            if handle:
                handle.remove()
        if handle and self.usable is None:
            # the head must be the last step, and see every position
            self.usable = len(seen) == 1 and torch.equal(self.head(seen[0]), logits)
        if self.usable and seen[0].nbytes <= self.room:
            self.kept[key] = seen[0]
            self.room -= seen[0].nbytes
        return logits
