"""How much quicker are several ranks than one, each with one core, and in which parts?

    python scripts/bench_ranks.py --base B --adapter A --calibration C [--samples 128] [--tokens 256] [--ranks 1,2] [--rounds 1] [--slow-disk 4MB] [--hosts] [--json FILE] [--page docs/measurements/ranks.md]

Each rank is a process of its own on a core of its own, with one thread. The numbers of ranks take turns. Outputs are compared file by file. ``--slow-disk``: a float merge too, as if every
process had a disk that takes so much a second. ``--hosts``: each rank in a network namespace of its own (root, iproute2).
"""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path
from typing import Any

from bench_ranks_runs import ROOT, SECONDS, command, measured, one_run, table, unmeasured
from bench_ranks_worker import PARTS

from qmerge.units import parse_bytes

SPLIT = {"gradients": "by batches", "forward": "by batches", "statistics": "by batches", "solve": "by linears of a group: one linear is not split", "load": "not split: each rank loads every block",
         "hand on": "not split: every rank unpacks every solved linear", "write": "by output file", "wait and send": "for the other ranks, and what is sent"}  # fmt: skip


def digests(place: Path) -> dict[str, str]:
    """Of the files of OUT."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted((place / "out").iterdir())}


def timed(sizes: list[int], rounds: int, recipe: dict[str, Any], slow: float = 0.0, apart: bool = False) -> list[dict[str, Any]]:
    def words(place: Path) -> list[str]:
        return [str(ROOT / "scripts" / "bench_ranks_worker.py"), json.dumps({"recipe": recipe | {"out": str(place / "out")}, "slow_disk": slow, "threads": 1})]

    return measured(sizes, rounds, lambda size: one_run(size, words, digests, apart), PARTS)


def page(asked: str, rows: list[dict[str, Any]], dense: list[dict[str, Any]], slow: str | None, tokens: str, apart: bool) -> str:
    """For people."""
    lines = ["# Several ranks against one", "", "Written by `scripts/bench_ranks.py`; each rank has one core and one thread, and the outputs are the same bytes.", "", f"    {asked}", "",
             f"gptq, {tokens}. Seconds of the rank that took most, medians over the rounds; {SECONDS}", ""]  # fmt: skip
    lines += table(rows, SPLIT, PARTS)
    if dense:
        lines += [f"A float merge (bf16, by output file) where every process has a disk that takes {slow} a second: " + ", ".join(f"{row['ranks']} ranks {row['elapsed_s']:.1f} s" for row in dense) + f", ratio {dense[-1]['elapsed_s'] / dense[0]['elapsed_s']:.2f}.", ""]
    return "\n".join([*lines, unmeasured(apart), ""])


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("base", "adapter", "calibration"):
        words.add_argument(f"--{name}", required=True)
    words.add_argument("--samples", type=int, default=128)
    words.add_argument("--tokens", type=int, default=256)
    words.add_argument("--ranks", default="1,2")
    words.add_argument("--rounds", type=int, default=1)
    words.add_argument("--slow-disk")
    words.add_argument("--hosts", action="store_true")
    words.add_argument("--json")
    words.add_argument("--page")
    wish = words.parse_args()
    sizes = [int(size) for size in wish.ranks.split(",")]
    inputs = {"base": wish.base, "adapter": [wish.adapter], "device": "cpu"}
    rows = timed(sizes, wish.rounds, inputs | {"format": "gptq", "calibration": wish.calibration, "samples": wish.samples, "tokens": wish.tokens}, apart=wish.hosts)
    dense = timed(sizes, wish.rounds, inputs | {"format": "bf16", "shard_size": "3MB"}, parse_bytes(wish.slow_disk), wish.hosts) if wish.slow_disk else []
    if wish.json:
        Path(wish.json).write_text(json.dumps({"gptq": rows, "dense": dense}, indent=1) + "\n")
    told = page(command(), rows, dense, wish.slow_disk, f"{wish.samples} windows of {wish.tokens} tokens", wish.hosts)
    if wish.page:
        Path(wish.page).write_text(told)
    print(told)


if __name__ == "__main__":
    main()
