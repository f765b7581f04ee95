"""Who of several ranks does what, and how does the result not depend on how many they are?

Batches of text are split by slots (`numerics.hessian.SLOTS`), whole slots to a rank. A sum over all batches is formed slot by slot: each rank sums a slot of its own, then all add up their
slots in the order of the slots, every rank a part of the matrix. Whoever solves a linear gets the whole sum. Alone, all of this is a plain sum.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from qmerge.numerics.hessian import SLOTS, Statistics
from qmerge.pipeline.requantize import Solved
from qmerge.pipeline.solved_record import from_record, to_record
from qmerge.ranks import ALONE, Ranks

PIECE = 1 << 22
"""elements of a sum, about, that ranks send each other at a time"""
Part = tuple[torch.Tensor, torch.Tensor, "torch.Tensor | None"]


@dataclass(frozen=True)
class Spread:
    """``train`` batches to solve on and ``held_out`` ones to choose with, over ``ranks``."""

    ranks: Ranks = ALONE
    train: int = 0
    held_out: int = 0

    @property
    def batches(self) -> int:
        return self.train + self.held_out

    def slots(self, held_out: bool) -> int:
        return min(SLOTS, self.held_out if held_out else self.train)

    def owner(self, held_out: bool, slot: int) -> int:
        """The rank that a slot's batches go through the model on; those held out begin behind the last of the others."""
        return (slot + (self.slots(False) if held_out else 0)) % self.ranks.size

    def mine(self, held_out: bool, slot: int) -> bool:
        return self.owner(held_out, slot) == self.ranks.rank

    def sums(self, held_out: bool, parts: Iterable[tuple[Part, int]], features: int, outputs: int, device: torch.device, solvers: Sequence[int], compute: torch.dtype = torch.float32, drifts: bool = True) -> Statistics | None:
        """The sum over all ranks' batches on the ``solvers``, None elsewhere. ``parts``: this rank's, with their slots, in order. ``outputs``: rows of the residual's product, or 0; ``drifts``: is D summed?"""
        reduced = _Reduced(self, held_out, features, outputs, device, compute, drifts)
        partial, current = None, None
        for part, slot in parts:
            if partial is not None and slot != current:
                reduced.add(partial)
                partial = None
            partial, current = partial or Statistics(features, device, outputs=outputs, compute=compute, drifts=drifts), slot
            partial.add_all([part])
        if partial is not None:
            reduced.add(partial)
        while reduced.turn * self.ranks.size < self.slots(held_out):
            reduced.add(None)
        return reduced.whole(solvers)


class _Reduced:
    """A sum under way. In each turn every rank brings a slot of its own, as long as there are some; all add up a share of every piece in the order of the slots."""

    def __init__(self, spread: Spread, held_out: bool, features: int, outputs: int, device: torch.device, compute: torch.dtype, drifts: bool) -> None:
        self.compute = compute
        self.spread, self.held_out, self.ranks, self.device = spread, held_out, spread.ranks, device
        self.features, self.outputs, self.drifts, self.turn, self.tokens = features, outputs, drifts, 0, 0
        self.shares: list[torch.Tensor] = []

    def add(self, partial: Statistics | None) -> None:
        size = self.ranks.size
        slots = range(self.turn * size, min((self.turn + 1) * size, self.spread.slots(self.held_out)))
        order = [self.spread.owner(self.held_out, slot) for slot in slots]
        self.turn += 1
        self.tokens += partial.tokens if partial is not None else 0
        shapes = _pieces((partial or self._empty()).strips())
        for number, strips in enumerate(shapes):
            count = sum(strip.numel() for strip in strips)
            share = -(-count // size)
            send, received = torch.zeros(share * size, device=self.device), torch.empty(share * len(order), device=self.device)
            if partial is not None:
                torch.cat([strip.reshape(-1) for strip in strips], out=send[:count])
            takes = [share if rank in order else 0 for rank in range(size)]
            self.ranks.swap(received, send if partial is not None else send[:0], takes, [share if partial is not None else 0] * size)
            by_rank = dict(zip(sorted(order), received.split(share), strict=True))
            for place, rank in enumerate(order):
                if place == 0 and self.turn == 1:
                    self.shares.append(by_rank[rank].clone())
                else:
                    self.shares[number].add_(by_rank[rank])

    def whole(self, solvers: Sequence[int]) -> Statistics | None:
        tokens = sum(self.ranks.hear(self.tokens))
        here, size = self.ranks.rank in solvers, self.ranks.size
        found = Statistics(self.features, self.device, tokens, self.outputs, self.compute, self.drifts) if here else None
        pieces = _pieces(found.strips()) if found is not None else [None] * len(self.shares)
        for share, strips in zip(self.shares, pieces, strict=True):
            received = torch.empty(len(share) * size if here else 0, device=self.device)
            gives = [len(share) if rank in solvers else 0 for rank in range(size)]
            self.ranks.swap(received, share.repeat(sum(1 for give in gives if give)), [len(share) if here else 0] * size, gives)
            start = 0
            for strip in strips or ():
                strip.copy_(received[start : start + strip.numel()].view(strip.shape))
                start += strip.numel()
        return found

    def _empty(self) -> Statistics:
        """For its shapes: a rank that has no slot left."""
        return Statistics(self.features, torch.device("meta"), outputs=self.outputs, drifts=self.drifts)


def _pieces(strips: list[torch.Tensor]) -> list[list[torch.Tensor]]:
    found: list[list[torch.Tensor]] = []
    room = 0
    for strip in strips:
        if room <= 0:
            found.append([])
            room = PIECE
        found[-1].append(strip)
        room -= strip.numel()
    return found


def share_out(sizes: Sequence[int], ranks: Ranks) -> list[int]:
    """The rank that does each piece of work: the largest first, each to who has least; of those the last, for the first rank also writes."""
    loads, found = [0] * ranks.size, [0] * len(sizes)
    for place in sorted(range(len(sizes)), key=lambda place: (-sizes[place], place)):
        rank = min(range(ranks.size), key=lambda rank: (loads[rank], -rank))
        found[place], loads[rank] = rank, loads[rank] + sizes[place]
    return found


def handed(ranks: Ranks, owners: Sequence[int], names: Sequence[str], found: dict[str, Solved], model_dtype: torch.dtype, device: torch.device) -> list[Solved]:
    """What each linear's owner ``found``, on all ranks."""
    if ranks.alone:
        return [found[name] for name in names]
    whole = []
    for name, owner in zip(names, owners, strict=True):
        record = to_record({name: found[name]}, model_dtype) if owner == ranks.rank else None
        facts, tensors = ranks.hand(None if record is None else ({"linears": record[0]}, record[1]), owner)
        whole.append(found[name] if owner == ranks.rank else from_record(facts["linears"], tensors, model_dtype, device)[name])
    return whole


def solved_apart(ranks: Ranks, names: Sequence[str], sizes: Sequence[int], solve: Callable[[str], Solved], model_dtype: torch.dtype, device: torch.device) -> dict[str, Solved]:
    """Linears that need nothing of each other, each solved by one rank."""
    owners = share_out(sizes, ranks)
    found = {name: solve(name) for name, owner in zip(names, owners, strict=True) if owner == ranks.rank}
    return dict(zip(names, handed(ranks, owners, names, found, model_dtype, device), strict=True))
