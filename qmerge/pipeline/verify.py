"""Does a written checkpoint hold what its manifest, its own files and (when named) its inputs say?

Float tensors are derived again exactly. Requantized linears are not solved again (that needs the calibration text): their unpacked weights are held against
W + ΔW derived anew, and the distance and slope between the two must be what the manifest recorded when they were solved.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qmerge.adapters.several_adapters import SUM, Choice, parse_choice
from qmerge.errors import QmergeError, Refused
from qmerge.formats import dense, registry
from qmerge.formats.base import Nf4Recipe
from qmerge.numerics.distances import weight_fit
from qmerge.pipeline.calibrate import load_tokenizer
from qmerge.pipeline.experts_names import held_one_by_one
from qmerge.pipeline.merge import Merged, stretches
from qmerge.pipeline.plan import MergePlan, read_inputs
from qmerge.pipeline.recipe import Recipe
from qmerge.pipeline.skeleton import Skeleton, build_skeleton
from qmerge.store.checkpoint import Checkpoint, open_checkpoint
from qmerge.store.headers import rows_of
from qmerge.store.manifest import MANIFEST, input_digests, read_manifest, verify_files
from qmerge.store.tensors import read_tensor

SAME = 2e-5
"""how far a distance or slope derived again may lie from the recorded one: fp32 products differ a little between machines, a changed scale differs more"""

NAMED = 20
"""how many wrong linears are named one by one"""


@dataclass(frozen=True)
class Check:
    name: str
    passed: bool
    detail: str


def verify(out: str, base: str | None = None, adapters: Sequence[str] = (), allow_pickle: bool = False) -> list[Check]:
    """All checks in order. ``adapters``: places, in the order of the merge; weights are the manifest's (one that is named must be it). Raises `QmergeError` only where there is nothing to check (no folder, no manifest)."""
    folder = Path(out)
    if not folder.is_dir():
        raise Refused("there is no such folder", where=out, expected="a checkpoint that qmerge wrote", found="nothing" if not folder.exists() else "a file")
    if not (folder / MANIFEST).is_file():
        raise Refused("qmerge did not write this folder", where=out, expected=MANIFEST, found="none", fix="verify checks what qmerge merge and qmerge run wrote")
    manifest = read_manifest(folder)
    inputs = _plan_again(manifest, base, adapters, allow_pickle) if base and adapters else None
    problems = verify_files(folder)
    checks = [Check("files", not problems, "; ".join(problems[:5]) or f"{len(manifest['files'])} files have the size and SHA-256 of the manifest")]
    try:
        checkpoint = open_checkpoint(out)
        checks.append(Check("headers", True, f"{len(checkpoint.specs)} tensors, headers and index agree"))
        skeleton = _class_of(checkpoint)
        checks.append(Check("config", True, f"transformers builds {type(skeleton.model).__name__} from it" if skeleton else "transformers has no class for it, so names are not held against one"))
        checks.append(_weights(checkpoint, skeleton))
        checks.append(_tokenizer(folder))
        if inputs:
            checks += _inputs(manifest, checkpoint, inputs)
    except QmergeError as problem:
        checks.append(Check("reading", False, f"{problem.what} ({problem.where})"))
    return checks


def _class_of(checkpoint: Checkpoint) -> Skeleton | None:
    """The model class; None where transformers has no such architecture and the weights are plain floats, which need none. Raises Refused for quantized ones."""
    try:
        return build_skeleton(checkpoint)
    except Refused:
        if Written(checkpoint).linears:
            raise
        return None


def _plan_again(manifest: dict[str, Any], base: str, adapters: Sequence[str], allow_pickle: bool) -> MergePlan:
    """The inputs as the manifest's recipe read them."""
    row = manifest["recipe"]
    choices = [parse_choice(text) for text in adapters]
    weights = row.get("weights") or [1.0] * sum(role.startswith("adapter") for role in manifest["inputs"])
    if len(weights) != len(choices):
        raise Refused("the checkpoint was made of another number of adapters", where=MANIFEST, expected=f"{len(weights)}", found=f"{len(choices)}")
    for choice, weight in zip(choices, weights, strict=True):
        if choice.weight not in (1.0, weight):
            raise Refused("the checkpoint was made with another weight for this adapter", where=f"--adapter {choice}", expected=f"{weight:g}, or none named", found=f"{choice.weight:g}")
    recipe = Recipe(
        base=base, adapter=tuple(str(Choice(choice.place, weight)) for choice, weight in zip(choices, weights, strict=True)), format=row["format"], on=row["on"], rtn=bool(row.get("rtn")),
        combine=row.get("combine", SUM), density=row.get("density"), combine_rank=row.get("combine_rank"), seed=row.get("seed", 0),
        residual_base=bool(row.get("residual_base")), allow_pickle=allow_pickle,
    )  # fmt: skip
    return read_inputs(recipe, _nf4_recipe(row["nf4"]) if row.get("nf4") else None)


def _nf4_recipe(row: dict[str, Any]) -> Nf4Recipe:
    return Nf4Recipe(**row | {"skip": tuple(row.get("skip", ()))})


def _tokenizer(folder: Path) -> Check:
    try:
        tokenizer = load_tokenizer([folder])
    except QmergeError as problem:
        return Check("tokenizer", False, problem.what)
    return Check("tokenizer", True, f"{len(tokenizer)} tokens")


class Written:
    """The weights of a written checkpoint as fp32 ``[out, in]``, whatever format its config names."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.settings: dict[str, Any] = checkpoint.config.get("quantization_config") or {}
        self.format = registry.of_settings(self.settings)
        if self.settings and self.format is None:
            raise Refused("the config names a quantization that this version does not write", where="config.json", expected="one of qmerge's formats", found=str(self.settings.get("quant_method")))
        self.linears = self.format.find(checkpoint.specs) if self.format else []

    @property
    def parts(self) -> set[str]:
        """The tensors of the file that make up the quantized weights."""
        return {part for name in self.linears for part in self.format.components(name)}

    def linear(self, name: str) -> torch.Tensor:
        """Raises `Refused` where a part of the weight is missing, or the config does not say how it is quantized."""
        try:
            return self.format.dequantize(self.format.unpack(name, self.checkpoint.load, self.checkpoint.specs, self.settings))
        except (KeyError, RuntimeError, ValueError) as problem:  # a part that is missing, or whose shape the config contradicts
            raise Refused("a quantized weight cannot be unpacked as the config says", where=name, found=str(problem).splitlines()[0][:200]) from problem


def _weights(checkpoint: Checkpoint, skeleton: Skeleton | None) -> Check:
    written = Written(checkpoint)
    bad = [name for name in written.linears if not torch.isfinite(written.linear(name)).all()]
    parts = written.parts
    floats = [name for name in checkpoint.specs if name not in parts]
    bad += [name for name in floats if checkpoint.specs[name].dtype in ("BF16", "F16", "F32") and not _finite(checkpoint, name)]
    missing = _missing(skeleton, set(floats) | set(written.linears), checkpoint) if skeleton else []
    if bad or missing:
        return Check("weights", False, f"{bad[0]} is not finite" if bad else f"{missing[0]} is missing")
    return Check("weights", True, f"{len(written.linears)} quantized linears unpack, {len(floats)} float tensors, all finite")


def _finite(checkpoint: Checkpoint, name: str) -> bool:
    spec = checkpoint.specs[name]
    return all(bool(torch.isfinite(read_tensor(checkpoint.path, rows_of(spec, *span))).all()) for span in stretches(spec.shape))


def _missing(skeleton: Skeleton, held: set[str], checkpoint: Checkpoint) -> list[str]:
    """Parameters of the class that no tensor of the file feeds, under whatever name transformers reads it."""
    tied = skeleton.tied_names
    absent = {name for name, _ in skeleton.model.named_parameters(remove_duplicate=False)} - held - tied
    absent -= held_one_by_one(skeleton, held) if absent else set()
    if not absent:
        return []
    from qmerge.adapters.names import relate

    return sorted(set(relate(skeleton.model, {name: spec.shape for name, spec in checkpoint.specs.items()}).missing) & absent)


def _inputs(manifest: dict[str, Any], checkpoint: Checkpoint, again: MergePlan) -> list[Check]:
    checks = []
    roles = {"base": again.checkpoint} | {("adapter" if index == 0 else f"adapter_{index + 1}"): adapter for index, adapter in enumerate(again.adapters)}
    for role, found in roles.items():
        same = {n: f["sha256"] for n, f in input_digests(found)["files"].items()} == {n: f["sha256"] for n, f in manifest["inputs"][role]["files"].items()}
        checks.append(Check(role, same, f"{found.name} is {'' if same else 'not '}what the manifest names"))
    merged = Merged(again.base, again.pieces, again.adapters, torch.device("cpu"))
    written = Written(checkpoint)
    trained = set(((manifest.get("polish") or {}).get("distill") or {}).get("floats") or ())
    checks.append(_floats(written, merged, manifest["recipe"]["format"], trained))
    return checks + ([_linears(written, merged, manifest.get("linears") or {})] if written.linears else [])


def _floats(written: Written, merged: Merged, fmt: str, trained: set[str]) -> Check:
    """``trained``: what ``--polish distill`` changed, which only the manifest's digests can vouch for."""
    compared = 0
    for name in merged.names:
        if name in written.linears or name in trained:
            continue
        dtype = dense.DTYPES.get(fmt)
        wanted = merged.float_tensor(name) if dtype is None or not merged.out_dtype(name).is_floating_point else merged.in_file_order(name, merged.weight(name)).to(dtype)
        if name not in written.checkpoint.specs or not torch.equal(written.checkpoint.load(name), wanted):
            return Check("float tensors", False, f"{name} is not what the inputs give")
        compared += 1
    return Check("float tensors", True, f"{compared} derived again from the inputs, equal bit for bit" + (f"; {len(trained)} were trained, and are held by their digests" if trained else ""))


def _linears(written: Written, merged: Merged, recorded: dict[str, Any]) -> Check:
    farthest, wrong = 0.0, {}
    for name in written.linears:
        module = name.removesuffix(".weight")
        if module not in recorded:
            if not (merged.untouched(name) and torch.equal(written.linear(name), merged.weight(name))):
                wrong[name] = "kept from the base, and not what the base holds"
            continue
        found = weight_fit(written.linear(name), merged.weight(name))
        wanted = (recorded[module].get("distance", -1.0), recorded[module].get("slope", -1.0))
        if any(abs(a - b) > SAME for a, b in zip(found, wanted, strict=True)):
            wrong[name] = f"distance {found[0]:.6f} and slope {found[1]:.6f} to W + ΔW, the manifest says {wanted[0]:.6f} and {wanted[1]:.6f}"
        farthest = max(farthest, found[0])
    if wrong:
        listed = "; ".join(f"{name}: {why}" for name, why in list(wrong.items())[:NAMED])
        more = f"; and {len(wrong) - NAMED} more" if len(wrong) > NAMED else ""
        return Check("linears", False, f"{len(wrong)} of {len(written.linears)} are not what was solved from these inputs: {listed}{more}")
    return Check("linears", True, f"{len(written.linears)} lie where the manifest says from W + ΔW derived again (at most {farthest:.3f} of ‖W‖)")
