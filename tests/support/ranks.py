"""Several ranks of one command, each a forked child, as torchrun would start them."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from support.forked import ended_within, fork


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def start(works: Sequence[Callable[[], Any]], log: Path) -> list[int]:
    """Process ids, by rank."""
    port = free_port()

    def named(rank: int, work: Callable[[], Any]) -> Callable[[], Any]:
        def inside() -> None:
            import torch

            torch.set_num_threads(1)
            os.environ.update(RANK=str(rank), WORLD_SIZE=str(len(works)), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(len(works)), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
            work()

        return inside

    return [fork(named(rank, work), log) for rank, work in enumerate(works)]


def end(children: Sequence[int], seconds: float) -> list[int]:
    """Exit codes by rank; whoever is not through after ``seconds`` is killed, which shows as -9."""
    until = time.monotonic() + seconds
    return [ended_within(child, max(0.1, until - time.monotonic())) for child in children]
