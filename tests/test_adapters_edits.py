"""Edits compute what their formulas say, rows alone as well as all together, and their proofs see every way to merge wrongly."""

from __future__ import annotations

import math

import pytest
import torch

from qmerge.adapters.edits import Proof
from qmerge.adapters.equality import same_edit
from qmerge.adapters.lowrank import Experts, LowRank
from qmerge.adapters.replace import AddBias, Replace, ReplaceRows
from qmerge.adapters.several import Chain, WeightedSum

CPU = torch.device("cpu")
OUT, IN, RANK = 24, 40, 4


def draws(*shape: int, seed: int = 0, size: float = 1.0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * size


WEIGHT, LEFT, RIGHT = draws(OUT, IN), draws(OUT, RANK, seed=1, size=0.1), draws(RANK, IN, seed=2, size=0.1)
MAGNITUDE, ROWS = draws(OUT, seed=3).abs() + 4, draws(2, IN, seed=4)
OTHER = draws(OUT, IN, seed=5)


def plain(scaling: float = 2.0, seed: int = 0) -> LowRank:
    return LowRank(("a", "b"), (OUT, IN), lambda: (LEFT + draws(OUT, RANK, seed=seed) if seed else LEFT, RIGHT), scaling)


def dora() -> LowRank:
    return LowRank(("a", "b", "m"), (OUT, IN), lambda: (LEFT, RIGHT), 2.0, lambda: MAGNITUDE)


def column_dora() -> LowRank:
    return LowRank(("a", "b", "m"), (OUT, IN), lambda: (LEFT, RIGHT), 2.0, lambda: draws(IN, seed=6).abs() + 4, by_column=True)


def replace(values: torch.Tensor = OTHER) -> Replace:
    return Replace(("w",), tuple(values.shape), lambda start, stop: values[start:stop])


EDITS = {
    "plain": plain(), "dora": dora(), "column dora": column_dora(), "replace": replace(), "rows": ReplaceRows(("t",), (OUT, IN), (3, 17), lambda: ROWS),
    "chain": Chain((replace(), plain())), "sum": WeightedSum((plain(), plain(1.0, 7)), (0.5, -2.0)), "sum with dora": WeightedSum((plain(), dora()), (0.5, 1.0)),
}  # fmt: skip


def expected(name: str) -> torch.Tensor:
    delta = 2.0 * (LEFT.double() @ RIGHT.double())
    whole = WEIGHT.double() + delta
    if name == "plain":
        return whole
    if name == "dora":
        return MAGNITUDE.double()[:, None] * whole / whole.norm(dim=1, keepdim=True)
    if name == "column dora":
        return (draws(IN, seed=6).abs() + 4).double() * whole / whole.norm(dim=0)
    if name == "replace":
        return OTHER.double()
    if name == "rows":
        return WEIGHT.double().index_copy(0, torch.tensor([3, 17]), ROWS.double())
    if name == "chain":
        return OTHER.double() + delta
    second = (LEFT + draws(OUT, RANK, seed=7)).double() @ RIGHT.double()
    return WEIGHT.double() + 0.5 * delta - 2.0 * second if name == "sum" else WEIGHT.double() + 0.5 * delta + (expected("dora") - WEIGHT.double())


@pytest.mark.parametrize("name", EDITS)
def test_formula(name):
    """A norm over the wrong axis, a scaling used twice, a sum over a base that was changed before. Tolerance: a few fp32 roundings."""
    before = WEIGHT.clone()
    found = EDITS[name].load(CPU).apply(before, 0)
    torch.testing.assert_close(found.double(), expected(name), rtol=1e-5, atol=1e-5)
    assert torch.equal(before, WEIGHT), "the base's rows were changed"


@pytest.mark.parametrize("name", [name for name in EDITS if EDITS[name].load(CPU).rowwise])
def test_rows_alone(name):
    """Rows of a later stretch that get the first rows' factors, magnitudes or tokens."""
    change = EDITS[name].load(CPU)
    parts = [change.apply(WEIGHT[start : start + 7].clone(), start) for start in range(0, OUT, 7)]
    torch.testing.assert_close(torch.cat(parts), change.apply(WEIGHT, 0), rtol=1e-6, atol=1e-6)


def test_column_dora_is_not_rowwise():
    """A column's norm over a few rows is another number."""
    assert not column_dora().load(CPU).rowwise


@pytest.mark.parametrize("name", EDITS)
def test_proof_accepts_what_was_merged_right(name):
    """A proof that refuses honest rounding; in stretches as in one piece."""
    change = EDITS[name].load(CPU)
    merged = change.apply(WEIGHT, 0)
    whole = change.prove(WEIGHT, merged, 0)
    assert whole.relative <= whole.limit
    if change.rowwise:
        parts = sum((change.prove(WEIGHT[s : s + 7], merged[s : s + 7], s) for s in range(0, OUT, 7)), Proof())
        assert parts.relative <= parts.limit and parts.wanted == pytest.approx(whole.wanted, rel=1e-3)


WRONG = {
    "nothing added": lambda merged: WEIGHT, "twice": lambda merged: 2 * merged - WEIGHT, "halved": lambda merged: (merged + WEIGHT) / 2, "1 % off": lambda merged: WEIGHT + 1.01 * (merged - WEIGHT),
    "rows shifted": lambda merged: WEIGHT + (merged - WEIGHT).roll(1, 0), "one row lost": lambda merged: torch.cat([merged[:-7], WEIGHT[-7:-6], merged[-6:]]),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("name", EDITS)
def test_proof_sees_every_way_to_merge_wrongly(name, wrong):
    """A proof that cannot fail."""
    change = EDITS[name].load(CPU)
    proof = change.prove(WEIGHT, WRONG[wrong](change.apply(WEIGHT, 0)), 0)
    assert proof.relative > 100 * proof.limit


def test_proof_of_an_empty_delta():
    """B is zero where training never moved it: nothing may be added, and 0 / 0 is no proof."""
    change = LowRank(("a", "b"), (OUT, IN), lambda: (torch.zeros(OUT, RANK), RIGHT), 2.0).load(CPU)
    assert change.prove(WEIGHT, WEIGHT, 0).relative == 0 and change.prove(WEIGHT, WEIGHT + 1e-3, 0).relative == math.inf


def test_experts():
    """Factors of one expert on the weight of another."""
    left, right, weight = draws(3, OUT, RANK), draws(3, RANK, IN, seed=1), draws(3, OUT, IN, seed=2)
    change = Experts(("a", "b"), (3, OUT, IN), lambda: (left, right), 0.5).load(CPU)
    merged = change.apply(weight, 0)
    torch.testing.assert_close(merged, weight + 0.5 * torch.einsum("eor,eri->eoi", left, right))
    torch.testing.assert_close(change.apply(weight[1:], 1), merged[1:])
    assert change.prove(weight, merged, 0).relative < 1e-5 and change.prove(weight, weight + (merged - weight).flip(0), 0).relative > 0.1


def test_bias():
    """lora_bias without the scaling: PEFT's 4-bit layer forgets it, its float layer does not."""
    change = AddBias(("b",), (OUT,), lambda: MAGNITUDE, 2.0).load(CPU)
    merged = change.apply(WEIGHT[:, 0], 0)
    torch.testing.assert_close(merged, WEIGHT[:, 0] + 2 * MAGNITUDE)
    assert change.prove(WEIGHT[:, 0], merged, 0).relative < 1e-5 and change.prove(WEIGHT[:, 0], WEIGHT[:, 0] + MAGNITUDE, 0).relative > 0.1


def test_same_edit():
    """A tie that breaks although both sides are one tensor, or holds although they are not."""
    turned = LowRank(("c", "d"), (OUT, IN), lambda: (LEFT, RIGHT), 2.0)
    assert same_edit(plain(), turned) and not same_edit(plain(), plain(1.0)) and not same_edit(plain(), plain(2.0, 7))
    assert same_edit(replace(), replace(OTHER.clone())) and not same_edit(replace(), replace(WEIGHT)) and not same_edit(replace(), plain())
    assert same_edit(EDITS["rows"], EDITS["rows"]) and same_edit(EDITS["chain"], Chain((replace(), turned))) and not same_edit(EDITS["chain"], Chain((replace(WEIGHT), turned)))
