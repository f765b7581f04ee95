"""Which adapters are merged, with which weights, and what do they do to the base together?

By default the exact weighted sum of their deltas, ``W + Σ w_i ΔW_i``. PEFT's named combinations are made by `combine.py` with PEFT's results.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qmerge.adapters.adapter import Adapter, open_adapter
from qmerge.adapters.edits import Edit
from qmerge.adapters.replace import Replace, ReplaceRows
from qmerge.adapters.several import Chain, WeightedSum
from qmerge.errors import Refused, UsageProblem

SUM = "sum"


@dataclass(frozen=True)
class Choice:
    """One ``--adapter``: a folder or hub id (``folder#name`` for one of several in it) and its weight in the sum."""

    place: str
    weight: float = 1.0

    def __str__(self) -> str:
        return self.place if self.weight == 1.0 else f"{self.place}={self.weight:g}"


@dataclass(frozen=True)
class Combination:
    """How several adapters become one: ``how`` is ``sum`` or one of PEFT's names; ``density`` and ``rank`` are PEFT's; ``seed`` for those that drop at random."""

    how: str = SUM
    density: float | None = None
    rank: int | None = None
    seed: int = 0


@dataclass(frozen=True)
class AdapterSet:
    """What the user named with ``--adapter``, and how it is to be read and combined."""

    choices: tuple[Choice, ...]
    combination: Combination
    residual_base: bool = False
    allow_pickle: bool = False

    @classmethod
    def of(cls, *texts: str) -> AdapterSet:
        """From ``--adapter`` texts, summed."""
        return cls(tuple(parse_choice(text) for text in texts), Combination())

    @property
    def weights(self) -> list[float]:
        return [choice.weight for choice in self.choices]

    def open(self) -> tuple[Adapter, ...]:
        """Raises Refused as `open_adapter`."""
        return tuple(open_adapter(choice.place, allow_pickle=self.allow_pickle, residual_base=self.residual_base) for choice in self.choices)


def parse_choice(text: str) -> Choice:
    """``"tuned=0.5"`` to ``Choice("tuned", 0.5)``; a folder whose name holds ``=`` is taken as it is. Raises UsageProblem for a weight that is no number."""
    place, sign, weight = text.rpartition("=")
    if not sign or os.path.exists(text):  # pathlib raises for a name that is too long
        return Choice(text)
    try:
        value = float(weight)
        if not math.isfinite(value) or not place:
            raise ValueError
    except ValueError:
        raise UsageProblem("the weight of an adapter is no number", where=f"--adapter {text}", expected="--adapter FOLDER or --adapter FOLDER=WEIGHT", found=weight) from None
    return Choice(place, value)


def check_several(adapters: Sequence[Adapter], combination: Combination) -> list[str]:
    """Refused, naming the adapter, where the combination is not defined; returns warnings. Headers only."""
    if combination.how == SUM:
        if len(adapters) > 1 and (other := next((adapter for adapter in adapters if adapter.kind != "LORA"), None)):
            raise Refused("Only LoRA adapters can be summed.", where=other.name, expected="peft_type LORA", found=other.kind, fix="merge one adapter at a time")
        return []
    from qmerge.adapters.combine import check_combination

    return list(check_combination(combination.how, [adapter.config for adapter in adapters], density=combination.density, rank=combination.rank))


def joint_edits(
    adapters: Sequence[Adapter], weights: Sequence[float], combination: Combination, shapes: Mapping[str, tuple[int, ...]], model: Any = None
) -> dict[str, Edit]:
    """Parameter -> edit for all adapters together. Raises Refused where a sum is not defined (a tensor that is replaced has no delta to weigh)."""
    if combination.how != SUM:
        from qmerge.adapters.combined import combined_edits

        return combined_edits(adapters, weights, combination, shapes, model)
    tables = [adapter.edits(shapes, model) for adapter in adapters]
    if len(tables) == 1 and weights[0] == 1.0:
        return tables[0]
    found = {}
    for parameter in sorted({name for table in tables for name in table}):
        here = [(adapter, table[parameter], weight) for adapter, table, weight in zip(adapters, tables, weights, strict=True) if parameter in table]
        if len(here) == 1 and here[0][2] == 1.0:
            found[parameter] = here[0][1]
            continue
        for adapter, edit, _ in here:
            if _replaces(edit):
                raise Refused("An adapter replaces a tensor, which cannot be weighed or summed with another adapter's.", where=f"{adapter.name}: {edit.keys[0]}",
                              expected="this adapter alone on the tensor, with weight 1", found=f"{len(here)} adapters, weights {', '.join(f'{weight:g}' for *_, weight in here)}")
        found[parameter] = WeightedSum(tuple(edit for _, edit, _ in here), tuple(weight for *_, weight in here))
    return found


def _replaces(edit: Edit) -> bool:
    return isinstance(edit, (Replace, ReplaceRows)) or (isinstance(edit, Chain) and any(_replaces(step) for step in edit.edits))
