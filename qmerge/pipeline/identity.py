"""Of what is a run, and is that what another one was of?

What decides the result (recipe, inputs, calibration, versions, the solver's own code) must be what it was; where it lies and what computes it may change, and that is said.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from qmerge import __version__
from qmerge.pipeline.calibrate import Calibration
from qmerge.pipeline.plan import MergePlan
from qmerge.pipeline.requantize import Steps
from qmerge.store.manifest import input_digests, portable, read_manifest, verify_files

SOLVER = ("numerics", "adapters", "formats", "pipeline", "types.py", "device.py")
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "safetensors", "numpy", "numba", "tokenizers")


def identity(plan: MergePlan, calibration: Calibration | None, steps: Steps | None, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """``fixed``: what must not change on resuming; ``free``: what may. No paths: of those only digests. ``inputs``: role -> `input_digests`. ``--device-memory`` decides where things lie and no byte of
    what comes out, so a run may go on with another one."""
    files = {role: {name: row["sha256"] for name, row in found["files"].items()} for role, found in inputs.items()}
    for number, adapter in enumerate(plan.adapters):
        if adapter.initial is not None:
            files[f"adapter_{number + 1} before training"] = {name: row["sha256"] for name, row in input_digests(adapter.initial)["files"].items()}
    recipe = plan.recipe.to_json() | {"shard_size": plan.recipe.shard_bytes}
    if plan.base.recipe:
        recipe["nf4"] = plan.base.recipe.to_json()
    fixed = {"recipe": recipe, "input": files, "versions": versions(), "solver": {"code": solver_digest()}}
    if calibration is not None:
        fixed |= {"calibration": text_facts(calibration.facts), "steps": asdict(steps or Steps())}
    places = {"base": plan.checkpoint.path} | {f"adapter {number + 1}": adapter.path for number, adapter in enumerate(plan.adapters)}
    free: dict[str, Any] = {f"the place of the {role}": hashlib.sha256(os.fsencode(Path(path).resolve())).hexdigest()[:12] for role, path in places.items()}
    free |= {"device": plan.recipe.device, "memory of the device": plan.recipe.device_memory, "threads": torch.get_num_threads(), "processor": processor()}
    return {"fixed": fixed, "free": free}


def processor() -> str:
    """What decides how the CPU rounds: also whether it has matrix units for bf16, whose sums go another way."""
    units = [name for name, there in (("bf16", "_is_avx512_bf16_supported"), ("amx", "_is_amx_tile_supported")) if getattr(torch.cpu, there, bool)()]
    return " ".join([platform.machine(), torch.backends.cpu.get_cpu_capability(), *units])


def text_facts(facts: Mapping[str, Any]) -> dict[str, Any]:
    """A calibration's facts without the names of its files."""
    return {key: {inner: item for inner, item in value.items() if inner != "source"} if isinstance(value, dict) else value for key, value in facts.items()}


def versions(packages: tuple[str, ...] = PACKAGES) -> dict[str, str]:
    """qmerge's and those of the packages that are installed."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"qmerge": __version__}
    for package in packages:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def solver_digest(parts: tuple[str, ...] = SOLVER) -> str:
    """Of the source of everything that computes."""
    home, digest = Path(__file__).parents[1], hashlib.sha256()
    for part in parts:
        for path in sorted([home / part] if part.endswith(".py") else (home / part).glob("*.py")):
            digest.update(path.relative_to(home).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def differences(before: Mapping[str, Any], now: Mapping[str, Any], where: str = "") -> list[str]:
    """What differs, each as one phrase: ``["recipe bits: 4, now 8"]``. Long values are named only."""
    found = []
    for key in sorted({*before, *now}):
        old, new = before.get(key), now.get(key)
        name = f"{where} {key}".strip()
        if isinstance(old, dict) and isinstance(new, dict):
            found += differences(old, new, name)
        elif old != new:
            told = f"{_short(old)}, now {_short(new)}"
            found.append(name if len(told) > 60 else f"{name}: {told}")
    return found


def _short(value: Any) -> str:
    return "none" if value is None else ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def already_there(plan: MergePlan, inputs: Mapping[str, Any], calibration: Calibration | None) -> str | None:
    """None where OUT holds, whole, what this plan would write; else what is wrong with it. Hashes all of it."""

    out = Path(plan.recipe.out)
    if problems := verify_files(out):
        return problems[0]
    manifest = read_manifest(out)
    there = {"recipe": manifest.get("recipe", {}), "input": {role: found.get("files") for role, found in manifest.get("inputs", {}).items() if role != "calibration"}}
    recipe = plan.recipe.to_json() | ({"nf4": plan.base.recipe.to_json()} if plan.base.recipe else {})
    wanted = {"recipe": portable(recipe), "input": {role: found["files"] for role, found in inputs.items()}}
    there["recipe"] = {key: value for key, value in there["recipe"].items() if key != "merged_on"}
    if calibration is not None:
        there["calibration"], wanted["calibration"] = text_facts(manifest.get("inputs", {}).get("calibration", {})), portable(text_facts(calibration.facts))
    found = differences(there, wanted)
    return found[0] if found else None
