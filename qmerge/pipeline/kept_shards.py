"""Which shards of a streamed checkpoint are on the disk for good, so that none of them is written again?"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from qmerge.pipeline.resume import Run
from qmerge.store.durable import sync
from qmerge.store.manifest import digest_file
from qmerge.store.runs import clear
from qmerge.store.stream import ShardStream
from qmerge.types import known


class KeptShards:
    """``digests`` of the shards that are finished, by number, and the ``records`` of the modules in them. ``ready``: are the inputs' digests known? A shard counts from then on.

    ``found``: what another rank has found of them here, which `told` gives; without it this process looks.
    """

    def __init__(self, run: Run, ready: Callable[[], bool], found: Mapping[str, Any] | None = None) -> None:
        self.run, self._ready = run, ready
        self.digests: dict[int, dict[str, Any]] = {}
        self.records: dict[str, dict[str, float]] = {}
        if found is not None:
            self.digests, self.records = {int(number): digest for number, digest in found["digests"].items()}, found["records"]
        elif run.resumed:
            self._look()

    def told(self) -> dict[str, Any]:
        return {"digests": self.digests, "records": self.records}

    def _look(self) -> None:
        out, files = known(self.run.folder).path, set[str]()
        for name in (name for name in self.run.journal.names() if name.startswith("shard-")):
            row = self.run.journal.get(name)
            if row is not None and (path := out / Path(row[0]["file"]).name).is_file() and digest_file(path) == row[0]["digest"]:
                files.add(path.name)
                self.digests[int(name.removeprefix("shard-"))] = row[0]["digest"]
                self.records |= row[0]["records"]
        clear(out, files)

    def note(self, stream: ShardStream, records: Mapping[str, dict[str, float]], wait: bool = False) -> None:
        """Keep what has become durable. ``wait`` for the inputs' digests, where they are not known yet."""
        self.run.place = f"shard {min(stream.closed + 1, len(stream.shards))}/{len(stream.shards)}"
        ahead = 1 < len(stream.shards) > stream.closed  # with one shard nothing could be kept of it
        self.run.stop.finishing = f"shard {stream.closed + 1}/{len(stream.shards)}" if ahead else ""
        fresh = [number for number in stream.durable if number not in self.digests]
        if not fresh or not (self._ready() or wait and self.run.facts is not None):
            return
        sync(stream.folder)
        self.run.begin()
        for number in fresh:
            name = stream.name_of(number)
            modules = [tensor.name.removesuffix(".weight") for tensor in stream.shards[number]]
            facts: dict[str, Any] = {"file": name, "digest": stream.digests[name], "records": {module: records[module] for module in modules if module in records}}
            self.run.journal.put(f"shard-{number}", facts)
            self.digests[number] = facts["digest"]

    def ends_here(self, stream: ShardStream) -> bool:
        """Is the run to end, and no shard half written?"""
        return self.run.stop.wanted and not stream.inside
