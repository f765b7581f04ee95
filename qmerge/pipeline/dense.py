"""How does a merged float checkpoint stream from the base's files into the output's, in the memory of a few stretches of tensors?

Worker threads read, decode, merge, prove and cast stretches of rows; this thread takes them in order, hashes and writes. Several outputs (one base, many adapters) share each
stretch of the base. Nothing depends on which worker finishes first.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch

from qmerge.adapters.edits import Proof
from qmerge.device import worker_threads
from qmerge.formats.base import FOUR_BIT
from qmerge.formats.dense import cast
from qmerge.numerics import nf4
from qmerge.pipeline.kept_shards import KeptShards
from qmerge.pipeline.merge import Merged, OpenPiece, stretches
from qmerge.pipeline.spread import share_out
from qmerge.ranks import ALONE, Ranks
from qmerge.store.adapter import check_finite
from qmerge.store.headers import TORCH_DTYPES, rows_of
from qmerge.store.stream import MAX_SHARD_BYTES, OutTensor, ShardStream, cut, in_order, order_key
from qmerge.store.tensors import read_tensor
from qmerge.types import known

MANY_WEIGHTS = 1 << 32


@dataclass
class Survival:
    """Sums over a tensor: ``<W_out - W_base, ΔW>`` and ``<ΔW, ΔW>``."""

    kept: float = 0.0
    whole: float = 0.0

    @classmethod
    def of(cls, out: torch.Tensor, before: torch.Tensor, added: torch.Tensor) -> Survival:
        delta = added.reshape(-1)
        moved = out.float().sub_(before).reshape(-1) if out.dtype != torch.float32 else (out - before).reshape(-1)  # a subtraction of two dtypes is five times as slow
        return cls(float(torch.dot(moved, delta)), float(torch.dot(delta, delta)))


@dataclass
class DenseJob:
    """One output: what it consists of, in which dtype, and where it goes."""

    merged: Merged
    dtype: torch.dtype
    folder: Path
    shard_bytes: int = MAX_SHARD_BYTES
    records: dict[str, dict[str, float]] = field(default_factory=dict)
    """module -> how well its delta was added and how much of it survived the cast"""
    digests: dict[str, dict[str, Any]] = field(default_factory=dict)
    kept: KeptShards | None = None
    ranks: Ranks = ALONE
    """each of them writes some of the shards"""

    def stream(self) -> ShardStream:
        """All shards, or this rank's."""
        done, tensors = self.kept.digests if self.kept else {}, self.outputs()
        shards = cut(in_order(tensors), self.shard_bytes)
        left = [number for number in range(len(shards)) if number not in done]
        owners = share_out([sum(tensor.nbytes for tensor in shards[number]) for number in left], self.ranks)
        own = {number for number, owner in zip(left, owners, strict=True) if owner == self.ranks.rank}
        return ShardStream(self.folder, tensors, self.shard_bytes, done=done, own=own)

    def outputs(self) -> list[OutTensor]:
        return [OutTensor(name, self.out_dtype(name), self.file_shape(name)) for name in self.merged.names]

    def out_dtype(self, name: str) -> torch.dtype:
        """The job's dtype; tensors that are no floats keep theirs."""
        stored = self.merged.out_dtype(name)
        return self.dtype if stored.is_floating_point else stored

    def file_shape(self, name: str) -> tuple[int, ...]:
        shape = self.merged.pieces.table[name].shape
        return shape[::-1] if self.merged.is_conv(name) else shape


@dataclass(frozen=True)
class _Part:
    """A finished stretch for one job."""

    job: DenseJob
    name: str
    data: torch.Tensor
    proof: Proof | None
    kept: Survival | None
    last: bool


def write_dense(jobs: list[DenseJob], device: torch.device, progress: Callable[[str, int, int], None]) -> None:
    """Write every job's shards into its folder and fill its ``records`` and ``digests``. ``progress(label, done, total)`` counts in percent."""
    _warm_up(jobs, device)
    streams = {id(job): job.stream() for job in jobs}
    there = {id(job): _there(job, streams[id(job)]) for job in jobs}
    before = [shard for job in jobs for number, shard in enumerate(streams[id(job)].shards) if job.kept and number in job.kept.digests]
    own = [stream.shards[number] for stream in streams.values() for number in stream.todo]
    done = sum(tensor.nbytes for shard in before for tensor in shard)
    sums: dict[tuple[int, str], tuple[Proof, Survival]] = {}
    total = max(1, done + sum(tensor.nbytes for shard in own for tensor in shard))
    try:
        for part in _in_order(_tasks(jobs, device, there), worker_threads(device)):
            streams[id(part.job)].write(part.data)
            earlier, done = done, done + part.data.nbytes
            if (percent := 100 * done // total) != 100 * earlier // total:
                progress("merged and written", percent, 100)
            if part.proof is not None:
                _note(part, sums)
            _keep(part.job, streams)
        for job in jobs:
            streams[id(job)].finish(job.ranks.first)
            job.digests = streams[id(job)].digests
            if job.kept is not None:
                job.kept.note(streams[id(job)], job.records, wait=True)
            for digests, records in job.ranks.hear([job.digests, job.records]) if not job.ranks.alone else ():
                job.digests, job.records = job.digests | digests, job.records | records
    finally:
        for stream in streams.values():
            stream.__exit__(None, None, None)


def _there(job: DenseJob, stream: ShardStream) -> dict[str, OutTensor]:
    """The tensors in shards that an earlier process has finished, or another rank writes; the adapter's part in them is used up, and was proved there."""
    todo = set(stream.todo)
    names = {tensor.name: tensor for number, shard in enumerate(stream.shards) if number not in todo for tensor in shard}
    job.merged.used_before(names)
    job.records |= job.kept.records if job.kept is not None else {}
    return names


def _keep(job: DenseJob, streams: Mapping[int, ShardStream]) -> None:
    """Note the shards that are on the disk, and end here where somebody wishes that and none of this job's is half written."""
    if job.ranks.asked_to_stop() and job.kept is not None:
        job.kept.run.stop.wanted = True
    else:
        job.ranks.check()
    if job.kept is None:
        return
    stream = streams[id(job)]
    job.kept.note(stream, job.records)
    if job.kept.ends_here(stream):
        stream.settle()
        job.kept.note(stream, job.records, wait=True)
        job.kept.run.stop.check()


def _warm_up(jobs: list[DenseJob], device: torch.device) -> None:
    """On a CPU a compiled loop decodes 4-bit weights five times as fast as torch, to the same bits, and takes 0.4 s to load, which it saves on 1.8 billion weights: worth it for more than those, and done beside the first tensors."""
    base = jobs[0].merged.base
    if device.type == "cpu" and sum(prod(base.shape(name)) for name, kind in base.quantized.items() if kind in FOUR_BIT) >= MANY_WEIGHTS:
        threading.Thread(target=_load_kernel, daemon=True).start()


def _load_kernel() -> None:
    with contextlib.suppress(Exception):  # without it torch decodes
        nf4.load_kernel()


def _note(part: _Part, sums: dict[tuple[int, str], tuple[Proof, Survival]]) -> None:
    """Add up the stretches of a tensor, and judge the whole after the last one."""
    key = (id(part.job), part.name)
    proof, kept = sums.pop(key, (Proof(), Survival()))
    proof = proof + known(part.proof)
    if part.kept is not None:
        kept = Survival(kept.kept + part.kept.kept, kept.whole + part.kept.whole)
    if not part.last:
        sums[key] = (proof, kept)
        return
    part.job.merged.settle(part.name, proof)
    record = {"proof": proof.relative} | ({"delta_survival": round(kept.kept / kept.whole, 6)} if kept.whole > 0 else {})
    part.job.records[part.name.removesuffix(".weight")] = record


Task = Callable[[], list[_Part]]


def _tasks(jobs: list[DenseJob], device: torch.device, there: Mapping[int, Mapping[str, OutTensor]]) -> Iterator[Task]:
    """Stretches in the order of the files; outputs that start from the same base tensor in the same stretches share a task. Tensors that are ``there`` are left out."""
    everything = sorted(((tensor, job) for job in jobs for tensor in job.outputs() if tensor.name not in there[id(job)]), key=lambda item: order_key(item[0]))
    index = 0
    while index < len(everything):
        tensor = everything[index][0]
        here = [job for other, job in everything[index:index + len(jobs)] if other.name == tensor.name and order_key(other) == order_key(tensor)]
        index += len(here)
        yield from _tensor_tasks(tensor, here, device)


def _tensor_tasks(tensor: OutTensor, jobs: list[DenseJob], device: torch.device) -> Iterator[Task]:
    copied = [job for job in jobs if _is_copy(job, tensor)]
    merged = {_source(job, tensor) for job in jobs if job not in copied}
    copied = [job for job in copied if _source(job, tensor) not in merged]  # else it is read for another output anyway, and casts back to its own bits
    sources: dict[str, list[DenseJob]] = {}
    for job in copied:
        sources.setdefault(known(_source(job, tensor)), []).append(job)
    for source, takers in sources.items():
        spans = stretches(tensor.shape)
        for start, stop in spans:
            yield partial(_copy, tensor, source, takers, start, stop, stop == spans[-1][1])
    opened: dict[tuple[str | None, tuple[tuple[int, int], ...], bool], list[tuple[DenseJob, OpenPiece]]] = {}
    for job in jobs:
        if job not in copied:
            piece = job.merged.open(tensor.name)
            turned = job.merged.is_conv(tensor.name)
            parts = ((0, piece.piece.shape[0]),) if turned else tuple(piece.spans())
            opened.setdefault((piece.piece.source, parts, turned), []).append((job, piece))
    for (_, parts, turned), members in opened.items():
        for start, stop in parts:
            yield partial(_merge, tensor, members, start, stop, turned, stop == parts[-1][1])


def _source(job: DenseJob, tensor: OutTensor) -> str | None:
    return job.merged.pieces.table[tensor.name].source


def _is_copy(job: DenseJob, tensor: OutTensor) -> bool:
    """Do the file's bytes go out as they are?"""
    merged, source = job.merged, _source(job, tensor)
    return source is not None and merged.untouched(tensor.name) and not merged.base.encoded(source) and TORCH_DTYPES[merged.base.checkpoint.specs[source].dtype] == tensor.dtype


def _copy(tensor: OutTensor, source: str, takers: list[DenseJob], start: int, stop: int, last: bool) -> list[_Part]:
    checkpoint = takers[0].merged.base.checkpoint
    data = read_tensor(checkpoint.path, rows_of(checkpoint.specs[source], start, stop))
    check_finite(f"{checkpoint.name}: {source}", data)
    return [_Part(job, tensor.name, data, None, None, last) for job in takers]


def _merge(tensor: OutTensor, members: list[tuple[DenseJob, OpenPiece]], start: int, stop: int, turned: bool, last: bool) -> list[_Part]:
    parts: list[_Part] = []
    shared: torch.Tensor | None = None
    for job, piece in members:
        found = piece.rows(start, stop, shared)
        shared = found.before if found.before is not None else shared
        out = cast(tensor.name, found.merged, tensor.dtype)
        kept = Survival.of(out, known(found.before), found.added) if found.added is not None and found.merged.dim() > 1 else None
        data = (out.T.contiguous() if turned else out).cpu()
        parts.append(_Part(job, tensor.name, data, found.proof, kept, last))
    return parts


def _in_order(tasks: Iterator[Task], workers: int) -> Iterator[_Part]:
    """Run tasks on ``workers`` threads, a bounded number ahead, and give their parts in the order of the tasks."""
    waiting: deque[Future[list[_Part]]] = deque()

    def run(task: Task) -> list[_Part]:
        with torch.no_grad():  # grad mode belongs to a thread
            return task()

    with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        try:
            for task in tasks:
                waiting.append(pool.submit(run, task))
                if len(waiting) > 2 * workers:
                    yield from waiting.popleft().result()
            while waiting:
                yield from waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
