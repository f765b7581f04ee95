"""Where are the answers to benchmark items kept, so that anyone can count again? One JSONL per arm and task beside results.json."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

from qmerge.errors import Refused
from qmerge.quality.paired import margin
from qmerge.quality.tasks import Answers, Item

FIELDS = {field.name for field in dataclasses.fields(Item)}
LONGEST = 180
"""characters of a file's name before its digest"""


def samples_folder(results: str | Path) -> Path:
    """``results.samples`` beside ``results.json``."""
    return Path(results).with_suffix(".samples")


def file_name(arm: str, task: str) -> str:
    """``ARM.TASK.jsonl``, of plain characters; a name that had to be changed carries a digest of what it stands for, so that no two are equal."""
    whole = f"{arm}.{task}"
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", whole).lstrip(".-_")[:LONGEST] or "task"
    # a dot may belong to either name, and some file systems take A for a
    exact = plain == whole and "." not in arm and whole == whole.lower()
    return f"{plain}.jsonl" if exact else f"{plain}-{hashlib.sha256(repr((arm, task)).encode()).hexdigest()[:8]}.jsonl"


def sample_text(items: list[Item]) -> str:
    """One JSON object per item: the fields of `Item` that are set, and its ``margin`` (nats), for readers. Log-likelihoods keep every bit."""
    rows = []
    for item in items:
        row = {key: value for key, value in dataclasses.asdict(item).items() if value not in (None, ()) and value is not False}
        rows.append(row | ({"margin": found} if (found := margin(item)) is not None and len(item.loglikelihoods) > 1 else {}))
    return "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows)


def name_samples(answers: dict[str, Answers], arms: dict[str, Any]) -> None:
    """Say in each arm's task rows which file holds their items (``samples``) and its digest (``samples_sha256``)."""
    for arm, tasks in answers.items():
        for task, items in tasks.items():
            arms[arm]["tasks"][task] |= {"samples": file_name(arm, task), "samples_sha256": _sha(sample_text(items))}


def write_samples(answers: dict[str, Answers], results: str | Path) -> None:
    """Write the logs into `samples_folder`; each file appears whole or not at all."""
    folder = samples_folder(results)
    for arm, tasks in answers.items():
        for task, items in tasks.items():
            folder.mkdir(parents=True, exist_ok=True)
            part = folder / f".{file_name(arm, task)}.part"
            part.write_text(sample_text(items), encoding="utf-8", newline="\n")
            os.replace(part, folder / file_name(arm, task))


def read_samples(path: str | Path, results: dict[str, Any]) -> dict[str, Answers]:
    """The answers that belong to the ``results`` at ``path``. ``Refused`` where a log is missing, damaged, or of another run."""
    found: dict[str, Answers] = {}
    for arm, row in results.get("arms", {}).items():
        for task, about in row.get("tasks", {}).items():
            if isinstance(about, dict) and "samples" in about:
                found.setdefault(arm, {})[task] = _read(samples_folder(path) / file_name(arm, task), about)
    return found


def _read(file: Path, about: dict[str, Any]) -> list[Item]:
    try:
        text = file.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise Refused("the log of a task's items cannot be read", where=f"{file.parent.name}/{file.name}", expected="the file beside results.json", found=type(error).__name__) from error
    if _sha(text) != about.get("samples_sha256"):
        raise Refused("the log of a task's items is not the one that results.json names", where=f"{file.parent.name}/{file.name}", expected=f"sha256 {about.get('samples_sha256')}", found=_sha(text))
    return [_item(line, f"{file.name}:{number}") for number, line in enumerate(text.splitlines(), 1)]


def _item(line: str, where: str) -> Item:
    try:
        row = json.loads(line)
        values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in row.items() if key in FIELDS}
        item = Item(**values)
        if fault := _fault(item):
            raise ValueError(fault)
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise Refused("a line of the log is no item", where=where, expected=", ".join(sorted(FIELDS)), found=str(error)) from error
    return item


def _fault(item: Item) -> str | None:
    """What in an item could not be counted, or written again."""
    choices = len(item.loglikelihoods)
    wrong = {
        "text": not all(isinstance(getattr(item, key), str) for key in ("task", "hash", "prompt_hash", "metric")) or not all(isinstance(part, (str, type(None))) for part in (item.answer, item.cluster)),
        "item": not _is_count(item.item),
        "correct": not _is_number(item.correct, 1e6),
        "gold": not isinstance(item.gold, tuple) or not all(_is_count(index) and (index < choices or not choices) for index in item.gold),
        "loglikelihoods": not isinstance(item.loglikelihoods, tuple) or not all(value is None or _is_number(value, 1e30) for value in item.loglikelihoods),
        "lengths": not isinstance(item.lengths, tuple) or not all(map(_is_count, item.lengths)) or len(item.lengths) not in (0, choices),
        "truncated": not isinstance(item.truncated, bool),
    }  # fmt: skip
    return next((f"{key} is malformed" for key, is_wrong in wrong.items() if is_wrong), None)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53


def _is_number(value: Any, most: float) -> bool:
    """NaN compares as false."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -most <= value <= most


def _sha(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()
