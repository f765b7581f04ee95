"""Runs qmerge commands one after the other in this process and prints what each gave back: the hub's client reads HF_ENDPOINT when it is imported, so it needs a process of its own.

Arguments: a JSON list of commands, each a list of words. Prints a JSON list of ``[exit code, stdout, stderr]``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))


def main() -> None:
    from conftest import run_cli

    answers = [run_cli(*words) for words in json.loads(sys.argv[1])]
    print(json.dumps([[answer.code, answer.out, answer.err] for answer in answers]))


if __name__ == "__main__":
    main()
