"""How much quicker do several ranks evaluate than one, each with one core, and in which parts?

    python scripts/bench_eval_ranks.py --base B --adapter A --candidate D --text T [--tokens 256] [--generate 0] [--ranks 1,2] [--rounds 3] [--hosts] [--json FILE] [--page docs/measurements/eval-ranks.md]

Each rank is a process of its own on a core of its own, with one thread; importing is not counted. The numbers of ranks take turns. Results and per-token arrays are compared, and must be equal.
``--hosts``: each rank in a network namespace of its own (root, iproute2).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from bench_ranks_runs import SECONDS, command, measured, one_run, table, unmeasured

SPLIT = {"read": "not split: every rank tokenizes all text", "load": "not split: each rank loads each arm that it measures", "measure": "by batches of 1024 tokens", "linears": "by linear", "perplexity": "by batches",
         "continuations": "by batches of 16 prompts", "statistics": "not split: rank 0 alone", "write": "not split: rank 0 alone", "wait and send": "for the other ranks, and what is sent"}  # fmt: skip
"""part -> how it is shared"""


def found_digest(results: Path) -> str:
    """Of results.json but for its times, and of the arrays beside it."""
    import numpy as np

    content = {key: value for key, value in json.loads(results.read_text()).items() if key not in ("elapsed_s", "measured_at")}
    digest = hashlib.sha256(json.dumps(content).encode())
    with np.load(results.with_suffix(".npz")) as arrays:
        for name in arrays.files:
            digest.update(name.encode() + arrays[name].tobytes())
    return digest.hexdigest()


def timed(sizes: list[int], rounds: int, wish: dict[str, Any], apart: bool) -> list[dict[str, Any]]:
    def words(place: Path) -> list[str]:
        return [__file__, "--work", json.dumps(wish | {"out": str(place / "results.json")})]

    return measured(sizes, rounds, lambda size: one_run(size, words, lambda place: found_digest(place / "results.json"), apart), SPLIT)


def page(asked: str, rows: list[dict[str, Any]], rounds: int, apart: bool) -> str:
    """For people."""
    lines = ["# Several ranks evaluate, against one", "", "Written by `scripts/bench_eval_ranks.py`; each rank has one core and one thread, and results and per-token arrays are equal.", "", f"    {asked}", "",
             f"Seconds of the rank that took most in a part, medians over {rounds} round(s); {SECONDS}", ""]  # fmt: skip
    return "\n".join([*lines, *table(rows, SPLIT, SPLIT), unmeasured(apart, ", benchmarks"), ""])


def work(wish: dict[str, Any]) -> None:
    """One rank: prints its seconds by part as one line of JSON."""
    import torch
    from bench_ranks_worker import Clock

    from qmerge.adapters.choices import AdapterSet
    from qmerge.api import measuring
    from qmerge.launch import launched
    from qmerge.quality import arms, evaluate, generation, perplexity, running, sidecar
    from qmerge.quality.compare import load_budget
    from qmerge.ranks import Ranks, together

    torch.set_num_threads(1)
    clock = Clock()
    clock.seconds, clock.cpu = dict.fromkeys(SPLIT, 0.0), dict.fromkeys(SPLIT, 0.0)
    for owner, names, part in ((evaluate, ("_read_texts",), "read"), (arms, ("load_separate", "load_base", "load_merged", "load_rtn", "load_candidate"), "load"), (running, ("as_served",), "load"),
                               (running, ("measure_share",), "measure"), (running, ("linear_rows",), "linears"), (perplexity, ("window_losses",), "perplexity"), (generation, ("continuations",), "continuations"),
                               (running, ("text_rows", "text_metrics"), "statistics"), (generation, ("divergence",), "statistics"), (sidecar, ("write_results",), "write"), (Ranks, ("_wait",), "wait and send")):  # fmt: skip
        for name in names:
            clock.watch(owner, name, part)
    with together(launched(os.environ), "cpu") as ranks:
        ranks.barrier()
        began, before = time.perf_counter(), time.process_time()
        measuring.measure(Path(wish["out"]), wish["candidates"], measuring.named_texts(wish["texts"]), base=wish["base"], adapter=AdapterSet.of(*wish["adapters"]), tokens=wish["tokens"], template=None, also=(), original=None,
                          on="dequantized", nf4_recipe=None, suite=None, tasks=None, allow_task_code=False, limits=load_budget("default"), device="cpu", count=lambda *_: None, ranks=ranks,
                          perplexity=wish["perplexity"], generate=wish["generate"], new_tokens=wish["new_tokens"])  # fmt: skip
        took = time.perf_counter() - began
        print(json.dumps({"rank": ranks.rank, "elapsed_s": took, "cpu_s": time.process_time() - before, "parts_s": clock.seconds, "cpu_parts_s": clock.cpu}), flush=True)


def main() -> None:
    if sys.argv[1:2] == ["--work"]:
        work(json.loads(sys.argv[2]))
        return
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--base", required=True)
    for name in ("adapter", "candidate", "text"):
        words.add_argument(f"--{name}", required=True, action="append")
    words.add_argument("--perplexity", action="append", default=[])
    for name, usual in (("tokens", 256), ("generate", 0), ("new-tokens", 64), ("rounds", 3)):
        words.add_argument(f"--{name}", type=int, default=usual)
    words.add_argument("--ranks", default="1,2")
    words.add_argument("--hosts", action="store_true")
    words.add_argument("--json")
    words.add_argument("--page")
    asked = words.parse_args()
    wish = {"base": asked.base, "adapters": asked.adapter, "candidates": asked.candidate, "texts": asked.text, "tokens": asked.tokens, "perplexity": asked.perplexity, "generate": asked.generate, "new_tokens": asked.new_tokens}
    rows = timed([int(size) for size in asked.ranks.split(",")], asked.rounds, wish, asked.hosts)
    if asked.json:
        Path(asked.json).write_text(json.dumps(rows, indent=1) + "\n")
    told = page(command(), rows, asked.rounds, asked.hosts)
    if asked.page:
        Path(asked.page).write_text(told)
    print(told)


if __name__ == "__main__":
    main()
