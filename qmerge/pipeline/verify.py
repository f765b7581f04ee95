"""Does a written checkpoint hold what its manifest, its own files and (when named) its inputs say?

Float tensors are derived again exactly. Requantized linears are not solved again (that needs the calibration text): their unpacked weights are held against
W + ΔW derived anew, and the distance and slope between the two must be what the manifest recorded when they were solved.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qmerge.errors import QmergeError, Refused
from qmerge.formats import dense, gptq
from qmerge.formats import nf4 as nf4_format
from qmerge.formats.base import Nf4Recipe, open_base
from qmerge.numerics import nf4
from qmerge.numerics.distances import weight_fit
from qmerge.pipeline.calibrate import load_tokenizer
from qmerge.pipeline.merge import Merged
from qmerge.pipeline.skeleton import Skeleton, build_skeleton
from qmerge.store.adapter import LoraAdapter, open_adapter
from qmerge.store.checkpoint import Checkpoint, open_checkpoint
from qmerge.store.manifest import MANIFEST, input_digests, read_manifest, verify_files
from qmerge.types import Grid

SAME = 2e-5
"""how far a distance or slope derived again may lie from the recorded one: fp32 products differ a little between machines, a changed scale differs more"""


@dataclass(frozen=True)
class Check:
    name: str
    passed: bool
    detail: str


def verify(out: str, base: str | None = None, adapter: str | None = None) -> list[Check]:
    """All checks in order. Raises `QmergeError` only where there is nothing to check (no folder, no manifest)."""
    folder = Path(out)
    if not folder.is_dir():
        raise Refused("there is no such folder", where=out, expected="a checkpoint that qmerge wrote", found="nothing" if not folder.exists() else "a file")
    if not (folder / MANIFEST).is_file():
        raise Refused("qmerge did not write this folder", where=out, expected=MANIFEST, found="none", fix="verify checks what qmerge merge and qmerge run wrote")
    manifest = read_manifest(folder)
    inputs = (open_checkpoint(base), open_adapter(adapter)) if base and adapter else None
    problems = verify_files(folder)
    checks = [Check("files", not problems, "; ".join(problems[:5]) or f"{len(manifest['files'])} files have the size and SHA-256 of the manifest")]
    try:
        checkpoint = open_checkpoint(out)
        checks.append(Check("headers", True, f"{len(checkpoint.specs)} tensors, headers and index agree"))
        skeleton = build_skeleton(checkpoint)
        checks.append(Check("config", True, f"transformers builds {type(skeleton.model).__name__} from it"))
        checks.append(_weights(checkpoint, skeleton))
        checks.append(_tokenizer(folder))
        if inputs:
            checks += _inputs(manifest, checkpoint, skeleton, *inputs)
    except QmergeError as problem:
        checks.append(Check("reading", False, f"{problem.what} ({problem.where})"))
    return checks


def _tokenizer(folder: Path) -> Check:
    try:
        tokenizer = load_tokenizer([folder])
    except QmergeError as problem:
        return Check("tokenizer", False, problem.what)
    return Check("tokenizer", True, f"{len(tokenizer)} tokens")


class Written:
    """The weights of a written checkpoint as fp32 ``[out, in]``."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        settings: dict[str, Any] = checkpoint.config.get("quantization_config") or {}
        self.nf4 = nf4_format.find_quantized(checkpoint.specs)
        self.gptq = {name.removesuffix(".qweight") + ".weight" for name in checkpoint.specs if name.endswith(".qweight")}
        self.grid = Grid("int", settings.get("bits", 4), settings.get("group_size", 128), settings.get("sym", True))

    @property
    def linears(self) -> list[str]:
        return sorted(self.gptq | set(self.nf4))

    def linear(self, name: str) -> torch.Tensor:
        if name in self.nf4:
            found = nf4_format.unpack(name, self.checkpoint.load, self.checkpoint.specs, self.nf4[name])
            return nf4.dequantize(found.codes, found.state)
        return gptq.dequantize(gptq.unpack(name.removesuffix(".weight"), self.checkpoint.load, self.grid))


def _weights(checkpoint: Checkpoint, skeleton: Skeleton) -> Check:
    written = Written(checkpoint)
    bad = [name for name in written.linears if not torch.isfinite(written.linear(name)).all()]
    parts = {part for name in written.nf4 for part in nf4_format.components(name)[1:]}
    parts |= {f"{name.removesuffix('.weight')}.{suffix}" for name in written.gptq for suffix in gptq.SUFFIXES}
    floats = [name for name in checkpoint.specs if name not in parts and name not in written.nf4]
    bad += [name for name in floats if checkpoint.specs[name].dtype in ("BF16", "F16", "F32") and not torch.isfinite(checkpoint.load(name)).all()]
    held = set(floats) | set(written.linears)
    tied = {skeleton.output_embedding} if skeleton.tied else set()
    missing = sorted({name for name, _ in skeleton.model.named_parameters(remove_duplicate=False)} - held - tied)
    if bad or missing:
        return Check("weights", False, f"{bad[0]} is not finite" if bad else f"{missing[0]} is missing")
    return Check("weights", True, f"{len(written.linears)} quantized linears unpack, {len(floats)} float tensors, all finite")


def _inputs(manifest: dict[str, Any], checkpoint: Checkpoint, skeleton: Skeleton, source: Checkpoint, adapter: LoraAdapter) -> list[Check]:
    recipe = manifest["recipe"]
    checks = []
    for role, found in (("base", source), ("adapter", adapter)):
        same = {n: f["sha256"] for n, f in input_digests(found)["files"].items()} == {n: f["sha256"] for n, f in manifest["inputs"][role]["files"].items()}
        checks.append(Check(role, same, f"{found.name} is {'' if same else 'not '}what the manifest names"))
    fly = recipe.get("nf4")
    base = open_base(source, on=recipe["on"], recipe=Nf4Recipe(**fly) if fly else None, linears=skeleton.linears)
    merged = Merged(base, adapter, torch.device("cpu"))
    written = Written(checkpoint)
    checks.append(_floats(written, merged, recipe["format"], skeleton))
    return checks + ([_linears(written, merged, manifest.get("linears") or {})] if written.linears else [])


def _floats(written: Written, merged: Merged, fmt: str, skeleton: Skeleton) -> Check:
    compared = 0
    for name in merged.base.names:
        if name in written.linears:
            continue
        if fmt in dense.DTYPES:
            wanted = merged.in_file_order(name, merged.weight(name)).to(dense.DTYPES[fmt])
        else:
            wanted = merged.float_tensor(name)
        if name not in written.checkpoint.specs or not torch.equal(written.checkpoint.load(name), wanted):
            return Check("float tensors", False, f"{name} is not what the inputs give")
        compared += 1
    return Check("float tensors", True, f"{compared} derived again from the inputs, equal bit for bit")


def _linears(written: Written, merged: Merged, recorded: dict[str, Any]) -> Check:
    farthest = 0.0
    for name in written.linears:
        module = name.removesuffix(".weight")
        if module not in recorded:
            same = merged.untouched(name) and torch.equal(written.linear(name), merged.weight(name))
            if not same:
                return Check("linears", False, f"{name} was kept from the base, and is not what the base holds")
            continue
        found = weight_fit(written.linear(name), merged.weight(name))
        wanted = (recorded[module].get("distance", -1.0), recorded[module].get("slope", -1.0))
        if any(abs(a - b) > SAME for a, b in zip(found, wanted, strict=True)):
            return Check("linears", False, f"{name} is not what was solved from these inputs: distance {found[0]:.6f} and slope {found[1]:.6f} to W + ΔW, the manifest says {wanted[0]:.6f} and {wanted[1]:.6f}")
        farthest = max(farthest, found[0])
    return Check("linears", True, f"{len(written.linears)} lie where the manifest says from W + ΔW derived again (at most {farthest:.3f} of ‖W‖)")
