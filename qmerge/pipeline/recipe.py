"""What did the user ask for? One frozen value from defaults, a YAML file, ``--set`` and flags, in that order; all faults in one message."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import yaml

from qmerge.errors import UsageProblem
from qmerge.formats import BUILT, KNOWN, QUANTIZING
from qmerge.formats.base import Nf4Recipe
from qmerge.types import Grid

MAX_RECIPE_BYTES = 1_000_000
GROUP_SIZES = (128, 64, 32, -1)


@dataclass(frozen=True)
class Recipe:
    """A merge job. Paths are folders or hub ids; ``tokens`` is the length of a calibration window."""

    base: str = ""
    adapter: str = ""
    out: str = ""
    format: str = "gptq"
    bits: int = 4
    group_size: int = 128
    symmetric: bool = True
    calibration: str | None = None
    template: str | None = None
    generic: str | None = None
    generic_share: float = 0.25
    samples: int = 128
    tokens: int = 2048
    seed: int = 0
    rtn: bool = False
    on: str = "dequantized"
    original: str | None = None
    nf4_recipe: str | None = None
    device: str = "auto"
    overwrite: bool = False

    @property
    def grid(self) -> Grid:
        if self.format == "nf4":
            return Grid("nf4", 4, 64, True, True)
        return Grid("int", self.bits, self.group_size, self.symmetric)

    def to_json(self) -> dict[str, Any]:
        """The fields that decide the result: no paths, no device."""
        quantizing = {"bits", "group_size", "symmetric"} if self.format == "gptq" else set()
        calibrated = {"template", "generic_share", "samples", "tokens", "seed"} if self.format in QUANTIZING and not self.rtn else set()
        wanted = {"format", "on", "nf4_recipe", "rtn"} | quantizing | calibrated
        row = {field.name: getattr(self, field.name) for field in fields(self) if field.name in wanted}
        if self.nf4_recipe and self.nf4_recipe not in ("double", "single"):
            row["nf4_recipe"] = Path(self.nf4_recipe).name
        return row


def build_recipe(file: str | None, settings: tuple[str, ...], flags: dict[str, Any]) -> Recipe:
    """Defaults, then ``file``, then ``key=value`` settings, then flags that are not None. Raises `UsageProblem` with every fault found."""
    faults: list[str] = []
    given: dict[str, Any] = {}
    if file:
        given |= _read_file(file, faults)
    for setting in settings:
        key, sign, value = setting.partition("=")
        if not sign:
            faults.append(f"--set {setting}: expected key=value")
        else:
            try:
                given[key.strip().replace("-", "_")] = yaml.safe_load(value)
            except (yaml.YAMLError, RecursionError) as problem:
                faults.append(f"--set {setting}: not YAML: {str(problem).splitlines()[0]}")
    given |= {key: value for key, value in flags.items() if value is not None}
    recipe = _check(given, faults)
    if faults:
        many = len(faults) > 1
        raise UsageProblem(f"{len(faults)} things are wrong with what was asked for" if many else faults[0], found="\n              ".join(faults) if many else None, fix="see --help of this command")
    return recipe


def _read_file(file: str, faults: list[str]) -> dict[str, Any]:
    path = Path(file)
    if not path.is_file():
        faults.append(f"--recipe {file}: no such file")
        return {}
    if path.stat().st_size > MAX_RECIPE_BYTES:
        faults.append(f"--recipe {file}: larger than {MAX_RECIPE_BYTES} bytes")
        return {}
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as problem:
        faults.append(f"--recipe {file}: not YAML: {str(problem).splitlines()[0]}")
        return {}
    if not isinstance(content, dict):
        faults.append(f"--recipe {file}: expected a mapping of settings, found {type(content).__name__}")
        return {}
    return {str(key).replace("-", "_"): value for key, value in content.items()}


_KINDS: dict[str, tuple[type, ...]] = {"int": (int,), "float": (float, int), "bool": (bool,), "str": (str,), "str | None": (str, type(None))}


def _check(given: dict[str, Any], faults: list[str]) -> Recipe:
    known = {field.name: str(field.type) for field in fields(Recipe)}
    for key in sorted(given.keys() - known.keys()):
        faults.append(f"unknown setting {key!r}; known: {', '.join(known)}")
    for key, kind in known.items():
        if key in given and (not isinstance(given[key], _KINDS[kind]) or (kind in ("int", "float") and isinstance(given[key], bool))):
            faults.append(f"{key}: expected {kind}, found {given[key]!r}")
            del given[key]
    recipe = replace(Recipe(), **{key: value for key, value in given.items() if key in known})
    for key in ("base", "adapter", "out"):
        if not getattr(recipe, key):
            faults.append(f"--{key} is missing")
    _check_values(recipe, faults)
    return recipe


def _check_values(recipe: Recipe, faults: list[str]) -> None:
    if recipe.format not in KNOWN:
        faults.append(f"--format {recipe.format}: no such format; this version writes {', '.join(BUILT)}")
    elif recipe.format not in BUILT:
        faults.append(f"--format {recipe.format} is not built yet; this version writes {', '.join(BUILT)}")
    if recipe.format == "gptq":
        if recipe.bits != 4:
            faults.append(f"--bits {recipe.bits} is not built yet; this version writes 4")
        if recipe.group_size not in GROUP_SIZES:
            faults.append(f"--group-size {recipe.group_size}: expected one of {', '.join(map(str, GROUP_SIZES))}")
    if recipe.on not in ("dequantized", "original"):
        faults.append(f"--on {recipe.on}: expected dequantized or original")
    if recipe.original and recipe.on != "original":
        faults.append("--original was given without --on original")
    if not 0 <= recipe.generic_share < 1:
        faults.append(f"--generic-share {recipe.generic_share}: expected at least 0 and below 1")
    if recipe.samples < 2:
        faults.append(f"--samples {recipe.samples}: expected at least 2 (some are held out to choose with)")
    if recipe.tokens < 2:
        faults.append(f"--tokens {recipe.tokens}: expected at least 2")
    if recipe.rtn and recipe.calibration:
        faults.append("--rtn uses no calibration text, and --calibration was given: leave one of them out")


def read_nf4_recipe(value: str | None) -> Nf4Recipe | None:
    """``double``, ``single``, or a JSON/YAML file with bitsandbytes' names (``bnb_4bit_use_double_quant``, …, also inside ``quantization_config``)."""
    if value is None:
        return None
    if value in ("double", "single"):
        return Nf4Recipe(double_quant=value == "double")
    faults: list[str] = []
    content = _read_file(value, faults)
    if faults:
        raise UsageProblem(faults[0].replace("--recipe", "--nf4-recipe"), expected="double, single, or a file")
    content = content.get("quantization_config", content)
    kind = content.get("bnb_4bit_quant_type", "nf4")
    if kind != "nf4":
        raise UsageProblem("the NF4 recipe names another 4-bit type", where=f"--nf4-recipe {value}", expected="nf4", found=str(kind))
    known = {"bnb_4bit_use_double_quant", "bnb_4bit_blocksize", "blocksize", "block_size", "double_quant", "dtype"}
    if not known & content.keys():
        raise UsageProblem("the NF4 recipe names nothing that qmerge knows", where=f"--nf4-recipe {value}", expected=", ".join(sorted(known)), found=", ".join(map(str, content)) or "nothing")
    if content.get("llm_int8_skip_modules"):
        raise UsageProblem("the NF4 recipe skips modules, which this version does not read from a file", where=f"--nf4-recipe {value}", fix="quantize the base once, save it, and give that folder")
    size = content.get("bnb_4bit_blocksize", content.get("blocksize", content.get("block_size", 64)))
    return Nf4Recipe(int(size), bool(content.get("bnb_4bit_use_double_quant", content.get("double_quant", False))), content.get("dtype"))
