"""How much quicker are fp32 products by oneDNN than by MKL on this processor, and are they fp32? (`qmerge.device.exact_products`)

    python scripts/bench_products.py --page docs/measurements/products.md      (a minute)

Shapes of the demo, of a model of some billions of parameters, and a square one; one thread, as each of a run's threads multiplies. The libraries take turns.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from bench_speed import about, in_turn
from bench_speed_parts import seconds_of

from qmerge.device import exact_products

SHAPES = ((2048, 2048, 2048), (4096, 256, 768), (4096, 768, 256), (1024, 4096, 4096), (128, 768, 768), (512, 4096, 512))
"""rows, what is summed over, columns"""


def row(shape: tuple[int, int, int], rounds: int) -> dict[str, Any]:
    rows, inner, columns = shape
    left, right = torch.randn(rows, inner), torch.randn(inner, columns)
    wanted = left.double() @ right.double()
    times = max(1, round(2e9 / (rows * inner * columns)))

    def multiply() -> torch.Tensor:
        for _ in range(times):
            found = left @ right
        return found

    def quick() -> float:
        with exact_products():
            return seconds_of(multiply)()

    found = in_turn(rounds, {"mkl": seconds_of(multiply), "here": quick})
    with exact_products():
        error = {"here": multiply()}
    error["mkl"] = multiply()
    size = float(wanted.abs().max())
    rate = {arm: 2 * rows * inner * columns * times / statistics.median(taken) / 1e9 for arm, taken in found.items()}
    ratios = sorted(a / b for a, b in zip(found["mkl"], found["here"], strict=True))
    return {"shape": list(shape), "gflops": rate, "error": {arm: float((its.double() - wanted).abs().max()) / size for arm, its in error.items()}, "times_quicker": [ratios[0], statistics.median(ratios), ratios[-1]], "n": rounds}


def page(found: dict[str, Any], command: str) -> str:
    rows = ["| rows × inner × columns | MKL, GFLOP/s | as qmerge takes them | times quicker (least to most) | largest error / largest element: MKL | as qmerge takes them |", "| --- | --- | --- | --- | --- | --- |"]
    for one in found["rows"]:
        low, middle, high = one["times_quicker"]
        rows.append(f"| {' × '.join(map(str, one['shape']))} | {one['gflops']['mkl']:.0f} | {one['gflops']['here']:.0f} | {middle:.2f} ({low:.2f} to {high:.2f}) | {one['error']['mkl']:.1e} | {one['error']['here']:.1e} |")
    machine = found["machine"]
    return "\n".join([
        "# fp32 products on AMD's processors", "",
        f"Written by `{command}`. Machine: {machine['cpu']}; torch {found['versions']['torch']}; one thread; n = {found['rows'][0]['n']} each, in turns.", "",
        "torch multiplies fp32 matrices by MKL, whose kernels for AMD use 256 of the 512 bits of a vector register. oneDNN, which torch brings too, uses them all; torch hands fp32 products to it only where it is allowed to",
        "take them in bf16, which oneDNN does with AMX only. `qmerge.device.exact_products` allows it on AMD's processors with AVX-512, tries out that the products stay fp32, and puts the setting back. bf16 would show as an",
        "error of some 1e-03 here, TF32 of 1e-04.", "", *rows, "",
    ])  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--page", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    found = about(argparse.Namespace(part=None, rounds=None)) | {"command": f"python scripts/bench_products.py --page docs/measurements/products.md --rounds {args.rounds}"}
    found["rows"] = [row(shape, args.rounds) for shape in SHAPES]
    text = page(found, found["command"])
    print(text)
    if args.page:
        args.page.write_text(text, encoding="utf-8")
        args.page.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
