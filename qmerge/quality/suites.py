"""Which benchmarks are asked for? Suite files and `--tasks`, checked before anything is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qmerge.errors import Refused, UsageProblem
from qmerge.extras import need
from qmerge.quality import local_tasks
from qmerge.store.yamlfiles import BadYaml, read_yaml

KEYS = {"tasks": list, "include_path": str, "limit": (int, float), "num_fewshot": int, "batch_size": (int, str), "chat_template": bool}
TASK_KEYS = {"name": str, "num_fewshot": int, "metric": str, "cluster": str}


@dataclass(frozen=True)
class Suite:
    """``tasks``: name -> its settings, in the order of the file; those with a ``file`` are local. ``content`` is what was asked for, for the
    fingerprint: local files by name and digest, no folder. ``include_path`` is the folder of further task definitions, resolved."""

    tasks: dict[str, dict[str, Any]]
    content: dict[str, Any]
    folder: Path
    include_path: str | None = None
    options: dict[str, Any] = field(default_factory=dict)


def load_suite(path: str | Path | None, names: Sequence[str] = (), allow_code: bool = False) -> Suite:
    """Read a suite file and add ``names`` of lm-eval's tasks. ``path`` None: the names alone.

    A file holds ``tasks`` (names, or mappings with ``name`` and optionally ``num_fewshot``, ``metric``, ``cluster``; with a ``file``, a task
    of its own: `local_tasks`), and ``include_path`` (a folder of lm-eval task files, relative to the suite), ``limit``, ``num_fewshot``,
    ``batch_size``, ``chat_template`` for all. Raises ``UsageProblem`` with all faults of the file at once, ``Refused`` for faults of the rows,
    and for an ``include_path`` without ``allow_code``: lm-eval's task files import Python by name and hold Jinja that is not sandboxed, so such a folder is a program.
    """
    need("a benchmark", "lm_eval")
    content = {"tasks": []} if path is None else _read(Path(path))
    folder = Path.cwd() if path is None else Path(path).resolve().parent
    faults = _top_faults(content, folder)
    listed = content.get("tasks")
    rows = [*(listed if isinstance(listed, list) else []), *names]
    tasks: dict[str, dict[str, Any]] = {}
    for index, row in enumerate(rows):
        task = {"name": row} if isinstance(row, str) else row
        found = _task_faults(task, folder)
        faults += [f"task {task.get('name') if isinstance(task, dict) else index + 1}: {fault}" for fault in found]
        if found:
            continue
        faults += [f"task {task['name']} is named twice"] * (task["name"] in tasks)
        tasks[task["name"]] = dict(task)
    if not rows:
        faults.append("`tasks` must be a list of names or mappings, with at least one entry")
    where = "--tasks" if path is None else Path(path).name
    if faults:
        raise UsageProblem("the suite is malformed", where=where, expected=f"{', '.join(KEYS)}; per task {', '.join((*TASK_KEYS, *local_tasks.KEYS))}", found="; ".join(faults))
    if "include_path" in content and not allow_code:
        raise Refused("the suite brings task files of lm-eval, which can run code", where=where, expected="tasks of lm-eval by name, and local ones with `file`", found="include_path",
                      fix="read the files in that folder, then --allow-task-code")
    bad = [f"{name}: {fault}" for name, task in tasks.items() if "file" in task for fault in local_tasks.row_faults(task, folder)]
    if bad:
        raise Refused("the rows of a local task cannot be scored", where=where, expected="the fields that the suite names, in every row", found="; ".join(bad))
    options = {key: value for key, value in content.items() if key not in ("tasks", "include_path")}
    include = str((folder / content["include_path"]).resolve()) if "include_path" in content else None
    return Suite(tasks, _public(tasks, content, folder), folder, include, options)


def split_names(text: str | None) -> list[str]:
    """``"arc_easy, piqa"`` -> names."""
    return [name.strip() for name in (text or "").split(",") if name.strip()]


def _read(path: Path) -> dict[str, Any]:
    try:
        content = read_yaml(path)
    except (OSError, BadYaml) as error:
        raise UsageProblem("the suite cannot be read", where=path.name, expected="a YAML file", found=str(error).splitlines()[0], fix="eval/suites holds suites to begin from") from error
    if not isinstance(content, dict):
        raise UsageProblem("the suite is malformed", where=path.name, expected="`tasks: [...]`", found="no mapping")
    return content


def _top_faults(content: dict[str, Any], folder: Path) -> list[str]:
    faults = [f"unknown key {key!r}" for key in content if key not in KEYS]
    faults += [f"{k} has the wrong type: {repr(v)[:120]}" for k, v in content.items() if k in KEYS and not _typed(v, KEYS[k])]
    faults += [f"{k} must be above 0" for k in ("limit", "batch_size") if _typed(content.get(k), (int, float)) and content[k] <= 0]
    if isinstance(content.get("batch_size"), str) and content["batch_size"] != "auto":
        faults.append("batch_size must be a number or auto")
    if isinstance(content.get("include_path"), str) and not _is_folder(folder / content["include_path"]):
        faults.append(f"include_path {content['include_path']!r} is no folder beside the suite")
    return faults


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # a name longer than names can be
        return False


def _task_faults(task: Any, folder: Path) -> list[str]:
    if not isinstance(task, dict) or not isinstance(task.get("name"), str) or not task["name"].strip():
        return ["neither a name nor a mapping with `name`"]
    known = TASK_KEYS | (local_tasks.KEYS if "file" in task else {})
    faults = [f"unknown key {key!r}" + (" (of tasks with a `file`)" if key in local_tasks.KEYS else "") for key in task if key not in known]
    faults += [f"{k} has the wrong type: {repr(v)[:120]}" for k, v in task.items() if k in known and not _typed(v, known[k])]
    if _typed(task.get("num_fewshot"), int) and task["num_fewshot"] < 0:
        faults.append("num_fewshot must not be below 0")
    return faults if faults or "file" not in task else local_tasks.setting_faults(task, folder)


def _typed(value: Any, kinds: Any) -> bool:
    return isinstance(value, kinds) and not (isinstance(value, bool) and kinds is not bool)


def _public(tasks: dict[str, dict[str, Any]], content: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What decides the numbers, without folders."""
    shown = []
    for task in tasks.values():
        files = {key: {"name": Path(task[key]).name, "sha256": local_tasks.digest(folder / task[key])} for key in ("file", "fewshot_file") if key in task}
        shown.append(task | files if len(task) > 1 else task["name"])
    named = {"include_path": Path(content["include_path"]).name} if "include_path" in content else {}
    return {"tasks": shown} | {key: value for key, value in content.items() if key not in ("tasks", "include_path")} | named
