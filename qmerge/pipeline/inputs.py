"""Which bytes is a run made of, and were they the same from the first header that was read to the last tensor?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from qmerge.errors import Interrupted, Refused
from qmerge.pipeline.plan import MergePlan
from qmerge.store.manifest import input_digests
from qmerge.store.steady import check_steady, differing, moved, stamps_of
from qmerge.store.tensors import GONE


class Steady:
    """Watches the files of a plan's inputs. ``digests`` gives role -> `input_digests` and may take long.

    Only files whose date, size or place on the disk has changed are read again: a copy of the same bytes put in their place is none the worse."""

    def __init__(self, plan: MergePlan, digests: Callable[[], Mapping[str, Any]]) -> None:
        self._sources, self._digests = _sources(plan), digests
        self._stamps = {role: dict(_files(source).stamps) for role, source in self._sources.items()}

    def check(self) -> None:
        """Raises Refused where a file is not what it was when its header was read, or when it was hashed."""
        for role, source in self._sources.items():
            if not (touched := moved(self._stamps[role])):
                continue
            now = stamps_of(touched)
            check_steady(source.name, (path.name for path in touched if not path.is_file()), "when it was opened")
            check_steady(source.name, () if _files(source).still_so() else (path.name for path in touched), "when it was opened")
            check_steady(source.name, differing(self._digests()[role]["files"], input_digests(source)["files"]), "when it was hashed")
            self._stamps[role] |= now


def _files(source: Any) -> Any:
    """What holds the stamps: a checkpoint itself, of an adapter its files."""
    return getattr(source, "source", source)


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
