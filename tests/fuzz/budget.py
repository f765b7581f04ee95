"""Does the budget reader answer for any YAML, with limits that a verdict can be held against?

An input is budget.yaml.
"""

from __future__ import annotations

import math

from fuzz import yamlish
from fuzz.places import Broken, Seeds, folder, refused
from qmerge.errors import QmergeError
from qmerge.quality.compare import DIRECTIONS, load_budget

WORDS = (*DIRECTIONS, "max", "min")
MAX_LEN = 1024
_FILE = folder("budget") / "budget.yaml"
mutate = yamlish.mutator(WORDS)


def seeds() -> Seeds:
    return yamlish.documents({"kl_mean": {"max": 0.05}, "retention": {"min": 0.9}}, {name: {side: 1} for name, side in DIRECTIONS.items()})


def check(data: bytes) -> bool:
    _FILE.write_bytes(data)
    try:
        budget = load_budget(_FILE)
    except QmergeError as error:
        return refused(error)
    for metric, limit in budget["limits"].items():
        if list(limit) != [DIRECTIONS[metric]] or not math.isfinite(float(limit[DIRECTIONS[metric]])):
            raise Broken(f"{metric}: {limit}")
    return True
