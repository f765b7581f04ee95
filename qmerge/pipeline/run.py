"""Execute a plan: compute every output tensor, write it, and publish the folder whole."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qmerge import __version__, formats
from qmerge.device import exact_matmuls, peak_rss_bytes, pick_device
from qmerge.formats import dense, nf4, registry
from qmerge.pipeline import outputs
from qmerge.pipeline.calibrate import Calibration, load_calibration, load_tokenizer
from qmerge.pipeline.dense import DenseJob, write_dense
from qmerge.pipeline.experts import Traffic, few_tokens
from qmerge.pipeline.merge import Merged
from qmerge.pipeline.plan import MergePlan
from qmerge.pipeline.requantize import Linear, Steps, round_to_nearest
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
    records: dict[str, dict[str, Any]] = {}
    traffic: dict[str, Traffic] = {}
    grids: dict[str, Grid] = {}
    with Digests([plan]) as inputs, _output(plan) as folder:
        writer = ShardWriter(folder.path, recipe.shard_bytes)
        with torch.no_grad():
            for name, tensor in tensors(plan, merged, calibration, records, grids, progress, steps, traffic):
                writer.add(name, tensor)
        writer.finish()
        merged.check_all_used()
        _finish(plan, folder, manifest(plan, calibration, records, inputs.result()[0]), {}, progress, grids)
    return RunReport(Path(recipe.out), time.perf_counter() - began, peak_rss_bytes(), calibration.documents if calibration else (), records, tuple(filter(None, (few_tokens(traffic.values()),))))


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
            _finish(plan, folder, manifest(plan, None, job.records, found), job.digests, progress)
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


def tensors(
    plan: MergePlan, merged: Merged, calibration: Calibration | None, records: dict, grids: dict[str, Grid], progress: Callable[[str], None], steps: Steps | None = None,
    traffic: dict[str, Traffic] | None = None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of the output by name, each once. ``records`` fills with what was chosen per linear, ``grids`` with what each was solved on, ``traffic`` with
    what routed experts saw."""
    traffic = {} if traffic is None else traffic
    packed = set(plan.requantized)
    for name in merged.names:
        if name in plan.kept_4bit:
            yield from nf4.pack(name, merged.four_bit(name)).items()
        elif name not in packed:
            yield name, merged.float_tensor(name)
    model_dtype = outputs.model_dtype(plan)
    like = outputs.nf4_template(plan)
    if calibration is None:
        for number, name in enumerate(plan.requantized):
            solved = round_to_nearest(Linear(name, merged.weight(name), merged.four_bit(name), merged.delta(name)), plan.recipe.grid, model_dtype, like)
            grids[name] = solved.quantized.grid
            yield from outputs.packed(plan, name, solved, records)
            if number % 50 == 0:
                progress(f"linear {number + 1}/{len(plan.requantized)}")
        return
    for _, solved in requantize_blocks(plan, merged, calibration, model_dtype, like, progress, steps, traffic):
        for name, result in solved.items():
            grids[name] = result.quantized.grid
            yield from outputs.packed(plan, name, result, records)
            if name in traffic:
                records[name.removesuffix(".weight")] |= traffic[name].to_json()


def manifest(plan: MergePlan, calibration: Calibration | None, records: dict, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """What is known at the commit point: inputs with digests, recipe, versions, choices per linear."""
    inputs = dict(inputs) | ({"calibration": calibration.facts} if calibration else {})
    recipe = plan.recipe.to_json() | {"merged_on": "float base" if plan.recipe.on == "original" else "dequantized base"}
    if plan.base.recipe:
        recipe["nf4"] = plan.base.recipe.to_json()
    return {"inputs": inputs, "recipe": recipe, "versions": versions(), "extra": {"linears": records, "warnings": list(plan.warnings)}}


def versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {"qmerge": __version__}
    for package in ("torch", "transformers", "peft", "bitsandbytes", "safetensors"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
