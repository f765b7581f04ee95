"""Execute a plan: compute every output tensor, write it, and publish the folder whole."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from qmerge import __version__, formats
from qmerge.device import exact_matmuls, peak_rss_bytes, pick_device
from qmerge.formats import dense, nf4, registry
from qmerge.pipeline import outputs
from qmerge.pipeline.budget import Division, choose_grids
from qmerge.pipeline.calibrate import Calibration, load_calibration, load_tokenizer
from qmerge.pipeline.dense import DenseJob, write_dense
from qmerge.pipeline.distill import DistillSettings, distill
from qmerge.pipeline.experts import Traffic, few_tokens
from qmerge.pipeline.gradients import Curvatures, curvatures
from qmerge.pipeline.merge import Merged
from qmerge.pipeline.plan import MergePlan
from qmerge.pipeline.requantize import Linear, Solved, Steps, round_to_nearest
from qmerge.pipeline.streams import requantize_blocks
from qmerge.store.durable import write_json
from qmerge.store.manifest import build_manifest, input_digests
from qmerge.store.publish import OutputFolder
from qmerge.store.sidefiles import copy_side_files
from qmerge.store.writer import ShardWriter
from qmerge.types import Grid


@dataclass(frozen=True)
class RunReport:
    """What a run did. ``documents`` are the calibration texts, for the overlap check against evaluation text."""

    out: Path
    elapsed_s: float
    peak_rss_bytes: int
    documents: tuple
    linears: dict[str, dict[str, Any]]
    notes: tuple[str, ...] = ()
    """what a user must be told at the end, such as experts that saw too few tokens"""


def quiet(_: str) -> None:
    """No progress."""


def run(plan: MergePlan, progress: Callable[[str], None] = quiet, calibration: Calibration | None = None, count: Callable[[str, int, int], None] | None = None, steps: Steps | None = None) -> RunReport:
    """Write ``plan`` to its OUT: absent or whole, never half. Raises `qmerge.errors.QmergeError` kinds only for what the inputs can cause.

    ``progress`` gets a line per step, ``count`` a label, what is done and what there is to do.
    """
    if plan.recipe.format in dense.DTYPES:
        return run_dense([plan], progress, count)[0]
    began = time.perf_counter()
    check_adapters(plan)
    recipe = plan.recipe
    device = pick_device(recipe.device)
    exact_matmuls()
    if calibration is None:
        calibration = calibration_for(plan)
    merged = Merged(plan.base, plan.pieces, plan.adapters, device)
    work = Work()
    with Digests([plan]) as inputs, _output(plan) as folder:
        writer = ShardWriter(folder.path, recipe.shard_bytes)
        if recipe.bits_per_weight is not None:
            work.division = choose_grids(plan, merged, calibration, outputs.model_dtype(plan), progress, work.curvatures)
        elif calibration is not None and recipe.curvature_tokens and (steps is None or steps.coupled):
            work.curvatures = curvatures(plan, merged, calibration, recipe.curvature_tokens, progress)
        with torch.no_grad():
            for name, tensor in tensors(plan, merged, calibration, work, progress, steps):
                writer.add(name, tensor)
        writer.finish()
        merged.check_all_used()
        _finish(plan, folder, manifest(plan, calibration, work, inputs.result()[0]), {}, progress, work.grids)
    shutil.rmtree(polish_folder(Path(recipe.out)), ignore_errors=True)
    few = few_tokens(work.traffic.values())
    return RunReport(Path(recipe.out), time.perf_counter() - began, peak_rss_bytes(), calibration.documents if calibration else (), work.records, (few,) if few else ())


def run_dense(plans: list[MergePlan], progress: Callable[[str], None] = quiet, count: Callable[[str, int, int], None] | None = None) -> list[RunReport]:
    """Write float checkpoints, streaming: one pass over the base for all plans (which share it). Each OUT is absent or whole."""
    began = time.perf_counter()
    for plan in plans:
        check_adapters(plan)
    device = pick_device(plans[0].recipe.device)
    exact_matmuls()
    with contextlib.ExitStack() as stack:
        inputs = stack.enter_context(Digests(plans))
        folders = [stack.enter_context(_output(plan)) for plan in plans]
        jobs = [
            DenseJob(Merged(plan.base, plan.pieces, plan.adapters, device), dense.DTYPES[plan.recipe.format], folder.path, plan.recipe.shard_bytes)
            for plan, folder in zip(plans, folders, strict=True)
        ]
        write_dense(jobs, device, count or (lambda *_: None))
        for plan, job, folder, found in zip(plans, jobs, folders, inputs.result(), strict=True):
            job.merged.check_all_used()
            _finish(plan, folder, manifest(plan, None, Work(job.records), found), job.digests, progress)
    return [RunReport(Path(plan.recipe.out), time.perf_counter() - began, peak_rss_bytes(), (), job.records) for plan, job in zip(plans, jobs, strict=True)]


def check_adapters(plan: MergePlan) -> None:
    """Read every adapter once and refuse NaN and Inf by name, before anything is written: adapters are small beside the base."""
    for adapter in plan.adapters:
        for part in (adapter, adapter.initial):
            for key in part.specs if part is not None else ():
                part.source.fp32(key)


def _output(plan: MergePlan) -> OutputFolder:
    return OutputFolder(Path(plan.recipe.out), [plan.checkpoint.path, *(adapter.path for adapter in plan.adapters)], plan.recipe.overwrite)


def _finish(plan: MergePlan, folder: OutputFolder, facts: dict[str, Any], digests: dict[str, dict[str, Any]], progress: Callable[[str], None], grids: Mapping[str, Grid] | None = None) -> None:
    """Configs and side files beside the weights, then the manifest and the name."""
    config = outputs.output_config(plan, grids)
    write_json(folder.path / "config.json", config)
    fmt = registry.of_format(plan.recipe.format)
    if fmt is not None and fmt.config_file:
        write_json(folder.path / fmt.config_file, config["quantization_config"])
    copy_side_files(plan.checkpoint.path, plan.adapters[0].path, folder.path)
    progress("publishing")
    folder.commit(build_manifest(folder.path, known=digests, **facts))


class Digests:
    """The inputs' digests, computed in a thread of their own while the work goes on, each input once; asked for at the commit point."""

    def __init__(self, plans: Sequence[MergePlan]) -> None:
        self._sources = [
            {"base": plan.checkpoint} | {("adapter" if index == 0 else f"adapter_{index + 1}"): adapter for index, adapter in enumerate(plan.adapters)} for plan in plans
        ]
        self._pool = ThreadPoolExecutor(1)

    def __enter__(self) -> Digests:
        self._found = self._pool.submit(self._all)
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _all(self) -> list[dict[str, Any]]:
        known: dict[tuple[Path, str], dict[str, Any]] = {}
        for source in (source for sources in self._sources for source in sources.values()):
            if (source.path, source.name) not in known:
                known[source.path, source.name] = input_digests(source)
        return [{role: known[source.path, source.name] for role, source in sources.items()} for sources in self._sources]

    def result(self) -> list[dict[str, Any]]:
        """Role -> digests, per plan."""
        return self._found.result()


def calibration_for(plan: MergePlan, documents: list | None = None) -> Calibration | None:
    """The calibration windows that the plan's recipe asks for (from ``documents`` where given), or None where the format needs none."""
    recipe = plan.recipe
    if recipe.format not in formats.QUANTIZING or recipe.rtn:
        return None
    tokenizer = load_tokenizer([*(adapter.path for adapter in plan.adapters), plan.checkpoint.path])
    context = plan.context_length or recipe.tokens
    return load_calibration(
        recipe.calibration, recipe.generic, tokenizer, template=recipe.template, generic_share=recipe.generic_share,
        samples=recipe.samples, tokens=min(recipe.tokens, context), seed=recipe.seed, documents=documents,
    )


@dataclass
class Work:
    """What a quantizing run learns on its way, for config and manifest: choices per linear, what each was solved on, what routed experts saw, what polishing did."""

    records: dict[str, dict[str, Any]] = field(default_factory=dict)
    grids: dict[str, Grid] = field(default_factory=dict)
    traffic: dict[str, Traffic] = field(default_factory=dict)
    tuned: list[dict[str, Any]] = field(default_factory=list)
    distilled: dict[str, Any] | None = None
    curvatures: Curvatures = field(default_factory=Curvatures)
    division: Division | None = None

    def polish(self) -> dict[str, Any]:
        """For the manifest."""
        return ({"blocks": self.tuned} if self.tuned else {}) | ({"distill": self.distilled} if self.distilled else {})


def tensors(
    plan: MergePlan, merged: Merged, calibration: Calibration | None, work: Work, progress: Callable[[str], None], steps: Steps | None = None
) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of the output by name, each once."""
    chosen = {} if work.division is None else work.division.grids
    packed = {name for name in plan.requantized if chosen.get(name, plan.recipe.grid) is not None}
    distilling = calibration is not None and "distill" in plan.recipe.polish
    solved = _solved(plan, merged, calibration, work, progress, steps)
    trained: dict[str, torch.Tensor] = {}
    if distilling:
        everything = dict(solved)
        found = distill(plan, merged, calibration, everything, outputs.model_dtype(plan), DistillSettings(seed=plan.recipe.seed), workdir=polish_folder(Path(plan.recipe.out)), progress=progress)
        work.distilled, trained = found.record | {"floats": sorted(found.floats)}, found.floats
        solved = iter(found.solved.items())
    for name in merged.names:
        if name in plan.kept_4bit:
            yield from nf4.pack(name, merged.four_bit(name)).items()
        elif name not in packed:
            own = merged.float_tensor(name)  # also where it was trained: the adapter's part in it must have been used
            yield name, trained.get(name, own)
    for name, result in solved:
        work.grids[name] = result.quantized.grid
        yield from outputs.packed(plan, name, result, work.records)
        if name in work.traffic:
            work.records[name.removesuffix(".weight")] |= work.traffic[name].to_json()


def _solved(
    plan: MergePlan, merged: Merged, calibration: Calibration | None, work: Work, progress: Callable[[str], None], steps: Steps | None
) -> Iterator[tuple[str, Solved]]:
    model_dtype, like = outputs.model_dtype(plan), outputs.nf4_template(plan)
    if calibration is None:
        for number, name in enumerate(plan.requantized):
            yield name, round_to_nearest(Linear(name, merged.weight(name), merged.four_bit(name), merged.delta(name)), plan.recipe.grid, model_dtype, like)
            if number % 50 == 0:
                progress(f"linear {number + 1}/{len(plan.requantized)}")
        return
    chosen = None if work.division is None else work.division.grids
    for _, found in requantize_blocks(plan, merged, calibration, model_dtype, like, progress, steps, work.traffic, chosen, work.tuned, work.curvatures.by_name):
        yield from found.items()


def polish_folder(out: Path) -> Path:
    """Where ``--polish distill`` keeps its state, so that a rerun of a killed run goes on from it."""
    return out.absolute().with_name(f".{out.name}.qmerge-polish")


def manifest(plan: MergePlan, calibration: Calibration | None, work: Work, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """What is known at the commit point: inputs with digests, recipe, versions, choices per linear."""
    inputs = dict(inputs) | ({"calibration": calibration.facts} if calibration else {})
    recipe = plan.recipe.to_json() | {"merged_on": "float base" if plan.recipe.on == "original" else "dequantized base"}
    if plan.base.recipe:
        recipe["nf4"] = plan.base.recipe.to_json()
    extra = {"linears": work.records, "warnings": list(plan.warnings)}
    extra |= {"curvature": work.curvatures.to_json()} if work.curvatures.linears else {}
    extra |= {"mixed_precision": work.division.to_json()} if work.division is not None else {}
    extra |= {"polish": polish} if (polish := work.polish()) else {}
    return {"inputs": inputs, "recipe": recipe, "versions": versions(), "extra": extra}


def versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {"qmerge": __version__}
    for package in ("torch", "transformers", "peft", "bitsandbytes", "safetensors"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
