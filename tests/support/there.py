"""A device beside the CPU that is made of the CPU: which tensors lie there, and how many bytes at most at once?

torch's own way to a device written in Python (torch.utils.backend_registration). Each operation on its tensors is the CPU's on memory that counts as the device's; one that meets tensors of both
sides fails, as on an accelerator. What an operation holds inside itself is not seen. Registering it changes the process for good, so runs on it are given to one of their own: `runs`.

    python tests/support/there.py '[{"recipe": {…}, "on_host": true, "ahead": null, "batch": 64, "tape": 0}]'      # one line of JSON for each
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
import weakref
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_map

NAME = "there"
ACROSS = {"aten.copy_.default", "aten._to_copy.default", "aten.index.Tensor", "aten.index_put_.default", "aten.index_put.default"}
"""operations that may meet tensors of both sides: copies, and indices from main memory"""


class Held:
    """Bytes of the device by storage."""

    def __init__(self) -> None:
        self.lock, self.views, self.sizes = threading.RLock(), Counter[int](), dict[int, int]()
        self.now = self.peak = 0

    def take(self, storage: torch.UntypedStorage) -> int:
        key = storage.data_ptr()
        with self.lock:
            if not self.views[key]:
                self.sizes[key] = storage.nbytes()
                self.now += self.sizes[key]
                self.peak = max(self.peak, self.now)
            self.views[key] += 1
        return key

    def leave(self, key: int) -> None:
        with self.lock:
            self.views[key] -= 1
            if not self.views[key]:
                self.now -= self.sizes.pop(key)
                del self.views[key]


HELD = Held()


class There(torch.Tensor):
    """A tensor of the device. ``inner``: its memory, seen from the CPU."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> There:
        made = torch.Tensor._make_wrapper_subclass(cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype, device=torch.device(NAME, 0))
        made.inner = inner
        if inner.numel():
            weakref.finalize(made, HELD.leave, HELD.take(inner.untyped_storage()))
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return computed(func, args, kwargs or {})

    def tolist(self) -> Any:  # torch gives none of subclasses
        return self.cpu().tolist()

    def __repr__(self) -> str:  # type: ignore[override]
        return f"There({self.inner!r})"


def computed(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """``func`` on the device's memory."""
    wrapped: dict[int, There] = {}
    sides = set()

    def inside(value: Any) -> Any:
        if isinstance(value, There):
            wrapped[id(value.inner)] = value
            sides.add(NAME)
            return value.inner
        if isinstance(value, torch.Tensor):
            if value.dim():
                sides.add(value.device.type)
            return value
        return torch.device("cpu") if isinstance(value, torch.device) and value.type == NAME else value

    goes = kwargs.get("device")
    where = NAME if goes is None else torch.device(goes).type
    args, kwargs = tree_map(inside, (args, {key: value for key, value in kwargs.items() if key != "pin_memory"}))
    if len(sides) > 1 and str(func) not in ACROSS:
        raise RuntimeError(f"{func}: tensors of two devices: {sorted(sides)}")
    found = func(*args, **kwargs)
    if where != NAME:
        return found
    return tree_map(lambda value: wrapped.get(id(value)) if id(value) in wrapped else There(value) if isinstance(value, torch.Tensor) else value, found)


class Module:
    """What torch asks of a device's module."""

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def is_initialized() -> bool:
        return True

    @staticmethod
    def current_device() -> int:
        return 0

    @staticmethod
    def device_count() -> int:
        return 1

    @staticmethod
    def _is_in_bad_fork() -> bool:
        return False

    @staticmethod
    def manual_seed_all(seed: int) -> None: ...

    @staticmethod
    def get_amp_supported_dtype() -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


def register() -> None:
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    _setup_privateuseone_for_python_backend(NAME, Module())
    library = torch.library.Library("_", "IMPL")
    library.fallback(lambda func, *args, **kwargs: computed(func, args, kwargs), "PrivateUse1")
    register.library = library  # type: ignore[attr-defined]  # lives as long as the process


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir()) if path.is_file()}


def runs(jobs: list[dict[str, Any]], **environment: str) -> list[dict[str, Any]]:
    """Merges on the device, one after the other in a process of their own. Of each: the files' digests, the device's peak and what was foreseen of it, in bytes."""
    root = Path(__file__).parents[2]
    paths = os.pathsep.join([str(root), str(root / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run([sys.executable, __file__, json.dumps(jobs)], capture_output=True, text=True, check=False, timeout=500, env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"} | environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def main() -> None:
    register()
    from qmerge.pipeline import batches, block_pair, memory_blocks
    from qmerge.pipeline.plan import plan
    from qmerge.pipeline.recipe import Recipe
    from qmerge.pipeline.residence import device_peak, phases_of
    from qmerge.pipeline.run import calibration_for, run
    from qmerge.pipeline.streams import Place
    from qmerge.pipeline.workload import measure_plan

    for job in json.loads(sys.argv[1]):
        batches.TOKENS_PER_BATCH = memory_blocks.TOKENS_PER_BATCH = job.get("batch", 4096)
        block_pair.TAPE_BYTES = memory_blocks.TAPE_BYTES = job.get("tape", 2**31)
        recipe = Recipe(**{"device": NAME} | {key: tuple(value) if key in ("adapter", "polish") else value for key, value in job["recipe"].items()})
        found = plan(recipe)
        calibration = calibration_for(found)
        work = measure_plan(found, torch.device(NAME), None if calibration is None else (len(calibration.train), len(calibration.held_out)))
        work = replace(work, streams_on_host=bool(job.get("on_host")))
        HELD.peak = HELD.now
        run(found, calibration=calibration, place=Place(job["on_host"], job.get("ahead")) if job.get("on_host") is not None else None)
        phases = phases_of([found], work)
        print(json.dumps({"files": digests(Path(recipe.out)), "peak_bytes": HELD.peak, "foreseen_bytes": device_peak(phases), "phases": {phase.name: phase.on_device(True) for phase in phases}}), flush=True)


if __name__ == "__main__":
    main()
