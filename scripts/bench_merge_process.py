"""What did one process cost: seconds, peak memory, bytes from the disk? And what is in the page cache before it starts?

This module imports the standard library only, and so must the process that uses it: on Linux a child's ru_maxrss starts at what its parent has
reached. Linux only.
"""

from __future__ import annotations

import os
import re
import subprocess
import threading
import time
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Cost:
    """Of one process. ``peak_rss_bytes`` is ru_maxrss; ``anonymous_bytes`` the largest part of it that maps no file, sampled every 50 ms (0: too short).

    Neither holds page cache that read() and write() fill; pages of mapped files that the process touched are in ru_maxrss.
    """

    wall_s: float
    cpu_s: float
    peak_rss_bytes: int
    anonymous_bytes: int
    disk_read_bytes: int


def measure(command: list[str], env: dict[str, str], log: Path) -> Cost:
    """Run ``command``, output to ``log``. SystemExit with the end of the log where it fails."""
    with open(log, "wb") as stream:
        began = time.perf_counter()
        process = subprocess.Popen(command, env=env, cwd=log.parent, stdin=subprocess.DEVNULL, stdout=stream, stderr=stream)
        watch = AnonymousMemory(process.pid)
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:
            process.kill()
            process.wait()
            raise
        finally:
            wall_s = time.perf_counter() - began
            watch.stop()
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        words = " ".join(command[1:3])
        raise SystemExit(f"{words} failed with exit code {process.returncode}; the end of its log:\n{log.read_text(errors='replace')[-3000:]}")
    return Cost(wall_s, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024, watch.peak_bytes, usage.ru_inblock * 512)


class AnonymousMemory:
    """Largest RssAnon of a process, by looking every 50 ms from a thread."""

    def __init__(self, pid: int) -> None:
        self.peak_bytes, self._status, self._stop = 0, Path(f"/proc/{pid}/status"), threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def _look(self) -> None:
        while not self._stop.wait(0.05):
            try:
                found = re.search(r"RssAnon:\s*(\d+) kB", self._status.read_text())
            except (FileNotFoundError, ProcessLookupError):
                return
            self.peak_bytes = max(self.peak_bytes, 1024 * int(found[1])) if found else self.peak_bytes

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def size(*folders: Path) -> int:
    return sum(path.stat().st_size for folder in folders for path in files(folder))


def drop(*folders: Path) -> None:
    """Ask the kernel to forget what it holds of these files. fsync first: dirty pages stay."""
    for path in (path for folder in folders for path in files(folder)):
        with open(path, "rb") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def memory_bytes(key: str) -> int:
    """``MemTotal`` or ``MemAvailable`` of this machine."""
    return 1024 * int(re.search(rf"{key}:\s*(\d+) kB", Path("/proc/meminfo").read_text())[1])
