"""How is one checkpoint of ours made, in a process of its own?

``bench_quality_ours.py`` imports everything once and then forks for each job that it reads (a JSON line on stdin), so that what is timed holds no imports and no
process knows what another did. Answers with a JSON line per job. A job is a ``recipe``, the step of the solver to switch (``without``), and files to write.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from dataclasses import fields
from pathlib import Path
from typing import Any

import bitsandbytes  # noqa: F401  imported here, where no clock runs
import numpy as np
import peft  # noqa: F401
import torch
from bench_quality_clock import Clock
from bench_quality_peers import warm
from transformers.utils import logging

import qmerge.numerics.kernels  # noqa: F401
from qmerge.errors import QmergeError
from qmerge.pipeline import requantize
from qmerge.pipeline.plan import plan
from qmerge.pipeline.recipe import build_recipe
from qmerge.pipeline.run import calibration_for, run
from qmerge.quality.arms import load_merged
from qmerge.quality.evaluate import load_tokenizer
from qmerge.room import one_heap
from qmerge.store.checkpoint import open_checkpoint


def main() -> None:
    logging.disable_progress_bar()
    for line in sys.stdin:
        job = json.loads(line)
        Path(job["done"]).unlink(missing_ok=True)
        child = os.fork()
        if child == 0:
            in_child(job)
        _, status, _ = os.wait4(child, 0)
        done = Path(job["done"])
        row = (
            json.loads(done.read_text(encoding="utf-8"))
            if done.is_file()
            else {"state": "failed", "reason": f"the process ended with {os.waitstatus_to_exitcode(status)}"}
        )
        print(json.dumps(row), flush=True)


def in_child(job: dict[str, Any]) -> None:
    """Never returns. What is printed goes to the job's log: stdout is the answers' place."""
    with open(job["log"], "wb") as stream:
        for number in (1, 2):
            os.dup2(stream.fileno(), number)
    torch.set_num_threads(job["threads"])
    try:
        row = {"state": "made"} | (prepare if job["kind"] == "prepare" else make)(job)
    except QmergeError as problem:
        row = {"state": "refused", "reason": " ".join(str(problem).split())}
    except Exception as problem:  # a bug in one arm must not hide the others; it is shown, and the bench fails at its end
        traceback.print_exc()
        row = {"state": "failed", "reason": f"{type(problem).__name__}: {' '.join(str(problem).split())[:300]}"}
    Path(job["done"]).write_text(json.dumps(row), encoding="utf-8")
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(0)


def make(job: dict[str, Any]) -> dict[str, Any]:
    """The cost of plan and run, in a heap as `qmerge merge` sets it up. Texts are read outside: the peers get token ids too."""
    one_heap()
    recipe = build_recipe(None, (), job["recipe"])
    warm(recipe.base)
    clock = Clock()
    found = plan(recipe)
    began = time.perf_counter()
    calibration = calibration_for(found)
    clock.without(time.perf_counter() - began)
    options = {"steps": switched(job["without"])} if job["without"] else {}
    run(found, calibration=calibration, **options)
    return clock.cost() | {"recipe": recipe.to_json()}


def prepare(job: dict[str, Any]) -> dict[str, Any]:
    """What every other process starts from: the windows, the texts that they were drawn from, the merged model in fp32."""
    recipe, out = build_recipe(None, (), job["recipe"]), Path(job["out"])
    found = plan(recipe)
    calibration = calibration_for(found)
    np.save(out / "windows.npy", torch.cat([calibration.train, calibration.held_out]).numpy())
    (out / "calibration.json").write_text(json.dumps([document.text for document in calibration.documents]), encoding="utf-8")
    # The loader's conversions (to NF4) must not be undone on the way to disk.
    load_merged(recipe.base, recipe.adapter[0]).model.save_pretrained(out / "merged", save_original_format=False)
    load_tokenizer(recipe.base, recipe.adapter[0]).save_pretrained(out / "merged")
    weights = int(sum(np.prod(found.base.shape(name)) for name in found.requantized))
    return {"calibration": calibration.facts, "linears": list(found.requantized), "weights": weights}


def switched(step: str) -> requantize.Steps:
    """All as usual but one step, which is off, or on where it usually is not."""
    return requantize.Steps(**{step: not getattr(requantize.Steps(), step)})


def steps() -> list[str]:
    """The switches of the solver."""
    return [field.name for field in fields(requantize.Steps)]


def stored_bits(folder: Path, linears: list[str], weights: int) -> float:
    """Bits per weight of ``linears``: all tensors that a file holds for them but their biases."""
    modules, specs = tuple(name.removesuffix("weight") for name in linears), open_checkpoint(folder).specs
    return 8 * sum(spec.nbytes for name, spec in specs.items() if name.startswith(modules) and not name.endswith(".bias")) / weights


if __name__ == "__main__":
    main()
