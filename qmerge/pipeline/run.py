"""Execute a plan: compute every output tensor, write it, and publish the folder whole."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from qmerge import formats
from qmerge.device import exact_products, limit_device, own_device, pick_device, without_triton
from qmerge.errors import Refused
from qmerge.formats import dense, registry
from qmerge.pipeline import outputs
from qmerge.pipeline.along import SameBytes, check_shared
from qmerge.pipeline.before import Work, before_the_blocks
from qmerge.pipeline.behind import Behind, KeptBehind
from qmerge.pipeline.calibrate import Calibration, load_calibration, load_tokenizer
from qmerge.pipeline.dense import DenseJob, write_dense
from qmerge.pipeline.experts import few_tokens
from qmerge.pipeline.identity import already_there, versions
from qmerge.pipeline.inputs import Digests, Steady
from qmerge.pipeline.kept import Kept
from qmerge.pipeline.kept_shards import KeptShards
from qmerge.pipeline.kept_together import KeptTogether
from qmerge.pipeline.merge import Merged
from qmerge.pipeline.plan import MergePlan
from qmerge.pipeline.requantize import Steps
from qmerge.pipeline.residence import settled
from qmerge.pipeline.resume import Resume, interrupted, joined, working
from qmerge.pipeline.stop import Stop
from qmerge.pipeline.streams import Count, Place
from qmerge.pipeline.tensors import tensors, units
from qmerge.ranks import ALONE, Ranks
from qmerge.room import peak_rss_bytes
from qmerge.store.durable import write_json
from qmerge.store.manifest import MANIFEST, build_manifest, read_manifest
from qmerge.store.runs import RunFolder
from qmerge.store.sidefiles import copy_side_files
from qmerge.store.texts import Document
from qmerge.store.writer import ShardWriter
from qmerge.types import Grid, known


@dataclass(frozen=True)
class RunReport:
    """What a run did. ``documents`` are the calibration texts, for the overlap check against evaluation text."""

    out: Path
    elapsed_s: float
    peak_rss_bytes: int
    documents: tuple[Document, ...]
    linears: dict[str, dict[str, Any]]
    notes: tuple[str, ...] = ()
    """what a user must be told at the end, such as experts that saw too few tokens"""


def quiet(_: str) -> None:
    """No progress."""


@exact_products()
def run(
    plan: MergePlan, progress: Callable[[str], None] = quiet, calibration: Calibration | None = None, count: Callable[[str, int, int], None] | None = None, steps: Steps | None = None,
    resume: Resume | None = None, stop: Stop | None = None, say: Callable[[str], None] = quiet, ranks: Ranks = ALONE, place: Place | None = None, inside: Count | None = None,
) -> RunReport:  # fmt: skip
    """Write ``plan`` to its OUT: absent or whole, never half. Raises `qmerge.errors.QmergeError` kinds only for what the inputs can cause, and `Interrupted` where it can be gone on with.

    ``progress`` gets a line per step, ``count`` a label, what is done and what there is to do. ``resume``: go on with an interrupted run of this OUT, or find that it is there already;
    ``stop``: somebody's wish to end it, ``say`` gets what a user must know of other runs. ``ranks``: the processes that share the work; the first writes, to the bytes that one alone would.
    ``place``: where things lie meanwhile (None: as `residence.settled` finds); it changes no byte. ``inside`` hears how far a block has come, as ``count``.
    """
    if plan.recipe.format in dense.DTYPES:
        return run_dense([plan], progress, count, resume, stop, say, ranks)[0]
    began = time.perf_counter()
    check_adapters(plan)
    recipe = plan.recipe
    device = pick_device(own_device(recipe.device, ranks.local_rank, ranks.local_size))
    if ranks.first and (word := without_triton(device)):
        say(word)
    if calibration is None:
        calibration = calibration_for(plan)
    check_shared([plan], calibration, steps, ranks)
    same, stop = SameBytes([plan], ranks), stop or Stop()
    merged, work = Merged(plan.base, plan.pieces, plan.adapters, device), Work()
    place = place or _placed(plan, calibration, device)
    if (limit := recipe.device_memory_bytes) is not None:
        limit_device(device, limit)
    if not ranks.first:
        _follow(plan, merged, calibration, work, same, progress, steps, stop, ranks, place)
        return RunReport(Path(recipe.out), time.perf_counter() - began, peak_rss_bytes(), (), {})
    with Digests([plan]) as inputs:
        report = _there(plan, lambda: inputs.result()[0], calibration, resume) if resume is not None else None
        if ranks.tell(report is not None):
            return known(report)
        with working(plan, calibration, steps, lambda: inputs.result()[0], resume, stop, say) as under_way:
            folder = known(under_way.folder)
            own = Kept(under_way, outputs.model_dtype(plan), device, "distill" not in recipe.polish, calibration is not None, recipe.shard_bytes)
            together = None if ranks.alone else KeptTogether(own, ranks, stop, outputs.model_dtype(plan), device, calibration is not None, lambda: same.check(inputs.result))
            before_the_blocks(plan, merged, calibration, work, together or own, progress, steps, ranks)
            writer = ShardWriter(folder.path, recipe.shard_bytes, done=own.shards, finished=own.shard)
            with torch.no_grad(), Behind(beside=ranks.alone) as behind:  # ranks speak to each other of what is kept, in one order
                for piece in tensors(plan, merged, calibration, work, together or KeptBehind(own, behind), progress, steps, ranks, place, inside):
                    behind.do(partial(writer.add_all, piece))
            writer.finish()
            merged.check_all_used()
            _finish(plan, folder, known(under_way.steady), manifest(plan, calibration, work, inputs.result()[0]), writer.digests, progress, work.grids)
    few = few_tokens(work.traffic.values())
    return RunReport(Path(recipe.out), time.perf_counter() - began, peak_rss_bytes(), calibration.documents if calibration else (), work.records, (few,) if few else ())


def _placed(plan: MergePlan, calibration: Calibration | None, device: torch.device) -> Place:
    """Where nobody has decided it from an estimate."""
    windows = None if calibration is None else (len(calibration.train), len(calibration.held_out))
    return Place(device.type != "cpu" and settled([plan], device, windows).streams_on_host)


def _follow(plan: MergePlan, merged: Merged, calibration: Calibration | None, work: Work, same: SameBytes, progress: Callable[[str], None], steps: Steps | None, stop: Stop, ranks: Ranks, place: Place) -> None:
    """The part of a rank that does not write. Raises Interrupted where the run can be gone on with."""
    if ranks.tell():
        return
    model_dtype = outputs.model_dtype(plan)
    with contextlib.ExitStack() as stack:
        inputs = stack.enter_context(Digests([plan])) if same.hashes else None
        kept = KeptTogether(None, ranks, stop, model_dtype, merged.device, calibration is not None, lambda: same.check(inputs.result if inputs else list))
        try:
            before_the_blocks(plan, merged, calibration, work, kept, progress, steps, ranks)
            with torch.no_grad():
                for _ in units(plan, merged, calibration, work, kept, progress, steps, ranks, place):
                    pass
        except BaseException as problem:
            raise interrupted(problem) from None


def _follow_dense(plans: list[MergePlan], device: torch.device, same: SameBytes, stop: Stop, ranks: Ranks) -> list[RunReport]:
    """The part of a rank that writes some files into the first one's folders."""
    jobs = []
    for row in ranks.tell():
        plan, folder = plans[row["plan"]], Path(row["folder"])
        if not (folder / "out").is_dir():
            raise Refused("A rank cannot see the folder that OUT grows in.", where=f"rank {ranks.rank}", expected="a file system that all ranks share: each writes some of the files", fix="run all ranks on one host, or put OUT on shared storage")
        kept = KeptShards(joined(folder, stop), partial(_has_begun, folder, stop), row["there"])
        jobs.append(DenseJob(Merged(plan.base, plan.pieces, plan.adapters, device), dense.DTYPES[plan.recipe.format], folder / "out", plan.recipe.shard_bytes, kept=kept, ranks=ranks))
    with contextlib.ExitStack() as stack:
        inputs = stack.enter_context(Digests(plans)) if same.hashes else None
        try:
            if jobs:
                write_dense(jobs, device, lambda *_: None)
                same.check(inputs.result if inputs else list)
        except BaseException as problem:
            raise interrupted(problem) from None
    return [RunReport(Path(plan.recipe.out), 0.0, peak_rss_bytes(), (), {}) for plan in plans]


@exact_products()
def run_dense(
    plans: list[MergePlan], progress: Callable[[str], None] = quiet, count: Callable[[str, int, int], None] | None = None, resume: Resume | None = None, stop: Stop | None = None,
    say: Callable[[str], None] = quiet, ranks: Ranks = ALONE,
) -> list[RunReport]:  # fmt: skip
    """Write float checkpoints, streaming: one pass over the base for all plans (which share it). Each OUT is absent or whole. The rest as in `run`; each of the ``ranks`` writes some of the
    files, so all must see the folder that OUT lies in."""
    began = time.perf_counter()
    for plan in plans:
        check_adapters(plan)
    device = pick_device(own_device(plans[0].recipe.device, ranks.local_rank, ranks.local_size))
    if ranks.first and (word := without_triton(device)):
        say(word)
    check_shared(plans, None, None, ranks)
    same, stop = SameBytes(plans, ranks), stop or Stop()
    if not ranks.first:
        return _follow_dense(plans, device, same, stop, ranks)
    with Digests(plans) as inputs:
        found = [_there(plan, partial(_nth, inputs, number), None, resume) if resume is not None else None for number, plan in enumerate(plans)]
        todo = [number for number, report in enumerate(found) if report is None]
        jobs: list[DenseJob] = []
        with contextlib.ExitStack() as stack:
            for number in todo:
                plan = plans[number]
                under_way = stack.enter_context(working(plan, None, None, partial(_nth, inputs, number), resume, stop, say))
                jobs.append(DenseJob(Merged(plan.base, plan.pieces, plan.adapters, device), dense.DTYPES[plan.recipe.format], known(under_way.folder).path, plan.recipe.shard_bytes, kept=KeptShards(under_way, inputs.ready), ranks=ranks))
            ranks.tell([{"plan": number, "folder": str(known(kept.run.folder).home), "there": kept.told()} for number, kept in zip(todo, (known(job.kept) for job in jobs), strict=True)])
            if jobs:
                write_dense(jobs, device, count or (lambda *_: None))
                same.check(inputs.result)
            for number, job in zip(todo, jobs, strict=True):
                job.merged.check_all_used()
                its = known(job.kept).run
                _finish(plans[number], known(its.folder), known(its.steady), manifest(plans[number], None, Work(job.records), inputs.result()[number]), job.digests, progress)
    for number, job in zip(todo, jobs, strict=True):
        found[number] = RunReport(Path(plans[number].recipe.out), time.perf_counter() - began, peak_rss_bytes(), (), job.records)
    return [known(report) for report in found]


def _nth(inputs: Digests, number: int) -> Mapping[str, Any]:
    return inputs.result()[number]


def _has_begun(folder: Path, stop: Stop) -> bool:
    return joined(folder, stop).began


def _there(plan: MergePlan, inputs: Callable[[], Mapping[str, Any]], calibration: Calibration | None, resume: Resume) -> RunReport | None:
    """A report where OUT is there, whole, and what was asked for. Raises Refused where it is something else and may not be replaced."""
    began, out = time.perf_counter(), Path(plan.recipe.out)
    if not (out / MANIFEST).is_file():
        return None
    if (wrong := already_there(plan, inputs(), calibration)) is None:
        note = f"{out.name} is there already, whole, and of these inputs and settings: nothing was to be done"
        return RunReport(out, time.perf_counter() - began, peak_rss_bytes(), calibration.documents if calibration else (), read_manifest(out).get("linears", {}), (note,))
    if not resume.overwrite:
        raise Refused("The output exists, and is not what this command would write.", where=str(out), found=wrong, fix="choose another name, or --overwrite")
    return None


def check_adapters(plan: MergePlan) -> None:
    """Read every adapter once and refuse NaN and Inf by name, before anything is written: adapters are small beside the base."""
    for adapter in plan.adapters:
        for part in (adapter, *([adapter.initial] if adapter.initial is not None else [])):
            for key in part.specs:
                part.source.fp32(key)


def _finish(plan: MergePlan, folder: RunFolder, steady: Steady, facts: dict[str, Any], digests: dict[str, dict[str, Any]], progress: Callable[[str], None], grids: Mapping[str, Grid] | None = None) -> None:
    """Configs and side files beside the weights, then the manifest and the name."""
    config = outputs.output_config(plan, grids)
    write_json(folder.path / "config.json", config)
    fmt = registry.of_format(plan.recipe.format)
    if fmt is not None and fmt.config_file:
        write_json(folder.path / fmt.config_file, config["quantization_config"])
    copy_side_files(plan.checkpoint.path, plan.adapters[0].path, folder.path)
    steady.check()
    progress("publishing")
    folder.commit(build_manifest(folder.path, known=digests, **facts))


def calibration_for(plan: MergePlan, documents: list[Document] | None = None) -> Calibration | None:
    """The calibration windows that the plan's recipe asks for (from ``documents`` where given), or None where the format needs none."""
    recipe = plan.recipe
    if recipe.format not in formats.QUANTIZING or recipe.rtn:
        return None
    tokenizer = load_tokenizer([*(adapter.path for adapter in plan.adapters), plan.checkpoint.path])
    context = plan.context_length or recipe.tokens
    return load_calibration(
        known(recipe.calibration), recipe.generic, tokenizer, template=recipe.template, generic_share=recipe.generic_share,
        samples=recipe.samples, tokens=min(recipe.tokens, context), seed=recipe.seed, documents=documents,
    )


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
    return {"inputs": inputs, "recipe": recipe, "versions": versions(("torch", "transformers", "peft", "bitsandbytes", "safetensors")), "extra": extra}
