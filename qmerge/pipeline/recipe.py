"""What did the user ask for? One frozen value from defaults, a YAML file, ``--set`` and flags, in that order; all faults in one message."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qmerge.adapters.choices import SUM, AdapterSet, Choice, Combination, parse_choice
from qmerge.errors import UsageProblem
from qmerge.formats import BITS, BLOCK_SIZES, QUANTIZING
from qmerge.formats.nf4_recipe import Nf4Recipe
from qmerge.formats.training import recipe_from_adapter, recipe_from_file
from qmerge.pipeline.recipe_checks import check_values
from qmerge.pipeline.recipe_values import FIXED
from qmerge.store.yamlfiles import BadYaml, parse_yaml, read_yaml
from qmerge.types import Grid
from qmerge.units import parse_bytes

if TYPE_CHECKING:
    from qmerge.adapters.adapter import Adapter

NEEDED = ("base", "adapter", "out")
QUICK_TOKENS = 1024
"""``curvature_tokens`` with ``quick``, where nothing else is said"""


@dataclass(frozen=True)
class Recipe:
    """A merge job. Paths are folders or hub ids; ``tokens`` is the length of a calibration window.

    ``bits``, ``group_size`` and ``symmetric`` are those of int formats; ``block_size`` and ``double_quant`` those of nf4 and fp4, None for what the base has
    (64 and double where it has none). ``bits_per_weight`` is a budget for stored bits, spent where the measured loss says so. ``curvature_tokens``: calibration tokens, about, that
    tell how errors of a linear's outputs count together; 0: they count one by one. ``quick``: each linear is solved on what it receives in the requantized model alone: no teacher runs beside
    it, and ``curvature_tokens`` is ``QUICK_TOKENS`` unless it is given; with 0 it is GPTQ as it was published. A budget measures on 16384 of its own, which then tell this too. ``compute``: in what the matrix
    products of the calibration text's passes are taken; a plan has made of ``auto`` what suits the machine. ``device_memory``: most that may be taken of an accelerator, as bytes or as a size; None:
    what is free there. It changes where things lie, never the bytes that come out.
    """

    base: str = ""
    adapter: tuple[str, ...] = ()
    out: str = ""
    format: str = "gptq"
    bits: int = 4
    group_size: int = 128
    symmetric: bool = True
    block_size: int | None = None
    double_quant: bool | None = None
    bits_per_weight: float | None = None
    polish: tuple[str, ...] = ()
    quantize_head: bool = False
    pad: bool = False
    low_traffic: str = "pooled"
    calibration: str | None = None
    template: str | None = None
    generic: str | None = None
    generic_share: float = 0.25
    samples: int = 128
    tokens: int = 2048
    curvature_tokens: int = 8192
    quick: bool = False
    seed: int = 0
    rtn: bool = False
    on: str = "dequantized"
    original: str | None = None
    nf4_recipe: str | None = None
    device: str = "auto"
    device_memory: int | str | None = None
    compute: str = "auto"
    overwrite: bool = False
    combine: str = "sum"
    density: float | None = None
    combine_rank: int | None = None
    each: bool = False
    residual_base: bool = False
    allow_pickle: bool = False
    shard_size: str = "5GB"

    @property
    def choices(self) -> tuple[Choice, ...]:
        """The adapters with their weights."""
        return tuple(parse_choice(text) for text in self.adapter)

    @property
    def adapter_set(self) -> AdapterSet:
        return AdapterSet(self.choices, Combination(self.combine, self.density, self.combine_rank, self.seed), self.residual_base, self.allow_pickle)

    @property
    def shard_bytes(self) -> int:
        return parse_bytes(self.shard_size)

    @property
    def device_memory_bytes(self) -> int | None:
        return None if self.device_memory is None else parse_bytes(str(self.device_memory))

    @property
    def grid(self) -> Grid:
        """What weights are rounded to (with a budget: most of them). Where nf4 or fp4 follow the base, `qmerge.pipeline.outputs.output_grid` knows the block size."""
        if self.format in BLOCK_SIZES:
            return Grid(self.format, 4, self.block_size or 64, True, self.double_quant is not False)
        # gptq's first version stores zero - 1, so a zero of 0 would borrow from its neighbour
        return Grid("int", self.bits, self.group_size, FIXED.get(self.format, {}).get("symmetric", self.symmetric), least_zero=1 if self.format == "gptq" else 0)

    def to_json(self) -> dict[str, Any]:
        """The fields that decide the result: no paths, no device."""
        quantizing = {"bits", "group_size", "symmetric", "bits_per_weight"} if self.format in BITS else {"block_size", "double_quant"} if self.format in BLOCK_SIZES else set()
        quantizing |= {name for name in ("quantize_head", "pad", "quick") if getattr(self, name)}
        calibrated = {"template", "generic_share", "samples", "tokens", "curvature_tokens", "seed", "polish", "low_traffic", "compute"} if self.format in QUANTIZING and not self.rtn else set()
        combined = {"combine", "density", "combine_rank", "seed"} if self.combine != SUM else set()
        wanted = {"format", "on", "nf4_recipe", "rtn", "residual_base"} | quantizing | calibrated | combined
        row = {field.name: list(value) if isinstance(value := getattr(self, field.name), tuple) else value for field in fields(self) if field.name in wanted}
        if self.nf4_recipe and self.nf4_recipe not in ("double", "single"):
            row["nf4_recipe"] = Path(self.nf4_recipe).name
        if self.combine != SUM or any(choice.weight != 1.0 for choice in self.choices) or len(self.choices) > 1:
            row["weights"] = [choice.weight for choice in self.choices]
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
                given[key.strip().replace("-", "_")] = parse_yaml(value)
            except BadYaml as problem:
                faults.append(f"--set {setting}: not YAML: {problem}")
    given |= {key: value for key, value in flags.items() if value not in (None, ())}
    recipe = _check(given, faults)
    if faults:
        many = len(faults) > 1
        raise UsageProblem(f"{len(faults)} things are wrong with what was asked for" if many else faults[0], found="\n              ".join(faults) if many else None, fix="see --help of this command; qmerge recipe check FILE reads a recipe alone")
    return recipe


def missing_in(file: str) -> tuple[str, ...]:
    """What the recipe ``file`` leaves to flags among what every merge needs. Faults of the file are left to `build_recipe`."""
    found = _read_file(file, [])
    return tuple(name for name in NEEDED if found.get(name) is None)


def _read_file(file: str, faults: list[str]) -> dict[str, Any]:
    path = Path(file)
    if not path.is_file():
        faults.append(f"--recipe {file}: no such file")
        return {}
    try:
        content = read_yaml(path)
    except (BadYaml, OSError) as problem:
        faults.append(f"--recipe {file}: not YAML: {problem}")
        return {}
    if not isinstance(content, dict):
        faults.append(f"--recipe {file}: expected a mapping of settings, found {type(content).__name__}")
        return {}
    found: dict[str, Any] = {}
    for key, value in content.items():
        name = str(key).replace("-", "_")
        if name in found:
            faults.append(f"--recipe {file}: {name[:80]!r} is set twice, once with - and once with _")
        found[name] = value
    return found


_KINDS: dict[str, tuple[type, ...]] = {
    "int": (int,), "float": (float, int), "bool": (bool,), "str": (str,), "str | None": (str, type(None)), "float | None": (float, int, type(None)),
    "int | None": (int, type(None)), "int | str | None": (int, str, type(None)), "bool | None": (bool, type(None)), "tuple[str, ...]": (tuple,),
}  # fmt: skip
SPOKEN = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text", "int | str": "a size in bytes", "tuple[str, ...]": "a list of texts"}


def _check(given: dict[str, Any], faults: list[str]) -> Recipe:
    known = {field.name: str(field.type) for field in fields(Recipe)}
    _split_lists(given)
    unknown = sorted(given.keys() - known.keys())
    for key in unknown:
        near = get_close_matches(key[:80], known, n=1) if len(unknown) <= 10 else []  # many are no typos, and each look takes a while
        faults.append(f"unknown setting {key[:80]!r}; " + (f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"))
    for key, kind in known.items():
        if key in given and (not isinstance(given[key], _KINDS[kind]) or ("bool" not in kind and isinstance(given[key], bool))):
            faults.append(f"{key}: expected {SPOKEN[kind.removesuffix(' | None')]}, found {repr(given[key])[:120]}")
            del given[key]
    if given.get("format") in FIXED:
        given = FIXED[given["format"]] | given
    if given.get("quick") is True:
        given = {"curvature_tokens": QUICK_TOKENS} | given
    recipe = replace(Recipe(), **{key: value for key, value in given.items() if key in known})
    for key in NEEDED:
        if not getattr(recipe, key):
            faults.append(f"--{key} is missing")
    check_values(recipe, faults)
    return recipe


def _split_lists(given: dict[str, Any]) -> None:
    """``adapter`` and ``polish`` may come as one string (a comma list for the latter) or as a YAML list."""
    for key in ("adapter", "polish"):
        value = given.get(key)
        items = [value] if isinstance(value, str) else value
        if not isinstance(items, (list, tuple)) or not all(isinstance(item, str) for item in items):
            continue
        given[key] = tuple(items) if key == "adapter" else tuple(dict.fromkeys(part.strip() for item in items for part in item.split(",") if part.strip()))


def read_nf4_recipe(value: str | None) -> Nf4Recipe | None:
    """``double``, ``single``, or a file that says how the base was quantized while training: bitsandbytes' JSON, or a training config of Axolotl, LLaMA-Factory or TRL."""
    if value is None:
        return None
    if value in ("double", "single"):
        return Nf4Recipe(double_quant=value == "double")
    return recipe_from_file(value)


def nf4_recipe_of(recipe: Recipe, adapters: tuple[Adapter, ...]) -> Nf4Recipe | None:
    """What the user said, else what an adapter's folder says about its training, where that is no guess."""
    if recipe.nf4_recipe is not None or recipe.on == "original":
        return read_nf4_recipe(recipe.nf4_recipe)
    found = {told for adapter in adapters if (told := recipe_from_adapter(adapter.config, adapter.path)) is not None}
    return found.pop() if len(found) == 1 else None
