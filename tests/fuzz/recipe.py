"""Does the recipe reader answer for any YAML, with a recipe whose every value can be used, or with all faults?

An input is recipe.yaml.
"""

from __future__ import annotations

import dataclasses
import json

from fuzz import yamlish
from fuzz.places import Broken, Seeds, folder, refused
from qmerge.errors import QmergeError
from qmerge.formats import BUILT
from qmerge.pipeline.recipe import Recipe, build_recipe
from qmerge.pipeline.recipe_values import COMBINATIONS

WORDS = (*(field.name for field in dataclasses.fields(Recipe)), *BUILT, *COMBINATIONS[:4], "sum", "blocks", "distill", "dequantized", "original", "double", "5GB", "a=0.5", "pooled", "rtn", "group-size")
MAX_LEN = 1024
_FILE = folder("recipe") / "recipe.yaml"
mutate = yamlish.mutator(WORDS)


def seeds() -> Seeds:
    least = {"base": "b", "adapter": "a", "out": "o"}
    several = least | {"adapter": ["a=0.5", "b"], "combine": "ties", "density": 0.5, "format": "bf16"}
    rest = least | {"format": "nf4", "block_size": 64, "double_quant": True, "samples": 8, "tokens": 64, "calibration": "c.jsonl", "shard_size": "1GB", "polish": "blocks", "seed": 3}
    budget = least | {"format": "compressed-tensors", "bits_per_weight": 4.5, "generic_share": 0.1, "curvature-tokens": 0}
    return yamlish.documents(least, several, rest, budget)


def check(data: bytes) -> bool:
    _FILE.write_bytes(data)
    try:
        recipe = build_recipe(str(_FILE), (), {})
    except QmergeError as error:
        return refused(error)
    recipe.choices, recipe.adapter_set, recipe.grid  # noqa: B018  each is computed from values that were accepted
    if recipe.shard_bytes < 1 or not isinstance(json.loads(json.dumps(recipe.to_json(), allow_nan=False)), dict):
        raise Broken(f"{recipe}")
    return True


