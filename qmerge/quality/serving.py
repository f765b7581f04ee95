"""What does it cost to serve base + adapter, the float merge, and each candidate?

Every arm is measured by `serving_process.py` in fresh interpreters, one at a time; an arm that crashes, hangs or cannot be loaded here gets a note and takes nothing with it.
Rounds go over all arms, each in another random order, so that a slow minute of the machine does not fall on one arm alone.
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qmerge.adapters.choices import AdapterSet
from qmerge.device import device_name
from qmerge.errors import QmergeError, Refused, UsageProblem
from qmerge.extras import need_loader
from qmerge.quality.arms import full_recipe, load_merged, weight_bytes
from qmerge.quality.attach import as_set, check_separate
from qmerge.quality.evaluate import recipe_of
from qmerge.quality.fingerprint import versions
from qmerge.quality.loaders import quantization_method
from qmerge.quality.metrics import json_metric
from qmerge.quality.stats import cluster_mean
from qmerge.quality.words import public
from qmerge.store.checkpoint import INDEX
from qmerge.store.foreign import check_model_folder
from qmerge.store.jsonfiles import read_object
from qmerge.types import Metric

START = "import sys, time; began = time.perf_counter(); sys.path[0] = sys.argv[1]; from qmerge.quality.serving_process import main; main(began)"
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Load:
    """What is asked of every arm: prompts of ``prompt_tokens`` at each of ``batches``, ``new_tokens`` decoded after each; ``repeats`` timings in each of ``rounds`` processes."""

    batches: tuple[int, ...] = (1, 8, 32)
    prompt_tokens: int = 128
    new_tokens: int = 32
    repeats: int = 3
    rounds: int = 3
    timeout_s: float = 3600
    seed: int = 0


@dataclass(frozen=True)
class _Arm:
    name: str
    path: str
    method: str
    nbytes: int | None
    adapter: AdapterSet | None = None
    nf4_recipe: dict[str, Any] | None = None


def check_load(load: Load, folders: Mapping[str, str]) -> None:
    """Raise UsageProblem for numbers that make no sense, for prompts that do not fit the context of one of ``folders``, and where its loader is not installed; reads configs alone."""
    if not load.batches or len(set(load.batches)) < len(load.batches) or min(load.batches) < 1:
        raise UsageProblem("the batch sizes are malformed", where="--batches", expected="different whole numbers from 1 on, as in 1,8,32", found=",".join(map(str, load.batches)) or "none")
    for flag, value in (("--prompt-tokens", load.prompt_tokens), ("--new-tokens", load.new_tokens), ("--repeats", load.repeats), ("--rounds", load.rounds), ("--timeout", load.timeout_s)):
        if not 1 <= value < 1e9:  # NaN is neither
            raise UsageProblem(f"{flag} must be at least 1", where=flag, expected="1 or more, below a billion", found=f"{value:g}")
    for name, folder in folders.items():
        need_loader(quantization_method(folder))  # which refuses what is no checkpoint
        if weight_bytes(folder) or (Path(folder) / INDEX).exists():  # without any weights no library opens it, and it gets a note
            check_model_folder(folder)
        config = read_object(Path(folder) / "config.json", what="the model's config")
        inner = config.get("text_config")
        text = inner if isinstance(inner, dict) else config
        longest = next((text[key] for key in ("max_position_embeddings", "n_positions") if isinstance(text.get(key), int)), None)
        if longest is not None and load.prompt_tokens + load.new_tokens > longest:
            raise UsageProblem("prompt and new tokens do not fit the model's context", where=name, expected=f"--prompt-tokens plus --new-tokens up to {longest}", found=load.prompt_tokens + load.new_tokens)


def measure_serving(
    base: str, adapter: str | AdapterSet, candidates: Mapping[str, str], load: Load, *, device: str = "cpu", merged: str | None = None, with_merged: bool = True,
    on: str = "dequantized", nf4_recipe: dict[str, Any] | None = None, progress: Progress | None = None,
) -> dict[str, Any]:
    """The ``serving`` section of results.json. ``candidates``: name -> folder. ``merged``: a float checkpoint of the merge; without it one is written to a temporary folder, unless not ``with_merged``.

    Raises what `check_load` and `check_separate` do, before anything is measured; afterwards an arm that fails is a row with a ``note``.
    """
    if not candidates:
        raise UsageProblem("there is no candidate to measure", expected="at least one --candidate", found="none")
    check_load(load, {Path(base).name: base, **candidates, **({"merged": merged} if merged else {})})
    adapter = as_set(adapter)
    opened = check_separate(adapter)
    recipe = recipe_of(base, opened, on, nf4_recipe)
    float_base = quantization_method(base) == "none" and on != "original"
    size = weight_bytes(base)
    arms = [_Arm("separate", base, "bitsandbytes" if float_base else quantization_method(base), None if size is None else size + sum(one.weight_bytes for one in opened), adapter, full_recipe(recipe) if float_base else None)]
    before = os.getloadavg()[0]
    with _merged(base, adapter, merged, with_merged, {"on": on, "nf4_recipe": recipe}) as (folder, failed):
        arms += [_Arm("merged", folder, quantization_method(folder), weight_bytes(folder))] if folder else []
        arms += [_Arm(name, path, quantization_method(path), weight_bytes(path)) for name, path in candidates.items()]
        answers = _rounds(arms, load, device, progress or (lambda text: None))
    rows = {arm.name: _row(arm, answers[arm.name], load) for arm in arms}
    if failed:
        rows["merged"] = {"hot_swap": False, "note": failed}
    good = [answer for given in answers.values() for answer in given if "error" not in answer]
    return {
        "device": device_name(torch.device(device)), "threads": next((answer["threads"] for answer in good), None), "rows": rows,
        "settings": dataclasses.asdict(load) | {"batches": list(load.batches)} | _words(load, good),
        "versions": versions(), "load_average": {"before": round(before, 2), "after": round(os.getloadavg()[0], 2)},
    }  # fmt: skip


def _words(load: Load, good: list[dict[str, Any]]) -> dict[str, str]:
    """How it was measured, for people."""
    return {
        "order": f"rounds over all arms, each in another random order (seed {load.seed}); every arm in a process of its own each time",
        "load": "the loader's call in a fresh process, weights in the page cache; importing torch, transformers and what the loader needs comes before it, and is import_s",
        "decoding": "own loop over model(…, past_key_values=…), greedy, never stopped early; random token ids as prompt; one untimed run of each batch size first",
        "interval": "mean and 95 % t interval, clustered by process" if load.rounds > 1 else "mean and 95 % t interval over the repeats of one process",
        "memory": (good[0]["memory"] if good else "not measured") + "; peak while loading, and the highest of all batches in prefill and in decoding",
    }


@contextmanager
def _merged(base: str, adapter: AdapterSet, given: str | None, wanted: bool, how: dict[str, Any]) -> Iterator[tuple[str | None, str | None]]:
    """``(folder, None)`` of a bf16 checkpoint of the merge, or ``(None, why not)``."""
    if given or not wanted:
        yield given, None
        return
    with tempfile.TemporaryDirectory() as folder:
        try:
            model = load_merged(base, adapter, **how).model.to(torch.bfloat16)
            model.save_pretrained(folder, save_original_format=False)
        except QmergeError as problem:
            failed: tuple[str | None, str | None] = None, f"no float merge to measure: {problem.what}"
        else:
            failed = folder, None
            del model
        yield failed


def _rounds(arms: list[_Arm], load: Load, device: str, progress: Progress) -> dict[str, list[dict[str, Any]]]:
    """Answers per arm, in order of time. An arm that never answered is not asked again."""
    dice = random.Random(load.seed)
    answers: dict[str, list[dict[str, Any]]] = {arm.name: [] for arm in arms}
    for number in range(load.rounds):
        for arm in dice.sample(arms, len(arms)):
            if number and all("error" in answer for answer in answers[arm.name]):
                continue
            answer = {"error": "there are no weights in its folder"} if arm.nbytes == 0 else ask(_job(arm, load, device), load.timeout_s)
            answers[arm.name].append(answer)
            progress(f"{arm.name}, round {number + 1} of {load.rounds}" + (f": {answer['error']}" if "error" in answer else ""))
    return answers


def _job(arm: _Arm, load: Load, device: str) -> dict[str, Any]:
    adapter = None if arm.adapter is None else dataclasses.asdict(arm.adapter)
    return {"path": arm.path, "method": arm.method, "adapter": adapter, "nf4_recipe": arm.nf4_recipe, "device": device} | dataclasses.asdict(load)


def ask(job: dict[str, Any], timeout_s: float) -> dict[str, Any]:
    """The answer of a measuring process (see `serving_process.measure`), or ``{"error": …}`` with its last words. The process is gone when this returns."""
    child = subprocess.Popen([sys.executable, "-c", START, str(Path(__file__).parents[2])], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8", errors="replace")
    try:
        out, talk = child.communicate(json.dumps(job), timeout=timeout_s)
    except subprocess.TimeoutExpired:
        return {"error": f"it was stopped after {timeout_s:g} s"}
    finally:
        if child.poll() is None:
            child.kill()
            child.communicate()
    try:
        answer: dict[str, Any] = json.loads(out)
    except ValueError:
        answer = {"error": _ending(child.returncode, talk)}
    return answer | ({"error": public(answer["error"])} if "error" in answer else {})


def _ending(code: int, talk: str) -> str:
    how = f"its process was killed by {signal.Signals(-code).name}" + (" (out of memory, perhaps)" if code == -signal.SIGKILL else "") if code < 0 else f"its process ended with code {code}"
    last = next((line.strip() for line in reversed(talk.splitlines()) if line.strip()), "")
    return f"{how}; its last words: {last[-300:]}" if last else f"{how}, without a word"


def _row(arm: _Arm, answers: list[dict[str, Any]], load: Load) -> dict[str, Any]:
    """One arm: what its processes measured, and in ``note`` what they could not."""
    row: dict[str, Any] = {"bytes": arm.nbytes, "hot_swap": arm.adapter is not None}
    good = [answer for answer in answers if "error" not in answer]
    notes = [f"{len(answers) - len(good)} of {len(answers)} processes failed: {next(answer['error'] for answer in answers if 'error' in answer)}"] if good and len(good) < len(answers) else []
    if not good:
        return row | {"note": f"not measured: {answers[0]['error']}"}
    row |= {key: _metric([[answer[key]] for answer in good], "s") for key in ("import_s", "load_s")}
    row |= {key: max(answer[key] for answer in good) for key in ("process_bytes", "peak_load_bytes")}
    rates: dict[str, dict[str, Any]] = {"prefill": {}, "decode": {}}
    for size in map(str, load.batches):
        ran = [answer["batches"][size] for answer in good]
        if problem := next((batch["error"] for batch in ran if "error" in batch), None):
            notes.append(f"batch {size} did not run: {public(problem)}")
            continue
        for phase, tokens in (("prefill", load.prompt_tokens), ("decode", load.new_tokens)):
            rates[phase][size] = _metric([[int(size) * tokens / seconds for seconds in batch[f"{phase}_s"]] for batch in ran], "tokens/s")
            row[f"peak_{phase}_bytes"] = max(row.get(f"peak_{phase}_bytes", 0), *(batch[f"peak_{phase}_bytes"] for batch in ran))
        if size == "1":
            row["time_to_first_token_s"] = _metric([batch["prefill_s"] for batch in ran], "s")
    row |= {"prefill_tokens_per_s": rates["prefill"], "decode_tokens_per_s": rates["decode"], "packages": good[0]["packages"]}
    kernels = list(dict.fromkeys(answer["kernel"] for answer in good))
    row["kernel"] = "; in another process ".join(kernels)
    notes += [f"loaded with {public(good[0]['loader'])}"] if good[0]["loader"] else []
    return row | ({"note": "; ".join(notes)} if notes else {})


def _metric(processes: list[list[float]], unit: str) -> dict[str, Any]:
    """Mean over all timings; the interval is clustered by process where there are several, as timings of one process have more in common."""
    values = np.array([value for process in processes for value in process])
    clusters = np.repeat(np.arange(len(processes)), [len(process) for process in processes]) if len(processes) > 1 else np.arange(len(values))
    found = cluster_mean(values, clusters, unit)
    note = "one measurement: no interval" if found.ci_low is None else None
    low = None if found.ci_low is None else max(0.0, found.ci_low)
    return json_metric(Metric(found.value, low, found.ci_high, len(values), unit, note))


def check_known(results: dict[str, Any], names: Mapping[str, str]) -> None:
    """Refused where results know none of the candidates: then they are another model's."""
    if not set(names) & set(results.get("arms", {})):
        raise Refused("these results are of other candidates", where="--into", expected=f"an arm named {' or '.join(names)}", found=", ".join(results.get("arms", {})) or "no arms", fix="--out FILE writes a file of its own")
