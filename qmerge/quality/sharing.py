"""Which of several ranks measures which batch of which model?

Whole batches are dealt out in turn. What a batch holds does not depend on who has it, so that its numbers keep their bits; put back in their order (`qmerge.quality.gathering`) they are those
of one rank. Where a model has fewer batches than there are ranks, the models are spread as well: each is loaded by as many ranks as it has batches.
"""

from __future__ import annotations

from dataclasses import dataclass

from qmerge.ranks import Ranks


@dataclass(frozen=True)
class Share:
    """What is ``rank``'s of one model's batches, which the ranks ``members`` hold."""

    rank: int = 0
    members: tuple[int, ...] = (0,)

    @property
    def empty(self) -> bool:
        """Nothing is: the model need not be loaded."""
        return self.rank not in self.members

    def has(self, number: int) -> bool:
        """Is batch ``number`` (from 0) this rank's?

        >>> [Share(1, (0, 1)).has(number) for number in range(3)]
        [False, True, False]
        """
        return self.members[number % len(self.members)] == self.rank

    def later(self, by: int) -> Share:
        """The same, begun by a member ``by`` places on: else short texts would all be the first one's."""
        by %= len(self.members)
        return Share(self.rank, self.members[by:] + self.members[:by])


WHOLE = Share()
"""one rank has all"""


def share_of(ranks: Ranks, model: int, batches: int) -> Share:
    """This rank's share of the ``model``-th one (from 0), of about ``batches`` batches."""
    count = max(1, min(ranks.size, batches))
    return Share(ranks.rank, tuple((model * count + place) % ranks.size for place in range(count)))


def share_of_all(ranks: Ranks) -> Share:
    """Of a model that every rank holds."""
    return Share(ranks.rank, tuple(range(ranks.size)))
