"""The sums that a linear is solved on: their bits do not depend on who formed which part of them."""

from __future__ import annotations

import pytest
import torch

from qmerge.numerics.hessian import SLOTS, Statistics, slot_of


def batches(count: int, features: int = 200) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    draw = torch.Generator().manual_seed(count)
    return [tuple(torch.randn(31, width, generator=draw) for width in (features, features, 48)) for _ in range(count)]


def test_slots_are_consecutive_and_at_most_so_many():
    """A slot that a batch comes back to: whoever forms it would have to wait for batches of others."""
    for count in (1, 2, 15, 16, 17, 55, 1000):
        slots = [slot_of(batch, count) for batch in range(count)]
        assert slots == sorted(slots) and sorted(set(slots)) == list(range(min(count, SLOTS)))


def test_the_calls_that_batches_come_in_do_not_matter():
    """A partial sum that is closed at the end of a call and not at the end of its slot: the bits would follow the number of threads."""
    parts = batches(37)
    slots = [slot_of(batch, len(parts)) for batch in range(len(parts))]
    whole, pieces = Statistics(200), Statistics(200)
    whole.add_all(parts, slots)
    whole_slots = Statistics(200)
    for start in range(0, len(parts), 5):
        pieces.add_all(parts[start : start + 5], slots[start : start + 5])
    for slot in sorted(set(slots)):
        its = [number for number, owner in enumerate(slots) if owner == slot]
        whole_slots.add_all([parts[number] for number in its], [slot] * len(its), complete=True)
    for name in ("hessian", "drift", "residual"):
        assert torch.equal(getattr(whole, name), getattr(pieces, name)), name
        assert torch.equal(getattr(whole, name), getattr(whole_slots, name)), name


def test_a_sum_is_right():
    """A slot that is dropped, or added twice, where the next begins."""
    parts = batches(20)
    found = Statistics(200)
    found.add_all(parts, [slot_of(batch, 20) for batch in range(20)])
    x, teacher, residual = (torch.cat(part).double() for part in zip(*parts, strict=True))
    tokens = len(x)
    for name, wanted in (("hessian", x.T @ x), ("drift", (teacher - x).T @ x), ("residual", residual.T @ x)):
        torch.testing.assert_close(getattr(found, name).double(), wanted / tokens, rtol=1e-5, atol=1e-5)


def test_means_are_symmetric_and_take_no_more_batches():
    """A strip that mirrors the half that was never summed; a sum that goes on from a mean."""
    found = Statistics(1100)
    x = torch.randn(40, 1100, generator=torch.Generator().manual_seed(3))
    found.add_all([(x, x, None)], complete=True)
    assert torch.equal(found.hessian, found.hessian.T)
    torch.testing.assert_close(found.hessian, x.T @ x / 40, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="no more batches"):
        found.add(x, x)
