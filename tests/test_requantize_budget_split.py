"""How bytes are divided among groups of linears: against every combination, on small problems."""

from __future__ import annotations

import itertools
import random

import pytest

from qmerge.pipeline.budget_split import allocate


def problem(dice: random.Random, step: int) -> tuple[dict, dict]:
    groups = range(dice.randint(1, 5))
    options = {group: range(dice.randint(1, 4)) for group in groups}
    sizes = {group: {option: step * dice.randint(1, 60) for option in options[group]} for group in groups}
    return {group: {option: dice.random() * 10 ** dice.uniform(-3, 0) for option in options[group]} for group in groups}, sizes


def total(table: dict, chosen: dict) -> float:
    return sum(table[group][option] for group, option in chosen.items())


@pytest.mark.parametrize("step", [1, 8])
def test_allocation_is_the_best_of_all(step):
    """Bytes spent where they gain less than elsewhere, or more bytes than there are: against every combination."""
    dice = random.Random(step)
    for _ in range(150):
        losses, sizes = problem(dice, step)
        every = [dict(zip(losses, picks, strict=True)) for picks in itertools.product(*losses.values())]
        budget = dice.randint(min(total(sizes, one) for one in every), max(total(sizes, one) for one in every))
        found = allocate(losses, sizes, budget)
        best = min(total(losses, one) for one in every if total(sizes, one) <= budget)
        assert total(sizes, found) <= budget and total(losses, found) == pytest.approx(best, rel=1e-12)


def test_allocation_with_coarse_steps_fits_and_fills():
    """Sizes rounded to a coarse step (what large models with awkward shapes get) going over the budget, or leaving room in which some group could still gain."""
    dice = random.Random(3)
    for _ in range(150):
        losses, sizes = problem(dice, 1)
        least, most = (sum(pick(options.values()) for options in sizes.values()) for pick in (min, max))
        budget = dice.randint(least, most)
        found = allocate(losses, sizes, budget, max_steps=7)
        left = budget - total(sizes, found)
        assert left >= 0
        for group, option in found.items():
            assert not [
                other
                for other in sizes[group]
                if losses[group][other] < losses[group][option] and sizes[group][other] - sizes[group][option] <= left
            ]


def test_allocation_below_the_cheapest_is_an_error():
    """A budget that cannot be kept answered with a result that breaks it."""
    with pytest.raises(ValueError, match="need 20"):
        allocate({"a": {4: 1.0}, "b": {4: 1.0}}, {"a": {4: 10}, "b": {4: 10}}, 19)
