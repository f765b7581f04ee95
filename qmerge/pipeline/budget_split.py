"""How are stored bytes divided among groups of linears so that the expected loss is least?

One choice per group, sizes that add up and losses that add up: a knapsack with classes, solved exactly over the sizes' common step where that is coarse enough.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from math import gcd
from typing import TypeVar

import numpy as np

Key = TypeVar("Key", bound=Hashable)
Option = TypeVar("Option", bound=Hashable)
MAX_STEPS = 100_000
"""finest division of what may be spent above the cheapest choices; sizes that it does not divide count a step more, and what is left over is filled afterwards"""


def allocate(
    losses: Mapping[Key, Mapping[Option, float]], sizes: Mapping[Key, Mapping[Option, int]], budget: int, max_steps: int = MAX_STEPS
) -> dict[Key, Option]:
    """One option per group: the least sum of ``losses`` whose ``sizes`` (bytes) add up to at most ``budget``. Equal losses go to the smaller size.

    Raises `ValueError` where the cheapest options together exceed the budget.

    >>> allocate({"a": {4: 1.0, 8: 0.1}, "b": {4: 5.0, 8: 0.2}}, {"a": {4: 10, 8: 20}, "b": {4: 10, 8: 20}}, 35)
    {'a': 4, 'b': 8}
    """
    rows = {key: _useful(losses[key], sizes[key]) for key in losses}
    spare = budget - cheapest(sizes)
    if spare < 0:
        raise ValueError(f"the cheapest options need {budget - spare}, and the budget is {budget}")
    extra = {key: [size - options[0][1] for _, size, _ in options] for key, options in rows.items()}
    step = max(gcd(*(value for values in extra.values() for value in values)), 1)
    step = step if spare // step <= max_steps else -(-spare // max_steps)
    picked = _knapsack(
        [[(-(-value // step), loss) for value, (_, _, loss) in zip(extra[key], rows[key], strict=True)] for key in rows], spare // step
    )
    chosen = dict(zip(rows, picked, strict=True))
    _fill(rows, chosen, spare - sum(extra[key][number] for key, number in chosen.items()))
    return {key: rows[key][number][0] for key, number in chosen.items()}


def cheapest(sizes: Mapping[Key, Mapping[Option, int]]) -> int:
    """The least that all groups together can take, bytes."""
    return sum(min(options.values()) for options in sizes.values())


def _useful(losses: Mapping[Option, float], sizes: Mapping[Option, int]) -> list[tuple[Option, int, float]]:
    """(option, size, loss) by size, without options that another one beats or equals in both."""
    found: list[tuple[Option, int, float]] = []
    for option in sorted(losses, key=lambda option: (sizes[option], losses[option])):
        if not found or losses[option] < found[-1][2]:
            found.append((option, sizes[option], losses[option]))
    return found


def _knapsack(classes: list[list[tuple[int, float]]], room: int) -> list[int]:
    """Which (steps, loss) of each class: exact dynamic programming over 0..``room`` steps."""
    best = np.zeros(room + 1)
    picks = []
    for options in classes:
        total, pick = np.full(room + 1, np.inf), np.zeros(room + 1, dtype=np.int16)
        for number, (steps, loss) in enumerate(options):
            if steps > room:
                continue
            value = best[: room + 1 - steps] + loss
            better = value < total[steps:]
            total[steps:][better], pick[steps:][better] = value[better], number
        best = total
        picks.append(pick)
    found, left = [], int(best.argmin())
    for options, pick in zip(reversed(classes), reversed(picks), strict=True):
        found.append(int(pick[left]))
        left -= options[found[-1]][0]
    return found[::-1]


def _fill(rows: Mapping[Key, list[tuple[Option, int, float]]], chosen: dict[Key, int], left: int) -> None:
    """Spend what is ``left`` (sizes were counted in whole steps) on the largest gain that fits, again and again."""
    while True:
        gains = []
        for place, (key, number) in enumerate(chosen.items()):
            _, size, loss = rows[key][number]
            gains += [
                (loss - row[2], -place, key, other, row[1] - size)
                for other, row in enumerate(rows[key])
                if row[2] < loss and row[1] - size <= left
            ]
        if not gains:
            return
        _, _, key, chosen[key], spent = max(gains, key=lambda gain: gain[:2])
        left -= spent
