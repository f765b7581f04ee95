"""Does somebody want the run to end, and what is finished before it does?

The first SIGINT, SIGTERM or SIGHUP lets the step that is under way come to its end (`finishing` names it); a second one, or one where nothing would be saved by waiting, ends the run at once. A signal that is ignored
(nohup's SIGHUP, SIGINT of what a script put into the background) stays so.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable
from typing import Any

from qmerge.errors import Interrupted


class Stop:
    """Use as a context manager around a run: signals are its own there, in the main thread. Elsewhere it is a wish that nobody has."""

    def __init__(self, say: Callable[[str], None] = lambda _: None) -> None:
        self.wanted, self.finishing, self._say = False, "", say
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():
            heard = [number for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) is not signal.SIG_IGN]
            self._before = {number: signal.signal(number, self._arrived) for number in heard}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _arrived(self, number: int, frame: Any) -> None:
        if self.wanted or not self.finishing:
            self.wanted = True
            raise KeyboardInterrupt
        self.wanted = True
        try:
            self._say(f"stopping: finishing {self.finishing}; once more to stop at once")
        except RuntimeError:  # the signal came in the middle of another line
            with contextlib.suppress(OSError):
                os.write(2, b"\nstopping after this step; once more to stop at once\n")

    def check(self) -> None:
        """Raises Interrupted where the end is wanted: what was `finishing` is finished."""
        if self.wanted:
            raise Interrupted("The run was stopped.", found="a signal")
