"""What does it cost and save to take calibration text's products in bf16? (`--compute fp32|mixed|bf16`)

    python scripts/bench_compute.py --page docs/measurements/compute.md      [--seeds 0,1,2]; minutes

The demo, made each way with several seeds and measured on its evaluation text, all files of a seed at once; then rates and rounding of products. Merges take turns, each a fresh process; seconds
are the command's own, without imports. Left out: accelerators, larger models.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from bench_speed import about

from qmerge.device import exact_products
from qmerge.numerics.products import add_product

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "examples" / "demo"
WAYS = ("fp32", "mixed", "bf16")
INPUTS = ("--base", str(DEMO / "base-nf4"), "--adapter", str(DEMO / "adapter"))
TEXTS = {"prose": DEMO / "eval-prose.jsonl", "code": DEMO / "eval-code.jsonl"}


def command(*words: str) -> str:
    """Runs ``qmerge`` and returns what it said."""
    return subprocess.run([sys.executable, "-m", "qmerge", *words], cwd=ROOT, check=True, capture_output=True, text=True).stderr


def merged(out: Path, way: str, seed: int) -> float:
    """Seconds of one merge."""
    told = command("merge", *INPUTS, "--calibration", str(DEMO / "calibration.jsonl"), "--generic", str(DEMO / "generic.jsonl"), "--tokens", "256", "--compute", way, "--seed", str(seed), "--out", str(out), "--overwrite", "--json")
    steps = [float(found) for found in re.findall(r"^ +([0-9.]+) s  ", told, re.MULTILINE)]
    return steps[-1]


def losses(folder: Path, seed: int) -> dict[str, dict[str, dict[str, float]]]:
    """Text -> way -> the KL metric of that file."""
    candidates = [word for way in WAYS for word in ("--candidate", str(folder / f"{way}-{seed}"))]
    texts = [word for name, file in TEXTS.items() for word in ("--text", f"{name}={file}")]
    command("eval", *INPUTS, *candidates, *texts, "--out", str(folder / f"{seed}.json"))
    arms = json.loads((folder / f"{seed}.json").read_text())["arms"]
    return {text: {way: arms[f"{way}-{seed}"]["texts"][text]["metrics"]["kl_mean"] for way in WAYS} for text in TEXTS}


def rate(dtype: torch.dtype, size: int = 2048) -> float:
    """Operations per second of a square product on all threads, the best of five."""
    left, right = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
    taken = []
    with exact_products():
        for _ in range(5):
            began = time.perf_counter()
            torch.nn.functional.linear(left, right)
            taken.append(time.perf_counter() - began)
    return 2 * size**3 / min(taken)


def rounding() -> dict[str, float]:
    """Median relative error of an element of ``xᵀx``, 4096 tokens of 1024 features, against fp64 on the same factors."""
    x = torch.randn(4096, 1024, generator=torch.Generator().manual_seed(0)).bfloat16()
    wanted, found = x.double().T @ x.double(), {}
    for name, given, exact in (("one bf16 product", x, False), ("a pair of them", x, True), ("fp32", x.float(), True)):
        total = torch.zeros(1024, 1024)
        add_product(total, given.T, given, exact)
        found[name] = float(((total.double() - wanted).abs() / wanted.abs()).median())
    return found


def page(found: dict[str, Any]) -> str:
    rows = ["| seed | text | fp32: KL in nats/token (95 %) | mixed | bf16 | mixed / fp32 | bf16 / fp32 |", "| --- | --- | --- | --- | --- | --- | --- |"]
    for seed, texts in found["losses"].items():
        for text, ways in texts.items():
            cells = [f"{ways[way]['value']:.3g} ({ways[way]['ci_low']:.3g} to {ways[way]['ci_high']:.3g})" for way in WAYS]
            rows.append(f"| {seed} | {text} | " + " | ".join(cells) + "".join(f" | {ways[way]['value'] / ways['fp32']['value']:.3f}" for way in WAYS[1:]) + " |")
    seconds = ", ".join(f"{way} {statistics.median(taken):.1f} ({min(taken):.1f} to {max(taken):.1f})" for way, taken in found["seconds"].items())
    errors = ", ".join(f"{name} {value:.1e}" for name, value in found["rounding"].items())
    machine = found["machine"]
    return "\n".join([
        "# In what calibration text is multiplied", "",
        f"Written by `python scripts/bench_compute.py {' '.join(found['arguments'])}`. Machine: {machine['cpu']}, {machine['cores']} cores; torch {found['versions']['torch']}.", "",
        "`--compute fp32` takes every product in fp32. `mixed` takes statistics (`E[x xᵀ]` and the like) and gradients from bf16 factors and sums them in fp32; `bf16` passes the text through both models in",
        "bf16 too. The solver answers the difference of two streams, and streams that are rounded apart differ by their rounding too. On accelerators (where nothing of this was measured), and where the processor says that it has",
        "AMX, or AMD's AVX512-BF16, `auto` is `bf16` for whole numbers of up to 4 bits and `mixed` for finer outputs; else `fp32`.", "",
        "The demo to GPTQ int4, `--tokens 256`; KL to base + adapter, intervals over documents:", "", *rows, "",
        f"Seconds of the merge, median (least to most), n = {len(next(iter(found['seconds'].values())))} each: {seconds}.", "",
        f"A product of 2048³ on all threads: {found['rates']['fp32'] / 1e9:.0f} GFLOP/s in fp32, {found['rates']['bf16'] / 1e9:.0f} in bf16. Median relative error of an element of a sum of 4096 products: {errors}.",
        "H is summed by pairs (`qmerge.numerics.products`), differences and curvatures by single products.", "",
    ])  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--page", type=Path)
    args = parser.parse_args()
    seeds = [int(seed) for seed in args.seeds.split(",")]
    found: dict[str, Any] = about(argparse.Namespace(part=None, rounds=None)) | {"arguments": [f"--seeds {args.seeds}"], "seconds": {way: [] for way in WAYS}, "losses": {}}
    del found["command"], found["schema"]
    with tempfile.TemporaryDirectory() as folder:
        for number, seed in enumerate(seeds):
            for way in WAYS if number % 2 == 0 else WAYS[::-1]:
                found["seconds"][way].append(merged(Path(folder) / f"{way}-{seed}", way, seed))
                print(f"seed {seed}, {way}: {found['seconds'][way][-1]:.1f} s", file=sys.stderr, flush=True)
            found["losses"][str(seed)] = losses(Path(folder), seed)
    found |= {"rates": {"fp32": rate(torch.float32), "bf16": rate(torch.bfloat16)}, "rounding": rounding()}
    print(page(found))
    if args.page:
        args.page.write_text(page(found), encoding="utf-8")
        args.page.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
