"""Are numbers that are read from tiles of logits, with the compiled loops, those of whole logits? On what device, in how many pieces and threads must not matter."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from qmerge.quality import fused, heads
from qmerge.quality.divergence import compare_logits, support_divergence
from qmerge.quality.heads import NUMBERS, answer_losses, compare_answers
from qmerge.quality.reference import Answers

POSITIONS, HIDDEN, VOCABULARY = 40, 8, 3000


class Head(torch.nn.Module):
    """States are the embeddings of tokens; logits a linear head's, with a bias, and soft-capped where ``cap`` says so."""

    def __init__(self, vocabulary=VOCABULARY, seed=0, wide=4.0, cap=None):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.config = SimpleNamespace(final_logit_softcapping=cap)
        self.table = torch.randn(VOCABULARY, HIDDEN, generator=torch.Generator().manual_seed(9))
        self.head = torch.nn.Linear(HIDDEN, vocabulary)
        self.head.weight.data = torch.randn(vocabulary, HIDDEN, generator=generator) * wide
        self.head.bias.data = torch.randn(vocabulary, generator=generator)

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids, use_cache=False):
        logits = self.head(self.table[input_ids])
        cap = self.config.final_logit_softcapping
        return SimpleNamespace(logits=torch.tanh(logits / cap) * cap if cap else logits)


def near(model, by, seed=5):
    other = Head(model.head.out_features, cap=model.config.final_logit_softcapping)
    for mine, theirs in zip(other.parameters(), model.parameters(), strict=True):
        mine.data = theirs.data + by * torch.randn(theirs.shape, generator=torch.Generator().manual_seed(seed))
    return other


def asked(*models):
    """(answers, states, positions, targets) of some tokens."""
    ids = torch.randint(0, VOCABULARY, (2, POSITIONS), generator=torch.Generator().manual_seed(1))
    answers = tuple(Answers(model) for model in models)
    with torch.no_grad():
        states = tuple(each.states(ids) for each in answers)
    at = torch.arange(1, 2 * POSITIONS, 2)
    return answers, states, at, torch.randint(0, VOCABULARY, (len(at),), generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def compared(*models, chunk=1 << 20):
    answers, states, at, targets = asked(*models)
    return compare_answers(answers, states, at, targets, chunk)


@torch.no_grad()
def plain(*models):
    """From whole logits, in torch."""
    answers, states, at, targets = asked(*models)
    logits = [each.logits(state.flatten(0, 1)[at]) for each, state in zip(answers, states, strict=True)]
    return logits, compare_logits(*logits, targets)


def exact(logits):
    """KL in fp64."""
    log_p, log_q = (each.double().log_softmax(-1) for each in logits)
    return (log_p.exp() * (log_p - log_q)).sum(-1).numpy()


@pytest.mark.parametrize("cap", [None, 30.0])
@pytest.mark.parametrize("chunk", [1, 40_000, 160_000, 1 << 20])
def test_tiles_of_any_size_give_the_numbers_of_whole_logits(chunk, cap):
    """An entry that falls between two tiles, a bias or a cap that a part of the head goes without, a target looked up in the wrong tile."""
    model = Head(wide=0.5, cap=cap)
    found, [_, expected] = compared(model, near(model, 0.3), chunk=chunk), plain(model, near(model, 0.3))
    for name in NUMBERS:
        np.testing.assert_allclose(found[name].astype(np.float64), expected[name].double().numpy(), rtol=5e-5, atol=3e-6, err_msg=name)
    assert found["agree"].any() and not found["agree"].all() and np.isnan(found["js"]).all()


@pytest.mark.parametrize(("by", "rtol"), [(1e-4, 5e-3), (1e-2, 5e-4), (1.0, 1e-5)])
@pytest.mark.parametrize("wide", [0.3, 3.0, 8.0])
def test_divergence_is_exact_also_where_the_reference_is_sure_of_a_late_token(wide, by, rtol):
    """A small KL left over from two large sums: the constant stayed that of the first tile while a later one held all the probability."""
    model = Head(wide=wide)
    model.head.bias.data[-5:] += 30.0 * torch.arange(5)
    found, [logits, _] = compared(model, near(model, by), chunk=40_000), plain(model, near(model, by))
    expected = exact(logits)
    np.testing.assert_allclose(found["kl"], expected, rtol=rtol, atol=1e-11)
    assert found["kl"].mean(dtype=np.float64) == pytest.approx(expected.mean(), rel=rtol / 5, abs=1e-12)


def test_equal_models_have_no_divergence_in_any_tile():
    """The zero of the scale, which rounding must not move."""
    found = compared(Head(), near(Head(), 0.0), chunk=40_000)
    assert found["kl"].max() == 0.0 and found["agree"].all() and (found["nll_ref"] == found["nll_cand"]).all() and (found["delta_p"] == 0).all()


def test_threads_change_no_bit(monkeypatch):
    """Results that differ from machine to machine by what their core counts are."""
    model = Head()
    first = compared(model, near(model, 0.1), chunk=160_000)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    again = compared(model, near(model, 0.1), chunk=160_000)
    assert all(np.array_equal(first[name], again[name], equal_nan=True) for name in first)


def test_what_is_not_finite_is_counted_as_in_torch():
    """A masked entry that becomes NaN, a NaN that a maximum hides, an infinite logit."""
    model = Head()
    other = near(model, 0.1)
    for head in (model.head, other.head):
        head.bias.data[7] = -torch.inf
    other.head.bias.data[2900] = -torch.inf
    found, [logits, expected] = compared(model, other, chunk=40_000), plain(model, other)
    for name in NUMBERS:
        np.testing.assert_allclose(found[name].astype(np.float64), expected[name].double().numpy(), rtol=5e-5, atol=3e-6, err_msg=name)
    np.testing.assert_allclose(found["js"], support_divergence(*logits).numpy(), rtol=2e-4, atol=1e-8)
    for value in (torch.nan, torch.inf):
        other.head.bias.data[0] = value
        assert np.isnan(compared(model, other, chunk=40_000)["nll_cand"]).all()


def test_what_the_reference_says_does_not_depend_on_the_arm_beside_it():
    """The sidecar keeps the reference's numbers once for all arms: other bits beside a broken arm, and nothing could be computed again."""
    model, broken = Head(), near(Head(), 0.1)
    broken.head.bias.data[3] = torch.nan
    fine, beside = compared(model, near(model, 0.1), chunk=40_000), compared(model, broken, chunk=40_000)
    assert not asked(broken)[0][0].whole and all(np.array_equal(fine[name], beside[name]) for name in ("nll_ref", "confidence")) and np.isnan(beside["kl"]).all()


def test_other_vocabularies_are_cut_in_tiles_too():
    """A head that is cut to the smaller vocabulary in all tiles but the last."""
    small, large = Head(), Head(VOCABULARY + 10)
    large.head.weight.data[:VOCABULARY], large.head.bias.data[:VOCABULARY] = small.head.weight.data, small.head.bias.data
    found = compared(small, large, chunk=40_000)
    assert found["kl"].max() == 0.0 and (found["js"] > 0).all() and (found["js"] < math.log(2)).all()


class Waits(TorchDispatchMode):
    """How often the host had to know a value that the device holds."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_the_way_of_accelerators_is_the_same_and_waits_for_no_piece():
    """A device that stands still after every chunk of logits until the host has looked at it."""
    model = Head()
    answers, states, at, targets = asked(model, near(model, 0.1))
    with torch.no_grad(), Waits() as seen:
        numbers, differ = heads._in_torch(answers, tuple(each.flatten(0, 1) for each in states), at, targets, 4 * VOCABULARY * 3)
    with torch.no_grad():
        ours = compare_answers(answers, states, at, targets, 40_000)
    assert seen.count == 0 and not differ.any()
    for name in NUMBERS:
        np.testing.assert_allclose(numbers[name].astype(np.float64), ours[name].astype(np.float64), rtol=5e-5, atol=3e-6, err_msg=name)


@pytest.mark.parametrize("chunk", [1, 40_000, 1 << 20])
def test_losses_are_those_of_cross_entropy(chunk):
    """A sum that starts anew with each tile; a masked entry that makes a loss NaN which is finite."""
    model = Head()
    model.head.bias.data[7] = -torch.inf
    model.table[0] = torch.nan
    answers, [states], at, targets = asked(model)
    states = states.flatten(0, 1)[at]
    states[3, 0] = torch.nan
    with torch.no_grad():
        expected = torch.nn.functional.cross_entropy(model.head(states), targets, reduction="none").numpy()
        found = answer_losses(answers[0], states, targets, chunk)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert np.isnan(found[3]) and np.isfinite(np.delete(found, 3)).all()


def test_the_exponential_is_exact_over_its_range():
    """A coefficient mistyped: an error that no single row shows, in every probability."""
    logits = np.linspace(-86.9, 0, 200_001, dtype=np.float32)[:, None]
    rows = np.concatenate([np.zeros_like(logits), logits], 1)
    state = fused.new_state(len(rows), fused.ONE_STATE)
    fused.loss_tile(np.ascontiguousarray(rows), 0, np.zeros(len(rows), np.int64), state)
    np.testing.assert_allclose(state[:, 1] - 1, np.exp(logits[:, 0].astype(np.float64)), rtol=3e-7, atol=1e-7)


def test_bits_do_not_depend_on_what_was_compiled_before(tmp_path):
    """A loop that another one calls has a copy inside it and one of its own: the process that compiled both took the second, which is summed in another order; later ones the first."""
    work = """
import hashlib, numpy as np
from qmerge.quality import fused
dice = np.random.default_rng(0)
ref = (dice.normal(size=(64, 1000)) * 3).astype(np.float32)
cand = ref + (dice.normal(size=ref.shape) * 0.05).astype(np.float32)
state, alone, targets = fused.new_state(64), fused.new_state(64, fused.ONE_STATE), dice.integers(0, 1000, 64)
for first in range(0, 1000, 250):
    here = slice(first, first + 250)
    fused.compare_tile(np.ascontiguousarray(ref[:, here]), np.ascontiguousarray(cand[:, here]), first, targets, state)
    fused.loss_tile(np.ascontiguousarray(ref[:, here]), first, targets, alone)
print(hashlib.sha256(state.tobytes() + alone.tobytes()).hexdigest())
"""
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[1])}
    first, again = (subprocess.run([sys.executable, "-c", work], env=environment, capture_output=True, text=True, check=True).stdout for _ in range(2))
    assert first == again and len(list(tmp_path.rglob("*.nbc"))) == 2
