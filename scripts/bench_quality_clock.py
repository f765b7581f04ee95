"""What did a piece of work cost this process, and how much of the machine did others use meanwhile?

Standard library only, so that peers in environments of their own can use it too.
"""

from __future__ import annotations

import os
import resource
import time
from pathlib import Path
from typing import Any

STAT, TICKS = Path("/proc/stat"), os.sysconf("SC_CLK_TCK")
IDLE = (3, 4)  # of the first line's fields: idle, iowait


class Clock:
    """Starts when it is made."""

    def __init__(self) -> None:
        self._began, self._paused = time.perf_counter(), 0.0
        self._own, self._busy = own_cpu_s(), machine_busy_s()

    def without(self, seconds: float) -> None:
        """Leave work out that is not part of what is timed."""
        self._paused += seconds

    def cost(self) -> dict[str, Any]:
        """``seconds``; ``peak_rss_bytes`` of the whole process, imports and all; ``others_share``: of the machine's cores, used by other processes (None: not known)."""
        wall = time.perf_counter() - self._began
        busy, share = machine_busy_s(), None
        if busy is not None and self._busy is not None:
            others = (busy - self._busy) - (own_cpu_s() - self._own)
            share = max(0.0, others) / (wall * (os.cpu_count() or 1))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return {"seconds": wall - self._paused, "peak_rss_bytes": peak, "others_share": share}


def own_cpu_s() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def machine_busy_s() -> float | None:
    """Seconds of all cores that were not idle, since the machine started; Linux only."""
    if not STAT.is_file():
        return None
    fields = [int(number) for number in STAT.read_text().splitlines()[0].split()[1:9]]
    return sum(number for index, number in enumerate(fields) if index not in IDLE) / TICKS
