"""Make docs/measurements/serving.md and .json: what serving costs, on the demo and on the benchmark's model, through `qmerge bench` itself.

Candidates are those that `make bench-quality` left below .bench/work; a case whose inputs or candidates are not there is left out, and said.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from qmerge.cli.bench import serving_tables

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "measurements" / "serving.md"
SHARED = ROOT.parent / "shared" / "models"
CASES = {
    "demo": (ROOT / "examples" / "demo" / "base-nf4", ROOT / "examples" / "demo" / "adapter", ("ours-gptq-int4", "ours-nf4", "ours-ct-w4a16", "gptqmodel")),
    "light": (SHARED / "bench-llama-12m-nf4", SHARED / "adapter-gsm8k-light", ("ours-gptq-int4", "ours-nf4", "gptqmodel")),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cases", default=",".join(CASES), metavar="A,B")
    args = parser.parse_args()
    found: dict[str, dict[str, Any]] = {}
    for name in filter(present, args.cases.split(",")):
        found[name] = measure(name, args)  # each case is written when it is there: they take minutes
        PAGE.with_suffix(".json").write_text(json.dumps({"about": about(args), "cases": found}, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        PAGE.write_text(page(about(args), found), encoding="utf-8")
        print(f"wrote {name} to {PAGE.name} and {PAGE.stem}.json")
    if not found:
        raise SystemExit("no case has its inputs and candidates here: run `make bench-quality` first")


def candidates(name: str) -> list[Path]:
    return [folder for part in CASES[name][2] if (folder := ROOT / ".bench" / "work" / name / part).is_dir()]


def present(name: str) -> bool:
    there = all(folder.is_dir() for folder in CASES[name][:2]) and bool(candidates(name))
    if not there:
        print(f"{name}: left out, its base, adapter or candidates are not here", file=sys.stderr)
    return there


def measure(name: str, args: argparse.Namespace) -> dict[str, Any]:
    base, adapter, _ = CASES[name]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "serving.json"
        words = ["bench", "--base", base, "--adapter", adapter, *(part for place in candidates(name) for part in ("--candidate", place)), "--repeats", args.repeats, "--rounds", args.rounds, "--device", "cpu", "--out", out]
        subprocess.run([sys.executable, "-m", "qmerge", *map(str, words)], check=True, stdout=subprocess.DEVNULL)
        return json.loads(out.read_text(encoding="utf-8"))["serving"]


def about(args: argparse.Namespace) -> dict[str, Any]:
    """What a person types to make the figures again, and the machine. No paths, host names or dates."""
    cpu = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())
    threads = os.environ.get("OMP_NUM_THREADS")
    words = [*([f"OMP_NUM_THREADS={threads}"] if threads else []), "python", "scripts/bench_serving.py", f"--repeats={args.repeats}", f"--rounds={args.rounds}", *([f"--cases={args.cases}"] if args.cases != ",".join(CASES) else [])]
    return {"command": shlex.join(words), "machine": {"cpu": cpu[1] if cpu else platform.machine(), "cores": os.cpu_count()}}


def page(how: dict[str, Any], found: dict[str, dict[str, Any]]) -> str:
    settings, machine = next(iter(found.values()))["settings"], how["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in next(iter(found.values()))["versions"].items())
    loads = ", ".join(f"{name} {row['load_average']['before']} before and {row['load_average']['after']} after" for name, row in found.items())
    busy = max(max(row["load_average"].values()) for row in found.values()) > machine["cores"]
    lines = [
        "# What serving costs", "", f"`{how['command']}` writes this file and the JSON beside it, through `qmerge bench`.", "",
        f"Versions: {versions}. Machine: {machine['cpu']}, {machine['cores']} cores. Load average: {loads}."
        + (" **Other jobs ran on these cores at the same time, more in one minute than in the next, which an interval over the repeats of one process does not see: compare no speeds between arms from this run. Bytes, peaks and kernels are not touched by that.**" if busy else ""), "",
        f"Prompts of {settings['prompt_tokens']} tokens, {settings['new_tokens']} decoded after each, at batch {', '.join(map(str, settings['batches']))}; {settings['repeats']} timings per process, {settings['rounds']} {'process' if settings['rounds'] == 1 else 'processes'} per arm.",
        *(f"{key.capitalize()}: {settings[key]}." for key in ("order", "load", "decoding", "memory", "interval")), "",
        "These models have 5 and 12 million parameters: Python's own time per layer is most of a decoding step, and the libraries are most of the memory. What carries over to large models is the kernel",
        "that is chosen and the bytes, not the ratio of speeds. “hot swap”: can another adapter be put on the loaded base.", "",
    ]  # fmt: skip
    for name, row in found.items():
        lines += [f"## {name}", "", "```", serving_tables(row), "```", ""]
        lines += [f"{arm}: {cells['note']}." for arm, cells in row["rows"].items() if cells.get("note")] + [""]
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    main()
