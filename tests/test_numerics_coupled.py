"""Rows of a weight that count together: against a rounding of the whole Kronecker system, the plain loops, and what is lost."""

from __future__ import annotations

import pytest
import torch
from test_numerics_polish import CASES, OUT, draws, hessian, option

from qmerge.errors import CheckFailed
from qmerge.numerics import coupled, gptq
from qmerge.numerics.coupled import ROUNDED, Coupling
from qmerge.numerics.curvature import DAMP, Curvature
from qmerge.numerics.hessian import factor
from qmerge.numerics.polish import damped
from qmerge.types import Grid


def curvature(rows: int = OUT, width: int = 2**14, seed: int = 5, rank: int = 6) -> Curvature:
    """Of gradients with a few common directions."""
    common = torch.randn(300, rank, generator=draws(seed)) @ torch.randn(rank, rows, generator=draws(seed + 1))
    found = Curvature(rows, width)
    found.add(common + 0.3 * torch.randn(300, rows, generator=draws(seed + 2)))
    return found.pack()


def loss(weight: torch.Tensor, target: torch.Tensor, metric: torch.Tensor, matrix: torch.Tensor) -> float:
    """``tr(G E H Eᵀ)`` in fp64."""
    error = (weight - target).double()
    return float(torch.trace(metric.double() @ error @ matrix.double() @ error.T))


def test_one_direction_that_is_most_of_the_curvature():
    """A merge on little calibration text that ends because bf16 rounded more off the curvature than its damping adds."""
    rows = 256
    gradient = 0.05 * torch.randn(40, rows, generator=draws(31))
    gradient[0] += 30 * torch.randn(rows, generator=draws(32))
    found = Curvature(rows, 2**14)
    found.add(gradient)
    packed = found.pack()
    assert float(torch.linalg.eigvalsh(packed.damped()[0].double())[0]) < 0, "no longer an example"
    part = Coupling(packed).parts[0]
    assert bool(part.feed.isfinite().all()) and float(torch.linalg.eigvalsh(part.metric.double())[0]) > 0
    assert DAMP < part.damp <= 2 * ROUNDED * (1 + DAMP) * rows, "no more than rounding can have taken, and it is told"


def test_what_rounding_cannot_have_done_is_no_curvature():
    """Damping that grows until anything passes: a matrix that is wrong, and rows that then count alone without a word."""
    wrong = torch.eye(8)
    wrong[0, 1] = wrong[1, 0] = 3.0
    with pytest.raises(CheckFailed, match="could not be factored"):
        Coupling(Curvature(8, 8, [wrong]))


def test_rounding_is_gptq_on_the_whole_kronecker_system():
    """The oracle knows nothing of rows: one long vector, one Hessian G ⊗ H, every element's error fed into all that are still free."""
    rows, columns = 5, 8
    g, h = curvature(rows, rank=2), hessian(columns=columns)
    level, coupling = factor(h, 0.02), Coupling(g)
    target = torch.randn(rows, columns, generator=draws(11))
    element = gptq.int_grid(torch.full((rows, 1), 0.4), torch.full((rows, 1), 8.0), columns, Grid("int", 4, -1))
    part = coupling.parts[0]
    whole = torch.kron(part.metric[part.order][:, part.order].double(), damped(h, 0.02)[level.order][:, level.order].double())
    upper = torch.linalg.cholesky(torch.linalg.inv(whole), upper=True)
    left = target[part.order][:, level.order].reshape(-1).double()
    wanted = torch.empty_like(left)
    for i in range(len(left)):
        wanted[i] = ((left[i] / 0.4).round() + 8).clamp(0, 15)
        left[i:] -= (left[i] - (wanted[i] - 8) * 0.4) / upper[i, i] * upper[i, i:]
    found = coupled.solve(target, level, element, coupling)
    assert torch.equal(found[part.order][:, level.order].reshape(-1).double(), wanted)
    assert not torch.equal(found, gptq.solve(target, level, element))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_compiled_rounding_is_the_plain_one(case):
    """A GPU runs the plain loops; with one row at a time they are exact too. A tie may fall either way."""
    weight, chosen = option(case)
    level, coupling = factor(hessian(), 0.03), Coupling(curvature())
    compiled, plain = coupled.solve(weight, level, chosen.element, coupling), coupled.solve(weight, level, chosen.element, coupling, tile=1)
    costs = [loss(gptq.values(codes, chosen.element), weight, coupling.parts[0].metric, damped(hessian(), 0.03)) for codes in (compiled, plain)]
    assert (compiled != plain).float().mean() < 0.02 and costs[0] == pytest.approx(costs[1], rel=0.02)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_coupled_rows_lose_less_and_descent_never_more(case):
    weight, chosen = option(case)
    matrix, level, coupling = damped(hessian(), 0.03), factor(hessian(), 0.03), Coupling(curvature())

    def cost(codes: torch.Tensor) -> float:
        return loss(gptq.values(codes, chosen.element), weight, coupling.parts[0].metric, matrix)

    apart, together = gptq.solve(weight, level, chosen.element), coupled.solve(weight, level, chosen.element, coupling)
    assert cost(together) < 0.6 * cost(apart)
    for tile in (None, 1, 7):  # compiled; plain; plain and side by side
        before = together
        for _ in range(3):
            after = coupled.descend(before, weight, hessian(), 0.03, chosen.element, coupling, tile=tile)
            assert cost(after) <= cost(before) * (1 + 1e-5)
            before = after
        assert cost(before) < cost(together)
    assert cost(coupled.solve(weight, level, chosen.element, coupling, tile=8)) < 0.8 * cost(apart)


@pytest.mark.parametrize("case", [CASES[0], "nf4-nested"], ids=str)
def test_independent_rows_are_the_usual_solver(case):
    """G diagonal, by nature or because a block has one row: nothing is handed from row to row."""
    weight, chosen = option(case)
    level = factor(hessian(), 0.03)
    single = Coupling(curvature(width=1))
    assert torch.equal(coupled.solve(weight, level, chosen.element, single), gptq.solve(weight, level, chosen.element))


def test_blocks_are_solved_apart():
    weight, chosen = option(CASES[0])
    level, whole = factor(hessian(), 0.03), curvature(width=16)
    found = coupled.solve(weight, level, chosen.element, Coupling(whole))
    for span, block in zip(whole.spans(), whole.blocks, strict=True):
        alone = Curvature(len(block), 2**14, [block])
        assert torch.equal(found[span], coupled.solve(weight[span], level, chosen.element.some(span), Coupling(alone)))


def test_curvature_sums_joins_and_packs():
    gradient = torch.randn(50, 6, generator=draws(1))
    whole, first, rest = (Curvature(6, 4) for _ in range(3))
    whole.add(gradient)
    first.add(gradient[:20])
    rest.add(gradient[20:])
    first.join(rest)
    wanted = gradient.T @ gradient
    for found in (whole, first):
        assert torch.allclose(found.blocks[0], wanted[:4, :4], atol=1e-4) and torch.allclose(found.blocks[1], wanted[4:, 4:], atol=1e-4)
    damp = whole.pack().damped()
    mean = wanted.diagonal().mean()
    assert torch.allclose(damp[0], wanted[:4, :4] / mean + DAMP * torch.eye(4), atol=0.02)
    assert torch.equal(damp[0], damp[0].T)


def test_no_gradient_means_independent_rows():
    """A dead linear: nothing is divided by zero and nothing is coupled."""
    dead = Curvature(4, 8)
    dead.add(torch.zeros(3, 4))
    (metric,) = dead.pack().damped()
    assert torch.equal(metric, DAMP * torch.eye(4))
    assert torch.equal(Coupling(dead.pack()).parts[0].feed, torch.zeros(4, 4))


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 1e30])
def test_gradients_that_are_not_finite_are_an_error(value):
    """Rows taken as independent without a word."""
    broken = Curvature(4, 8)
    broken.add(torch.full((3, 4), value))
    with pytest.raises(CheckFailed, match="not finite"):
        broken.pack()
