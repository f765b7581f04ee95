"""What does it cost that a run can be resumed?

    python scripts/bench_resume.py --base B --adapter A --calibration C [--rounds 3] [--format gptq] [--samples 128] [--tokens 256]

Runs the same merge with and without keeping anything for a resume, in turns in one process, and prints seconds and their ratio; and the share of the run that the journal says it took.
Then one run is killed behind each block, and the resume timed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from qmerge.pipeline.kept import Kept
from qmerge.pipeline.plan import plan
from qmerge.pipeline.recipe import Recipe
from qmerge.pipeline.resume import Resume
from qmerge.pipeline.run import run
from qmerge.store.journal import Journal


@contextlib.contextmanager
def nothing_kept() -> Iterator[None]:
    """Runs in here keep nothing."""
    names = {"commit": lambda self, number, *_: setattr(self, "count", number + 1), "save_streams": lambda *_: None, "shard": lambda *_: None, "keep_phase": lambda *_: None}
    before = {name: getattr(Kept, name) for name in names}
    for name, stub in names.items():
        setattr(Kept, name, stub)
    try:
        yield
    finally:
        for name, method in before.items():
            setattr(Kept, name, method)


class Spent:
    """Seconds that journals took, summed up over all of them."""

    def __init__(self) -> None:
        self.journals: list[Journal] = []
        inner, found = Journal.__init__, self.journals

        def begin(journal: Journal, folder: Path) -> None:
            inner(journal, folder)
            found.append(journal)

        Journal.__init__ = begin

    def take(self) -> float:
        total = sum(journal.seconds for journal in self.journals)
        self.journals.clear()
        return total


def timed(recipe: Recipe, **options: Any) -> float:
    shutil.rmtree(recipe.out, ignore_errors=True)
    began = time.perf_counter()
    run(plan(recipe), **options)
    return time.perf_counter() - began


def killed_behind(recipe: Recipe, block: int) -> None:
    """A run that ends when block ``block`` + 1 begins to be solved."""
    inner = Kept.solving

    def solving(self: Kept, number: int) -> None:
        if number == block:
            raise KeyboardInterrupt
        inner(self, number)

    Kept.solving = solving
    try:
        with contextlib.suppress(Exception):
            timed(recipe)
    finally:
        Kept.solving = inner


def main() -> None:
    options = argparse.ArgumentParser()
    for name in ("base", "adapter", "calibration"):
        options.add_argument(f"--{name}", required=True)
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--format", default="gptq")
    options.add_argument("--samples", type=int, default=128)
    options.add_argument("--tokens", type=int, default=256)
    asked = options.parse_args()
    root = Path(tempfile.mkdtemp(prefix="qmerge-bench-"))
    recipe = Recipe(base=asked.base, adapter=(asked.adapter,), calibration=asked.calibration, format=asked.format, samples=asked.samples, tokens=asked.tokens, device="cpu", out=str(root / "out"))
    spent, kept, bare, shares = Spent(), [], [], []
    timed(recipe)
    for number in range(asked.rounds):
        for keeps in ((True, False), (False, True))[number % 2]:
            spent.take()
            with contextlib.nullcontext() if keeps else nothing_kept():
                seconds = timed(recipe)
            (kept if keeps else bare).append(seconds)
            if keeps:
                shares.append(spent.take() / seconds)
    row = {"threads": torch.get_num_threads(), "kept_s": kept, "bare_s": bare, "ratio_of_medians": statistics.median(kept) / statistics.median(bare), "journal_share": shares, "resume_s": {}}
    shutil.rmtree(recipe.out)
    for block in range(1, len(plan(recipe).skeleton.blocks)):
        killed_behind(recipe, block)
        began = time.perf_counter()
        run(plan(recipe), resume=Resume(False))
        row["resume_s"][f"{block} blocks solved"] = time.perf_counter() - began
        shutil.rmtree(recipe.out)
    print(json.dumps(row, indent=2))
    shutil.rmtree(root)


if __name__ == "__main__":
    main()
