"""Is this command one of several processes, and may it be?"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from qmerge.cli.output import Streams
from qmerge.errors import UsageProblem
from qmerge.launch import launched
from qmerge.ranks import Ranks, together

SHARED = ("merge", "eval", "run")


@contextmanager
def several(device: str | None) -> Iterator[Ranks]:
    """The ranks that torchrun or srun has started, or this process alone. Only the first talks."""
    with together(launched(os.environ), device or "auto") as ranks:
        yield ranks


def check_alone(command: str | None, streams: Streams | None) -> None:
    """Raises UsageProblem where several processes would do the same thing beside each other. Ranks but the first are silenced."""
    launch = launched(os.environ)
    if launch is None:
        return
    if launch.rank and streams is not None:
        streams.mute()
    if command not in SHARED:
        raise UsageProblem(f"qmerge {command} is not shared among processes.", where=f"rank {launch.rank} of {launch.size}", expected="qmerge merge, eval or run, or one process", fix=f"run qmerge {command} without torchrun or srun")
