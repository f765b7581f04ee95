"""Do the arms answer benchmark items alike? A thin layer over lm-eval that pairs items; the benchmarks themselves are lm-eval's."""

from __future__ import annotations

import importlib.util
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from qmerge.errors import Refused, UsageProblem
from qmerge.quality.metrics import json_metric
from qmerge.quality.stats import cluster_mean, holm, mcnemar_exact, ratio_error, smallest_difference, wilson
from qmerge.types import Metric

KEYS = {"tasks": list, "include_path": str, "limit": (int, float), "num_fewshot": int, "batch_size": int}
CORRECTNESS = ("acc", "exact_match", "em", "acc_norm")
Answers = dict[str, dict[tuple[str, str], float]]
"""task -> (document id, document hash) -> 1.0 right, 0.0 wrong"""


@dataclass(frozen=True)
class Suite:
    """``content`` is what the file says, for the fingerprint; ``include_path`` is its folder of task definitions, resolved."""

    content: dict[str, Any]
    include_path: str | None


def load_suite(path: str | Path) -> Suite:
    """Read ``{tasks: [...], include_path, limit, num_fewshot, batch_size}``; ``include_path`` is relative to the file. All faults at once."""
    if importlib.util.find_spec("lm_eval") is None:
        raise UsageProblem("a suite of tasks needs lm-eval, which is not installed", fix="pip install 'qmerge[eval]'")
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageProblem("the suite cannot be read", where=Path(path).name, expected="a YAML file", found=str(error).splitlines()[0]) from error
    rows = content if isinstance(content, dict) else {}
    faults = [f"unknown key {k!r}" for k in rows if k not in KEYS]
    faults += [f"{k} has the wrong type: {v!r}" for k, v in rows.items() if k in KEYS and (not isinstance(v, KEYS[k]) or isinstance(v, bool))]
    tasks = rows.get("tasks")
    if not isinstance(tasks, list) or not tasks or not all(isinstance(t, str) for t in tasks):
        faults.append("`tasks` must be a list of names")
    if faults:
        raise UsageProblem("the suite is malformed", where=Path(path).name, expected=", ".join(KEYS), found="; ".join(faults))
    folder = (Path(path).parent / rows["include_path"]).resolve() if "include_path" in rows else None
    if folder is not None and not folder.is_dir():
        raise UsageProblem("the suite's include_path is no folder", where=Path(path).name, expected="a folder beside the suite", found=rows["include_path"])
    return Suite(dict(rows), str(folder) if folder else None)


def task_index(suite: Suite) -> Any:
    """lm-eval's index of all task definitions. It takes seconds to build, so one serves all arms."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=suite.include_path)


def run_suite(suite: Suite, manager: Any, model: torch.nn.Module, tokenizer: Any) -> Answers:
    """Per item right or wrong, through ``lm_eval.simple_evaluate`` with log-softmax in fp32; ``manager`` from ``task_index``."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    wanted = suite.content
    lm = HFLM(pretrained=model, tokenizer=tokenizer, softmax_dtype="float32", batch_size=wanted.get("batch_size", 8))
    try:
        found = lm_eval.simple_evaluate(
            model=lm, tasks=wanted["tasks"], task_manager=manager, num_fewshot=wanted.get("num_fewshot"),
            limit=wanted.get("limit"), log_samples=True, bootstrap_iters=0,
        )  # fmt: skip
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise Refused("lm-eval cannot run the suite", found=f"{type(error).__name__}: {error}", fix="check the names of the tasks and that their data can be loaded") from error
    return {task: _answers(task, rows) for task, rows in found["samples"].items()}


def task_rows(answers: dict[str, Answers], arms: dict[str, Any]) -> dict[str, Any]:
    """``tasks`` of the results (task -> n). Adds to each arm's row ``tasks``: per task the accuracy (Wilson) and, against ``separate``, the paired
    difference, flips, exact McNemar p (and Holm's over tasks), the smallest difference this n could have shown; and ``macro_accuracy_delta``."""
    reference = answers["separate"]
    for arm, found in answers.items():
        rows, deltas = {}, []
        for task, items in reference.items():
            theirs = found.get(task, {})
            if set(theirs) != set(items):
                raise Refused("the arms did not answer the same items", where=f"{arm}, {task}", expected=f"{len(items)} items", found=len(theirs))
            rows[task], delta = paired_row(np.array([items[k] for k in items]), np.array([theirs[k] for k in items]))
            deltas.append(delta)
        for row, p in zip(rows.values(), holm([row["mcnemar_p"] for row in rows.values()]), strict=True):
            row["holm_p"] = p
        arms[arm]["tasks"] = rows | {"macro_accuracy_delta": json_metric(macro_delta(deltas))}
    return {task: {"n": len(items)} for task, items in reference.items()}


def paired_row(reference: np.ndarray, candidate: np.ndarray) -> tuple[dict[str, Any], np.ndarray]:
    """One arm on one task from right/wrong arrays ``[items]``, and the per-item differences."""
    difference = candidate - reference
    lost, won = int((difference < 0).sum()), int((difference > 0).sum())
    return {
        "accuracy": json_metric(wilson(int(round(float(candidate.sum()))), len(candidate))),
        "delta": json_metric(cluster_mean(difference, np.arange(len(difference)), "share")),
        "flips": lost + won,
        "lost": lost,
        "won": won,
        "mcnemar_p": mcnemar_exact(lost, won),
        "smallest_detectable": smallest_difference(lost + won, len(difference)),
    }, difference


def macro_delta(differences: list[np.ndarray]) -> Metric:
    """Mean over tasks of the mean per-item difference; tasks are independent samples, so their variances add. Normal 95 % interval."""
    parts = [ratio_error(d, np.ones(len(d)), np.arange(len(d))) for d in differences]
    n = sum(len(d) for d in differences)
    if not parts or any(value is None or error is None for value, error, _ in parts):
        return Metric(None, None, None, n, "share", "a task has fewer than 2 items")
    value = sum(v for v, _, _ in parts) / len(parts)
    half = 1.959964 * math.sqrt(sum(e * e for _, e, _ in parts)) / len(parts)
    return Metric(value, value - half, value + half, n, "share")


def _answers(task: str, rows: list[dict[str, Any]]) -> dict[tuple[str, str], float]:
    key = next((k for k in CORRECTNESS if rows and k in rows[0]), None)
    if key is None:
        raise Refused("the task has no right or wrong per item", where=task, expected=" or ".join(CORRECTNESS), found="other metrics")
    first = rows[0].get("filter")
    return {(str(row["doc_id"]), str(row.get("doc_hash"))): float(row[key]) for row in rows if row.get("filter") == first}
