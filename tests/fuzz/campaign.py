"""Give every reader its number of inputs, in processes of their own, and believe nothing that they do not report.

``python tests/fuzz/campaign.py [READER …] [--runs N] [--chunk N] [--jobs N] [--engine …] [--seed S] [--into FOLDER] [--rows FILE]``; this is `make fuzz`.
A process that dies, reports fewer inputs than it was given, accepts none, refuses none or fails at one makes the exit code 1.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
if __name__ == "__main__":
    sys.path[0] = str(HERE.parent)  # not this folder: its names are those of readers

from fuzz.run import READERS  # noqa: E402

IMPORTS_S = 900
"""what a process may take before its first input on a busy machine"""
PER_INPUT_S = 0.1
"""far above what the slowest reader takes for one input on average"""


def faults(row: dict[str, Any] | None, code: int, runs: int) -> list[str]:
    """What is wrong with one process: its last line of JSON (None: it wrote none), its exit code, and the inputs it was to run."""
    if row is None:
        return [f"no report, exit code {code}"]
    found = [f"{row['failed']} inputs broke the contract: {json.dumps(row['places'])}"] if row["failed"] else []
    found += [f"{row['inputs']} inputs of {runs}"] if row["inputs"] != runs else []
    found += [f"no input was {word}" for word in ("accepted", "refused") if not row[word]]
    return found or ([f"exit code {code}"] if code else [])


def reported(text: str) -> dict[str, Any] | None:
    """The row in the last line of a process's output, if it is one."""
    try:
        row = json.loads(text.splitlines()[-1])
    except (ValueError, IndexError):
        return None
    return row if isinstance(row, dict) and {"inputs", "accepted", "refused", "failed", "places"} <= set(row) else None


def run_one(reader: str, runs: int, seed: int, given: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    """One process: its row with what it was asked, and what is wrong."""
    found = given.found / f"{reader}-{seed}"
    words = [sys.executable, str(HERE / "run.py"), reader, "--runs", str(runs), "--seed", str(seed), "--engine", given.engine, "--found", str(found)]
    words += ["--into", str(given.into / reader)] if given.into else []
    began = time.time()
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=IMPORTS_S + PER_INPUT_S * runs, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"}, errors="replace")
    except subprocess.TimeoutExpired:
        return {"reader": reader, "seed": seed, "runs": runs}, [f"no end in {time.time() - began:.0f} s"]
    row = reported(done.stdout)
    wrong = faults(row, done.returncode, runs)
    if row is None:
        wrong.append(done.stderr[-2000:])
    return {"reader": reader, "seed": seed, "runs": runs, "wall_s": round(time.time() - began, 1), **(row or {})}, wrong


def chunks(readers: list[str], runs: int, chunk: int, seed: int) -> list[tuple[str, int, int]]:
    """``(reader, inputs, seed)`` of every process: the readers take turns, so that an interrupted campaign has given each about the same."""
    sizes = [min(chunk, runs - begin) for begin in range(0, runs, chunk)]
    return [(reader, size, seed + number) for number, size in enumerate(sizes) for reader in readers]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("readers", nargs="*", default=[])
    parser.add_argument("--runs", type=int, default=5000, help="inputs per reader")
    parser.add_argument("--chunk", type=int, default=200_000, help="inputs per process")
    parser.add_argument("--jobs", type=int, default=1, help="processes side by side")
    parser.add_argument("--engine", choices=("auto", "atheris", "plain"), default="auto")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--found", type=Path, default=Path(".fuzz"))
    parser.add_argument("--into", type=Path, help="folder of a corpus per reader that guided runs add to")
    parser.add_argument("--rows", type=Path, help="file that gets a line of JSON per process")
    given = parser.parse_args()
    work = chunks(given.readers or list(READERS), given.runs, given.chunk, given.seed)
    if not work or given.runs < 1:
        sys.exit("nothing to run")
    if given.engine == "auto" and importlib.util.find_spec("atheris") is None:
        print("atheris is not installed (the extra fuzz): inputs are changed at random, not guided by coverage", file=sys.stderr)
    writing, wrong = threading.Lock(), []

    def one(part: tuple[str, int, int]) -> None:
        row, found = run_one(*part, given)
        with writing:
            wrong.extend(f"{part[0]} (seed {part[2]}): {fault}" for fault in found)
            print(json.dumps(row), *found, sep="\n  ", flush=True)
            if given.rows:
                with given.rows.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row | {"wrong": found}) + "\n")

    with ThreadPoolExecutor(given.jobs) as pool:
        done = list(pool.map(one, work))
    print(f"{len(done)} of {len(work)} processes ended, {len(wrong)} faults; what broke a reader lies in {given.found}", file=sys.stderr)
    sys.exit(1 if wrong or len(done) != len(work) else 0)


if __name__ == "__main__":
    main()
