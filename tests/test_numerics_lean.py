"""Is the adapter's effect that rounding loses seen, and given back?"""

import pytest
import torch
from support.blocks import block_maxima

from qmerge.errors import CheckFailed
from qmerge.numerics import gptq, nf4
from qmerge.numerics.hessian import Statistics
from qmerge.numerics.polish import Lean, descend
from qmerge.pipeline.requantize import Linear, requantize_group
from qmerge.types import Grid, QuantizedWeight, QuantState


def _linear(seed: int = 0, outputs: int = 48, inputs: int = 128):
    """A base that lies exactly on the NF4 grid, a low-rank ΔW of 1 %, and correlated inputs."""
    torch.manual_seed(seed)
    weight = torch.randn(outputs, inputs) * 0.02
    absmax = block_maxima(weight, 64)
    state = QuantState(absmax, nf4.code_book("nf4"), 64, (outputs, inputs), "float32")
    codes = nf4.nearest(weight, absmax, state.code, 64)
    base = nf4.dequantize(codes, state)
    delta = torch.randn(outputs, 4) @ torch.randn(4, inputs)
    delta *= 0.01 * base.norm() / delta.norm()
    mix = torch.randn(inputs, inputs) * 0.3 + torch.eye(inputs)
    return base, delta, QuantizedWeight(codes, Grid("nf4", 4, 64, True, False), state=state), mix


def _statistics(mix: torch.Tensor, tokens: int, seed: int) -> Statistics:
    x = torch.randn(tokens, mix.shape[0], generator=torch.Generator().manual_seed(seed)) @ mix
    found = Statistics(mix.shape[0])
    found.add(x, x)
    return found


def test_lean_is_minus_one_where_the_adapter_is_gone_and_zero_where_it_is_whole():
    """A sign or a normalization lost here would push weights away from the adapter."""
    base, delta, _, mix = _linear()
    hessian = _statistics(mix, 2000, 1).hessian
    lean = Lean(delta, hessian)
    gone, size = lean.share(-delta), lean.size
    torch.testing.assert_close(gone, torch.full_like(gone, -1.0))
    assert float(lean.share(torch.zeros_like(delta)).abs().max()) == 0.0
    torch.testing.assert_close(size[0, 0], delta[0] @ hessian @ delta[0])


def test_lean_of_a_zero_delta_is_zero_and_not_nan():
    """A linear that the adapter leaves alone (B = 0) must not turn the choice into NaN."""
    _, delta, _, mix = _linear()
    lean = Lean(torch.zeros_like(delta), _statistics(mix, 100, 1).hessian)
    share, size = lean.share(delta), lean.size
    assert float(share.abs().max()) == 0.0 and float(size.abs().max()) == 0.0


def test_requantizing_on_the_nf4_grid_gives_the_lean_back():
    """Without the step against it, coordinate descent from the base's own grid leaves a fifth of a small adapter behind."""
    base, delta, stored, mix = _linear()
    train, held_out = _statistics(mix, 4000, 1), _statistics(mix, 1000, 2)
    grid = Grid("nf4", 4, 64, True, False)
    plain = requantize_group([Linear("w", base + delta, stored)], grid, train, held_out, torch.float32)[0]
    given_back = requantize_group([Linear("w", base + delta, stored, delta)], grid, train, held_out, torch.float32, blocks=40)[0]

    def lost(weight: torch.Tensor) -> float:
        lean = Lean(delta, held_out.hessian)
        share, size = lean.share(weight - base - delta), lean.size
        return float((share * size).sum() / size.sum())

    assert lost(plain.weight) < -0.05, "this case no longer shows the lean; choose another"
    assert abs(lost(given_back.weight)) < 0.3 * abs(lost(plain.weight))


def test_no_finite_candidate_is_an_error():
    """Held-out sums that overflowed decide nothing: the first grid taken without damping and without a word."""
    base, delta, stored, mix = _linear()
    train, held_out = _statistics(mix, 400, 1), _statistics(mix, 100, 2)
    held_out.hessian.fill_(float("nan"))
    with pytest.raises(CheckFailed, match="held-out"):
        requantize_group([Linear("w", base + delta, stored, delta)], Grid("nf4", 4, 64, True, False), train, held_out, torch.float32)


def test_descent_never_raises_the_objective_that_it_is_given():
    """A stale gradient after a block would make later sweeps climb."""
    base, delta, stored, mix = _linear()
    hessian = _statistics(mix, 3000, 1).hessian
    element = gptq.book_grid(stored.state.absmax, tuple(base.shape), 64, stored.state.code)
    target = base + 20 * delta  # a small one leaves every single code where it is: that is why the solver goes first

    def cost(codes: torch.Tensor) -> float:
        error = (gptq.values(codes, element) - target).double()
        return float((error * (error @ hessian.double())).sum())

    costs = [cost(stored.codes)] + [cost(descend(stored.codes, target, hessian, 0.0, element, sweeps=sweeps, block=32)) for sweeps in (1, 2, 4)]
    assert all(later <= earlier * (1 + 1e-6) for earlier, later in zip(costs, costs[1:], strict=False)) and costs[-1] < costs[0]
