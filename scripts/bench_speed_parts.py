"""What is timed against what? Each part gives rows of `bench_speed.ratio`; a part that cannot run here raises LookupError with the reason."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench_speed import ROOT, in_turn, ratio
from bench_speed_gpu import on_a_gpu

if TYPE_CHECKING:
    from bench_quality_cases import Case

DEMO = ROOT / "examples" / "demo"
Rows = list[dict[str, Any]]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}


def start_up(rounds: int) -> Rows:
    """`qmerge --help` against the interpreter that imports click and does nothing else. Files are in the page cache."""

    def call(*words: str) -> None:
        subprocess.run([sys.executable, *words], env=ENVIRONMENT, check=True, stdout=subprocess.DEVNULL)

    call("-m", "qmerge", "--help")
    found = in_turn(rounds, {"help": lambda: call("-m", "qmerge", "--help"), "click": lambda: call("-c", "import click")})
    return [ratio("start-up", "qmerge --help / python -c 'import click'", found["help"], found["click"])]


def dequantize(rounds: int) -> Rows:
    """Decoding NF4 to fp32 against bitsandbytes' own, and against filling as many bytes (the floor: it writes eight times what it reads), which lie ready: a 4096 x 4096 weight in one call, on all threads, into memory that
    the system gives anew each time; and 2^20 values on one thread, what a merge decodes at a time. In torch: as before numba is loaded, which small merges never do."""
    import torch

    def of(what: str, rows: int, columns: int, threads: int, calls: int) -> Rows:
        torch.set_num_threads(threads)
        found = in_turn(rounds, decoders(rows, columns, calls))
        labels = {"bitsandbytes": f"NF4 {what} decoded / by bitsandbytes", "fill": f"NF4 {what} decoded / writing its bytes", "torch": f"NF4 {what} decoded / in torch"}
        part = "dequantize" if calls == 1 else "dequantize-stretch"
        return [ratio(f"{part}/{other}", label, found["ours"], found[other]) for other, label in labels.items()]

    threads = torch.get_num_threads()
    try:
        return of("4096²", 4096, 4096, threads, 1) + of("2^20 on one thread", 256, 4096, 1, 20)
    finally:
        torch.set_num_threads(threads)


def decoders(rows: int, columns: int, calls: int) -> dict[str, Callable[[], float]]:
    """Seconds of ``calls`` decodings of one random weight, by who decodes; all give the same bits."""
    import bitsandbytes.functional as bnb
    import torch

    from qmerge.numerics import nf4

    weight = torch.randn(rows, columns) * 0.02
    packed, state = bnb.quantize_4bit(weight, quant_type="nf4", blocksize=64)
    table, flat, out = nf4.pair_table(state.code), packed.reshape(-1), torch.empty(weight.numel())

    def in_torch() -> torch.Tensor:
        found = nf4.room(flat.numel() * 2, flat.device)
        nf4.decode_in_torch(flat, state.absmax, table, 64, found)
        return found

    nf4.load_kernel()
    found = {"ours": lambda: nf4.decode(flat, state.absmax, table, 64, weight.numel()), "torch": in_torch, "bitsandbytes": lambda: bnb.dequantize_4bit(packed, state)}
    wanted = bnb.dequantize_4bit(packed, state)
    if not all(torch.equal(call().reshape(weight.shape), wanted) for call in found.values()):
        raise SystemExit("two of them decode to other values, so their times mean nothing")
    return {name: seconds_of(call, calls) for name, call in (found | {"fill": lambda: out.fill_(1.0)}).items()}


def merge(rounds: int) -> Rows:
    """`qmerge merge --format bf16` of one layer in the shape of Llama-3-8B (with its embeddings), against the read plus the copy of the same bytes."""
    from bench_merge import Workplace
    from bench_merge_process import size
    from synthetic_llama import Shape

    free = shutil.disk_usage(tempfile.gettempdir()).free
    if free < 20_000_000_000:
        raise LookupError(f"20 GB of disk are needed in the temporary folder, {free / 1e9:.0f} GB are free")
    work = Path(tempfile.mkdtemp(prefix="bench-speed-")).resolve()
    try:
        place = Workplace(work, None)
        place.make(Shape(layers=1))
        place.cold = place.can_drop()
        place.run("qmerge")  # a copy needs an output
        found = in_turn(rounds, {arm: (lambda arm=arm: place.run(arm)["wall_s"]) for arm in ("qmerge", "read", "copy")})
        floor = [a + b for a, b in zip(found["read"], found["copy"], strict=True)]
        return [ratio("merge/copy", f"bf16 merge to {size(place.folder('qmerge')) / 1e9:.1f} GB / reading the inputs and copying the output", found["qmerge"], floor, 1.3)]
    finally:
        shutil.rmtree(work)


def requantize(rounds: int) -> Rows:
    """`qmerge merge --format gptq` of the demo on 128 windows of 256 tokens, and the same with `--quick`, against gptqmodel's and llm-compressor's defaults on the same merged model and windows, fresh processes,
    imports not counted; and against the operations that they cannot do without, at this machine's own measured rate of matrix products."""
    from bench_quality_arms import OURS, PEERS
    from bench_quality_cases import CACHE, all_cases
    from bench_quality_make import Maker
    from bench_speed import say
    from torch import get_num_threads

    case = next(case for case in all_cases() if case.name == "demo")
    arms = {arm.name: arm for arm in (*OURS, *PEERS)}
    with Maker(CACHE / "speed", CACHE, get_num_threads(), "cpu", False, say) as maker:
        maker.prepare(case)

        def timed(name: str) -> float:
            row = maker.make(case, arms[name], again=True)
            if row["state"] != "made":
                raise LookupError(f"{name}: {row['reason']}")
            return row["seconds"]

        timed("ours-gptq-int4")  # compiled loops are cached, files are in the page cache
        names = {"whole": "ours-gptq-int4", "mixed": "ours-gptq-int4-mixed", "quick": "ours-gptq-int4-quick", "gptqmodel": "gptqmodel", "llm-compressor": "llmcompressor"}
        calls: dict[str, Callable[[], float | None]] = {arm: (lambda name=name: timed(name)) for arm, name in names.items()}
        try:
            timed("llmcompressor")
        except LookupError as lost:  # make bench-peers installs it
            say(f"skipped: {lost.args[0]}")
            del calls["llm-compressor"]
        found = in_turn(rounds, calls | {f"{way} floor": (lambda way=way: floor_seconds(case, way == "quick")) for way in ("whole", "mixed", "quick")})
    labels, rows = {"whole": "gptq int4 of the demo", "mixed": "the same, --compute mixed", "quick": "the same, --quick"}, []
    for way, label in labels.items():
        rows += [ratio(f"requantize/{way}/{peer}", f"{label} / by {peer}", found[way], found[peer], 0.5) for peer in ("gptqmodel", "llm-compressor") if peer in found]
        rows.append(ratio(f"requantize/{way}/floor", f"{label} / its FLOP at the rate of a 2048³ product", found[way], found[f"{way} floor"], 2.5))
    return rows


def floor_seconds(case: Case, quick: bool) -> float:
    """The operations of the method, each once (`qmerge.pipeline.floor`), at the rate of one large fp32 product."""
    import torch
    from bench_quality_cases import SAMPLES, WINDOW

    from qmerge.device import exact_products
    from qmerge.pipeline.floor import operations
    from qmerge.pipeline.plan import plan
    from qmerge.pipeline.recipe import QUICK_TOKENS, Recipe
    from qmerge.pipeline.workload import measure_plan

    quickly = {"quick": True, "curvature_tokens": QUICK_TOKENS} if quick else {}
    recipe = Recipe(base=str(case.base), adapter=(str(case.adapter),), out="out", calibration=str(case.calibration), samples=SAMPLES, tokens=WINDOW, device="cpu", **quickly)
    work = measure_plan(plan(recipe, writes=False), torch.device("cpu"))
    size = 2048
    one, two = torch.randn(size, size), torch.randn(size, size)
    with exact_products():
        torch.mm(one, two)
        rate = 2 * size**3 / min(seconds_of(lambda: torch.mm(one, two))() for _ in range(3))
    return operations(work).total / rate


def evaluate(rounds: int) -> Rows:
    """Separate and merged measured, divergence and all, against two plain forward passes that make logits and drop them: the demo, and a vocabulary of 32,000 on a small model."""
    from bench_eval import CASES, run

    return [row for case in CASES if case.name in ("demo", "32k") for row in run(case, rounds)[0]]


def seconds_of(call: Callable[[], Any], calls: int = 1) -> Callable[[], float]:
    """A call that says how long it took on average, without what is freed afterwards."""

    def timed() -> float:
        taken = 0.0
        for _ in range(calls):
            began = time.perf_counter()
            kept = call()
            taken += time.perf_counter() - began
            del kept
        return taken / calls

    return timed


PARTS: dict[str, tuple[Callable[[int], Rows], int]] = {"start-up": (start_up, 10), "dequantize": (dequantize, 10), "gpu": (on_a_gpu, 10), "evaluate": (evaluate, 5), "merge": (merge, 3), "requantize": (requantize, 3)}
"""name -> (part, rounds)"""
