"""How are several ranks started on cores of their own, and on hosts of their own, and what do their times come to?"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
Run = dict[str, Any]


@contextlib.contextmanager
def hosts(count: int) -> Iterator[list[str]]:
    """So many network namespaces on one switch, which stand for hosts: their names. Exits where that is not allowed."""
    if shutil.which("ip") is None or os.geteuid() != 0:
        raise SystemExit("skipped: --hosts needs root and iproute2")
    switch, names = f"qb{os.getpid()}s", [f"qb{os.getpid()}n{number}" for number in range(count)]

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True, text=True)

    try:
        for name in (switch, *names):
            ip("netns", "add", name)
        ip("-n", switch, "link", "add", "br0", "up", "type", "bridge")
        for number, name in enumerate(names):
            ip("-n", name, "link", "add", "eth0", "type", "veth", "peer", "name", f"p{number}", "netns", switch)
            ip("-n", switch, "link", "set", f"p{number}", "master", "br0", "up")
            ip("-n", name, "addr", "add", f"10.78.0.{number + 1}/24", "dev", "eth0")
            for device in ("eth0", "lo"):
                ip("-n", name, "link", "set", device, "up")
        yield names
    except subprocess.CalledProcessError as problem:
        raise SystemExit(f"skipped: no network namespaces here: {problem.stderr.strip()}") from None
    finally:
        for name in (switch, *names):
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def one_run(size: int, words: Callable[[Path], list[str]], found: Callable[[Path], Any], apart: bool = False) -> Run:
    """As `_one_run`. ``apart``: each rank on a host of its own (`hosts`)."""
    with hosts(size) if apart else contextlib.nullcontext([]) as names:
        return _one_run(size, words, found, names)


def _one_run(size: int, words: Callable[[Path], list[str]], found: Callable[[Path], Any], names: list[str]) -> Run:
    """``words``: the arguments of each rank's Python, whose last line is JSON (``rank``, ``elapsed_s``, ``cpu_s``, …), given the folder to write in; ``found``: digests of what they wrote there. Seconds are those
    of the slowest rank."""
    place = Path(tempfile.mkdtemp(prefix="bench-ranks-"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    cores, started = sorted(os.sched_getaffinity(0)), []
    for rank in range(size):
        variables = os.environ | {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
                                  "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}  # fmt: skip
        if names:
            variables |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "10.78.0.1", "GLOO_SOCKET_IFNAME": "eth0"}
        core, inside = cores[rank % len(cores)], ["ip", "netns", "exec", names[rank]] if names else []
        started.append(subprocess.Popen([*inside, sys.executable, *words(place)], env=variables, stdout=subprocess.PIPE, text=True, preexec_fn=lambda core=core: os.sched_setaffinity(0, {core})))
    try:
        said = [json.loads(one.communicate()[0].splitlines()[-1]) for one in started]
        digests = found(place)
    finally:
        for one in started:
            one.kill()
        shutil.rmtree(place, ignore_errors=True)
    return {"elapsed_s": max(row["elapsed_s"] for row in said), "cpu_s": max(row["cpu_s"] for row in said), "ranks": sorted(said, key=lambda row: row["rank"]), "digests": digests}


def measured(sizes: list[int], rounds: int, run: Callable[[int], Run], parts: Iterable[str]) -> list[Run]:
    """One row per number of ranks: medians over the rounds. Exits where what they wrote differs."""
    runs: dict[int, list[Run]] = {size: [] for size in sizes}
    for _ in range(rounds):
        for size in sizes:
            runs[size].append(run(size))
    if len({json.dumps(one["digests"]) for found in runs.values() for one in found}) != 1:
        raise SystemExit("the outputs differ, so their times mean nothing")
    rows, names = [], list(parts)
    for size, found in runs.items():
        spent = {key: {part: statistics.median(max(rank[key][part] for rank in one["ranks"]) for one in found) for part in names} for key in ("parts_s", "cpu_parts_s")}
        rows.append({"ranks": size, "elapsed_s": statistics.median(one["elapsed_s"] for one in found), "cpu_s": statistics.median(one["cpu_s"] for one in found), "all_s": [round(one["elapsed_s"], 2) for one in found], **spent})
    return rows


def table(rows: list[Run], split: Mapping[str, str], parts: Iterable[str]) -> list[str]:
    """Lines: seconds by part, the last row's over the first's, and how the part is shared; then the clock, round by round."""
    lines = ["| part | " + " | ".join(f"{row['ranks']} ranks" if row["ranks"] > 1 else "1 rank" for row in rows) + " | ratio | how it is split |", "|---|" + "---|" * (len(rows) + 2)]
    for part in ("all", *parts):
        values = [row["cpu_s"] if part == "all" else row["cpu_parts_s"][part] for row in rows]
        clock = [row["elapsed_s"] if part == "all" else row["parts_s"][part] for row in rows]
        if max(*values, *clock) < 0.05:
            continue
        ratio = f"{values[-1] / values[0]:.2f}" if values[0] > 0.05 else ""
        lines.append(f"| {part} | " + " | ".join(f"{value:.1f} ({wall:.1f})" for value, wall in zip(values, clock, strict=True)) + f" | {ratio} | {split.get(part, '')} |")
    return [*lines, "", f"Clock, round by round: {'; '.join(str(row['ranks']) + ' ranks: ' + ', '.join(map(str, row['all_s'])) + ' s' for row in rows)}.", ""]


SECONDS = "of the processor, and of the clock in brackets (which counts what others did on the machine, too):"


def unmeasured(apart: bool, more: str = "") -> str:
    """The last line of a page."""
    between = "Each rank's host was a network namespace of one machine, so memory and disk were shared. Not measured: a network" if apart else "Not measured: several hosts, a network"
    return f"{between}, GPUs and NCCL{more}."


def command() -> str:
    return "python " + " ".join(word.replace("/work/shared", "../shared") for word in sys.argv)
