"""Which bytes is a run made of, and were they the same from the first header that was read to the last tensor?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from qmerge.errors import Interrupted, Refused
from qmerge.pipeline.plan import MergePlan
from qmerge.store.manifest import input_digests
from qmerge.store.steady import check_steady, differing, moved
from qmerge.store.tensors import GONE


def check_inputs(plan: MergePlan, digests: Mapping[str, Any]) -> None:
    """Refused where a file of an input is not what it was when its header was read, or when it was hashed. ``digests``: role -> `input_digests`.

    Only files whose date, size or place on the disk has changed are read again: a copy of the same bytes put in their place is none the worse."""
    for role, source in _sources(plan).items():
        files = source if role == "base" else source.source
        if not (touched := moved(files.stamps)):
            continue
        check_steady(source.name, (path.name for path in touched if not path.is_file()), "when it was opened")
        check_steady(source.name, () if files.still_so() else (path.name for path in touched), "when it was opened")
        check_steady(source.name, differing(digests[role]["files"], input_digests(source)["files"]), "when it was hashed")


def _sources(plan: MergePlan) -> dict[str, Any]:
    """Role in the manifest -> base or adapter."""
    return {"base": plan.checkpoint} | {("adapter" if index == 0 else f"adapter_{index + 1}"): adapter for index, adapter in enumerate(plan.adapters)}


class Digests:
    """The inputs' digests, computed in a thread of their own while the work goes on, each input once; asked for at the commit point."""

    def __init__(self, plans: Sequence[MergePlan]) -> None:
        self._sources = [_sources(plan) for plan in plans]
        self._pool = ThreadPoolExecutor(1)

    def __enter__(self) -> Digests:
        self._found = self._pool.submit(self._all)
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _all(self) -> list[dict[str, Any]]:
        known: dict[tuple[Path, str], dict[str, Any]] = {}
        for source in (source for sources in self._sources for source in sources.values()):
            if (source.path, source.name) not in known:
                known[source.path, source.name] = input_digests(source)
        return [{role: known[source.path, source.name] for role, source in sources.items()} for sources in self._sources]

    def ready(self) -> bool:
        """Are they known, so that `result` does not wait?"""
        return self._found.done()

    def result(self) -> list[dict[str, Any]]:
        """Role -> digests, per plan. Raises as `qmerge.store.tensors.read_tensor` where a file cannot be read any more."""
        try:
            return self._found.result()
        except OSError as problem:
            kind = Interrupted if problem.errno in GONE else Refused
            raise kind("A file of an input cannot be read any more.", where=Path(str(problem.filename or "an input")).name, found=problem.strerror,
                       fix="see that the disk is there and works, and that nothing writes to the inputs, then run the same command again") from problem
