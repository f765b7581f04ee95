"""What will a run read, write and need: bytes, room on the disk, memory at its fullest moment, time? From headers, configs and the recipe; no weights are read."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from qmerge import formats
from qmerge.device import COMPUTE, pick_device
from qmerge.formats import registry
from qmerge.pipeline import memory, outputs
from qmerge.pipeline.calibrate import Calibration
from qmerge.pipeline.plan import MergePlan
from qmerge.pipeline.residence import device_limit, phases_of, settled
from qmerge.pipeline.timing import Rates, seconds
from qmerge.pipeline.workload import Workload
from qmerge.room import Room, resident_bytes
from qmerge.store.pending import WAITING_BYTES
from qmerge.store.sidefiles import side_files
from qmerge.types import Grid, known

LIBRARIES = 40_000_000
"""what torch and numba take when they first compute: pools, compiled loops"""
HEADER_ENTRY = 78
"""bytes of a tensor in a safetensors header beside its name"""
RECORD, FACTS = 290, 3400
"""bytes of the manifest: for each linear, and for all else"""
KEPT_SCALES = 1.15
"""a solved block in the journal over its packed form: scales and zeros lie there in fp32"""


@dataclass(frozen=True)
class Estimate:
    """``disk_bytes`` must be free beside OUT; up to ``disk_most_bytes`` are used where they are (what a resumed run goes on from the sooner). ``base_bytes``: this process as it stands.
    ``seconds`` of work, libraries' start included, on the measured ``rates``."""

    work: Workload
    bytes_in: int
    bytes_written: int
    disk: dict[str, int]
    disk_more: dict[str, int]
    base_bytes: int
    phases: tuple[memory.Phase, ...]
    seconds: float
    rates: Rates
    device: str
    limit: Room | None = None
    """what may be taken of an accelerator"""

    @property
    def fullest(self) -> memory.Phase:
        """The phase that decides how much memory is needed."""
        return max(self.phases, key=lambda phase: phase.ram(self.work.accelerator))

    @property
    def ram_bytes(self) -> int:
        """Peak resident memory of the process."""
        return self.ram_at(self.fullest)

    def ram_at(self, phase: memory.Phase) -> int:
        """Resident memory of the process in a phase, with the holes in its heap."""
        return self.base_bytes + phase.ram(self.work.accelerator) + memory.holes_bytes(self.work, phase)

    @property
    def device_bytes(self) -> int:
        """Peak of what torch allocates on an accelerator, 0 on a CPU."""
        return self.fullest_on_device.on_device(self.work.accelerator)

    @property
    def fullest_on_device(self) -> memory.Phase:
        """The phase that decides how much of an accelerator is needed."""
        return max(self.phases, key=lambda phase: phase.on_device(self.work.accelerator))

    @property
    def streams(self) -> str:
        """Where the two streams of activations lie: ``none`` (no text goes through the model), ``device`` or ``main memory``."""
        return "none" if not self.work.train else "device" if self.work.accelerator and not self.work.streams_on_host else "main memory"

    @property
    def disk_bytes(self) -> int:
        return sum(self.disk.values())

    @property
    def disk_most_bytes(self) -> int:
        return self.disk_bytes + sum(self.disk_more.values())

    def to_json(self) -> dict[str, Any]:
        accelerator = self.work.accelerator
        rows = {phase.name: {"ram_bytes": self.ram_at(phase), "device_bytes": phase.on_device(accelerator), "holes_bytes": memory.holes_bytes(self.work, phase), "parts": {part.name: part.nbytes for part in phase.parts}} for phase in self.phases}
        return {
            "bytes_written": self.bytes_written, "disk_bytes": self.disk_bytes, "disk_most_bytes": self.disk_most_bytes, "disk": self.disk | self.disk_more,
            "peak_ram_bytes": self.ram_bytes, "process_bytes": self.base_bytes, "peak_device_bytes": self.device_bytes, "device_limit_bytes": None if self.limit is None else self.limit.free, "streams_in": self.streams, "fullest_phase": self.fullest.name, "phases": rows,
            "elapsed_s": round(self.seconds, 1), "elapsed_basis": self.rates.basis,
        }  # fmt: skip


def estimate(plans: Sequence[MergePlan], calibration: Calibration | None = None, base_bytes: int | None = None, rates: Rates | None = None) -> Estimate:
    """Of a run of ``plans``: one, or several float ones side by side. ``calibration``: the windows, where they are drawn already; else as many as the recipe asks for count.

    ``base_bytes`` and ``rates`` are measured on this process where they are not given.
    """
    plan, device = plans[0], pick_device(plans[0].recipe.device)
    windows = None if calibration is None else (len(calibration.train), len(calibration.held_out))
    limit = device_limit(plan.recipe, device)
    work = settled(plans, device, windows, limit)
    if base_bytes is None:
        _import_what_computes(plan, work)
        base_bytes = resident_bytes() + LIBRARIES
    rates = rates or Rates.measured(work.threads, COMPUTE.get(plan.recipe.compute, COMPUTE["fp32"]))
    bytes_written = sum(written_bytes(one) for one in plans)
    found = phases_of(plans, work)
    needed, more = working_bytes(plan, work)
    bytes_in = plan.bytes_in + sum(adapter.weight_bytes for one in plans[1:] for adapter in one.adapters)
    return Estimate(work, bytes_in, bytes_written, {"output": bytes_written} | needed, more, base_bytes, found, seconds(work, rates, bytes_in, bytes_written), rates, str(device), limit)


def with_settings(found: Estimate, plans: Sequence[MergePlan], **changes: Any) -> Estimate:
    """The estimate of the same run with other ``samples`` (fewer), ``tokens`` (fewer), ``curvature_tokens``, ``polish``, ``shard_size``."""
    recipe = replace(plans[0].recipe, **changes)
    changed = [replace(plans[0], recipe=recipe), *plans[1:]]
    work = replace(found.work, curvature_tokens=recipe.curvature_tokens if found.work.train else 0)
    if "tokens" in changes:
        windows = min(recipe.samples, found.work.calibration_tokens // recipe.tokens)
        work = replace(work, tokens=recipe.tokens, train=windows - max(1, windows // 7), held_out=max(1, windows // 7))
    if "samples" in changes:
        windows = min(recipe.samples, work.windows)
        work = replace(work, train=windows - max(1, windows // 7), held_out=max(1, windows // 7))
    needed, more = working_bytes(changed[0], work)
    return replace(found, work=work, phases=phases_of(changed, work), disk={"output": found.bytes_written} | needed, disk_more=more, seconds=seconds(work, found.rates, found.bytes_in, found.bytes_written))


def as_float(found: Estimate, plans: Sequence[MergePlan]) -> Estimate:
    """The estimate of the same merge with ``--format bf16``."""
    written = round(found.bytes_written - plans[0].bytes_out + 2 * found.work.total)
    work = replace(found.work, quantized=0, train=0, held_out=0, curvature_tokens=0)
    return replace(found, work=work, phases=memory.phases(work, 0, 0), bytes_written=written, disk={"output": written}, disk_more={}, seconds=seconds(work, found.rates, found.bytes_in, written))


def _import_what_computes(plan: MergePlan, work: Workload) -> None:
    """Libraries that the run will load are part of the process that is measured."""
    if work.quantized and not work.accelerator:
        importlib.import_module("qmerge.numerics.kernels")
    if plan.recipe.format in formats.BLOCK_SIZES or plan.base.recipe is not None:
        importlib.import_module("bitsandbytes")


def written_bytes(plan: MergePlan) -> int:
    """Bytes of all files of OUT, within a percent: tensors, headers, index, side files, configs, manifest."""
    names = list(_stored_names(plan))
    shards = max(1, -(-plan.bytes_out // plan.recipe.shard_bytes))
    headers = sum(len(name) + HEADER_ENTRY for name in names) + 64 * shards
    index = sum(len(name) + 45 for name in names) if shards > 1 else 0
    config = len(json.dumps(outputs.output_config(plan), indent=2))
    fmt = registry.of_format(plan.recipe.format)
    beside = sum((folder / name).stat().st_size for folder, name in side_files(plan.checkpoint.path, plan.adapters[0].path).values())
    return plan.bytes_out + headers + index + (2 if fmt and fmt.config_file else 1) * config + beside + RECORD * len({*plan.requantized, *plan.changed}) + FACTS


def _stored_names(plan: MergePlan) -> Iterator[str]:
    fmt, packed = registry.of_format(plan.recipe.format), {*plan.requantized, *plan.kept_4bit}
    for name in plan.pieces.table:
        if name not in packed:
            yield name
            continue
        yield from (part for part in known(fmt).components(name) if _is_written(part, outputs.output_grid(plan.recipe, plan.base, plan.pieces.table[name].source)))


def _is_written(part: str, grid: Grid) -> bool:
    """A format names every part that it may have; which ones a grid has follows from it."""
    if grid.kind == "int":
        return not (grid.symmetric and part.endswith(".weight_zero_point"))
    other = "fp4" if grid.kind == "nf4" else "nf4"
    return not part.endswith(f"__{other}") and (grid.double_quant or ".nested_" not in part)


def working_bytes(plan: MergePlan, work: Workload) -> tuple[dict[str, int], dict[str, int]]:
    """What lies beside the growing output while it grows: (what must, what may where there is room).

    The journal holds solved blocks until the shard that they go into is on the disk, the activations that enter a block (two streams; the new ones lie there before the old ones go), and the
    curvatures (pipeline.kept).
    """
    if not work.quantized:
        return {}, {}
    packed = {*plan.requantized, *plan.kept_4bit}
    solved = sum(outputs.bytes_out(plan.recipe, plan.base, plan.pieces, name, packed) for name in plan.requantized)
    blocks = solved if "distill" in plan.recipe.polish else min(plan.recipe.shard_bytes, solved)
    more = {"activations": 2 * 2 * memory.FP32 * work.calibration_tokens * work.hidden, "curvatures": memory.curvatures_bytes(work)}
    filling = min(plan.recipe.shard_bytes, plan.bytes_out) - WAITING_BYTES
    must = {"solved blocks": round(KEPT_SCALES * blocks), "the shard that is being filled": max(0, filling)}
    return {name: count for name, count in must.items() if count}, {name: count for name, count in more.items() if count}
