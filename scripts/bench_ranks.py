"""How much quicker are several ranks than one, each with one core, and in which parts?

    python scripts/bench_ranks.py --base B --adapter A --calibration C [--samples 128] [--tokens 256] [--ranks 1,2] [--rounds 1] [--slow-disk 4MB] [--json FILE] [--page docs/measurements/ranks.md]

Each rank is a process of its own on a core of its own, with one thread. The numbers of ranks take turns. Outputs are compared file by file. ``--slow-disk``: a float merge too, as if every
process had a disk that takes so much a second.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench_ranks_worker import PARTS

from qmerge.units import parse_bytes

ROOT = Path(__file__).parents[1]
SPLIT = {"gradients": "by batches", "forward": "by batches", "statistics": "by batches", "solve": "by linears of a group: one linear is not split", "load": "not split: each rank loads every block",
         "hand on": "not split: every rank unpacks every solved linear", "write": "by output file", "wait and send": "for the other ranks, and what is sent"}  # fmt: skip


def one_run(size: int, recipe: dict[str, Any], slow: float) -> dict[str, Any]:
    """Wall seconds of the slowest rank, its parts by rank, and the digests of the files."""
    place = Path(tempfile.mkdtemp(prefix="bench-ranks-"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    wish = json.dumps({"recipe": recipe | {"out": str(place / "out")}, "slow_disk": slow, "threads": 1})
    cores = sorted(os.sched_getaffinity(0))
    started = []
    for rank in range(size):
        variables = os.environ | {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
                                  "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}  # fmt: skip
        core = cores[rank % len(cores)]
        started.append(subprocess.Popen([sys.executable, str(ROOT / "scripts" / "bench_ranks_worker.py"), wish], env=variables, stdout=subprocess.PIPE, text=True, preexec_fn=lambda core=core: os.sched_setaffinity(0, {core})))
    try:
        said = [json.loads(one.communicate()[0].splitlines()[-1]) for one in started]
        digests = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted((place / "out").iterdir())}
    finally:
        for one in started:
            one.kill()
        shutil.rmtree(place, ignore_errors=True)
    return {"elapsed_s": max(row["elapsed_s"] for row in said), "parts_s": [row["parts_s"] for row in sorted(said, key=lambda row: row["rank"])], "digests": digests}


def measured(sizes: list[int], rounds: int, recipe: dict[str, Any], slow: float = 0.0) -> list[dict[str, Any]]:
    """One row per number of ranks: medians over the rounds. Exits where the bytes differ."""
    runs: dict[int, list[dict[str, Any]]] = {size: [] for size in sizes}
    for _ in range(rounds):
        for size in sizes:
            runs[size].append(one_run(size, recipe, slow))
    if len({json.dumps(run["digests"]) for found in runs.values() for run in found}) != 1:
        raise SystemExit("the outputs differ, so their times mean nothing")
    rows = []
    for size, found in runs.items():
        parts = {part: statistics.median(max(rank[part] for rank in run["parts_s"]) for run in found) for part in PARTS}
        rows.append({"ranks": size, "elapsed_s": statistics.median(run["elapsed_s"] for run in found), "all_s": [round(run["elapsed_s"], 2) for run in found], "parts_s": parts})
    return rows


def page(command: str, rows: list[dict[str, Any]], dense: list[dict[str, Any]], slow: str | None, tokens: str) -> str:
    """For people."""
    first = rows[0]
    lines = ["# Several ranks against one", "", "Written by `scripts/bench_ranks.py`; each rank has one core and one thread, and the outputs are the same bytes.", "", f"    {command}", "", f"gptq, {tokens}. Seconds of the slowest rank, medians over the rounds:", ""]
    lines += ["| part | " + " | ".join(f"{row['ranks']} ranks" if row["ranks"] > 1 else "1 rank" for row in rows) + " | ratio | how it is split |", "|---|" + "---|" * (len(rows) + 2)]
    for part in ("all", *PARTS):
        values = [row["elapsed_s"] if part == "all" else row["parts_s"][part] for row in rows]
        if max(values) < 0.05:
            continue
        ratio = f"{values[-1] / values[0]:.2f}" if values[0] > 0.05 else ""
        lines.append(f"| {part} | " + " | ".join(f"{value:.1f}" for value in values) + f" | {ratio} | {SPLIT.get(part, '')} |")
    lines += ["", f"Rounds: {'; '.join(str(row['ranks']) + ': ' + ', '.join(map(str, row['all_s'])) + ' s' for row in rows)}. Half the time in {rows[-1]['ranks']} ranks would be {1 / rows[-1]['ranks'] * first['ranks']:.2f}.", ""]
    if dense:
        lines += [f"A float merge (bf16, by output file) where every process has a disk that takes {slow} a second: " + ", ".join(f"{row['ranks']} ranks {row['elapsed_s']:.1f} s" for row in dense) + f", ratio {dense[-1]['elapsed_s'] / dense[0]['elapsed_s']:.2f}.", ""]
    return "\n".join([*lines, "Not measured: several hosts, a network, GPUs and NCCL.", ""])


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("base", "adapter", "calibration"):
        words.add_argument(f"--{name}", required=True)
    words.add_argument("--samples", type=int, default=128)
    words.add_argument("--tokens", type=int, default=256)
    words.add_argument("--ranks", default="1,2")
    words.add_argument("--rounds", type=int, default=1)
    words.add_argument("--slow-disk")
    words.add_argument("--json")
    words.add_argument("--page")
    wish = words.parse_args()
    sizes = [int(size) for size in wish.ranks.split(",")]
    inputs = {"base": wish.base, "adapter": [wish.adapter], "device": "cpu"}
    rows = measured(sizes, wish.rounds, inputs | {"format": "gptq", "calibration": wish.calibration, "samples": wish.samples, "tokens": wish.tokens})
    dense = measured(sizes, wish.rounds, inputs | {"format": "bf16", "shard_size": "3MB"}, parse_bytes(wish.slow_disk)) if wish.slow_disk else []
    if wish.json:
        Path(wish.json).write_text(json.dumps({"gptq": rows, "dense": dense}, indent=1) + "\n")
    told = page("python " + " ".join(sys.argv), rows, dense, wish.slow_disk, f"{wish.samples} windows of {wish.tokens} tokens")
    if wish.page:
        Path(wish.page).write_text(told)
    print(told)


if __name__ == "__main__":
    main()
