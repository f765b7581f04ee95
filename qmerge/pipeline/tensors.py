"""Which tensors does a requantized output hold, in the order in which they are made?"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace

import torch

from qmerge.formats import nf4
from qmerge.pipeline import outputs
from qmerge.pipeline.before import Work
from qmerge.pipeline.behind import KeptBehind
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

NONE = torch.empty(0)
"""in place of a weight that nobody asks for any more"""


def tensors(
    plan: MergePlan, merged: Merged, calibration: Calibration | None, work: Work, kept: Kept | KeptBehind | KeptTogether, progress: Callable[[str], None], steps: Steps | None = None,
    ranks: Ranks = ALONE, place: Place = USUAL, inside: Count | None = None,
) -> Iterator[Iterable[tuple[str, torch.Tensor]]]:
    """Every tensor of the output by name, each once; not those of linears that ``kept`` knows to be in finished shards. In pieces, which must be gone through in their order, but may be while the next one is made: a
    block's linears are packed then."""
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
            yield list(nf4.pack(name, known(merged.four_bit(name))).items())
        elif name not in packed:
            own = merged.float_tensor(name)  # also where it was trained: the adapter's part in it must have been used
            yield [(name, trained.get(name, own))]
        kept.wait()  # so that no two of them are held
    found: dict[str, Solved] | None
    for number, found in solved:
        work.grids |= {name: result.quantized.grid for name, result in found.items()}
        yield _packed(plan, number, to_pack(found), work, kept)
        found = None  # a block's weights are no longer held while the next one is solved


def to_pack(found: Mapping[str, Solved]) -> dict[str, Solved]:
    """What is still needed of a unit's linears: not their weights."""
    return {name: replace(result, weight=NONE) for name, result in found.items()}


def _packed(plan: MergePlan, number: int, found: Mapping[str, Solved], work: Work, kept: Kept | KeptBehind | KeptTogether) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a unit's linears; notes their records, and which they are."""
    made: set[str] = set()
    for name, result in found.items():
        for key, tensor in outputs.packed(plan, name, result, work.records):
            made.add(key)
            yield key, tensor
        if name in work.traffic:
            work.records[name.removesuffix(".weight")] |= work.traffic[name].to_json()
    kept.tensors_of[number] = made


def _solved(
    plan: MergePlan, merged: Merged, calibration: Calibration | None, work: Work, kept: Kept | KeptBehind | KeptTogether, progress: Callable[[str], None], steps: Steps | None, ranks: Ranks, place: Place, inside: Count | None = None
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
    plan: MergePlan, merged: Merged, calibration: Calibration | None, work: Work, kept: Kept | KeptBehind | KeptTogether, progress: Callable[[str], None], steps: Steps | None, ranks: Ranks, place: Place, inside: Count | None = None
) -> Iterator[tuple[int, dict[str, Solved]]]:
    """(number, linears) of each unit of `Kept`, in order; a rank that does not write takes part in making them by going through them all."""
    model_dtype, like = outputs.model_dtype(plan), outputs.nf4_template(plan)
    if calibration is None:
        return _stretches(plan, merged, kept, progress, like, ranks)
    chosen = None if work.division is None else work.division.grids
    return requantize_blocks(plan, merged, calibration, model_dtype, like, progress, steps, work.traffic, chosen, work.tuned, work.curvatures.by_name, kept, ranks, place, inside)


def _stretches(plan: MergePlan, merged: Merged, kept: Kept | KeptBehind | KeptTogether, progress: Callable[[str], None], like: QuantState | None, ranks: Ranks) -> Iterator[tuple[int, dict[str, Solved]]]:
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
        kept.wait()
        sizes = [torch.Size(plan.pieces.table[name].shape).numel() for name in names]
        found = solved_apart(ranks, names, sizes, lambda name: round_to_nearest(Linear(name, merged.weight(name), merged.four_bit(name), merged.delta(name)), plan.recipe.grid, model_dtype, like), model_dtype, merged.device)
        if not ranks.alone:
            merged.used_before(names)  # merged and proved by one of them
        progress(f"linear {done}/{len(plan.requantized)}")
        kept.commit(number, found, {}, None)
        kept.rest()
        yield number, found
