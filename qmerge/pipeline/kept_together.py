"""How do several ranks go by what one of them keeps on its disk?

The first rank alone has the journal. It decides, the others hear; activations of other ranks' batches go through it, so that what lies there is the same for any number of ranks, and a
run may be resumed with another one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from typing import Any

import torch

from qmerge.errors import Interrupted
from qmerge.numerics.curvature import Curvature, Distant
from qmerge.pipeline.budget import Division
from qmerge.pipeline.experts import Traffic
from qmerge.pipeline.gradients import Curvatures
from qmerge.pipeline.kept import Kept
from qmerge.pipeline.requantize import Solved
from qmerge.pipeline.resume import Run
from qmerge.pipeline.solved_record import from_record, laid_back, laid_flat, to_record
from qmerge.pipeline.stop import Stop
from qmerge.ranks import Ranks
from qmerge.store.writer import Shard
from qmerge.types import Grid, known


class KeptTogether:
    """As `Kept`, for all ranks; ``kept`` is None on those that have no journal. Every rank makes the same calls."""

    def __init__(self, kept: Kept | None, ranks: Ranks, stop: Stop, model_dtype: torch.dtype, device: torch.device, forwards: bool, before_first: Callable[[], None]) -> None:
        """``before_first`` is called on all ranks before the first unit is kept."""
        self.kept, self.ranks, self.stop, self.model_dtype, self.device, self.forwards = kept, ranks, stop, model_dtype, device, forwards
        self.units, self.before_first = 0, before_first
        self.count, self.passed = ranks.tell(None if kept is None else [kept.count, kept.passed])

    def expect(self, units: int) -> None:
        self.units = units
        if self.kept is not None:
            self.kept.expect(units)

    def facts(self, number: int) -> dict[str, Any]:
        """Elsewhere than where the journal is nobody needs them."""
        return self.kept.facts(number) if self.kept is not None else {"tuned": None}

    def traffic(self, number: int) -> dict[str, Traffic]:
        return self.kept.traffic(number) if self.kept is not None else {}

    def solved(self, number: int) -> dict[str, Solved]:
        """A solved unit, where the text still has to go through it; else only where the journal is."""
        own = self.kept.solved(number) if self.kept is not None else {}
        if not self.forwards or number < self.passed or self.count >= self.units:
            return own
        record = to_record(own, self.model_dtype) if self.kept is not None else None
        facts, tensors = self.ranks.hand(None if record is None else ({"linears": record[0]}, record[1]), 0)
        return own if self.kept is not None else from_record(facts["linears"], tensors, self.model_dtype, self.device)

    @property
    def tensors_of(self) -> dict[int, set[str]]:
        return known(self.kept).tensors_of

    @property
    def shards(self) -> list[Shard]:
        return known(self.kept).shards

    @property
    def run(self) -> Run:
        return known(self.kept).run

    def shard(self, number: int, shard: Shard) -> None:
        known(self.kept).shard(number, shard)

    def solving(self, number: int) -> None:
        """From here to `rest` a signal waits."""
        if self.kept is not None:
            self.kept.solving(number)
        else:
            self.stop.finishing = f"block {number + 1}/{self.units}"

    def commit(self, number: int, solved: Mapping[str, Solved], traffic: Mapping[str, Traffic], tuned: Mapping[str, Any] | None) -> None:
        self.before_first()
        if self.kept is not None:
            self.kept.commit(number, solved, traffic, tuned)

    def wait(self) -> None:
        """All that was given is kept: it is so at once."""

    def rest(self) -> None:
        """A unit is done, and kept; raises Interrupted on all ranks where one is to end."""
        self.stop.finishing = ""
        if any(self.ranks.hear(self.stop.wanted)):
            raise Interrupted("The run was stopped.", found="a signal")

    # activations

    def save_streams(self, passed: int, batches: list[Any]) -> None:
        """Keep what enters block ``passed``, every rank's, if there is time and room for it where the journal is."""
        own = {batch.number: batch for batch in batches}
        mine = {number: [list(batch.teacher.shape), *(laid_flat(stream)[1] for stream in (batch.teacher, batch.runtime))] for number, batch in own.items()}
        table = {int(number): (rank, *row) for rank, rows in enumerate(self.ranks.hear(mine)) for number, row in rows.items()}
        nbytes = sum(2 * 4 * torch.Size(shape).numel() for _, shape, *_ in table.values())
        if not self.ranks.tell(self.kept.worth_keeping(nbytes) if self.kept is not None else None):
            return
        arriving = self._arriving(table, own)
        if self.kept is not None:
            self.kept.put_streams(passed, arriving, len(table))
        for _ in arriving:  # also where there was no room after all: the others send on
            pass

    def _arriving(self, table: Mapping[int, tuple[Any, ...]], own: Mapping[int, Any]) -> Iterator[tuple[Any, Any]]:
        """Both streams of each batch, where the journal is; None elsewhere."""
        for number in sorted(table):
            rank, shape, *orders = table[number]
            pair = []
            for name, order in zip(("teacher", "runtime"), orders, strict=True):
                flat = laid_flat(getattr(own[number], name))[0] if number in own else None
                found = self.ranks.move(flat, [shape[axis] for axis in order], torch.float32, rank, 0)
                pair.append(None if found is None else laid_back(found, order))
            yield pair[0], pair[1]

    def load_streams(self, batches: list[Any]) -> int:
        """Each rank's batches get what was kept of them; returns how many blocks they have gone through."""
        owners = {number: rank for rank, numbers in enumerate(self.ranks.hear([batch.number for batch in batches])) for number in numbers}
        if self.kept is not None:
            self.kept.streams_of(len(owners))
        self.passed = self.ranks.tell(self.kept.passed if self.kept is not None else None)
        own = {batch.number: batch for batch in batches}
        for number in sorted(owners) if self.passed else ():
            pair = self.kept.get_streams(number) if self.kept is not None else ()
            flat = [laid_flat(stream) for stream in pair]
            shape, orders = self.ranks.tell([list(pair[0].shape), [order for _, order in flat]] if pair else None)
            for place, (name, order) in enumerate(zip(("teacher", "runtime"), orders, strict=True)):
                found = self.ranks.move(flat[place][0] if flat else None, [shape[axis] for axis in order], torch.float32, 0, owners[number])
                if found is not None:
                    setattr(own[number], name, laid_back(found, order, own[number].teacher.device))
        return int(self.passed)

    # what comes before the blocks

    def phase(self) -> tuple[Curvatures, Division | None] | None:
        """What was kept of it, on all ranks."""
        found = self.kept.phase() if self.kept is not None else None
        record = None
        if found is not None:
            curvatures, division = found
            blocks = {name: curvature.blocks for name, curvature in curvatures.by_name.items()}
            shapes = {name: [curvature.outputs, curvature.width, len(blocks[name])] for name, curvature in curvatures.by_name.items()}
            grids = None if division is None else [{name: None if grid is None else asdict(grid) for name, grid in division.grids.items()}, division.losses, division.bits_per_weight]
            tensors = {f"{name}#{place}": block for name, its in blocks.items() for place, block in enumerate(its)}
            record = {"shapes": shapes, "counts": [curvatures.tokens, curvatures.rows, curvatures.linears], "division": grids}, tensors
        facts, tensors = self.ranks.hand(record or ({"shapes": None}, {}), 0)
        if facts["shapes"] is None or found is not None:
            return found
        by_name: dict[str, Curvature | Distant] = {name: Curvature(outputs, width, [tensors[f"{name}#{place}"] for place in range(count)]) for name, (outputs, width, count) in facts["shapes"].items()}
        row = facts["division"]
        division = None if row is None else Division({name: None if grid is None else Grid(**grid) for name, grid in row[0].items()}, row[1], row[2])
        return Curvatures(by_name, *facts["counts"]), division

    def keep_phase(self, curvatures: Curvatures, division: Division | None, elapsed_s: float) -> None:
        if self.kept is not None:
            self.kept.keep_phase(curvatures, division, elapsed_s)
