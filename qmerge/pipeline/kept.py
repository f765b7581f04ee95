"""What of a quantizing run is on the disk, so that at most one block is solved again?

After each block: its solved linears. Every few blocks, as time allows: the activations that enter the next one (the blocks between are then run forwards with their solved weights, to the
same bits). What is inside finished shards, and not needed to run forwards, goes. With ``--polish distill`` all of it stays until the end.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from qmerge.errors import Interrupted
from qmerge.numerics.curvature import Curvature, Distant
from qmerge.pipeline.budget import Division
from qmerge.pipeline.experts import Traffic
from qmerge.pipeline.gradients import Curvatures
from qmerge.pipeline.requantize import Solved
from qmerge.pipeline.resume import Run
from qmerge.pipeline.solved_record import from_record, laid_back, laid_flat, to_record
from qmerge.store.manifest import digest_file
from qmerge.store.runs import clear
from qmerge.store.writer import Shard, number_of, temporary
from qmerge.types import Grid, known

SHARE = 0.04
"""of the run's time that keeping activations may take together with all else that is kept"""
PHASE_SHARE = 0.1
"""of a phase's time that keeping its result may take"""


class Kept:
    """Units are blocks, counted from 0, then the head; or stretches of linears that need no calibration text."""

    def __init__(self, run: Run, model_dtype: torch.dtype, device: torch.device, drops: bool, forwards: bool, shard_bytes: int) -> None:
        """``drops``: may tensors of solved units go once they are in the output? ``forwards``: do later units need earlier ones to be run? ``units`` is set once it is known."""
        self.run, self.journal, self.units, self.model_dtype, self.device = run, run.journal, 0, model_dtype, device
        self.drops, self.forwards, self.shard_bytes, self.began = drops, forwards, shard_bytes, time.perf_counter()
        self.tensors_of: dict[int, set[str]] = {}
        """unit -> the tensors of the output that came of it, in this process"""
        self.shards: list[Shard] = []
        self._full: dict[int, int] = {}
        """unit -> bytes of its tensors in the journal"""
        self.count = self.passed = 0
        """units that are solved; blocks that the kept activations have gone through"""
        if run.resumed:
            self._look()

    # what an earlier process has left

    def _look(self) -> None:
        out, rows = known(self.run.folder).path, list[Shard]()
        while (found := self.journal.get(f"shard-{len(rows)}")) is not None:
            rows.append(Shard(found[0]["names"], found[0]["tensor_bytes"], found[0]["digest"]))
        _put_back(out, len(rows))
        good = [digest_file(temporary(out, number)) == shard.digest if temporary(out, number).exists() else False for number, shard in enumerate(rows)]
        while (row := self.journal.facts(f"unit-{self.count}")) is not None:
            whole = row["dropped"] or self.journal.get(f"unit-{self.count}") is not None
            if not whole:
                break
            self._full[self.count] = 0 if row["dropped"] else self.journal.size(f"unit-{self.count}")
            self.units, self.count = row["of"], self.count + 1
        dropped = [number for number, size in self._full.items() if not size]
        self.passed = self._whole_streams()
        lost = bool(dropped) and (max(dropped) >= self.passed and self.forwards and self.count < self.units)
        if lost or (dropped and not all(good)):  # what was dropped lay in shards that are no longer good
            self._from_the_beginning()
            return
        for number in range(good.index(False) if False in good else len(rows), len(rows)):
            self.journal.drop(f"shard-{number}")
            rows.pop()
        self.shards = rows
        clear(out, {temporary(out, number).name for number in range(len(rows))})

    def _whole_streams(self) -> int:
        head = self.journal.get("streams")
        if head is None or head[0]["passed"] > self.count:
            return 0
        passed = head[0]["passed"]
        return passed if all(self.journal.get(f"streams-{passed}-{number}") is not None for number in range(head[0]["batches"])) else 0

    def _from_the_beginning(self) -> None:
        self.run.say("--resume: what was kept is damaged; starting from the beginning")
        for name in self.journal.names():
            if name != "run":
                self.journal.drop(name)
        clear(known(self.run.folder).path, set())
        self._full, self.count, self.passed, self.shards = {}, 0, 0, []

    def expect(self, units: int) -> None:
        """How many units there are."""
        self.units = units
        self._at()

    def facts(self, number: int) -> dict[str, Any]:
        """What is known of a solved unit besides its tensors: ``linears``, ``traffic``, ``tuned``, ``dropped``."""
        return known(self.journal.facts(f"unit-{number}"))

    def solved(self, number: int) -> dict[str, Solved]:
        """The linears of a solved unit, those whose tensors were dropped left out."""
        if not self._full[number]:
            return {}
        found = self.journal.get(f"unit-{number}")
        if found is None:
            raise Interrupted("What was kept of the run cannot be read any more.", where=f"unit-{number}", fix="run again without --resume")
        return from_record(found[0]["linears"], found[1], self.model_dtype, self.device)

    def traffic(self, number: int) -> dict[str, Traffic]:
        return {name: Traffic(**row) for name, row in self.facts(number)["traffic"].items()}

    # what this one leaves

    def solving(self, number: int) -> None:
        """From here to `commit` a signal waits."""
        self.run.stop.finishing = f"block {number + 1}/{self.units}"

    def commit(self, number: int, solved: Mapping[str, Solved], traffic: Mapping[str, Traffic], tuned: Mapping[str, Any] | None) -> None:
        """A unit is solved. Raises Interrupted where there is no room."""
        self.run.begin()
        began = time.perf_counter()
        rows, tensors = to_record(solved, self.model_dtype)
        self.journal.seconds += time.perf_counter() - began
        facts = {"linears": rows, "traffic": {name: asdict(row) for name, row in traffic.items() if name in solved}, "tuned": tuned, "dropped": False, "of": self.units}
        self._full[number] = self.journal.put(f"unit-{number}", facts, tensors)
        self.count = number + 1
        self._drop()
        self._at()

    def wait(self) -> None:
        """All that was given is kept: it is so at once."""

    def rest(self) -> None:
        """What belongs to a unit is done; raises Interrupted where the run is to end."""
        self.run.stop.finishing = ""
        self.run.stop.check()

    def _at(self) -> None:
        self.run.place = f"block {self.count + 1}/{self.units}" if self.count < self.units else "the writing"

    def shard(self, number: int, shard: Shard) -> None:
        """A shard is on the disk."""
        self.run.begin()
        self.journal.put(f"shard-{number}", {"names": shard.names, "tensor_bytes": shard.tensor_bytes, "digest": shard.digest})
        self.shards.append(shard)
        self._drop()

    def _drop(self) -> None:
        """Tensors that are in finished shards and are not needed to run forwards."""
        if not self.drops or not self.shards:
            return
        there = {name for shard in self.shards for name in shard.names}
        for number, names in list(self.tensors_of.items()):
            if names <= there and self._full.get(number) and (not self.forwards or number < self.passed or self.count >= self.units):
                self.journal.put(f"unit-{number}", self.facts(number) | {"dropped": True})
                self._full[number] = 0
                del self.tensors_of[number]

    # activations

    def save_streams(self, passed: int, batches: list[Any]) -> None:
        """Keep what enters block ``passed``, if there is time and room for it."""
        if self.worth_keeping(sum(stream.numel() * stream.element_size() for batch in batches for stream in (batch.teacher, batch.runtime))):
            self.put_streams(passed, ((batch.teacher, batch.runtime) for batch in batches), len(batches))

    def worth_keeping(self, nbytes: int) -> bool:
        """Is there time and room to keep activations of so many bytes?"""
        elapsed, held = time.perf_counter() - self.began, sum(self._full[number] for number in self._full if self.tensors_of.get(number))
        pressing = self.drops and bool(self.shards) and held > max(self.shard_bytes, 2 * nbytes)
        if not pressing and self.journal.seconds + self.journal.cost(nbytes) > SHARE * elapsed:
            return False
        return shutil.disk_usage(known(self.run.folder).home).free >= 2 * nbytes

    def put_streams(self, passed: int, streams: Iterable[tuple[torch.Tensor, torch.Tensor]], batches: int) -> None:
        """Keep them, the teacher's and the run-time one of each of the ``batches``, if there is room."""
        try:
            for number, pair in enumerate(streams):
                flat = {name: laid_flat(stream) for name, stream in zip(("teacher", "runtime"), pair, strict=True)}
                self.journal.put(f"streams-{passed}-{number}", {name: order for name, (_, order) in flat.items()}, {name: tensor for name, (tensor, _) in flat.items()})
            self.journal.put("streams", {"passed": passed, "batches": batches})
        except Interrupted:  # no room for it: the blocks are there all the same, and more of them will have to be run forwards
            self._forget_streams(keep=self.passed)
            return
        self.passed = passed
        self._forget_streams(keep=passed)
        self._drop()

    def _forget_streams(self, keep: int) -> None:
        for name in self.journal.names():
            if name.startswith("streams-") and not name.startswith(f"streams-{keep}-"):
                self.journal.drop(name)

    def load_streams(self, batches: list[Any]) -> int:
        """Put kept activations into ``batches`` and return how many blocks they have gone through; 0 where there are none that fit."""
        if self.streams_of(len(batches)):
            for batch, pair in zip(batches, map(self.get_streams, range(len(batches))), strict=True):
                batch.teacher, batch.runtime = (stream.to(batch.teacher.device) for stream in pair)
        return self.passed

    def streams_of(self, batches: int) -> bool:
        """Are activations kept of so many batches? Those of other numbers are forgotten."""
        head = self.journal.get("streams") if self.passed else None
        if head is None or head[0]["batches"] != batches:
            self.passed = 0
        return self.passed > 0

    def get_streams(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Kept activations of a batch, on the CPU: the teacher's and the run-time one."""
        found = self.journal.get(f"streams-{self.passed}-{number}")  # was whole when this process began
        if found is None:
            raise Interrupted("What was kept of the run cannot be read any more.", where=f"streams-{self.passed}-{number}", fix="run again without --resume")
        return laid_back(found[1]["teacher"], found[0]["teacher"]), laid_back(found[1]["runtime"], found[0]["runtime"])

    # what comes before the blocks

    def keep_phase(self, curvatures: Curvatures, division: Division | None, elapsed_s: float) -> None:
        """What gradients and budget told, where keeping it takes little of the time that finding it took; else a later run finds it again."""
        tensors = {f"{name}#{place}": block for name, curvature in curvatures.by_name.items() for place, block in enumerate(curvature.blocks)}
        whole = self.journal.cost(sum(block.numel() * block.element_size() for block in tensors.values())) <= PHASE_SHARE * elapsed_s
        self.run.begin()
        facts: dict[str, Any] = {"curvatures": {name: [curvature.outputs, curvature.width, len(curvature.blocks)] for name, curvature in curvatures.by_name.items()},
                                 "counts": [curvatures.tokens, curvatures.rows, curvatures.linears], "division": None, "whole": whole}  # fmt: skip
        if division is not None:
            facts["division"] = {"grids": {name: None if grid is None else asdict(grid) for name, grid in division.grids.items()}, "losses": division.losses, "bits_per_weight": division.bits_per_weight}
        with contextlib.suppress(Interrupted):  # no room: it is found again
            self.journal.put("phase", facts, tensors if whole else {})
            if whole and (there := self.journal.later("phase", check=False)) is not None:  # memory needs them no more
                curvatures.by_name.update(_distant(facts["curvatures"], there[1]))

    def phase(self) -> tuple[Curvatures, Division | None] | None:
        """What `keep_phase` kept, where that is all that is still needed."""
        found = self.journal.later("phase") if self.run.resumed else None
        if found is None or not (found[0]["whole"] or 0 < self.units <= self.count):
            return None
        facts, tensors = found
        held = facts["curvatures"] if facts["whole"] else {}
        row = facts["division"]
        division = None if row is None else Division({name: None if grid is None else Grid(**grid) for name, grid in row["grids"].items()}, row["losses"], row["bits_per_weight"])
        return Curvatures(_distant(held, tensors), *facts["counts"]), division


def _distant(table: Mapping[str, list[int]], readers: Mapping[str, Callable[[], torch.Tensor]]) -> dict[str, Curvature | Distant]:
    """Curvatures of a record, which are read when a block comes to them."""
    return {name: Distant(outputs, width, tuple(readers[f"{name}#{place}"] for place in range(count))) for name, (outputs, width, count) in table.items()}


def _put_back(out: Path, count: int) -> None:
    """Give the first ``count`` shards their temporary names, whatever they were renamed to before the end came."""
    for path in list(out.iterdir()):
        number = number_of(path.name)
        if number is not None and number < count and not path.is_symlink():
            path.rename(temporary(out, number))
