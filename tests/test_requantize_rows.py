"""Is a linear that is solved a few rows at a time solved as it is in one go?"""

from __future__ import annotations

import pytest
import torch

from qmerge.numerics.curvature import Curvature
from qmerge.numerics.hessian import Statistics
from qmerge.pipeline import requantize
from qmerge.pipeline.requantize import Linear, requantize_group
from qmerge.types import Grid

OUT, IN = 48, 64
GRID = Grid("int", 4, 32, True, False)


def sums(seed: int) -> Statistics:
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(900, IN, generator=draw) @ (torch.eye(IN) + 0.3 * torch.randn(IN, IN, generator=torch.Generator().manual_seed(0)))
    found = Statistics(IN)
    found.add(x, x + 0.05 * torch.randn(900, IN, generator=draw), 0.1 * torch.randn(900, OUT, generator=draw))
    return found


def solved(coupled: bool, spent: bool = False):
    draw = torch.Generator().manual_seed(7)
    weight = 0.02 * torch.randn(OUT, IN, generator=draw)
    delta = 0.001 * torch.randn(OUT, 4, generator=draw) @ torch.randn(4, IN, generator=draw)
    curvature = Curvature(OUT, 16)
    curvature.add(torch.randn(500, OUT, generator=draw) @ (torch.eye(OUT) + 0.2))
    linear = Linear("w", weight + delta, None, delta, curvature.pack() if coupled else None)
    train, held_out = sums(1), sums(2)
    found = requantize_group([linear], GRID, train, held_out, torch.float32, blocks=4, spent=spent)[0]
    return found, train


@pytest.mark.parametrize("coupled", [False, True])
def test_stretches_of_rows_give_what_the_whole_linear_gives(coupled, monkeypatch):
    """Rows that a stretch leaves out, curvatures cut between rows that count together, a turn chosen for each stretch by itself."""
    whole, _ = solved(coupled)
    monkeypatch.setattr(requantize, "STRETCH", 20 * IN)
    parts, _ = solved(coupled)
    assert float((whole.quantized.codes != parts.quantized.codes).float().mean()) < 0.01
    assert whole.choice.to_json() == parts.choice.to_json()
    assert abs(whole.choice.held_out - parts.choice.held_out) <= 1e-3 * abs(whole.choice.held_out)
    torch.testing.assert_close(whole.survival, parts.survival, rtol=0.01, atol=0.01)


def test_sums_that_nobody_needs_any_more_are_freed_with_the_same_result():
    """D kept beside H while it is factored is a fifth of the peak of the widest linears; D freed too early is another target."""
    kept, there = solved(True)
    freed, gone = solved(True, spent=True)
    assert there.drift is not None and gone.drift is None
    assert torch.equal(kept.weight, freed.weight)
