"""Is a dense merge of an 8B-shaped NF4 base as fast as the disk lets it be, in little memory, and how does PEFT's compare?

Writes docs/measurements/merge.md and merge.json: `qmerge merge --format bf16` beside a plain copy of the bytes it wrote plus the read of the bytes it
read, and beside PEFT's merge_and_unload. Each run is a process of its own. Left out: other formats, GPUs, real weights (values do not change the work).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import resource
import shlex
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bench_merge_page import limits, markdown, summary
from bench_merge_process import Cost, drop, measure, memory_bytes, size
from synthetic_llama import ALPHA, LINEARS, Shape, base_bytes, merged_bytes

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
SLACK_BYTES = 2_000_000_000  # disk beside the checkpoints, and memory of PEFT beside its weights


def main() -> None:
    args = arguments()
    shape = Shape(layers=args.layers)
    check_room(args, shape)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the finally below removes gigabytes
    work = Path(tempfile.mkdtemp(prefix="bench-merge-", dir=args.scratch)).resolve()
    try:
        found = about(args) | bench(work, shape, args.repeats, args.peft_repeats, args.threads)
    finally:
        if args.keep:
            say(f"kept: {work}")
        else:
            shutil.rmtree(work)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.with_suffix(".json").write_text(json.dumps(found, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
    args.out.write_text(markdown(found), encoding="utf-8")
    say(f"wrote {args.out} and {args.out.with_suffix('.json').name}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=6, help="decoder layers of the base; Llama-3-8B has 32 (default 6)")
    parser.add_argument("--repeats", type=int, default=3, help="runs of qmerge, read and copy (default 3)")
    parser.add_argument("--peft-repeats", type=int, default=1, help="runs of PEFT, at most --repeats (default 1)")
    parser.add_argument("--skip-peft", action="store_true", help="PEFT needs the whole float model in memory")
    parser.add_argument("--threads", type=int, help="OMP_NUM_THREADS of every process (default: as the environment has it)")
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()), help="where the checkpoints go (default: the system's folder)")
    parser.add_argument("--keep", action="store_true", help="leave the checkpoints there")
    parser.add_argument("--out", type=Path, default=ROOT / "docs/measurements/merge.md", help="the page; the JSON goes beside it")
    args = parser.parse_args()
    if args.skip_peft:
        args.peft_repeats = 0
    if min(args.layers, args.repeats, args.threads or 1) < 1 or not 0 <= args.peft_repeats <= args.repeats:
        parser.error("--layers, --repeats and --threads must be at least 1, and --peft-repeats at most --repeats")
    if not args.scratch.is_dir():
        parser.error(f"--scratch {args.scratch} is no folder")
    return args


def say(text: str, began: float = time.perf_counter()) -> None:  # noqa: B008  the process's start
    print(f"{time.perf_counter() - began:7.1f} s  {text}", file=sys.stderr, flush=True)


def check_room(args: argparse.Namespace, shape: Shape) -> None:
    """Stop before anything is written where disk or, for PEFT, memory is short."""
    disk, free = base_bytes(shape) + 2 * merged_bytes(shape) + SLACK_BYTES, shutil.disk_usage(args.scratch).free
    if free < disk:
        raise SystemExit(f"{disk / 1e9:.1f} GB of disk are needed in --scratch, {free / 1e9:.1f} GB are free: give another --scratch, or fewer --layers")
    memory, there = base_bytes(shape) + merged_bytes(shape) + SLACK_BYTES, memory_bytes("MemAvailable")
    if args.peft_repeats and there < memory:
        raise SystemExit(f"PEFT may need {memory / 1e9:.1f} GB of memory, {there / 1e9:.1f} GB are available: fewer --layers, or --skip-peft")


def bench(work: Path, shape: Shape, repeats: int, peft_repeats: int, threads: int | None = None) -> dict[str, Any]:
    """Make base and adapter in ``work``, run everything, and return what was measured. SystemExit where a run fails or outputs disagree."""
    place = Workplace(work, threads)
    place.make(shape)
    place.cold = place.can_drop()
    say(f"base {size(place.base) / 1e9:.2f} GB; page cache {'dropped' if place.cold else 'cannot be dropped: warmed'} before every run")
    runs: list[dict[str, Any]] = []
    for number in range(repeats):
        # a copy needs an output, so it cannot come first; after that the order turns round
        for arm in ("qmerge", "read", "copy") if number % 2 == 0 else ("copy", "read", "qmerge"):
            runs.append({"arm": arm, "round": number} | place.run(arm))
        if number < peft_repeats:
            runs.append({"arm": "peft", "round": number} | place.run("peft"))
        if number == 0:
            agreement = place.compare(shape, with_peft=peft_repeats > 0)
            say(f"outputs agree ({len(agreement['merged'])} merged tensors looked at)")
        shutil.rmtree(place.folder("peft"), ignore_errors=True)
    bytes_in, bytes_out = size(place.base, place.adapter), size(place.folder("qmerge"))
    return {
        "shape": asdict(shape), "bytes_in": bytes_in, "bytes_out": bytes_out, "page_cache": "cold" if place.cold else "warm",
        "bench_peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "arms": summary(runs, bytes_in, bytes_out), "limits": limits(runs), "agreement": agreement, "runs": runs,
    }  # fmt: skip


class Workplace:
    """The folders of one benchmark, and the processes that work on them."""

    def __init__(self, work: Path, threads: int | None) -> None:
        self.work, self.cold, self.base, self.adapter = work, True, work / "base", work / "adapter"
        self.env = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"} | ({"OMP_NUM_THREADS": str(threads)} if threads else {})

    def folder(self, arm: str) -> Path:
        return self.work / f"out-{arm}"

    def call(self, *command: str) -> Cost:
        return measure([sys.executable, *command], self.env, self.work / "log.txt")

    def arm(self, mode: str, **job: Any) -> tuple[Cost, Any]:
        """One of bench_merge_arms.py's: its cost and its answer."""
        done = self.work / "answer.json"
        cost = self.call(str(HERE / "bench_merge_arms.py"), mode, json.dumps(job | {"answer": str(done)}))
        return cost, json.loads(done.read_text(encoding="utf-8"))

    def qmerge(self, *flags: str) -> Cost:
        words = ("--base", self.base, "--adapter", self.adapter, "--out", self.folder("qmerge"), "--format", "bf16", "--device", "cpu")
        return self.call("-m", "qmerge", "merge", *map(str, words), *flags)

    def make(self, shape: Shape) -> None:
        """Base and adapter; then every library once, so that no timed run reads Python's own files from a cold disk."""
        say("writing the base and the adapter")
        self.call(str(HERE / "synthetic_llama.py"), json.dumps({"base": str(self.base), "adapter": str(self.adapter), "shape": asdict(shape)}))
        self.call("-c", "import torch, transformers, peft, bitsandbytes")
        self.qmerge("--dry-run")

    def can_drop(self) -> bool:
        """Does posix_fadvise(DONTNEED) empty the page cache here? Seen in what a read of the adapter, just dropped, takes from the disk."""
        drop(self.adapter)
        cost, _ = self.arm("read", folders=[str(self.adapter)])
        return cost.disk_read_bytes > 0.9 * size(self.adapter)

    def run(self, arm: str) -> dict[str, Any]:
        """One timed process, after its old output is removed, dirty pages are written, and its inputs have left (or all entered) the page cache."""
        out, inputs = self.folder(arm), [self.folder("qmerge")] if arm == "copy" else [self.base, self.adapter]
        shutil.rmtree(out, ignore_errors=True)
        os.sync()
        if self.cold:
            drop(*inputs)
        else:
            self.arm("read", folders=list(map(str, inputs)))
        if arm == "qmerge":
            cost = self.qmerge()
        elif arm == "read":
            cost, _ = self.arm("read", folders=list(map(str, inputs)))
        elif arm == "copy":
            cost, _ = self.arm("copy", source=str(inputs[0]), target=str(out))
            shutil.rmtree(out)
        else:
            cost, answer = self.arm("peft", base=str(self.base), adapter=str(self.adapter), out=str(out))
        say(f"{arm:6} {cost.wall_s:7.2f} s, peak {cost.peak_rss_bytes / 1e9:.2f} GB")
        if arm != "peft":
            return asdict(cost)
        # PEFT's own way ends with save_pretrained; with an fsync behind it, as qmerge's ends, it takes longer
        return asdict(cost) | {"wall_s": cost.wall_s - answer["fsync"], "wall_with_fsync_s": cost.wall_s, "stages_s": answer}

    def compare(self, shape: Shape, with_peft: bool) -> dict[str, Any]:
        """SystemExit unless the outputs hold the merge: one linear of each kind, spread over the layers, and what must be unchanged."""
        modules = [f"model.layers.{i * (shape.layers - 1) // (len(LINEARS) - 1)}.{name}" for i, name in enumerate(LINEARS)]
        theirs = str(self.folder("peft")) if with_peft else None
        job = {"base": str(self.base), "adapter": str(self.adapter), "ours": str(self.folder("qmerge")), "theirs": theirs}
        _, found = self.arm("compare", **job, scaling=ALPHA / shape.rank, modules=modules)
        wrong = [row["tensor"] for row in found["merged"] if not all(value <= 1 for value in (*row["error"].values(), row.get("difference", 0)))]
        wrong += [name for name, same in found["unchanged"].items() if not same]
        if wrong:
            raise SystemExit(f"outputs are not the same merge, so their times mean nothing: {', '.join(wrong)}\n{json.dumps(found, indent=1)}")
        return found


def about(args: argparse.Namespace) -> dict[str, Any]:
    """How the figures were made: what a person types to make them again, versions, machine. No paths, host names or dates."""
    words = ["python", "scripts/bench_merge.py", f"--layers={args.layers}", f"--repeats={args.repeats}"]
    words += [f"--peft-repeats={args.peft_repeats}"] if args.peft_repeats else ["--skip-peft"]
    words += [f"--threads={args.threads}"] * bool(args.threads)
    cpu = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())
    threads = args.threads or os.environ.get("OMP_NUM_THREADS") or f"{os.cpu_count()} (not set)"
    machine = {"cpu": cpu[1] if cpu else platform.machine(), "cores": os.cpu_count(), "memory_gb": round(memory_bytes("MemTotal") / 1e9, 1)}
    machine |= {"threads": threads, "load_average_at_start": round(os.getloadavg()[0], 2)}
    packages = ("torch", "transformers", "peft", "bitsandbytes", "safetensors")
    return {"command": shlex.join(words), "versions": {name: version(name) for name in packages}, "machine": machine}


if __name__ == "__main__":
    main()
