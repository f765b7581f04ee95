"""The solver against a blackboard version of itself; scales, shift, objective and factorization against their definitions."""

from __future__ import annotations

import pytest
import torch
from oracles import gptq_slow
from support.blocks import block_maxima

from qmerge.errors import CheckFailed
from qmerge.numerics import grids, nf4
from qmerge.numerics.distances import fit
from qmerge.numerics.gptq import book_grid, int_grid, solve, values
from qmerge.numerics.hessian import Statistics, factor
from qmerge.numerics.lora import delta_survival
from qmerge.numerics.polish import descend
from qmerge.numerics.shift import Judge, aim, shifts
from qmerge.types import Grid

OUT, IN = 24, 96
GRIDS = ["sym", "asym", "nf4"]


def draws(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def correlated(tokens: int = 600, features: int = IN, seed: int = 1) -> torch.Tensor:
    """Inputs with strong correlations and scales that differ between channels, as a decoder's have."""
    mix = torch.randn(features, features, generator=draws(seed)) * torch.logspace(0, -1.2, features)[:, None]
    return torch.randn(tokens, features, generator=draws(seed + 1)) @ mix * torch.linspace(0.3, 2.0, features)


def statistics(x: torch.Tensor, teacher: torch.Tensor | None = None, residual: torch.Tensor | None = None) -> Statistics:
    found = Statistics(x.shape[1])
    found.add(x, x if teacher is None else teacher, residual)
    return found


def problem(kind: str, seed: int = 0):
    """(weight, element grid, the oracle's rounding of a column) on ``kind``."""
    weight = torch.randn(OUT, IN, generator=draws(seed)) * 0.05
    flat = torch.ones(IN)
    if kind == "nf4":  # 64 does not divide 96: blocks run across rows
        absmax = block_maxima(weight, 64)
        return weight, book_grid(absmax, (OUT, IN), 64, nf4.code_book("nf4")), gptq_slow.book_columns(absmax, (OUT, IN), 64, nf4.code_book("nf4"))
    scales, zeros = grids.search_int(weight, flat, Grid("int", 4, 32, kind == "sym"), torch.bfloat16)
    return weight, int_grid(scales, zeros, IN, Grid("int", 4, 32, kind == "sym")), gptq_slow.int_columns(scales, zeros, IN, 15)


@pytest.mark.parametrize("by_activation", [True, False])
def test_costs_are_those_of_the_columns_that_are_left(by_activation):
    """Scales searched with weights of the wrong columns: the cost of an error in a column, with all later ones free to make up for it, from the inverse of what is left of H, in fp64."""
    hessian, damp = statistics(correlated()).hessian, 0.03
    found = factor(hessian, damp, by_activation)
    matrix = hessian.double() + damp * hessian.diagonal().double().mean() * torch.eye(IN, dtype=torch.float64)
    matrix = torch.tril(matrix) + torch.tril(matrix, -1).T
    wanted = torch.empty(IN, dtype=torch.float64)
    for place, column in enumerate(found.order.tolist()):
        left = found.order[place:]
        wanted[column] = 1.0 / torch.linalg.inv(matrix[left][:, left])[0, 0]
    assert torch.allclose(found.costs().double(), wanted, rtol=1e-4)


def loss(candidate: torch.Tensor, weight: torch.Tensor, x: torch.Tensor) -> float:
    return float(((candidate - weight).double() @ x.double().T).square().sum())


@pytest.mark.parametrize("kind", GRIDS)
def test_solver_is_the_blackboard_solver(kind):
    """A wrong factor of the inverse, a column order that is not undone, or an error fed forward twice. At most 1 code in 200 may fall on the other side of a tie."""
    weight, element, rounding = problem(kind)
    hessian = statistics(correlated()).hessian
    ours = solve(weight, factor(hessian, 0.01), element)
    slow = gptq_slow.solve(weight, hessian, 0.01, rounding)
    assert float((ours != slow).float().mean()) < 1 / 200


@pytest.mark.parametrize("kind", GRIDS)
def test_block_size_is_only_speed(kind):
    """Errors lost at a block's border, or an update of columns that were rounded already."""
    weight, element, _ = problem(kind)
    level = factor(statistics(correlated()).hessian, 0.01)
    whole = solve(weight, level, element, block=IN)
    for block in (1, 7, 64):
        assert float((solve(weight, level, element, block=block) != whole).float().mean()) < 1 / 200, block


@pytest.mark.parametrize("kind", GRIDS)
def test_uncorrelated_inputs_give_round_to_nearest(kind):
    """Something other than the inverse Hessian's off-diagonal feeds errors forward."""
    weight, element, rounding = problem(kind)
    nearest = torch.stack([rounding(column, weight[:, column].double())[0] for column in range(IN)], dim=1).to(torch.uint8)
    assert torch.equal(solve(weight, factor(torch.eye(IN), 0.0), element), nearest)


@pytest.mark.parametrize("kind", GRIDS)
def test_compensation_lowers_the_error(kind):
    """An update of the wrong sign: GPTQ must beat rounding to nearest where inputs are correlated, by far."""
    weight, element, rounding = problem(kind)
    x = correlated()
    nearest = torch.stack([rounding(column, weight[:, column].double())[0] for column in range(IN)], dim=1).to(torch.uint8)
    compensated = values(solve(weight, factor(statistics(x).hessian, 0.01), element), element)
    assert loss(compensated, weight, x) < 0.5 * loss(values(nearest, element), weight, x)


def test_weights_on_the_grid_stay(seed=3):
    """A weight that is on the grid already must come back bit for bit: nothing is to be compensated."""
    _, element, _ = problem("asym")
    codes = torch.randint(0, 16, (OUT, IN), generator=draws(seed)).to(torch.uint8)
    assert torch.equal(solve(values(codes, element), factor(statistics(correlated()).hessian, 0.01), element), codes)


def test_stacked_weights_are_solved_alone():
    """Linears solved side by side leaking into each other."""
    pairs = [problem("sym", seed) for seed in (0, 1)]
    level = factor(statistics(correlated()).hessian, 0.01)
    joined = type(pairs[0][1])(torch.cat([p[1].scale for p in pairs], dim=1), torch.cat([p[1].zero for p in pairs], dim=1), 15)
    together = solve(torch.cat([p[0] for p in pairs]), level, joined)
    assert float((together != torch.cat([solve(p[0], level, p[1]) for p in pairs])).float().mean()) < 1 / 200


def test_empty_blocks_stay_zero():
    """Division by an absmax of 0."""
    weight = torch.zeros(4, 64)
    element = book_grid(block_maxima(weight, 64), (4, 64), 64, nf4.code_book("nf4"))
    codes = solve(weight, factor(torch.eye(64), 0.01), element)
    assert codes.unique().tolist() == [7] and float(values(codes, element).abs().max()) == 0


def test_factor_is_the_inverse():
    """The factor of another matrix than (H + λI)⁻¹ in the solver's order."""
    hessian = statistics(correlated()).hessian
    found = factor(hessian, 0.02)
    damped = hessian.double() + 0.02 * float(hessian.diagonal().double().mean()) * torch.eye(IN, dtype=torch.float64)
    upper = found.upper.double()
    torch.testing.assert_close((upper.T @ upper) @ damped[found.order][:, found.order], torch.eye(IN, dtype=torch.float64), atol=2e-3, rtol=0)
    assert torch.equal(found.order, hessian.diagonal().argsort(descending=True, stable=True)) and found.damp == 0.02
    right = torch.randn(5, IN, generator=draws(4))
    torch.testing.assert_close(found.solve(right), (right.double() @ torch.linalg.inv(damped)).float(), rtol=1e-4, atol=1e-4 * float(found.solve(right).abs().max()))


def test_singular_hessian_raises_the_damping_and_says_so():
    """A silent fall-back where fewer tokens than features were seen: the Hessian, summed in fp32, has eigenvalues below zero."""
    hessian = statistics(torch.randn(40, IN, generator=draws())).hessian
    assert float(torch.linalg.eigvalsh(hessian.double()).min()) < 0
    found = factor(hessian, 1e-10)
    assert found.damp > 1e-10 and torch.isfinite(found.upper).all()
    assert factor(hessian, 0.01).damp == 0.01


def test_no_activations_at_all():
    """A linear that only ever saw zeros: its Hessian is zero, and rounding to nearest is all that is left."""
    weight, element, rounding = problem("sym")
    codes = solve(weight, factor(torch.zeros(IN, IN), 0.01), element)
    nearest = torch.stack([rounding(column, weight[:, column].double())[0] for column in range(IN)], dim=1).to(torch.uint8)
    assert torch.equal(codes, nearest)


def test_activations_that_are_not_finite():
    """NaN in the calibration pass turning into codes."""
    with pytest.raises(CheckFailed, match="not finite"):
        factor(torch.full((4, 4), float("nan")), 0.01)


def test_statistics_are_means_over_all_tokens():
    """A mean of means: batches of different sizes would weigh alike."""
    x, teacher = correlated(), correlated(seed=5)
    residual = torch.randn(600, OUT, generator=draws(6))
    found = Statistics(IN)
    for part in (slice(0, 100), slice(100, 130), slice(130, 600)):
        found.add(x[part], teacher[part], residual[part])
    assert found.tokens == 600
    close = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(found.hessian, x.T @ x / 600, **close)
    torch.testing.assert_close(found.drift, (teacher - x).T @ x / 600, **close)
    torch.testing.assert_close(found.residual, residual.T @ x / 600, **close)


def test_same_streams_shift_nothing():
    """A target that moves although the teacher and the model so far agree."""
    weight, _, _ = problem("sym")
    found = statistics(correlated(), residual=torch.zeros(600, OUT))
    level = factor(found.hessian, 0.01)
    assert torch.equal(aim(weight, shifts(weight @ found.drift, found.residual, level), 1.0, 1.0), weight)


def test_full_shift_answers_as_the_teacher():
    """The shift transposed or of the wrong sign: W* x must be the best linear answer to W x̃ + r."""
    x = correlated()
    teacher = x + 0.3 * correlated(seed=9)
    residual = (x @ torch.randn(IN, OUT, generator=draws(7))) * 0.1
    weight, _, _ = problem("sym")
    found = statistics(x, teacher, residual)
    aimed = aim(weight, shifts(weight @ found.drift, found.residual, factor(found.hessian, 1e-6)), 1.0, 1.0)
    wanted = teacher.double() @ weight.double().T + residual.double()
    best = torch.linalg.lstsq(x.double(), wanted).solution.T
    error = [float((wanted - x.double() @ w.double().T).square().mean()) for w in (aimed, best, weight)]
    assert error[0] < 1.02 * error[1] and error[0] < 0.8 * error[2]


def test_objective_is_the_mean_squared_error():
    """A dropped term or a missing factor of 2: candidates would be ranked wrongly. Differences must equal those of brute force over the samples."""
    x, weight = correlated(), problem("sym")[0]
    teacher, residual = x + 0.2 * correlated(seed=9), 0.1 * torch.randn(600, OUT, generator=draws(8))
    found = statistics(x, teacher, residual)
    candidates = [weight + 0.01 * torch.randn(OUT, IN, generator=draws(20 + i)) for i in range(4)]
    wanted = teacher.double() @ weight.double().T + residual.double()
    brute = torch.tensor([float((wanted - x.double() @ q.double().T).square().sum() / 600) for q in candidates])
    ours = torch.tensor([Judge(weight, found)(q) for q in candidates])
    torch.testing.assert_close(ours - ours[0], brute - brute[0], rtol=1e-3, atol=1e-3 * float((brute - brute[0]).abs().max()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_storable_scales_survive_every_cast(dtype):
    """A loader that casts scales to the model's dtype, or a file that holds fp16, rounding them again."""
    raw = torch.cat([torch.logspace(-9, 6, 4000), -torch.logspace(-9, 6, 4000), torch.zeros(1)])
    scale = grids.storable(raw, dtype)
    assert torch.equal(scale.half().float(), scale) and torch.equal(scale.to(dtype).float(), scale)
    assert (scale != 0).all() and torch.isfinite(scale).all()
    normal = (raw.abs() > 2**-13) & (raw.abs() < 6e4)
    torch.testing.assert_close(scale[normal], raw[normal], rtol=2**-8, atol=0)


@pytest.mark.parametrize("case", ["both signs", "positive", "negative", "constant", "zero"])
def test_asymmetric_zeros_fit_the_file(case):
    """A zero of 0, which gptq's v1 files store as -1 and borrow from the neighbour for; or a group of one sign without a finite scale."""
    weight = torch.randn(16, 128, generator=draws()) * 0.05
    weight = {"both signs": weight, "positive": weight.abs() + 0.01, "negative": -weight.abs() - 0.01, "constant": torch.full_like(weight, 0.03), "zero": weight * 0}[case]
    scales, zeros = grids.search_int(weight, torch.ones(128), Grid("int", 4, 32, False), torch.bfloat16)
    assert scales.shape == zeros.shape == (16, 4) and bool(((zeros >= 1) & (zeros <= 15) & (zeros == zeros.round())).all())
    assert torch.isfinite(scales).all() and bool((scales != 0).all())
    wide = [value.repeat_interleave(32, dim=1) for value in (scales, zeros)]
    rounded = grids.round_int(weight, *wide, 15)
    assert float((rounded - weight).norm()) <= 0.12 * float(weight.norm()) + 1e-3 * (case == "zero")


def test_symmetric_scales_give_the_longer_half_to_the_larger_extreme():
    """An unsigned scale: +max has no code of its own, and is clipped or makes all steps coarser."""
    weight = torch.zeros(2, 32)
    weight[0, 0], weight[1, 0] = 0.8, -0.8
    scales, zeros = grids.search_int(weight, torch.ones(32), Grid("int", 4, 32, True), torch.bfloat16)
    assert float(scales[0]) < 0 < float(scales[1]) and zeros.unique().tolist() == [8.0]
    assert torch.allclose(grids.round_int(weight, scales, zeros, 15), weight, rtol=1.2e-2)  # an unsigned scale clips at 7/8 or misses by as much


def test_important_channels_decide_the_scale():
    """Importance ignored: the search would serve the outlier that no input uses."""
    weight = torch.randn(8, 64, generator=draws()) * 0.05
    weight[:, 3] = 1.0
    importance = torch.ones(64)
    importance[3] = 0.0
    for search in ("int", "nf4"):
        if search == "int":
            scales, zeros = grids.search_int(weight, importance, Grid("int", 4, 64, False), torch.bfloat16)
            rounded = grids.round_int(weight, scales, zeros, 15)
        else:
            absmax = grids.search_absmax(weight, importance, nf4.code_book("nf4"), 64)
            rounded = nf4.code_book("nf4")[nf4.nearest(weight, absmax, nf4.code_book("nf4"), 64).long()] * absmax[:, None]
        others = [c for c in range(64) if c != 3]
        plain = nf4.code_book("nf4")[nf4.nearest(weight, block_maxima(weight, 64), nf4.code_book("nf4"), 64).long()] * block_maxima(weight, 64)[:, None]
        assert float((rounded - weight)[:, others].norm()) < 0.8 * float((plain - weight)[:, others].norm()), search


def test_delta_survival_by_hand():
    """Survival of 1 for a merge that was kept, 0 for one that was rounded away, and no number where there is no delta."""
    weight, delta = torch.randn(8, 8, generator=draws()), torch.randn(8, 8, generator=draws(1)) * 0.01
    assert delta_survival(weight + delta, weight, delta) == pytest.approx(1, abs=1e-3) and delta_survival(weight, weight, delta) == 0
    assert delta_survival(weight + delta / 4, weight, delta) == pytest.approx(0.25, abs=1e-3) and delta_survival(weight, weight, 0 * delta) != 0


@pytest.mark.parametrize("kind", GRIDS)
def test_descent_never_raises_the_error(kind):
    """A gradient that goes stale between columns: each move would be best for weights that are no longer there. Its optimum is one: a second descent moves nothing."""
    weight, element, _ = problem(kind)
    hessian = statistics(correlated()).hessian
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(IN)

    def error(codes: torch.Tensor) -> float:
        left = (values(codes, element) - weight).double()
        return float((left @ damped.double() * left).sum())

    start = solve(weight, factor(hessian, 0.01), element)
    found = descend(start, weight, hessian, 0.01, element, sweeps=1)
    settled = descend(found, weight, hessian, 0.01, element, sweeps=30)
    assert error(settled) <= error(found) < error(start)
    assert float((descend(settled, weight, hessian, 0.01, element) != settled).float().mean()) < 1 / 200


def test_descent_block_size_is_only_speed():
    """Moves of one block that the next one does not see."""
    weight, element, _ = problem("nf4")
    hessian = statistics(correlated()).hessian
    start = solve(weight, factor(hessian, 0.01), element)
    whole = descend(start, weight, hessian, 0.01, element, block=IN)
    assert float((descend(start, weight, hessian, 0.01, element, block=5) != whole).float().mean()) < 1 / 200


def test_fit_by_hand():
    """A scale that is 2 % off hidden in the distance of honest rounding; zero against zero called wrong."""
    weight = torch.randn(8, 64, generator=draws())
    same, zeros, scaled = fit(weight, weight), fit(0 * weight, 0 * weight), fit(1.02 * weight, weight)
    assert (same.distance, same.slope) == (0.0, pytest.approx(1.0)) and (zeros.distance, zeros.slope) == (0.0, 1.0)
    assert (scaled.distance, scaled.slope) == (pytest.approx(0.02, rel=1e-3), pytest.approx(1.02)) and fit(weight, 0 * weight).distance == float("inf")
