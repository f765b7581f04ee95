"""How much main memory is there to take, how much does this process hold, and how does it hand memory back?"""

from __future__ import annotations

import ctypes
import os
import re
import resource
import sys
import time
from dataclasses import dataclass
from pathlib import Path

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8
"""mallopt's names for them (malloc.h)"""
TIDY_S, LOOSE_BYTES = 60.0, 256 << 20
"""the heap's free pages are handed back this often at most, and where they are more than this"""
ARENAS_BYTES = 8 * (os.cpu_count() or 1) * 64 * 2**20
"""address space that glibc's allocator may set aside without using it: 64 MiB for each of its arenas"""


@dataclass(frozen=True)
class Room:
    """``free``: bytes that can still be taken, beside what this process holds. ``limit``: what sets them, for people."""

    free: int
    limit: str


def peak_rss_bytes() -> int:
    """Peak resident memory of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def resident_bytes() -> int:
    """Resident memory of this process now; the peak so far where the system does not tell."""
    return _status("VmRSS") or peak_rss_bytes()


def memory_room() -> Room | None:
    """The tightest of what the machine has available (without swapping), the control groups that this process is in (versions 1 and 2), and its own limits. None where the system tells nothing."""
    found = [Room(free, "available on this machine")] if (free := _meminfo("MemAvailable")) is not None else []
    found += [Room(free, "left to its control group") for free in _cgroup_rooms()]
    for kind, held, name in ((resource.RLIMIT_AS, "VmSize", "of address space left by ulimit -v"), (resource.RLIMIT_DATA, "VmData", "of data left by ulimit -d")):
        limit = resource.getrlimit(kind)[0]
        if limit != resource.RLIM_INFINITY:
            found.append(Room(max(0, limit - _status(held) - ARENAS_BYTES), name))
    return min(found, key=lambda room: room.free, default=None)


def _status(key: str) -> int:
    """Bytes of a line of this process's status, 0 where there is none."""
    return _kilobytes(Path("/proc/self/status"), key) or 0


def _meminfo(key: str) -> int | None:
    return _kilobytes(Path("/proc/meminfo"), key)


def _kilobytes(path: Path, key: str) -> int | None:
    try:
        found = re.search(rf"^{key}:\s+(\d+) kB", path.read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None


def _cgroup_rooms(system: Path = Path("/sys/fs/cgroup"), process: Path = Path("/proc/self/cgroup")) -> list[int]:
    """What each control group from this process's up to the root has left. Page cache that nobody uses counts as free: the kernel drops it first."""
    try:
        rows = [line.split(":", 2) for line in process.read_text().splitlines()]
    except OSError:
        return []
    found = []
    for _, kinds, inside in rows:
        if kinds == "":
            root, names = system, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in kinds.split(","):
            root, names = system / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        place = root / inside.lstrip("/")
        while place.is_relative_to(root):  # in a container the path may not be there; its own group is then the root
            found += _cgroup_room(place, *names)
            place = place.parent
    return found


def _cgroup_room(place: Path, most: str, used: str, idle: str) -> list[int]:
    try:
        limit, taken = (place / most).read_text().strip(), int((place / used).read_text())
        cache = re.search(rf"^{idle} (\d+)$", (place / "memory.stat").read_text(), re.MULTILINE)
    except (OSError, ValueError):
        return []
    return [] if limit == "max" or int(limit) >= 1 << 60 else [max(0, int(limit) - taken + (int(cache[1]) if cache else 0))]


def one_heap() -> None:
    """Let all threads take memory from one heap of glibc's, and tensors of 32 MB and more from the system. Left to itself each thread has heaps of its own, torn up by what is alive in them:
    a run's peak was half as high again for it, and could not be foreseen. Handing smaller tensors back at once made the peak lower still and the run a fifth slower. Elsewhere than on glibc
    nothing happens."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for setting, value in ((_ARENA_MAX, 1), (_MMAP_THRESHOLD, 32 << 20), (_TRIM_THRESHOLD, 256 << 20)):
            mallopt(setting, value)


class _Heap(ctypes.Structure):
    """glibc's ``struct mallinfo2``."""

    _fields_ = [(name, ctypes.c_size_t) for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")]


def tidy_heap(last: float) -> float:
    """Hand free pages within the heap back to the system: sizes that change from linear to linear leave holes. ``last``: when that was done last, on the monotonic clock; returned renewed. It takes
    tenths of a second, and so does filling the pages again, so it is done once a `TIDY_S` at most: in runs whose linears take that long. Elsewhere than on glibc nothing happens."""
    libc, now = ctypes.CDLL(None), time.monotonic()
    if now - last < TIDY_S or not hasattr(libc, "mallinfo2"):
        return last
    libc.mallinfo2.restype = _Heap
    if libc.mallinfo2().fordblks > LOOSE_BYTES:
        libc.malloc_trim(0)
    return now
