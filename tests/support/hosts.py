"""Two hosts on one machine: network namespaces with a cable between them, and processes started in each."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FIRST, PORT = "10.77.0.1", 29555
"""where ranks meet: an address that only the first host has"""


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@contextlib.contextmanager
def two_hosts() -> Iterator[list[str]]:
    """Two network namespaces with a cable between them: their names. Skips where that is not allowed."""
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("network namespaces need root and iproute2")
    names = [f"qm{os.getpid()}{side}" for side in "ab"]
    try:
        try:
            for name in names:
                ip("netns", "add", name)
            ip("link", "add", f"v{names[0]}", "type", "veth", "peer", "name", f"v{names[1]}")
            for number, name in enumerate(names):
                ip("link", "set", f"v{name}", "netns", name)
                ip("-n", name, "addr", "add", f"10.77.0.{number + 1}/24", "dev", f"v{name}")
                for device in (f"v{name}", "lo"):
                    ip("-n", name, "link", "set", device, "up")
        except subprocess.CalledProcessError as problem:
            pytest.skip(f"no network namespaces here: {problem.stderr.decode().strip()}")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def pull(name: str) -> None:
    """The cable, out of a host: no connection is closed by that."""
    ip("-n", name, "link", "set", f"v{name}", "down")


def on_hosts(names: list[str], words: list[str]) -> list[subprocess.Popen]:
    """One rank on each host, with the variables that a launcher sets; ``words``: of its Python."""
    started = []
    for rank, name in enumerate(names):
        started.append(_inside(name, words, {"RANK": str(rank), "WORLD_SIZE": str(len(names)), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": FIRST, "MASTER_PORT": str(PORT)}))
    return started


def torchrun_on_hosts(names: list[str], words: list[str]) -> list[subprocess.Popen]:
    """torchrun on each host, one rank each. The namespaces have one host name, so what torchrun else finds by it is told: who keeps the meeting point, and each host's own address."""
    started = []
    for number, name in enumerate(names):
        meet = ["--nnodes", str(len(names)), "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-endpoint", f"{FIRST}:{PORT}", "--rdzv-conf", f"is_host={number == 0}", "--local-addr", f"10.77.0.{number + 1}"]
        started.append(_inside(name, ["-m", "torch.distributed.run", *meet, *words], {}))
    return started


def _inside(name: str, words: list[str], variables: dict[str, str]) -> subprocess.Popen:
    found = environment() | variables | {"GLOO_SOCKET_IFNAME": f"v{name}"}
    return subprocess.Popen(["ip", "netns", "exec", name, sys.executable, *words], env=found, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def ends(started: list[subprocess.Popen], seconds: float) -> tuple[list[int], list[str]]:
    """Exit codes and what was said on stderr, by host. Whoever is not through in time is killed, and all with it."""
    try:
        told = [one.communicate(timeout=seconds)[1] for one in started]
    finally:
        for one in started:
            one.kill()
    return [one.returncode for one in started], told
