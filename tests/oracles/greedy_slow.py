"""Greedy continuation without a cache, without a batch, without padding: the whole text through the model for every token."""

from __future__ import annotations

from typing import Any

import torch


def continued(model: Any, prompt: list[int], new_tokens: int, eos: set[int]) -> list[int]:
    """The continuation, ended by an end token where one comes."""
    ids = list(prompt)
    for _ in range(new_tokens):
        with torch.no_grad():
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] in eos:
            break
    return ids[len(prompt) :]


def first_difference(ours: list[int], theirs: list[int], length: int) -> int:
    """Index of the first token that differs, a text that has ended differing from one that goes on; ``length`` where they are equal."""
    for at in range(max(len(ours), len(theirs))):
        if at >= len(ours) or at >= len(theirs) or ours[at] != theirs[at]:
            return at
    return length
