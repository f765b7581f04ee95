"""How do the numbers that several ranks have measured come together on the first one, in the order of one rank?"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from qmerge.quality.measure import Batches
from qmerge.ranks import Ranks, Record

ByArm = dict[str, dict[str, np.ndarray]]


@dataclass(frozen=True)
class Found:
    """What one rank has measured, or all of them together.

    ``about``: arm -> its row of results.json as far as it is known before numbers are counted; ``batches``: text -> arm -> what `measure_share` gave; ``numbers``: kind -> label -> arm -> an
    array in which the rows of other ranks are 0; ``served``: how the reference was served, from a rank that knows.
    """

    about: dict[str, dict[str, Any]] = field(default_factory=dict)
    batches: dict[str, dict[str, Batches]] = field(default_factory=dict)
    numbers: dict[str, ByArm] = field(default_factory=dict)
    served: str | None = None


def gathered(found: Found, ranks: Ranks) -> Found | None:
    """What all ranks have found: on the first one. None on the others."""
    if ranks.alone:
        return found
    records = ranks.gather(_packed(found))
    return _joined(_unpacked(*record) for record in records) if ranks.first else None


def _packed(found: Found) -> Record:
    tensors: dict[str, torch.Tensor] = {}
    texts, numbers = list[Any](), list[Any]()
    for text, arms in found.batches.items():
        for arm, batches in arms.items():
            order = sorted(batches.rows)
            for name in batches.rows[order[0]] if order else ():
                tensors[f"{len(texts)} {name}"] = torch.from_numpy(np.concatenate([batches.rows[number][name] for number in order]))
            texts.append([text, arm, batches.vocabulary_cut, [[number, len(batches.rows[number]["kl"])] for number in order]])
    for kind, labels in found.numbers.items():
        for label, arrays in labels.items():
            for arm, array in arrays.items():
                tensors[f"number {len(numbers)}"] = torch.from_numpy(np.ascontiguousarray(array))
                numbers.append([kind, label, arm])
    return {"about": found.about, "served": found.served, "texts": texts, "numbers": numbers}, tensors


def _unpacked(facts: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> Found:
    found = Found(facts["about"], {}, {}, facts["served"])
    for place, (text, arm, cut, lengths) in enumerate(facts["texts"]):
        own = {name.partition(" ")[2]: tensor.numpy() for name, tensor in tensors.items() if name.startswith(f"{place} ")}
        cuts = np.cumsum([length for _, length in lengths])[:-1]
        pieces = {name: np.split(array, cuts) for name, array in own.items()}
        rows = {number: {name: parts[turn] for name, parts in pieces.items()} for turn, (number, _) in enumerate(lengths)}
        found.batches.setdefault(text, {})[arm] = Batches(rows, cut)
    for place, (kind, label, arm) in enumerate(facts["numbers"]):
        found.numbers.setdefault(kind, {}).setdefault(label, {})[arm] = tensors[f"number {place}"].numpy()
    return found


def _joined(parts: Iterable[Found]) -> Found:
    whole = Found()
    served = None
    for part in parts:
        served = served or part.served
        for arm, row in part.about.items():
            before = whole.about.setdefault(arm, row)
            linears = before.get("linears", {}) | row.get("linears", {})
            before |= {key: value for key, value in row.items() if key not in before} | ({"linears": linears} if linears else {})
        for text, arms in part.batches.items():
            for arm, batches in arms.items():
                before_them = whole.batches.setdefault(text, {}).get(arm, Batches({}))
                whole.batches[text][arm] = Batches({**before_them.rows, **batches.rows}, batches.vocabulary_cut)
        for kind, labels in part.numbers.items():
            for label, arrays in labels.items():
                place = whole.numbers.setdefault(kind, {}).setdefault(label, {})
                for arm, array in arrays.items():
                    place[arm] = place[arm] + array if arm in place else array
    return Found(whole.about, whole.batches, whole.numbers, served)
