"""Do two edits make one and the same tensor of one and the same base, so that tied sides stay tied?"""

from __future__ import annotations

import torch

from qmerge.adapters.edits import Edit
from qmerge.adapters.lowrank import LowRank
from qmerge.adapters.replace import Replace, ReplaceRows
from qmerge.adapters.several import Chain

ROWS = 8192


def same_edit(first: Edit, second: Edit) -> bool:
    """Equal factors, rows and values, read and compared; a false "no" only costs a tie. An embedding's factors and a linear's are laid out alike here."""
    if first.shape != second.shape or type(first) is not type(second):
        return False
    if isinstance(first, Chain) and isinstance(second, Chain):
        return len(first.edits) == len(second.edits) and all(same_edit(a, b) for a, b in zip(first.edits, second.edits, strict=True))
    if isinstance(first, Replace) and isinstance(second, Replace):
        steps = range(0, first.shape[0], ROWS)
        return all(torch.equal(first.read(start, min(start + ROWS, first.shape[0])), second.read(start, min(start + ROWS, first.shape[0]))) for start in steps)
    if isinstance(first, ReplaceRows) and isinstance(second, ReplaceRows):
        return first.indices == second.indices and torch.equal(first.values(), second.values())
    if isinstance(first, LowRank) and isinstance(second, LowRank) and first.plain and second.plain:
        return first.scaling == second.scaling and all(torch.equal(a, b) for a, b in zip(first.factors(), second.factors(), strict=True))
    return False
