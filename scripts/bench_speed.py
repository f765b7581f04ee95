"""How fast is each part, as a ratio to a peer or to a physical floor in the same run? Ten minutes on two cores.

Writes JSON (`--out`, default .bench/speed.json) and a table on stdout; `scripts/compare_speed.py OLD NEW` names what got slower. Each ratio is of two things that took
turns, in an order that turns round; its interval is over the rounds. Left out: quality (bench_quality.py), large shapes (bench_merge.py).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import re
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from scipy import stats

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "gptqmodel", "numba")


def main() -> None:
    from bench_speed_parts import PARTS

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", action="append", choices=list(PARTS), help="only this one; repeatable")
    parser.add_argument("--rounds", type=int, help="rounds of each part (default: each part's own, 2 to 10)")
    parser.add_argument("--out", type=Path, default=ROOT / ".bench" / "speed.json")
    parser.add_argument("--page", type=Path, help="write the table as a page too, and the JSON beside it")
    args = parser.parse_args()
    if args.rounds is not None and args.rounds < 2:
        parser.error("--rounds must be at least 2: one round has no spread")
    found: dict[str, Any] = about(args) | {"rows": {}}
    started = time.perf_counter()
    for name, (part, rounds) in PARTS.items():
        if args.part and name not in args.part:
            continue
        before, began = os.getloadavg()[0], time.perf_counter()
        try:
            rows = part(args.rounds or rounds)
        except LookupError as lost:
            say(f"skipped: {name}: {lost.args[0]}")
            continue
        for row in rows:
            found["rows"][row["name"]] = row | {"part": name, "load_average_before": round(before, 2)}
        say(f"{name}: {time.perf_counter() - began:.0f} s")
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(found, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
    print(table(found))
    if args.page:
        args.page.write_text(page(found, time.perf_counter() - started), encoding="utf-8")
        args.page.with_suffix(".json").write_text(args.out.read_text(encoding="utf-8"), encoding="utf-8")
    say(f"wrote {args.out}. Next: python scripts/compare_speed.py OLD.json {args.out}")


def in_turn(rounds: int, arms: dict[str, Callable[[], float | None]]) -> dict[str, list[float]]:
    """Seconds of each arm per round. An arm that returns a number timed itself; else the call is timed. The order turns round with every round."""
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(rounds):
        for name in list(arms) if number % 2 == 0 else list(arms)[::-1]:
            began = time.perf_counter()
            own = arms[name]()
            seconds[name].append(time.perf_counter() - began if own is None else own)
    return seconds


def ratio(name: str, what: str, ours: list[float], other: list[float], limit: float | None = None) -> dict[str, Any]:
    """One row: the geometric mean over the rounds of ``ours / other`` with its 95 % t interval (of the logarithm). Below 1: ours is quicker. ``limit``: what is aimed at."""
    logs = [math.log(a / b) for a, b in zip(ours, other, strict=True)]
    middle, half = statistics.fmean(logs), 0.0
    if len(logs) > 1:
        half = float(stats.t.ppf(0.975, len(logs) - 1)) * statistics.stdev(logs) / math.sqrt(len(logs))
    return {"name": name, "what": what, "value": math.exp(middle), "ci_low": math.exp(middle - half), "ci_high": math.exp(middle + half), "n": len(logs), "unit": "×",
            "limit": limit, "seconds": statistics.median(ours), "other_seconds": statistics.median(other)}  # fmt: skip


def table(found: dict[str, Any]) -> str:
    rows = [("what", "ratio", "95 %", "n", "aim", "ours", "other")]
    for row in found["rows"].values():
        aim = "" if row["limit"] is None else f"≤ {row['limit']:g}"
        rows.append((row["what"], f"{row['value']:.2f}", f"{row['ci_low']:.2f} to {row['ci_high']:.2f}", str(row["n"]), aim, f"{row['seconds']:.3g} s", f"{row['other_seconds']:.3g} s"))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(width) if index == 0 else cell.rjust(width) for index, (cell, width) in enumerate(zip(row, widths, strict=True))) for row in rows)


def page(found: dict[str, Any], elapsed_s: float) -> str:
    """The table for docs/measurements."""
    rows = ["| what | ratio | 95 % | n | aim | ours | other |", "| --- | --- | --- | --- | --- | --- | --- |"]
    for row in found["rows"].values():
        aim = "" if row["limit"] is None else f"≤ {row['limit']:g}"
        rows.append(f"| {row['what']} | **{row['value']:.2f}** | {row['ci_low']:.2f} to {row['ci_high']:.2f} | {row['n']} | {aim} | {row['seconds']:.3g} s | {row['other_seconds']:.3g} s |")
    machine, loads = found["machine"], [row["load_average_before"] for row in found["rows"].values()]
    return "\n".join([
        "# Speed, part by part", "",
        f"Written by `{found['command']} --page docs/measurements/speed.md` (`make bench`) in {elapsed_s / 60:.0f} min. Machine: {machine['cpu']}, {machine['cores']} cores, load average before the parts {min(loads):.1f} to {max(loads):.1f}; "
        + ", ".join(f"{name} {version}" for name, version in found["versions"].items()) + ".", "",
        "Each ratio is of two things that took turns; below 1 ours is quicker. Geometric mean over n rounds with its 95 % t interval; seconds are medians. `scripts/compare_speed.py OLD.json NEW.json` names what got slower by more than 10 % and its noise.",
        "", *rows, "",
        "What each row is: the docstrings of `scripts/bench_speed_parts.py`. gptqmodel and llm-compressor quantize the merged model; what qmerge takes includes dequantizing and merging it.", "",
    ])  # fmt: skip


def about(args: argparse.Namespace) -> dict[str, Any]:
    """How the figures were made: command, versions, machine. No paths, host names or dates."""
    words = ["python", "scripts/bench_speed.py", *(f"--part={part}" for part in args.part or ())] + ([f"--rounds={args.rounds}"] if args.rounds else [])
    return {"schema": "speed/1", "command": shlex.join(words)} | machine()


def machine() -> dict[str, Any]:
    """Versions of what was measured, and where."""
    import torch

    cpu = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text()) if Path("/proc/cpuinfo").is_file() else None
    place = {"cpu": cpu[1] if cpu else platform.machine(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    return {"versions": {name: version(name) for name in PACKAGES}, "machine": place}


def say(text: str, began: float = time.perf_counter()) -> None:  # noqa: B008  the process's start
    print(f"{time.perf_counter() - began:7.1f} s  {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
