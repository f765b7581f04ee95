"""How does a JSONL file of questions become a task that lm-eval runs?

The suite names the fields; nothing is copied or converted. Three kinds, one JSON object per line:

========  =====================================================================  ==========================================
kind      settings (names of fields, unless said otherwise)                      scored
========  =====================================================================  ==========================================
choice    ``prompt`` (a template, ``{field}``), ``choices``, ``gold``             log-likelihood of each choice after the prompt
fill      ``contexts``, ``continuation``, ``gold``                                log-likelihood of one continuation after each context (WinoGrande's partial evaluation)
generate  ``prompt`` (a template), ``answer``, ``number`` and ``gold_after``      greedy text, cut by the regex ``number``, equal to the answer
          (a regex, a text), ``until``, ``max_tokens``
========  =====================================================================  ==========================================

``gold`` is an index from 0, or (kind choice) the text of the right choice. ``choices`` is a field that holds a list, or a list of words
that all items share, or of ``{field}``. The result is an ordinary task config (strings only), so it also works by hand:
``lm_eval.simple_evaluate(tasks=[task_config(...)])``.
"""

from __future__ import annotations

import hashlib
import json
import re
import string
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NEEDED = {"choice": ("prompt", "choices", "gold"), "fill": ("contexts", "continuation", "gold"), "generate": ("prompt", "answer")}
KEYS = {
    "file": str, "kind": str, "prompt": str, "choices": (str, list), "gold": str, "contexts": str, "continuation": str, "answer": str,
    "number": str, "gold_after": str, "until": list, "max_tokens": int, "fewshot_file": str,
}  # fmt: skip
OWN = {"choice": set(), "fill": set(), "generate": {"number", "gold_after", "until", "max_tokens"}}
SHOWN = 5
"""faulty rows that a message lists"""


def setting_faults(task: dict[str, Any], folder: Path) -> list[str]:
    """What is wrong with one local task of a suite, rows left out; files are relative to ``folder``, the suite's."""
    kind = task.get("kind")
    if kind not in NEEDED:
        return [f"kind {kind!r} (known: {', '.join(NEEDED)})"]
    faults = [f"{key} is missing (kind {kind})" for key in NEEDED[kind] if key not in task]
    faults += [f"{key} has no meaning for kind {kind}" for key in task if key in KEYS and key not in {"file", "kind", "fewshot_file", *NEEDED[kind], *OWN[kind]}]
    faults += [f"{key}: there is no file {task[key]!r} beside the suite" for key in ("file", "fewshot_file") if key in task and not _is_file(folder, task[key])]
    names = [task[key] for key in ("gold", "contexts", "continuation", "answer", "choices") if isinstance(task.get(key), str)]
    faults += [f"{name!r} cannot be a field: letters, digits and _ only" for name in names if not name.isidentifier()]
    try:
        re.compile(task.get("number", ""))
    except re.error as error:
        faults.append(f"number is no regex: {error}")
    if "prompt" in task:
        faults += _template_faults(task["prompt"], "prompt")
    if isinstance(task.get("choices"), list) and (len(task["choices"]) < 2 or not all(isinstance(c, str) and c for c in task["choices"])):
        faults.append("choices must be a field, or a list of at least two words or {field}s")
    elif isinstance(task.get("choices"), list):
        faults += [fault for choice in task["choices"] if "{" in choice for fault in _template_faults(choice, f"choice {choice!r}")]
    if not all(isinstance(stop, str) and stop for stop in task.get("until", [])) or task.get("max_tokens", 1) < 1:
        faults.append("until must be a list of texts, and max_tokens above 0")
    if task.get("num_fewshot") and "fewshot_file" not in task:
        faults.append("num_fewshot needs fewshot_file: examples must not come from the items that are scored")
    if not task.get("num_fewshot") and "fewshot_file" in task:
        faults.append("fewshot_file needs num_fewshot")
    return faults


def _is_file(folder: Path, name: str) -> bool:
    try:
        return (folder / name).is_file()
    except OSError:  # a name longer than names can be
        return False


def row_faults(task: dict[str, Any], folder: Path) -> list[str]:
    """The first faults of the rows, each with file and line; [] where lm-eval can score every one."""
    faults: list[str] = []
    for key in ("file", "fewshot_file"):
        if key not in task:
            continue
        seen = False
        for line, row in _rows(folder / task[key]):
            seen = True
            if problem := row if isinstance(row, str) else _row_fault(task, row):
                faults.append(f"{Path(task[key]).name}:{line}: {problem}")
            if len(faults) >= SHOWN:
                return faults
        if not seen:
            faults.append(f"{Path(task[key]).name} holds no rows")
    return faults


def digest(path: Path) -> str:
    """sha256 of the file's bytes, in hex."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def task_config(task: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The lm-eval task config (``dataset_path: json``) of one local task; plain strings and numbers, so that it can be saved as YAML."""
    files = {"test": str((folder / task["file"]).resolve())} | ({"train": str((folder / task["fewshot_file"]).resolve())} if "fewshot_file" in task else {})
    config: dict[str, Any] = {
        "task": task["name"], "dataset_path": "json", "dataset_kwargs": {"data_files": files}, "test_split": "test",
        "num_fewshot": task.get("num_fewshot", 0), "metadata": {"version": 1},
    }  # fmt: skip
    if "fewshot_file" in task:
        config["fewshot_split"] = "train"
    return config | {"choice": _choice, "fill": _fill, "generate": _generate}[task["kind"]](task)


def _choice(task: dict[str, Any]) -> dict[str, Any]:
    choices = task["choices"]
    if isinstance(choices, list) and any("{" in choice for choice in choices):
        choices = "{{ [" + ", ".join(" ~ ".join(_pieces(choice)) if "{" in choice else json.dumps(choice, ensure_ascii=False) for choice in choices) + "] }}"
    metrics = [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")]
    return {"output_type": "multiple_choice", "doc_to_text": template(task["prompt"]), "doc_to_choice": choices, "doc_to_target": task["gold"], "metric_list": metrics}


def _fill(task: dict[str, Any]) -> dict[str, Any]:
    # lm-eval's convention for several contexts and one continuation: the index in doc_to_text, the contexts in doc_to_choice
    return {
        "output_type": "multiple_choice", "doc_to_text": task["gold"], "doc_to_choice": task["contexts"], "doc_to_target": task["continuation"],
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }  # fmt: skip


def _generate(task: dict[str, Any]) -> dict[str, Any]:
    number = task.get("number")
    ignored = [f"(?s).*{re.escape(task['gold_after'])}"] if "gold_after" in task else []
    ignored += [",", r"\$", r"\.$"] if number else []
    take = [{"function": "regex", "regex_pattern": number}] if number else []
    return {
        "output_type": "generate_until", "doc_to_text": template(task["prompt"]), "doc_to_target": task["answer"],
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True, "ignore_case": True, "regexes_to_ignore": ignored}],
        "generation_kwargs": {"until": task.get("until", ["\n\n"]), "do_sample": False, "temperature": 0.0, "max_gen_toks": task.get("max_tokens", 256)},
        "filter_list": [{"name": "number" if number else "whole", "filter": [*take, {"function": "take_first"}]}],
    }  # fmt: skip


def template(text: str) -> str:
    """A ``{field}`` template as lm-eval takes it: the bare name where it is nothing but one field, else Jinja in which only the fields are code.

    >>> template("{question}"), template("Q: {question} {{x}}")
    ('question', 'Q: {{ question }}{{ " {x}" }}')
    """
    parts = list(string.Formatter().parse(text))
    if len(parts) == 1 and parts[0][0] == "" and parts[0][1]:
        return parts[0][1]
    shown = []
    for literal, field in _merged(parts):
        # json.dumps makes a Jinja string of what Jinja would read as its own marks
        shown.append(literal if set(literal).isdisjoint("{}%#") else "{{ " + json.dumps(literal, ensure_ascii=False) + " }}")
        shown += ["{{ " + field + " }}"] if field else []
    return "".join(shown)


def _pieces(text: str) -> Iterator[str]:
    """The parts of a template as Jinja expressions."""
    for literal, field in _merged(list(string.Formatter().parse(text))):
        if literal:
            yield json.dumps(literal, ensure_ascii=False)
        if field:
            yield field


def _merged(parts: list[Any]) -> Iterator[tuple[str, str | None]]:
    """(literal, field) pairs; an escaped brace starts a new part in Python's parser, and is joined again here."""
    held = ""
    for literal, field, _, _ in parts:
        held += literal
        if field is not None:
            yield held, field
            held = ""
    if held:
        yield held, None


def _template_faults(text: str, key: str) -> list[str]:
    try:
        parts = list(string.Formatter().parse(text))
    except ValueError as error:
        return [f"{key} is malformed: {error} (write a literal brace twice)"]
    fields = [field for _, field, _, _ in parts if field is not None]
    if not fields:
        return [f"{key} names no {{field}}"]
    return [f"{key}: {{{field}}} is no field name" for field, spec, turn in ((f, s, c) for _, f, s, c in parts if f is not None) if not field.isidentifier() or spec or turn]


def _fields_of(text: str) -> list[str]:
    return [field for _, field, _, _ in string.Formatter().parse(text) if field]


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """(line number, row or what is wrong with it)."""
    with open(path, encoding="utf-8", errors="strict") as file:
        try:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError) as error:
                    yield number, f"not JSON: {error}"
                    continue
                yield number, row if isinstance(row, dict) else "no JSON object"
        except UnicodeDecodeError as error:
            yield 0, f"not UTF-8: {error}"


def _row_fault(task: dict[str, Any], row: dict[str, Any]) -> str | None:
    choices, asked = task.get("choices"), _fields_of(task.get("prompt", ""))
    templates = [choice for choice in choices if "{" in choice] if isinstance(choices, list) else []
    texts = [task[key] for key in ("continuation", "answer") if key in task] + asked + [name for choice in templates for name in _fields_of(choice)]
    named = texts + [task[key] for key in ("gold", "contexts") if key in task] + ([choices] if isinstance(choices, str) else [])
    if missing := [name for name in named if row.get(name) is None]:
        return f"no field {', '.join(missing)}"
    if wrong := [name for name in texts if not isinstance(row[name], str) or not row[name]]:
        return f"{', '.join(wrong)} must be text"
    if task["kind"] == "choice" and "}" in template(task["prompt"]) and task["prompt"].format_map(row).isdigit():
        return "the prompt is a bare number, which lm-eval takes for an index"
    if task["kind"] == "generate":
        return None
    options = row[task["contexts"]] if task["kind"] == "fill" else row[choices] if isinstance(choices, str) else [choice.format_map(row) if choice in templates else choice for choice in choices or ()]
    if not isinstance(options, list) or len(options) < 2 or not all(isinstance(o, str) and o for o in options):
        return f"{task.get('contexts') or choices} must be a list of at least two texts"
    return _gold_fault(row[task["gold"]], options, task["kind"], task["gold"])


def _gold_fault(gold: Any, options: list[str], kind: str, name: str) -> str | None:
    if isinstance(gold, int) and not isinstance(gold, bool):
        return None if 0 <= gold < len(options) else f"{name} is {gold}, outside 0 to {len(options) - 1}"
    if kind == "choice" and isinstance(gold, str):
        return None if options.count(gold) == 1 else f"{name} is {gold!r}, which is not one of the choices"
    return f"{name} must be an index from 0" + (" or the text of a choice" if kind == "choice" else "")
