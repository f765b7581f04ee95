"""Does a run fit into this machine, and if not, which setting would make it?"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from qmerge.errors import Refused
from qmerge.formats import QUANTIZING
from qmerge.pipeline import plan as planning
from qmerge.pipeline.estimate import LIBRARIES, Estimate, as_float, with_settings
from qmerge.pipeline.memory import Phase
from qmerge.pipeline.plan import MergePlan
from qmerge.pipeline.residence import ASKED
from qmerge.room import Room, memory_room
from qmerge.store.runs import find_runs
from qmerge.units import format_bytes

CLOSE = 1.2
"""estimates are right within a fifth: where there is not so much more than they say, that is told"""
SPARE = 0.95
"""of what is there that a setting which is named may need: it must still fit a minute later"""
SHARDS = ("2GB", "1GB", "500MB", "200MB", "100MB", "50MB", "20MB", "10MB", "5MB", "2MB", "1MB")
OVERRULE = "--no-fit-check"
Fits = Callable[[Estimate], bool]


def check_fit(found: Estimate, plans: Sequence[MergePlan], resumed: bool = False, evaluating: int = 0, processes: int = 1) -> list[str]:
    """Refused where disk, memory or accelerator cannot hold the run, naming what is needed, what is there and the setting that would do. Returns words on what is close.

    ``resumed``: what an interrupted run has left beside OUT counts as written. ``evaluating``: memory that measuring the result takes beside the process itself, 0 where nothing is measured.
    ``processes``: as many like this one are on this machine.
    """
    close = _check_disk(found, plans, resumed)
    close += _check_memory(found, plans, memory_room(), evaluating, processes)
    return close + _check_device(found, plans)


def _check_disk(found: Estimate, plans: Sequence[MergePlan], resumed: bool) -> list[str]:
    out, there = Path(plans[0].recipe.out), 0
    if resumed:
        there = max((left.nbytes for left in find_runs(out) if left.resumable), default=0)
    need = max(0, found.disk_bytes - there)
    fitting = _settings(found, plans, lambda other: max(0, other.disk_bytes - there) <= SPARE * free_bytes(out), disk=True)
    planning.check_room(out, need, fitting)
    return []


def free_bytes(out: Path) -> int:
    """Free on the disk that OUT would be on."""
    return shutil.disk_usage(next(parent for parent in out.absolute().parents if parent.exists())).free


def _check_memory(found: Estimate, plans: Sequence[MergePlan], room: Room | None, evaluating: int, processes: int = 1) -> list[str]:
    if room is None:
        return []
    room = Room(room.free // processes, room.limit + (f", for each of {processes} processes" if processes > 1 else ""))
    merging = found.ram_bytes - found.base_bytes + LIBRARIES
    if merging > room.free:
        fitting = _settings(found, plans, lambda other: other.ram_bytes - other.base_bytes + LIBRARIES <= SPARE * room.free)
        raise Refused(
            "the run needs more memory than there is", where=f"phase: {found.fullest.name}", expected=f"{format_bytes(merging)} beside the {format_bytes(found.base_bytes - LIBRARIES)} of this process ({_largest_part(found.fullest)})",
            found=f"{format_bytes(room.free)} {room.limit}", fix=_advice(fitting, "a machine with more memory"),
        )  # fmt: skip
    if evaluating > room.free:
        raise Refused(
            "measuring the result needs more memory than there is: two models in fp32", where="phase: evaluation", expected=f"{format_bytes(evaluating)} beside this process",
            found=f"{format_bytes(room.free)} {room.limit}", fix=f"qmerge merge with the same settings, and qmerge eval on a larger machine; or {OVERRULE}, if you know better",
        )  # fmt: skip
    most = max(merging, evaluating)
    return [f"memory is close: about {format_bytes(most)} are needed, {format_bytes(room.free)} are {room.limit}"] if most * CLOSE > room.free else []


def _check_device(found: Estimate, plans: Sequence[MergePlan]) -> list[str]:
    room, recipe = found.limit, plans[0].recipe
    if recipe.device_memory is not None and not found.work.accelerator:
        return [f"--device-memory {recipe.device_memory} limits nothing here: {found.device} computes in main memory"]
    if room is None or found.device_bytes <= room.free:
        return []
    fitting = _settings(found, plans, lambda other: other.device_bytes <= SPARE * room.free)
    more = [f"--device-memory {-(-found.device_bytes // 10**6)}MB where so much is free"] if room.limit == ASKED else []
    lying = ", the two streams of activations in main memory" if found.work.streams_on_host else ""
    raise Refused("the run needs more memory than the accelerator has", where=f"--device {found.device}, phase: {found.fullest_on_device.name}", expected=f"{format_bytes(found.device_bytes)}{lying} ({_largest_part(found.fullest_on_device, host=False)})",
                  found=f"{format_bytes(room.free)} {room.limit}", fix=_advice([*fitting, *more, "--device cpu"], "another device"))  # fmt: skip


def _largest_part(phase: Phase, host: bool = True) -> str:
    """``host``: of those in main memory too."""
    part = max((part for part in phase.parts if host or not part.host), key=lambda part: part.nbytes)
    return f"most of it: {part.name}, {format_bytes(part.nbytes)}"


def _advice(fitting: list[str], otherwise: str) -> str:
    return f"{' , or '.join(fitting) or otherwise}; {OVERRULE} where this estimate is wrong".replace(" ,", ",")


def _settings(found: Estimate, plans: Sequence[MergePlan], fits: Fits, disk: bool = False) -> list[str]:
    """Flags that, each alone, make the run fit; by the same formulas. The ones that cost no quality first."""
    if fits(found):
        return []
    recipe = plans[0].recipe
    alone = [flag for flag, other in _single(found, plans, fits, disk) if fits(other)]
    if not alone and recipe.format in QUANTIZING and found.work.train:
        changes: dict[str, Any] = {"samples": 8, "tokens": min(found.work.tokens, 512), "curvature_tokens": 0, "polish": (), "shard_size": _smaller(recipe.shard_bytes, "100MB")}
        if fits(with_settings(found, plans, **changes)):
            alone.append(f"--samples 8 --tokens {changes['tokens']} --curvature-tokens 0 --shard-size {changes['shard_size']}" + (" without --polish" if recipe.polish else ""))
    if recipe.format in QUANTIZING and not disk and fits(as_float(found, plans)):
        alone.append("--format bf16, which is merged in a stream")
    return alone


def _smaller(shard_bytes: int, size: str) -> str:
    from qmerge.units import parse_bytes

    return size if parse_bytes(size) < shard_bytes else f"{shard_bytes}B"


def _single(found: Estimate, plans: Sequence[MergePlan], fits: Fits, disk: bool) -> Iterator[tuple[str, Estimate]]:
    from qmerge.units import parse_bytes

    recipe, work = plans[0].recipe, found.work
    if not work.quantized:
        return
    for size in (size for size in SHARDS if parse_bytes(size) < recipe.shard_bytes):
        other = with_settings(found, plans, shard_size=size)
        if fits(other):
            yield f"--shard-size {size}", other
            break
    if disk or not work.train:
        return
    for key, flag, least, most in (("samples", "--samples", 8, work.windows), ("tokens", "--tokens", 64, work.tokens)):
        def holds(count: int, key: str = key) -> bool:
            return fits(with_settings(found, plans, **{key: count}))

        if (value := _most(holds, least, most)) is not None:
            yield f"{flag} {value}", with_settings(found, plans, **{key: value})
    if recipe.curvature_tokens:
        yield "--curvature-tokens 0", with_settings(found, plans, curvature_tokens=0)
    if recipe.polish:
        yield "no --polish", with_settings(found, plans, polish=())


def _most(fits: Callable[[int], bool], least: int, most: int) -> int | None:
    """The largest of ``least`` … ``most`` - 1 that fits (needs grow with it), rounded down to a multiple of 8; None where not even the least does."""
    if least >= most or not fits(least):
        return None
    low, high = least, most
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return max(least, low // 8 * 8)
