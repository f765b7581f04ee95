"""Where do the per-token numbers go, and how does a verdict come back from them without a model?"""

from __future__ import annotations

import json
import os
import struct
import tokenize
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from qmerge.errors import Refused
from qmerge.quality.measure import TokenScores
from qmerge.quality.metrics import text_row
from qmerge.quality.paired import task_rows
from qmerge.quality.samples import name_samples, read_samples, write_samples
from qmerge.quality.tasks import Answers

Scores = dict[str, dict[str, TokenScores]]
"""text -> arm -> scores; the arm ``served`` is the reference as its public loader runs it (the noise floor)"""
_UNREADABLE = (
    OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error, tokenize.TokenError, SyntaxError, TypeError, KeyError, IndexError, OverflowError, struct.error,
    MemoryError,  # an array that claims terabytes
    RuntimeError,  # an encrypted archive, a compression that is not built in, brackets without end
)
"""what numpy and zipfile raise on damaged and hostile archives"""
SHARED = ("nll_ref", "confidence", "window", "doc")
OWN = ("nll_cand", "kl", "agree", "delta_p")


def write_results(results: dict[str, Any], scores: Scores, path: str | Path, answers: dict[str, Answers] | None = None) -> None:
    """Write ``results.json`` at ``path``, the per-token arrays beside it as ``.npz`` and the items of benchmarks (arm -> answers) in
    ``.samples/``; each file appears whole or not at all, results.json last."""
    path = Path(path)
    arrays: dict[str, Any] = {}
    for text, arms in scores.items():
        for arm, row in arms.items():
            arrays |= {f"{text}/{arm}/{key}": getattr(row, key) for key in OWN}
            arrays[f"{text}/{arm}/vocabulary_cut"] = np.int64(row.vocabulary_cut)
            arrays |= {f"{text}/{arm}/js": row.js} if len(row.js) else {}
            arrays |= {f"{text}/{key}": getattr(row, key) for key in SHARED}
    beside = path.with_suffix(".npz")
    with open(beside.with_suffix(".npz.part"), "wb") as stream:
        np.savez_compressed(stream, **arrays)
    os.replace(beside.with_suffix(".npz.part"), beside)
    write_samples(answers or {}, path)
    part = path.with_suffix(".json.part")
    part.write_text(json.dumps(results, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(part, path)


def read_scores(path: str | Path) -> Scores:
    """The arrays of a sidecar. ``Refused`` where the file is not one."""
    try:
        with open(path, "rb") as stream, np.load(stream, allow_pickle=False) as stored:  # numpy leaves a file open that it opened and cannot read
            arrays = dict(stored)
    except _UNREADABLE as error:
        found = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise Refused("the per-token arrays cannot be read", where=str(path), expected="the .npz that was written beside results.json", found=found,
                      fix="put the one that belongs to these results there, or measure again with qmerge eval") from error
    scores: Scores = {}
    try:
        for key in arrays:
            parts = key.split("/")
            if len(parts) == 3 and parts[2] == "kl":
                text, arm = parts[0], parts[1]
                own = {k: arrays[f"{text}/{arm}/{k}"] for k in OWN} | {k: arrays[f"{text}/{k}"] for k in SHARED}
                if any(row.shape != own["kl"].shape or row.ndim != 1 for row in own.values()):
                    raise Refused("the per-token arrays have different lengths", where=Path(path).name, expected="one number per token", found=f"{text}/{arm}")
                if any(row.dtype.kind not in "biuf" for row in own.values()):
                    raise Refused("the per-token arrays do not hold numbers", where=Path(path).name, expected="real numbers", found=f"{text}/{arm}")
                scores.setdefault(text, {})[arm] = TokenScores(**own, vocabulary_cut=int(arrays[f"{text}/{arm}/vocabulary_cut"]), js=arrays.get(f"{text}/{arm}/js", np.zeros(0, np.float32)))
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise Refused("the per-token arrays are incomplete", where=Path(path).name, expected="results.npz as qmerge wrote it", found=str(error)) from error
    return scores


def text_rows(arms: dict[str, TokenScores]) -> dict[str, dict[str, Any]]:
    """Every arm's row for one text, from its scores alone: the evaluation and a later re-run use this one function."""
    floor = arms.get("served")
    return {name: text_row(scores, arms.get("base"), floor if name == "merged" else None) for name, scores in arms.items() if name != "served"}


def recompute(results: dict[str, Any], scores: Scores, answers: dict[str, Answers] | None = None, *, seed: int = 0) -> dict[str, Any]:
    """``results`` with every text metric computed anew from the sidecar's arrays, and every task metric from the items; the arguments are left as they are."""
    arms = {name: dict(arm) | {"texts": {}} for name, arm in results["arms"].items()}
    for text, rows in scores.items():
        for name, row in text_rows(rows).items():
            arms[name]["texts"][text] = row
    if not answers:
        return results | {"arms": arms}
    tasks = task_rows(answers, arms, seed=seed)
    name_samples(answers, arms)
    return results | {"arms": arms, "tasks": tasks}


def recompute_file(path: str | Path, results: dict[str, Any]) -> dict[str, Any]:
    """`recompute` of the ``results`` at ``path`` from the files beside it. ``Refused`` where one is missing or belongs to other results."""
    scores = read_scores(Path(path).with_suffix(".npz"))
    measured = {name for arm in results["arms"].values() for name in arm["texts"]}
    if set(scores) != measured or any(set(arms) - {"served"} != set(results["arms"]) for arms in scores.values()):
        raise Refused("the per-token arrays belong to other results", where=Path(path).with_suffix(".npz").name, expected=f"texts {', '.join(sorted(measured))}, and all arms", found=", ".join(sorted(scores)))
    for text, arms in scores.items():
        stated = results["fingerprint"].get("texts", {}).get(text, {}).get("scored_tokens")
        if other := next((f"{len(row.kl)} of {arm}" for arm, row in arms.items() if stated is not None and len(row.kl) != stated), None):
            raise Refused("the per-token arrays belong to other results", where=Path(path).with_suffix(".npz").name, expected=f"{stated} tokens on {text}", found=other)
    return recompute(results, scores, read_samples(path, results), seed=results.get("fingerprint", {}).get("seed", 0))
