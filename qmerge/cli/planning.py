"""What is said of a run before it begins, is it refused because it cannot fit, and what is said of its time at its end?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from qmerge.cli.helping import RUNNING
from qmerge.cli.options import topic
from qmerge.cli.output import say
from qmerge.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from qmerge.pipeline.estimate import Estimate
    from qmerge.pipeline.plan import MergePlan
    from qmerge.pipeline.run import RunReport

fit_option = topic(RUNNING, click.option("--no-fit-check", "unchecked", is_flag=True, help="Start even where the estimate says that disk or memory will not do. The estimate is shown all the same."))


def describe_estimate(found: Estimate, evaluating: int = 0) -> str:
    """For people, one line for each thing that is needed."""
    more = f" (up to {format_bytes(found.disk_most_bytes)} while it grows)" if found.disk_most_bytes > found.disk_bytes else ""
    rows = [
        f"reads     {format_bytes(found.bytes_in)}, writes {format_bytes(found.bytes_written)}",
        f"needs     {format_bytes(found.disk_bytes)} of disk{more}, about {format_bytes(found.ram_bytes)} of memory at its fullest ({found.fullest.name})",
    ]
    if evaluating:
        rows.append(f"          about {format_bytes(found.base_bytes + evaluating)} of memory while it is measured")
    if found.device_bytes:
        limit = "" if found.limit is None else f" of {format_bytes(found.limit.free)} {found.limit.limit}"
        lying = {"device": ", both streams of activations among it", "main memory": "; both streams of activations lie in main memory", "none": ""}[found.streams]
        rows.append(f"          about {format_bytes(found.device_bytes)}{limit} on {found.device} ({found.fullest_on_device.name}){lying} (by the same formulas; not measured on such a device)")
    on_top = ", and measuring on top" if evaluating else ""
    return "\n".join([*rows, f"takes     about {format_seconds(found.seconds)} to merge where nothing else runs{on_top}"])


def detail(found: Estimate) -> str:
    """What the lines above rest on, for ``--dry-run``."""
    rows = [f"basis     {found.rates.basis}", f"memory    {format_bytes(found.base_bytes)} of it is this process with its libraries"]
    rows += [f"          {phase.name}: {format_bytes(found.ram_at(phase))}" for phase in found.phases]
    rows += [f"            {part.name}: {format_bytes(part.nbytes)}" for part in sorted(found.fullest.parts, key=lambda part: -part.nbytes)[:4]]
    return "\n".join([*rows, *(f"disk      {name}: {format_bytes(count)}" for name, count in (found.disk | found.disk_more).items())])


def announce(found: Estimate, evaluating: int = 0) -> None:
    """At every start, on stderr."""
    say(describe_estimate(found, evaluating))


def evaluation_of(plan: MergePlan, found_bytes: int, text_tokens: int, window: int) -> int:
    """Memory that measuring ``plan``'s output takes beside this process; what the merge leaves behind (embeddings and head in fp32) counted in."""
    from qmerge.device import pick_device
    from qmerge.pipeline.workload import measure_plan
    from qmerge.quality.estimate import Measured, evaluation_bytes

    work = measure_plan(plan, pick_device("cpu"))
    method = {"nf4": "bitsandbytes", "fp4": "bitsandbytes"}.get(plan.recipe.format, plan.recipe.format)
    sizes = Measured(work.total, work.largest, work.hidden, work.inner, work.vocabulary, found_bytes, method, text_tokens, window)
    return evaluation_bytes(sizes) + 4 * work.ends


def estimate_json(found: Estimate, evaluating: int = 0) -> dict[str, Any]:
    return {"estimate": found.to_json() | ({"evaluation_ram_bytes": found.base_bytes + evaluating} if evaluating else {})}


def took(done: RunReport, floor_s: float | None) -> str:
    """At the end of a merge. ``floor_s``: what its products alone would take, where that can be told."""
    said, peak = f"merged in {format_seconds(done.elapsed_s)}", f"peak memory {format_bytes(done.peak_rss_bytes)}"
    if floor_s is None:
        return f"{said}, {peak}"
    return f"{said}, {_times(done.elapsed_s / floor_s)} times what its matrix products alone take at the rate that this machine showed at the start ({format_seconds(floor_s) if floor_s >= 1 else f'{floor_s:.2g} s'}); {peak}"


def took_json(done: RunReport, floor_s: float | None) -> dict[str, Any]:
    """``floor_s`` is null where it cannot be told."""
    return {"elapsed_s": round(done.elapsed_s, 2), "floor_s": None if floor_s is None else float(f"{floor_s:.3g}"), "peak_rss_bytes": done.peak_rss_bytes}


def _times(ratio: float) -> str:
    return f"{ratio:.1f}" if ratio < 10 else f"{ratio:.0f}"
