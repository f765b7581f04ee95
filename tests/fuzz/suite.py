"""Does the suite reader answer for any YAML, with tasks that all have what their kind needs?

An input is suite.yaml; a file of rows lies beside it.
"""

from __future__ import annotations

import json

from fuzz import yamlish
from fuzz.places import Broken, Seeds, folder, refused
from qmerge.errors import QmergeError
from qmerge.quality import local_tasks
from qmerge.quality.suites import KEYS, TASK_KEYS, load_suite

WORDS = (*KEYS, *TASK_KEYS, *local_tasks.KEYS, *local_tasks.NEEDED, "rows.jsonl", "more", "question", "options", "answer", "{question}", "{options}", "arc_easy", "../suite.yaml", "suite.yaml")
MAX_LEN = 1024
_FOLDER = folder("suite")
_FILE = _FOLDER / "suite.yaml"
(_FOLDER / "more").mkdir()
(_FOLDER / "rows.jsonl").write_text(json.dumps({"question": "2+2?", "options": ["4", "5"], "answer": "4", "gold": 0, "contexts": ["a", "b"], "rest": "c"}) + "\n")
mutate = yamlish.mutator(WORDS)


def seeds() -> Seeds:
    choice = {"name": "own", "file": "rows.jsonl", "kind": "choice", "prompt": "Q: {question}", "choices": "options", "gold": "gold"}
    fill = {"name": "filled", "file": "rows.jsonl", "kind": "fill", "contexts": "contexts", "continuation": "rest", "gold": "gold"}
    generate = {"name": "free", "file": "rows.jsonl", "kind": "generate", "prompt": "{question}", "answer": "answer", "number": "[0-9]+", "until": ["\n"], "max_tokens": 8, "num_fewshot": 1, "fewshot_file": "rows.jsonl"}
    listed = choice | {"choices": ["{answer}", "no"], "gold": "answer"}
    return yamlish.documents({"tasks": ["arc_easy", {"name": "piqa", "num_fewshot": 2, "metric": "acc"}], "limit": 10, "batch_size": 2}, {"tasks": [choice], "include_path": "more"}, {"tasks": [fill, generate]}, {"tasks": [listed], "chat_template": True})


def check(data: bytes) -> bool:
    _FILE.write_bytes(data)
    try:
        suite = load_suite(_FILE, allow_code=True)
    except QmergeError as error:
        return refused(error)
    json.dumps(suite.content)
    for name, task in suite.tasks.items():
        if task["name"] != name:
            raise Broken(f"{name}: {task}")
        if "file" in task:
            json.dumps(local_tasks.task_config(task, suite.folder))
    return bool(suite.tasks)
