"""What does a merge to GPTQ take in memory and time where the shapes are those of an 8B model?

Makes a model with random NF4 weights in Llama-3-8B's shape (`synthetic_llama`) with a few blocks, merges it in a fresh process and watches that process: resident memory several times a second,
the time of each progress line. What costs once a block is scaled to 32 of them. Writes the page and a JSON beside it.

    scripts/bench_8b.py --blocks 1 --page docs/measurements/large-shapes.md
    scripts/bench_8b.py --blocks 2 --device cuda --calibration TEXT.jsonl --samples 128 --tokens 2048      # on a GPU; not yet run on one

Then the products that the method cannot do without, at the rates of large products measured on that device once the run is over.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from synthetic_llama import Shape, write_adapter, write_base

DEMO = Path(__file__).parents[1] / "examples" / "demo"
WHOLE = 32
"""blocks of the model that this stands for"""
CHILD = """
import json, sys
from sampled import Sampled
from qmerge.pipeline import gradients
gradients.CURVATURE_BYTES = int(gradients.CURVATURE_BYTES * float(sys.argv[1]))  # as narrow as in the whole model
from qmerge.cli.main import main
parts, sys.argv = sys.argv[2], ["qmerge", *sys.argv[3:]]
with Sampled() as where:
    try:
        code = main()
    except SystemExit as end:
        code = end.code
with open(parts, "w") as file:
    json.dump({"wall_s": where.wall_s, "thread_s": where.seconds}, file)
sys.exit(code)
"""


@dataclass
class Taken:
    """``lines``: (seconds since the start, resident bytes at most since the line before, text). ``ended``: the exit status, None where the time was up."""

    lines: list[tuple[float, int, str]]
    peak_bytes: int
    elapsed_s: float
    ended: int | None
    load_before: float
    parts: dict[str, Any] | None = None
    """`sampled.Sampled`: wall time, and seconds of threads by part of the run"""


def make(home: Path, shape: Shape) -> tuple[Path, Path]:
    base, adapter = home / "base", home / "adapter"
    write_base(base, shape)
    write_adapter(adapter, shape, base.name)
    for file in (DEMO / "base-nf4").glob("*token*"):
        shutil.copy(file, base)
    return base, adapter


def resident(process: int, key: str) -> int:
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(key)), 0)


def watch(words: list[str], share: float, limit_s: float, home: Path) -> Taken:
    """``home``: the folder that all is made in, which no page names."""
    load, began, parts = os.getloadavg()[0], time.perf_counter(), home / "parts.json"
    child = subprocess.Popen([sys.executable, "-c", CHILD, str(share), str(parts), *words], env=os.environ | {"PYTHONPATH": str(Path(__file__).parent)}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    lines: list[tuple[float, int, str]] = []
    seen = [0, 0]
    """the most since the last line, and of all"""

    def read() -> None:
        for line in child.stdout:
            lines.append((round(time.perf_counter() - began, 1), seen[0], line.rstrip().replace(f"{home}/", "")))
            seen[0] = 0

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    while child.poll() is None and time.perf_counter() - began < limit_s:
        seen[0] = max(seen[0], resident(child.pid, "VmRSS"))
        seen[1] = max(seen[1], resident(child.pid, "VmHWM"))
        time.sleep(0.05)
    ended = child.poll()
    if ended is None:
        child.kill()
    child.wait()
    reader.join()
    found = json.loads(parts.read_text(encoding="utf-8")) if parts.is_file() else None
    return Taken(lines, seen[1], round(time.perf_counter() - began, 1), ended, load, found)


@dataclass
class Floor:
    """``flop``: of passes, sums and solving (`qmerge.pipeline.floor`); rates in FLOP/s of large square products on the device, of fp32 and of bf16 factors."""

    device: str
    flop: tuple[float, float, float]
    fp32: float
    bf16: float
    compute: str

    @property
    def seconds(self) -> float:
        passing, summing, solving = self.flop
        return passing / (self.bf16 if self.compute == "bf16" else self.fp32) + summing / (self.fp32 if self.compute == "fp32" else self.bf16) + solving / self.fp32


def floor_of(words: list[str]) -> Floor:
    """Of the run that `qmerge merge` was given ``words`` for."""
    import torch

    from qmerge.device import device_name, exact_products, pick_device, wait_for
    from qmerge.pipeline.estimate import estimate
    from qmerge.pipeline.floor import operations
    from qmerge.pipeline.plan import plan
    from qmerge.pipeline.recipe import build_recipe
    from qmerge.pipeline.run import calibration_for

    given = {word.removeprefix("--"): value for word, value in zip(words[1::2], words[2::2], strict=True)}
    recipe = build_recipe(None, (), given | {"adapter": (given["adapter"],), "samples": int(given["samples"]), "tokens": int(given["tokens"]), "overwrite": True})
    made, device = plan(recipe), pick_device(given["device"])
    counted, size = operations(estimate([made], calibration_for(made)).work), 2048 if device.type == "cpu" else 8192

    def rate(dtype: torch.dtype) -> float:
        left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        spent = []
        for _ in range(6):
            began = time.perf_counter()
            torch.mm(left, right)
            wait_for(device)
            spent.append(time.perf_counter() - began)
        return 2 * size**3 / min(spent)

    with exact_products():
        return Floor(device_name(device), (counted.passing, counted.summing, counted.solving), rate(torch.float32), rate(torch.bfloat16), made.recipe.compute)


def page(shape: Shape, taken: Taken, command: str, floor: Floor) -> str:
    rows = "\n".join(f"| {at:.0f} | {held / 1e9:.2f} | {text} |" for at, held, text in taken.lines)
    end = "the run ended by itself" if taken.ended == 0 else f"the run ended with {taken.ended}" if taken.ended is not None else "the run was cut off, so the peak is of what it came to"
    solved, gradients = seconds_each(taken, "  block "), seconds_each(taken, "gradients: block ")
    scaled = (
        f"A block took {gradients:.0f} s for its gradients and {solved:.0f} s to be solved, so {WHOLE} of them take {WHOLE * (solved + gradients) / 3600:.1f} h on these {os.cpu_count()} cores."
        if solved and gradients else "No block was finished in the time that it was given."
    )  # fmt: skip
    passing, summing, solving = floor.flop
    least = f"""Its products, each once ({passing:.2g} FLOP of passes, {summing:.2g} of sums and gradients, {solving:.2g} of solving), take {floor.seconds:.0f} s at the rates of large products that were measured on
{floor.device} after the run, {floor.fp32 / 1e9:.0f} GFLOP/s in fp32 and {floor.bf16 / 1e9:.0f} in bf16 (`--compute {floor.compute}`): the whole run took **{taken.elapsed_s / floor.seconds:.2f} times** that."""
    return f"""# Large shapes

`{command}`: hidden {shape.hidden}, inner {shape.ffn}, vocabulary {shape.vocab}, {shape.layers} blocks of random NF4 weights, merged to GPTQ by a fresh process on {os.cpu_count()} cores (load {taken.load_before:.1f}
before the start, n = 1). Curvatures are as narrow as they are in a model of {WHOLE} blocks.

Peak resident memory **{taken.peak_bytes / 1e9:.2f} GB**; {end}, after {taken.elapsed_s:.0f} s. {scaled}

{least}

{breakdown(taken)}

| s | GB at most since the line above | what it says |
|---|---|---|
{rows}

With more blocks the hidden states between them are added while gradients are taken, and the block before is held while the next one is solved (`--dry-run` counts both).
"""


def seconds_each(taken: Taken, word: str) -> float | None:
    """Between the lines that tell of a block, the first one's begin being the line before it."""
    at = [number for number, (_, _, text) in enumerate(taken.lines) if word in text]
    return (taken.lines[at[-1]][0] - taken.lines[at[0] - 1][0]) / len(at) if at else None


def breakdown(taken: Taken) -> str:
    if taken.parts is None:
        return "Where the time went is not known: the run did not end by itself."
    whole, wall = sum(taken.parts["thread_s"].values()), taken.parts["wall_s"]
    rows = "\n".join(f"| {part} | {spent:.0f} | {spent / whole:.0%} |" for part, spent in taken.parts["thread_s"].items())
    return f"""Where the threads were (`scripts/sampled.py`, five looks a second; {whole:.0f} s of threads in {wall:.0f} s, so {whole / wall:.2f} of {os.cpu_count()} cores were busy):

| part | s of threads | share |
|---|---|---|
{rows}"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, default=1)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--ffn", type=int, default=14336)
    parser.add_argument("--vocab", type=int, default=128256)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--limit", type=float, default=460, help="seconds after which the merge is ended")
    parser.add_argument("--made", type=Path, help="a folder with base and adapter of an earlier run")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--calibration", type=Path, default=DEMO / "calibration.jsonl")
    parser.add_argument("--page", type=Path)
    asked = parser.parse_args()
    shape = Shape(layers=asked.blocks, hidden=asked.hidden, ffn=asked.ffn, vocab=asked.vocab)
    with tempfile.TemporaryDirectory() as home:
        base, adapter = (asked.made / "base", asked.made / "adapter") if asked.made else make(Path(home), shape)
        words = ["merge", "--base", base, "--adapter", adapter, "--format", "gptq", "--calibration", asked.calibration, "--samples", asked.samples, "--tokens", asked.tokens, "--device", asked.device, "--out", f"{home}/out"]
        taken = watch(list(map(str, words)), asked.blocks / WHOLE, asked.limit, Path(home))
        floor = floor_of(list(map(str, words)))
    command = " ".join(["scripts/bench_8b.py", *sys.argv[1:]])
    text = page(shape, taken, command, floor)
    print(text)
    if asked.page:
        asked.page.write_text(text, encoding="utf-8")
        asked.page.with_suffix(".json").write_text(json.dumps({"command": command, "shape": asdict(shape), "taken": asdict(taken), "floor": asdict(floor)}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
