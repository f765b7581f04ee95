"""Is a written checkpoint what its inputs give?

Exact, bit for bit: which tensors there are, float tensors, weights kept as the base stores them, config.json, the files that are copied beside the weights. Requantized
linears are not solved again (that needs the calibration text): how far each band of their rows lies from W + ΔW, and how it leans on it, must be what was recorded when
they were solved. Whoever has the inputs too can record what fits his own codes: against him there are only a signature, or solving again.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from qmerge.adapters.choices import Choice, parse_choice
from qmerge.errors import QmergeError, Refused, UsageProblem
from qmerge.formats import QUANTIZING, dense
from qmerge.formats.nf4_recipe import Nf4Recipe
from qmerge.formats.training import recipe_from_mapping
from qmerge.numerics.distances import band_rows, fit, unpack_bands
from qmerge.pipeline.merge import Merged
from qmerge.pipeline.outputs import output_config
from qmerge.pipeline.plan import MergePlan, read_inputs, with_outputs
from qmerge.pipeline.recipe import Recipe, build_recipe
from qmerge.pipeline.written import Written, same_bits
from qmerge.store.manifest import MANIFEST, digest_file, input_digests
from qmerge.store.sidefiles import copy_side_files

SAME = 2e-5
"""how far a whole linear's distance or slope derived again may lie from the recorded one, which has six digits: files of versions before 0.2 have no bands"""

SAME_BAND = 2e-7
"""the same for a band of rows: fp32 products differ by less between machines, one changed code or scale moves more (docs/verify.md)"""

NAMED = 20
"""how many wrong linears are named one by one"""

SHOWN = 6
"""how many digits of a distance"""


@dataclass(frozen=True)
class Check:
    """One line of what `verify` says."""

    name: str
    passed: bool
    detail: str


def plan_again(manifest: Mapping[str, Any], base: str, adapters: Sequence[str], allow_pickle: bool) -> MergePlan:
    """The inputs as the manifest's recipe read them, and what becomes of each weight. Raises `Refused` where the recipe is malformed or of other inputs."""
    row = manifest.get("recipe", {})
    choices = [parse_choice(text) for text in adapters]
    weights = row.get("weights") or [1.0] * sum(role.startswith("adapter") for role in manifest.get("inputs", {}))
    if not isinstance(weights, list) or not all(isinstance(weight, (int, float)) and math.isfinite(weight) for weight in weights):
        raise Refused("the manifest's recipe is malformed", where=MANIFEST, expected="weights of adapters", found=str(weights)[:80])
    if len(weights) != len(choices):
        raise Refused("the checkpoint was made of another number of adapters", where=MANIFEST, expected=f"{len(weights)}", found=f"{len(choices)}", fix="give each adapter of the merge, in its order: manifest.json names them")
    for choice, weight in zip(choices, weights, strict=True):
        if choice.weight not in (1.0, weight):
            raise Refused("the checkpoint was made with another weight for this adapter", where=f"--adapter {choice}", expected=f"{weight:g}, or none named", found=f"{choice.weight:g}", fix="name the adapter without a weight: the manifest has it")
    settings = {field.name: row[field.name] for field in fields(Recipe) if field.name in row and field.name not in ("nf4_recipe", "template")}
    named = {"base": base, "adapter": tuple(str(Choice(choice.place, weight)) for choice, weight in zip(choices, weights, strict=True)), "out": ".", "device": "cpu"}
    try:
        recipe = build_recipe(None, (), settings | named | {"allow_pickle": allow_pickle})
        trained_with = _nf4_recipe(row["nf4"]) if row.get("nf4") else None
    except UsageProblem as problem:
        raise Refused("the manifest's recipe is malformed", where=MANIFEST, found=f"{problem.what} {problem.found or ''}".strip()) from problem
    return with_outputs(read_inputs(recipe, trained_with))


def _nf4_recipe(row: Any) -> Nf4Recipe:
    if not isinstance(row, dict):
        raise UsageProblem("nf4 in it is no object")
    return recipe_from_mapping({key: value for key, value in row.items() if value not in (None, [])}, MANIFEST)


def check_against_inputs(manifest: Mapping[str, Any], written: Written, again: MergePlan) -> list[Check]:
    """All checks against the inputs, in order."""
    roles = {"base": again.checkpoint} | {("adapter" if index == 0 else f"adapter_{index + 1}"): adapter for index, adapter in enumerate(again.adapters)}
    checks = [_input(role, found, manifest.get("inputs", {}).get(role) or {}) for role, found in roles.items()]
    merged = Merged(again.base, again.pieces, again.adapters, torch.device("cpu"))
    recorded = manifest.get("linears") or {}
    checks += [_names(written, merged, again, recorded), _config(written, again, manifest), _side_files(written.checkpoint.path, again)]
    with torch.no_grad():
        checks.append(_floats(written, merged, again, _trained(manifest)))
        if written.linears:
            checks.append(_linears(written, merged, again, recorded))
    return checks


def _input(role: str, found: Any, recorded: Mapping[str, Any]) -> Check:
    wanted = {name: digest["sha256"] for name, digest in (recorded.get("files") or {}).items()}
    same = {name: digest["sha256"] for name, digest in input_digests(found)["files"].items()} == wanted
    return Check(role, same, f"{found.name} is {'' if same else 'not '}what the manifest names")


def _names(written: Written, merged: Merged, again: MergePlan, recorded: Mapping[str, Any]) -> Check:
    """Every tensor of the merged model once, quantized where the recipe says so, and nothing else."""
    packed = set(written.linears)
    wanted = set(again.requantized) | set(again.kept_4bit)
    if again.recipe.bits_per_weight is not None:  # a budget may leave linears float: those that were not recorded
        wanted -= {name for name in again.requantized if name.removesuffix(".weight") not in recorded}
    if wrong := sorted(packed ^ wanted):
        return Check("tensors", False, f"{wrong[0]} is {'quantized, and should be float or absent' if wrong[0] in packed else 'not quantized, and should be'}")
    there = set(written.checkpoint.specs) - written.parts
    if wrong := sorted(there ^ (set(merged.names) - packed)):
        return Check("tensors", False, f"{wrong[0]} is {'no tensor of the merged model' if wrong[0] in there else 'missing'}")
    return Check("tensors", True, f"the {len(merged.names)} weights of the merged model are there, and no other")


def _config(written: Written, again: MergePlan, manifest: Mapping[str, Any]) -> Check:
    grids = {name: written.quantized(name).grid for name in written.linears if name in set(again.requantized)}
    wanted = output_config(again, grids)
    quantizer = (wanted.get("quantization_config") or {}).get("meta")
    if quantizer:  # names the version that wrote it
        wanted["quantization_config"]["meta"] = {"quantizer": [f"qmerge:{manifest['tool'].get('version')}"]}
    found = written.checkpoint.config
    wrong = sorted(key for key in wanted.keys() | found.keys() if _text(wanted.get(key)) != _text(found.get(key)))
    return Check("config again", not wrong, f"config.json: {wrong[0]} is not what the inputs give" if wrong else f"config.json says what the inputs give, {len(wanted)} settings")


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def _side_files(out: Path, again: MergePlan) -> Check:
    """Tokenizer, templates, licences: copied again into a folder for the moment, and compared."""
    with tempfile.TemporaryDirectory() as folder:
        wanted = copy_side_files(again.checkpoint.path, again.adapters[0].path, Path(folder))
        for name in wanted:
            path = out / name
            if not path.is_file() or path.is_symlink() or digest_file(path) != digest_file(Path(folder) / name):
                return Check("side files", False, f"{name} is not what the inputs give")
    foreign = [name for name in SIDE_FILES_OF_LOADERS if (out / name).exists() and name not in wanted]
    if foreign:
        return Check("side files", False, f"{foreign[0]} is in none of the inputs")
    return Check("side files", True, f"{len(wanted)} files beside the weights (tokenizer, templates, licences) are the inputs' own, byte for byte")


SIDE_FILES_OF_LOADERS = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt", "merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "chat_template.json", "generation_config.json", "preprocessor_config.json", "processor_config.json",
)  # fmt: skip
"""files that change what a model says where an input has none"""


def _trained(manifest: Mapping[str, Any]) -> set[str]:
    """The float tensors that ``--polish distill`` is recorded to have changed."""
    polish = manifest.get("polish")
    distilled = polish.get("distill") if isinstance(polish, dict) else None
    floats = distilled.get("floats") if isinstance(distilled, dict) else None
    return {name for name in floats if isinstance(name, str)} if isinstance(floats, list) else set()


def _floats(written: Written, merged: Merged, again: MergePlan, trained: set[str]) -> Check:
    """``trained`` float tensors, vectors only and only where the recipe polished, have nothing but the manifest's digests to vouch for them."""
    compared, excused = 0, 0
    packed = set(written.linears)
    for name in merged.names:
        if name in packed:
            continue
        if name in trained and "distill" in again.recipe.polish and len(merged.pieces.table[name].shape) == 1:
            excused += 1
            continue
        dtype = dense.DTYPES.get(again.recipe.format)
        wanted = merged.float_tensor(name) if dtype is None or not merged.out_dtype(name).is_floating_point else merged.in_file_order(name, merged.weight(name)).to(dtype)
        if name not in written.checkpoint.specs or not same_bits(written.checkpoint.load(name), wanted):
            return Check("float tensors", False, f"{name} is not what the inputs give")
        compared += 1
    rest = f"; {excused} norms and biases were trained (--polish distill): only the manifest's digests vouch for them" if excused else ""
    return Check("float tensors", True, f"{compared} derived again from the inputs, equal bit for bit" + rest)


def _linears(written: Written, merged: Merged, again: MergePlan, recorded: Mapping[str, Any]) -> Check:
    farthest, whose, banded, kept, wrong = 0.0, "", 0, 0, {}
    known = set(merged.names)
    for name in written.linears:
        row = recorded.get(name.removesuffix(".weight"))
        if name not in known:
            wrong[name] = "no weight of the merged model"
        elif name in again.kept_4bit:
            kept += 1
            if not same_bits(written.linear(name), merged.weight(name)):
                wrong[name] = "kept from the base, and not what the base holds"
        elif not isinstance(row, dict):
            wrong[name] = "requantized, and the manifest does not record how"
        else:
            why, distance = _compare(written.linear(name), merged.weight(name), row)
            wrong |= {name: why} if why else {}
            banded += bool(row.get("bands"))
            farthest, whose = max((farthest, whose), (distance, name))
    if unheld := sorted(module for module in recorded if f"{module}.weight" not in written.linears) if again.recipe.format in QUANTIZING else []:
        wrong[f"{unheld[0]}.weight"] = "recorded as requantized, and not in the file"
    if wrong:
        listed = "; ".join(f"{name}: {why}" for name, why in list(wrong.items())[:NAMED])
        more = f"; and {len(wrong) - NAMED} more" if len(wrong) > NAMED else ""
        return Check("linears", False, f"{len(wrong)} of {len(written.linears)} are not what was solved from these inputs: {listed}{more}")
    solved = len(written.linears) - kept
    how = f"{banded} of them band by band of their rows" if banded else "as a whole: an older version recorded no bands"
    return Check("linears", True, f"{solved} lie where the manifest says from W + ΔW derived again, {how} (farthest {farthest:.3f} of ‖W‖, {whose})" + (f"; {kept} are the base's own, bit for bit" if kept else ""))


def _compare(found: torch.Tensor, wanted: torch.Tensor, row: Mapping[str, Any]) -> tuple[str | None, float]:
    """What differs between a linear and its record, and its distance. NaN in a record is no match for anything."""
    if found.shape != wanted.shape:
        return f"shape {list(found.shape)}, and the inputs give {list(wanted.shape)}", 0.0
    near = fit(found, wanted)
    told = [float(value) if isinstance(value := row.get(key), (int, float)) else -1.0 for key in ("distance", "slope")]
    if not all(a == b or abs(a - b) <= SAME for a, b in zip((near.distance, near.slope), told, strict=True)):
        return f"distance {near.distance:.{SHOWN}f} and slope {near.slope:.{SHOWN}f} to W + ΔW, the manifest says {told[0]:.{SHOWN}f} and {told[1]:.{SHOWN}f}", near.distance
    if "bands" not in row:
        return None, near.distance
    try:
        here, there = unpack_bands(near.bands), unpack_bands(row["bands"])
    except (AttributeError, ValueError):
        return "its bands in the manifest cannot be read", near.distance
    if here.shape != there.shape:
        return f"{len(here)} bands of rows, the manifest says {len(there)}", near.distance
    off = ~((here == there) | ((here - there).abs() <= SAME_BAND)).all(1)
    if not bool(off.any()):
        return None, near.distance
    height = band_rows(tuple(found.shape))
    first = int(off.nonzero()[0])
    rows = f"rows {first * height} to {min((first + 1) * height, len(found)) - 1}"
    return f"{int(off.sum())} of {len(off)} bands of its rows lie elsewhere from W + ΔW than when they were solved, the first of them {rows}", near.distance


def explain(problem: QmergeError) -> str:
    told = [f"{label} {value}" for label, value in (("expected", problem.expected), ("found", problem.found)) if value]
    return f"{problem.what} ({problem.where})" + (f": {', '.join(told)}" if told else "")
