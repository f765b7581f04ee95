"""How do several ranks share the answers to benchmark items? lm-eval's own batches are dealt out to them.

lm-eval has a way of its own, for models that accelerate has started on several devices: each rank takes every n-th item. It then draws the examples of few-shot prompts for each rank anew, and
fails on a task with fewer items than ranks: other prompts than those of one rank, which nothing could be compared with. Here every rank writes all prompts, as one rank would, and answers some of
the batches. Answers travel as JSON.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from qmerge.ranks import Ranks

ADAPTIVE = 64
"""requests that are dealt out together where lm-eval is to find the size of a batch by itself"""


class Turns:
    """Batches go to the ranks in turn, over all calls of one model; every rank must make the same calls."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks, self._given = ranks, 0

    def answers(self, requests: Sequence[Any], batches: Sequence[Sequence[int]], ask: Callable[[list[Any]], list[Any]]) -> list[Any]:
        """One answer for each of the ``requests``, in their order. ``batches``: which of them lm-eval would put together, by place; ``ask``: lm-eval's own way, for some of them."""
        mine = sorted(place for number, batch in enumerate(batches, self._given) if number % self.ranks.size == self.ranks.rank for place in batch)
        self._given += len(batches)
        own = ask([requests[place] for place in mine]) if mine else []
        found: list[Any] = [None] * len(requests)
        for places, answers in self.ranks.hear([mine, own]):
            for place, answer in zip(places, answers, strict=True):
                found[place] = tuple(answer) if isinstance(answer, list) else answer
        return found


def scored(requests: Sequence[tuple[Any, list[int], list[int]]], size: int | str) -> list[list[int]]:
    """The batches of (text, context's tokens, continuation's tokens), as HFLM makes them: what differs in the last token alone is run once, long ones come first."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for place, (_, context, continuation) in enumerate(requests):
        groups.setdefault(tuple(context + continuation[:-1]), []).append(place)

    def order(places: list[int]) -> tuple[int, list[int]]:
        _, context, continuation = requests[max(places, key=lambda place: len(requests[place][2]))]
        return -len(context + continuation), context + continuation

    ordered = sorted(groups.values(), key=order)
    return _cut(ordered, size)


def written(requests: Sequence[tuple[str, dict[str, Any]]], size: int | str, tokens: Callable[[str], list[int]]) -> list[list[int]]:
    """The batches of (prompt, settings of its continuation), as HFLM makes them: those of one setting together, long ones first."""
    groups: dict[str, list[int]] = {}
    for place, (_, settings) in enumerate(requests):
        groups.setdefault(repr(sorted(settings.items())), []).append(place)
    found = list[list[int]]()
    for places in groups.values():
        ordered = sorted(places, key=lambda place: (-len(tokens(requests[place][0])), requests[place][0]))
        found += _cut([[place] for place in ordered], size)
    return found


def _cut(groups: Sequence[Sequence[int]], size: int | str) -> list[list[int]]:
    step = size if isinstance(size, int) else ADAPTIVE
    return [[place for group in groups[start : start + step] for place in group] for start in range(0, len(groups), step)]
