"""Which tensors does a requantized output hold, in the order in which they are made?"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import torch

from qmerge.formats import nf4
from qmerge.pipeline import outputs
from qmerge.pipeline.before import Work
from qmerge.pipeline.calibrate import Calibration
from qmerge.pipeline.candidates import Linear
from qmerge.pipeline.distill import DistillSettings, distill
from qmerge.pipeline.kept import Kept
from qmerge.pipeline.kept_together import KeptTogether
from qmerge.pipeline.merge import Merged
from qmerge.pipeline.plan import MergePlan
from qmerge.pipeline.requantize import Solved, Steps, round_to_nearest
from qmerge.pipeline.spread import solved_apart
from qmerge.pipeline.streams import USUAL, Count, Place, requantize_blocks
from qmerge.ranks import ALONE, Ranks
from qmerge.types import Grid, QuantState, known


def tensors(
    plan: MergePlan, merged: Merged, calibration: Calibration | None, work: Work, kept: Kept | KeptTogether, progress: Callable[[str], None], steps: Steps | None = None,
    ranks: Ranks = ALONE, place: Place = USUAL, inside: Count | None = None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of the output by name, each once; not those of linears that ``kept`` knows to be in finished shards."""
    chosen = {} if work.division is None else work.division.grids
    packed = {name for name in plan.requantized if chosen.get(name, plan.recipe.grid) is not None}
    solved = _solved(plan, merged, calibration, work, kept, progress, steps, ranks, place, inside)
    trained: dict[str, torch.Tensor] = {}
    if calibration is not None and "distill" in plan.recipe.polish:
        everything = {name: result for _, found in solved for name, result in found.items()}
        better = distill(plan, merged, calibration, everything, outputs.model_dtype(plan), DistillSettings(seed=plan.recipe.seed), workdir=known(kept.run.folder).journal, progress=progress, stop=kept.run.stop)
        work.distilled, trained = better.record | {"floats": sorted(better.floats)}, better.floats
        solved = iter([(0, better.solved)])
    for name in merged.names:
        if name in plan.kept_4bit:
            yield from nf4.pack(name, known(merged.four_bit(name))).items()
        elif name not in packed:
            own = merged.float_tensor(name)  # also where it was trained: the adapter's part in it must have been used
            yield name, trained.get(name, own)
    found: dict[str, Solved] | None
    result: Solved | None
    tensor: torch.Tensor | None
    for number, found in solved:
        made: set[str] = set()
        for name, result in found.items():
            work.grids[name] = result.quantized.grid
            for key, tensor in outputs.packed(plan, name, result, work.records):
                made.add(key)
                yield key, tensor
            if name in work.traffic:
                work.records[name.removesuffix(".weight")] |= work.traffic[name].to_json()
        kept.tensors_of[number] = made
        found = result = tensor = None  # a block is no longer held while the next one is solved


def _solved(
    plan: MergePlan, merged: Merged, calibration: Calibration | None, work: Work, kept: Kept | KeptTogether, progress: Callable[[str], None], steps: Steps | None, ranks: Ranks, place: Place, inside: Count | None = None
) -> Iterator[tuple[int, dict[str, Solved]]]:
    """The units of `Kept`, each with its linears. Those in finished shards are only noted."""
    before = kept.count
    found: dict[str, Solved] | None
    for number, found in units(plan, merged, calibration, work, kept, progress, steps, ranks, place, inside):
        if number < before:
            rows = kept.facts(number)["linears"]
            merged.used_before(row["name"] for row in rows)
            for row in (row for row in rows if row["name"] not in found):
                work.grids[row["name"]] = Grid(**row["grid"])
                traffic = work.traffic.get(row["name"])
                work.records[row["name"].removesuffix(".weight")] = row["record"] | (traffic.to_json() if traffic else {})
        yield number, found
        found = None  # nor here


def units(
    plan: MergePlan, merged: Merged, calibration: Calibration | None, work: Work, kept: Kept | KeptTogether, progress: Callable[[str], None], steps: Steps | None, ranks: Ranks, place: Place, inside: Count | None = None
) -> Iterator[tuple[int, dict[str, Solved]]]:
    """(number, linears) of each unit of `Kept`, in order; a rank that does not write takes part in making them by going through them all."""
    model_dtype, like = outputs.model_dtype(plan), outputs.nf4_template(plan)
    if calibration is None:
        return _stretches(plan, merged, kept, progress, like, ranks)
    chosen = None if work.division is None else work.division.grids
    return requantize_blocks(plan, merged, calibration, model_dtype, like, progress, steps, work.traffic, chosen, work.tuned, work.curvatures.by_name, kept, ranks, place, inside)


def _stretches(plan: MergePlan, merged: Merged, kept: Kept | KeptTogether, progress: Callable[[str], None], like: QuantState | None, ranks: Ranks) -> Iterator[tuple[int, dict[str, Solved]]]:
    """Round to nearest, without calibration: the linears of a block are a unit."""
    model_dtype, blocks = outputs.model_dtype(plan), plan.tree.blocks_name + "."
    units = [list(names) for _, names in itertools.groupby(plan.requantized, key=lambda name: name[len(blocks):].partition(".")[0] if name.startswith(blocks) else "")]
    kept.expect(len(units))
    done = 0
    for number, names in enumerate(units):
        done += len(names)
        if number < kept.count:
            yield number, kept.solved(number)
            continue
        kept.solving(number)
        sizes = [torch.Size(plan.pieces.table[name].shape).numel() for name in names]
        found = solved_apart(ranks, names, sizes, lambda name: round_to_nearest(Linear(name, merged.weight(name), merged.four_bit(name), merged.delta(name)), plan.recipe.grid, model_dtype, like), model_dtype, merged.device)
        if not ranks.alone:
            merged.used_before(names)  # merged and proved by one of them
        progress(f"linear {done}/{len(plan.requantized)}")
        kept.commit(number, found, {}, None)
        kept.rest()
        yield number, found
