"""Tokens that a distribution gives: as often as it says, and the same ones wherever it lies."""

from __future__ import annotations

import pytest
import torch

from qmerge.numerics.draws import PIECE, drawn


def plain(probabilities: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """By the definition, token by token in fp64."""
    found = []
    for row, number in zip(probabilities.double(), numbers.tolist(), strict=True):
        total, goal = 0.0, number * float(row.sum())
        for word, value in enumerate(row.tolist()):
            total += value
            if total > goal:
                found.append(word)
                break
    return torch.tensor(found)


@pytest.mark.parametrize("vocabulary", [1, 7, PIECE - 1, PIECE, PIECE + 1, 3 * PIECE + 88])
def test_the_word_is_that_of_the_definition(vocabulary):
    """A piece too far, its beginning counted twice, or words that padding has made up."""
    generator = torch.Generator().manual_seed(vocabulary)
    probabilities = (3 * torch.randn(200, vocabulary, generator=generator)).softmax(-1)
    numbers = torch.rand(200, generator=generator, dtype=torch.float64)
    assert torch.equal(drawn(probabilities, numbers), plain(probabilities, numbers))


def test_words_come_as_often_as_their_probability_says():
    """Gradients of a model that answers otherwise: the curvature would be another one's. A chi-square of 39 degrees of freedom is above 80 once in 10,000."""
    generator = torch.Generator().manual_seed(3)
    row, count = (2 * torch.randn(40, generator=generator)).softmax(-1), 20000
    words = drawn(row.expand(count, -1), torch.rand(count, generator=generator, dtype=torch.float64))
    seen = torch.bincount(words, minlength=40).double()
    assert float(((seen - count * row).square() / (count * row)).sum()) < 80


def test_a_word_without_probability_is_never_given():
    """Infinite gradients: at both ends of the numbers, of a row and of a piece."""
    row = torch.zeros(2 * PIECE + 3)
    row[[5, PIECE - 1, PIECE + 4]] = torch.tensor([0.25, 0.5, 0.25])
    numbers = torch.tensor([0.0, 0.2499999, 0.25, 0.7499999, 0.75, 1 - 2**-53], dtype=torch.float64)
    assert drawn(row.expand(6, -1), numbers).tolist() == [5, 5, PIECE - 1, PIECE - 1, PIECE + 4, PIECE + 4]


def test_one_certain_word_is_always_given():
    """A distribution of one word, wherever it stands."""
    for word in (0, PIECE - 1, PIECE, 2 * PIECE):
        row = torch.zeros(3, 2 * PIECE + 1)
        row[:, word] = 1.0
        assert drawn(row, torch.tensor([0.0, 0.5, 1 - 2**-53], dtype=torch.float64)).tolist() == [word] * 3
