"""How do gigabytes reach a file without a copy of each passing through the page cache?

Bytes gather in a page-aligned buffer; full ones are written past the cache (``O_DIRECT``) by a thread of their own while the next fills. Where the file system cannot do
that, or the file is small, the same buffers go the ordinary way: only the speed differs. Every file is on the disk (fsync) before it counts as closed.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

ALIGNMENT = 4096
BUFFER_BYTES = 8 << 20
DIRECT_BYTES = 256 << 20
"""files from this size on go past the cache; smaller ones are likely to be read again at once"""


class DirectWriter:
    """Writes files one after the other. Calls return before the bytes are on the disk; `settle` waits for that. A failure (disk full) is raised by a later call."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1)
        self._waiting: deque[Future[None]] = deque()
        self._free = [mmap.mmap(-1, BUFFER_BYTES) for _ in range(2)]
        self._buffer, self._filled, self._handle, self._count = self._free.pop(), 0, -1, 0

    def open(self, path: Path, size: int) -> None:
        """Create ``path`` (it must not exist), mode by the umask, for ``size`` bytes."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0)
        self._handle = os.open(path, flags, 0o666)
        self._filled = self._count = 0
        if size >= DIRECT_BYTES and hasattr(os, "O_DIRECT"):
            _set_direct(self._handle, True)

    def write(self, view: memoryview) -> None:
        """The next bytes of the file. Raises OSError for what went wrong up to now."""
        while len(view):
            step = min(len(view), BUFFER_BYTES - self._filled)
            self._buffer[self._filled : self._filled + step] = view[:step]
            self._filled, self._count, view = self._filled + step, self._count + step, view[step:]
            if self._filled == BUFFER_BYTES:
                self._send()

    def close(self) -> Future[None]:
        """No more bytes for this file. The future is done when it is on the disk."""
        self._send()
        handle, self._handle = self._handle, -1
        self._waiting.append(self._pool.submit(_finish, handle))
        return self._waiting[-1]

    def settle(self) -> None:
        """Wait until every closed file is on the disk. Raises OSError."""
        while self._waiting:
            self._waiting.popleft().result()

    def stop(self) -> None:
        """Let go of everything, whatever state it is in."""
        self._pool.shutdown(wait=True)
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1

    def _send(self) -> None:
        if not self._filled:
            return
        buffer, filled, handle = self._buffer, self._filled, self._handle
        self._waiting.append(self._pool.submit(self._put, handle, buffer, filled))
        while not self._free or (self._waiting and self._waiting[0].done()):
            self._waiting.popleft().result()
        self._buffer, self._filled = self._free.pop(), 0

    def _put(self, handle: int, buffer: mmap.mmap, filled: int) -> None:
        try:
            with memoryview(buffer) as whole:
                done = 0
                while done < filled:
                    done += _write(handle, whole[done:filled])
        finally:
            self._free.append(buffer)


def _write(handle: int, view: memoryview) -> int:
    """One write; an end that does not fill a page, and a file system that refuses after all, go the ordinary way."""
    with view:
        if len(view) % ALIGNMENT:
            _set_direct(handle, False)
        try:
            return os.write(handle, view)
        except OSError as error:
            if error.errno != errno.EINVAL or not _set_direct(handle, False):
                raise
            return os.write(handle, view)


def _set_direct(handle: int, wanted: bool) -> bool:
    """Switch the cache off or on for this file. False where that changes nothing, or the file system has no such switch."""
    direct = getattr(os, "O_DIRECT", 0)
    flags = fcntl.fcntl(handle, fcntl.F_GETFL)
    if bool(flags & direct) == wanted:
        return False
    try:
        fcntl.fcntl(handle, fcntl.F_SETFL, flags ^ direct)
    except OSError:
        return False
    return True


def _finish(handle: int) -> None:
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
