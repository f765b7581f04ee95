"""What do several adapters do to the base together?

By default the exact weighted sum of their deltas, ``W + Σ w_i ΔW_i``. PEFT's named combinations are made by `combine.py` with PEFT's results.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qmerge.adapters.adapter import Adapter
from qmerge.adapters.choices import SUM, Combination
from qmerge.adapters.edits import Edit
from qmerge.adapters.replace import Replace, ReplaceRows
from qmerge.adapters.several import Chain, WeightedSum
from qmerge.errors import Refused


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
