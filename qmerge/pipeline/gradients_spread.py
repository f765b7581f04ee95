"""How are curvatures summed where several ranks take gradients, each on batches of its own?

Batch after batch goes round the ranks. In each turn every rank has one of its own, and each linear's owner adds up what all of them found, in the order of the batches: as one process would.
"""

from __future__ import annotations

import torch

from qmerge.numerics.curvature import Curvature, Distant
from qmerge.pipeline.spread import Spread, share_out
from qmerge.ranks import Ranks
from qmerge.types import known


class Summed:
    """The curvatures of one block. ``sums``: of all linears, or of those that this rank owns; ``names`` of all that gradients reached, in order."""

    def __init__(self, spread: Spread, device: torch.device) -> None:
        self.spread, self.ranks, self.device, self.turn = spread, spread.ranks, device, 0
        self.sums: dict[str, Curvature] = {}
        self.names: list[str] = []

    def add(self, found: dict[str, Curvature] | None) -> None:
        """A batch's, or None where this rank has none left. All ranks come here equally often."""
        if self.ranks.alone:
            for name, curvature in known(found).items():
                self.sums[name].join(curvature) if name in self.sums else self.sums.update({name: curvature})
            self.names = list(self.sums)
            return
        told = self.ranks.hear(None if found is None else [[name, curvature.outputs, curvature.width] for name, curvature in found.items()])
        having = [rank for rank, rows in enumerate(told) if rows is not None]
        rows = told[having[0]]
        if any(told[rank] != rows for rank in having):
            raise RuntimeError("gradients reach other linears in one batch than in another")
        self.names = [name for name, *_ in rows]
        shapes = {name: Curvature(outputs, width) for name, outputs, width in rows}
        owners = share_out([_elements(shape) for shape in shapes.values()], self.ranks)
        self._swap(found, shapes, dict(zip(shapes, owners, strict=True)), having)
        self.turn += 1

    def _swap(self, found: dict[str, Curvature] | None, shapes: dict[str, Curvature], owners: dict[str, int], having: list[int]) -> None:
        counts = [sum(_elements(shape) for name, shape in shapes.items() if owners[name] == rank) for rank in range(self.ranks.size)]
        parts = [block.reshape(-1) for rank in range(self.ranks.size) for name, curvature in (found or {}).items() if owners[name] == rank for block in curvature.blocks]
        send = torch.cat(parts) if parts else torch.empty(0, device=self.device)
        mine = counts[self.ranks.rank]
        received = torch.empty(mine * len(having), device=self.device)
        self.ranks.swap(received, send, [mine if rank in having else 0 for rank in range(self.ranks.size)], counts if found is not None else [0] * self.ranks.size)
        for whole in received.split(mine) if mine else ():
            start = 0
            for name in (name for name, owner in owners.items() if owner == self.ranks.rank):
                blocks = []
                for span in shapes[name].spans():
                    side = span.stop - span.start
                    blocks.append(whole[start : start + side * side].view(side, side).clone())
                    start += side * side
                curvature = Curvature(shapes[name].outputs, shapes[name].width, blocks)
                self.sums[name].join(curvature) if name in self.sums else self.sums.update({name: curvature})

    def end(self) -> None:
        """This rank's batches are through; others' may not be."""
        while not self.ranks.alone and self.turn * self.ranks.size < self.spread.batches:
            self.add(None)


def _elements(curvature: Curvature) -> int:
    return sum((span.stop - span.start) ** 2 for span in curvature.spans())


def everywhere(by_name: dict[str, Curvature | Distant], order: list[str], ranks: Ranks) -> dict[str, Curvature | Distant]:
    """Every rank's packed curvatures, on all of them, in the order of the names."""
    if ranks.alone:
        return by_name
    owners = {name: (rank, *row) for rank, rows in enumerate(ranks.hear({name: [curvature.outputs, curvature.width] for name, curvature in by_name.items()})) for name, row in rows.items()}
    found = {}
    for name in order:
        rank, outputs, width = owners[name]
        _, tensors = ranks.hand(({}, {str(place): block for place, block in enumerate(by_name[name].blocks)}) if rank == ranks.rank else None, rank)
        found[name] = by_name[name] if rank == ranks.rank else Curvature(outputs, width, [tensors[place] for place in sorted(tensors, key=int)])
    return found
