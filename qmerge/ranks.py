"""How do several processes, started together, do one piece of work?

`Ranks` is passed to whoever shares work. Alone (size 1) it does nothing and imports nothing. Else torch.distributed carries what ranks tell each other; all of them must make the same
calls in the same order. Facts travel as JSON and tensors as bytes, never as pickles. A call that waits for others ends with an error within a minute where one of them is gone.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any

from qmerge.errors import QmergeError
from qmerge.launch import Launch
from qmerge.types import known
from qmerge.watch import STORE_S, Watch, is_lost, lost

if TYPE_CHECKING:
    import torch

JOIN_S = 600
"""until all ranks are there"""
LONGEST_PAUSE_S = 0.002
TOLD_S = 6.0
"""after a connection broke: time for its other end's last word to come through the store"""
Record = tuple[dict[str, Any], dict[str, "torch.Tensor"]]


@dataclass(frozen=True)
class Ranks:
    """This process, ``rank`` of ``size``; ``local_rank`` of ``local_size`` on its host."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    watch: Watch | None = field(default=None, repr=False)
    spent: dict[str, float] = field(default_factory=lambda: {"seconds": 0.0, "bytes": 0.0}, repr=False)
    """on telling and waiting so far, and what this rank gave others (a broadcast counts once)"""

    @property
    def alone(self) -> bool:
        return self.size == 1

    @property
    def first(self) -> bool:
        """Does this rank write, and talk to people?"""
        return self.rank == 0

    def check(self) -> None:
        """Raises what another rank ended with, if one has."""
        if self.watch is not None and (problem := self.watch.problem()) is not None:
            self.watch.noticed = True
            raise problem

    def asked_to_stop(self) -> bool:
        """Has another rank ended because it was asked to, having finished what it was at? Then so may this one."""
        if self.watch is None or self.watch.failure is None or not self.watch.failure.polite:
            return False
        self.watch.noticed = True
        return True

    # facts

    def tell(self, facts: Any = None, source: int = 0) -> Any:
        """Rank ``source``'s facts (JSON), on every rank."""
        if self.alone:
            return facts
        return json.loads(self._bytes(json.dumps(facts).encode() if self.rank == source else b"", source))

    def hear(self, facts: Any) -> list[Any]:
        """Every rank's facts (JSON), by rank."""
        if self.alone:
            return [facts]
        import torch

        raw = json.dumps(facts).encode()
        sizes = torch.zeros(self.size, dtype=torch.int64)  # not by all_gather, which has another name in each torch
        self._wait(lambda dist: dist.all_to_all_single(sizes, torch.full((self.size,), len(raw)), async_op=True))
        takes, found = sizes.tolist(), torch.empty(int(sizes.sum()), dtype=torch.uint8)
        send = torch.frombuffer(bytearray(raw * self.size), dtype=torch.uint8)
        self._wait(lambda dist: dist.all_to_all_single(found, send, takes, [len(raw)] * self.size, async_op=True))
        return [json.loads(bytes(part.numpy())) for part in found.split(takes)]

    def _bytes(self, raw: bytes, source: int) -> bytes:
        import torch

        size = torch.tensor([len(raw)])
        self._wait(lambda dist: dist.broadcast(size, source, async_op=True))
        whole = torch.frombuffer(bytearray(raw), dtype=torch.uint8) if self.rank == source else torch.empty(int(size), dtype=torch.uint8)
        if len(whole):
            self._wait(lambda dist: dist.broadcast(whole, source, async_op=True), len(raw))
        return bytes(whole.numpy())

    # tensors

    def hand(self, record: Record | None, source: int) -> Record:
        """Rank ``source``'s facts and tensors (contiguous, on the CPU), on every rank."""
        if self.alone:
            return known(record)
        import torch

        facts, tensors = known(record) if self.rank == source else ({}, {})
        facts, table = self.tell([facts, [[name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape)] for name, tensor in tensors.items()]], source)
        found = {}
        for name, dtype, shape in table:
            part = tensors[name] if self.rank == source else torch.empty(shape, dtype=getattr(torch, dtype))
            if part.numel():
                flat = part.reshape(-1).view(torch.uint8)
                self._wait(partial(_broadcast, flat, source), flat.numel() if self.rank == source else 0)
            found[name] = part
        return facts, found

    def gather(self, record: Record) -> list[Record]:
        """Every rank's facts and tensors (contiguous, on the CPU), by rank: on the first one. The others get nothing."""
        if self.alone:
            return [record]
        import torch

        facts, tensors = record
        everybody = self.hear([facts, [[name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape)] for name, tensor in tensors.items()]])
        found: list[Record] = []
        for source, (told, table) in enumerate(everybody):
            parts = {}
            for name, text, shape in table:
                dtype = getattr(torch, text)
                part = self.move(tensors[name] if self.rank == source else None, shape, dtype, source, 0) if 0 not in shape else torch.empty(shape, dtype=dtype)
                if part is not None:
                    parts[name] = part
            found.append((told, parts))
        return found if self.first else []

    def move(self, tensor: torch.Tensor | None, shape: Sequence[int], dtype: torch.dtype, source: int, target: int) -> torch.Tensor | None:
        """Rank ``source``'s tensor (contiguous, on the CPU), on rank ``target``; None on the others. All ranks make the call, and know ``shape`` and ``dtype``."""
        import torch

        if source == target:
            return tensor if self.rank == source else None
        none = torch.empty(0, dtype=torch.uint8)
        send = known(tensor).reshape(-1).view(torch.uint8) if self.rank == source else none
        received = torch.empty(tuple(shape), dtype=dtype) if self.rank == target else None
        takes = [0] * self.size
        if received is not None:
            takes[source] = received.numel() * received.element_size()
        gives = [0] * self.size
        gives[target] = send.numel()
        into = received.reshape(-1).view(torch.uint8) if received is not None else torch.empty(0, dtype=torch.uint8)
        self._wait(lambda dist: dist.all_to_all_single(into, send, takes, gives, async_op=True), send.numel())
        return received

    def swap(self, into: torch.Tensor, send: torch.Tensor, takes: list[int], gives: list[int]) -> None:
        """Give each rank its consecutive part of ``send`` (flat), ``gives`` elements long, and take ``takes`` from each into ``into``."""
        given = (sum(gives) - gives[self.rank]) * send.element_size()
        self._wait(lambda dist: dist.all_to_all_single(into, send, takes, gives, async_op=True), given)

    def barrier(self) -> None:
        """Return when all ranks have come here."""
        self.hear(None)

    def _wait(self, start: Callable[[Any], Any], nbytes: int = 0) -> None:
        """Begin something with others and wait for it, in Python so that signals and other ranks' ends are noticed. ``nbytes``: that this rank gives."""
        import torch.distributed as dist

        began, pause = time.perf_counter(), 2e-5
        try:
            self.check()
            work = start(dist)
            while not work.is_completed():
                self.check()
                time.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE_S)
            work.wait()
        except RuntimeError as problem:
            watch = known(self.watch)
            watch.noticed = True
            raise (watch.wait_for_word(TOLD_S) or lost((str(problem).splitlines() or [""])[0][:160])) from None
        finally:
            self.spent["seconds"] += time.perf_counter() - began
            self.spent["bytes"] += nbytes


def _broadcast(flat: torch.Tensor, source: int, dist: Any) -> Any:
    return dist.broadcast(flat, source, async_op=True)


ALONE = Ranks()
"""one process"""


@contextmanager
def together(launch: Launch | None, device: str = "cpu") -> Iterator[Ranks]:
    """The ranks, from the time that all have come until all are done. An error on one ends all with the same exit code. ``device``: what computes here."""
    if launch is None:
        yield ALONE
        return
    import torch.distributed as dist

    from qmerge.device import group_backend

    prefix = f"qmerge/{launch.attempt}"
    keeps = launch.rank == 0 and not launch.hosted
    try:
        store = dist.TCPStore(launch.host, launch.port, launch.size, keeps, timedelta(seconds=JOIN_S), wait_for_workers=False)
        mine = dist.TCPStore(launch.host, launch.port, launch.size, False, timedelta(seconds=STORE_S), wait_for_workers=False)
        watch = Watch(dist.PrefixStore(f"{prefix}/watch", mine), launch.rank, launch.size)
        watch.announce()
        # no limit on waiting: a rank may solve for an hour. Who is gone is found by the watch
        dist.init_process_group(group_backend(device, launch.local_rank), store=dist.PrefixStore(f"{prefix}/group", store), rank=launch.rank, world_size=launch.size, timeout=timedelta(days=30))
    except (dist.DistError, RuntimeError) as problem:
        raise lost(f"not all of {launch.size} ranks came to where they meet within {JOIN_S} s ({(str(problem).splitlines() or [''])[0][:120]})") from None
    watch.start()
    ranks = Ranks(launch.rank, launch.size, launch.local_rank, launch.local_size, watch)
    try:
        yield ranks
        ranks.barrier()
    except BaseException as problem:
        told = watch.problem() is not None
        watch.noticed = True
        if told:
            watch.seen()
        else:
            watch.tell(problem)
        if keeps and not is_lost(problem):  # who is gone will see nothing
            watch.all_seen(TOLD_S)
        raise
    finally:
        dist.destroy_process_group()
        watch.stop()  # last: what waits for a host that is silent is ended by it


def agreed(ranks: Ranks, what: Mapping[str, Any], differences: Callable[[Mapping[str, Any], Mapping[str, Any]], list[str]], error: Callable[[int, list[str]], QmergeError]) -> None:
    """Raises ``error`` of the first rank whose ``what`` is not rank 0's, and in what it differs; on all ranks the same."""
    everybody = ranks.hear(what)
    for rank, other in enumerate(everybody):
        if found := differences(everybody[0], other):
            raise error(rank, found)
