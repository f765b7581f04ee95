"""Which adapters did the user name, with which weights, and how are they to be combined? Read without torch: a misspelt one is refused at once."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qmerge.errors import UsageProblem

if TYPE_CHECKING:
    from qmerge.adapters.adapter import Adapter

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
        from qmerge.adapters.adapter import open_adapter

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
