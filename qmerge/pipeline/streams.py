"""How do the teacher's and the run-time activations go through the model, block by block, while it is requantized?

Two streams start at the embeddings. The teacher stream runs through the separate model (in fp32 the same function as the merged one), the run-time
stream through the model as requantized so far (``quick``: it alone). Within a block the groups of linears are requantized in the order in which they run.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from qmerge.device import COMPUTE, in_parallel, to_device, to_host
from qmerge.numerics.curvature import Curvature, Distant
from qmerge.pipeline.batches import Batch, Shelf, start
from qmerge.pipeline.block_pair import BlockPair
from qmerge.pipeline.blocks import Group, run_block
from qmerge.pipeline.calibrate import Calibration
from qmerge.pipeline.candidates import Linear
from qmerge.pipeline.experts import ARRIVALS, Traffic
from qmerge.pipeline.experts_names import ExpertWeight
from qmerge.pipeline.head import solve_head, wants_head
from qmerge.pipeline.loading import Loader, load_block
from qmerge.pipeline.merge import Merged
from qmerge.pipeline.plan import MergePlan
from qmerge.pipeline.requantize import Solved, Steps, requantize_group, round_to_nearest
from qmerge.pipeline.skeleton import set_weight
from qmerge.pipeline.spread import Spread, handed, share_out
from qmerge.ranks import ALONE, Ranks
from qmerge.room import tidy_heap
from qmerge.types import Grid, QuantState, known

if TYPE_CHECKING:
    import torch

    from qmerge.pipeline.behind import KeptBehind
    from qmerge.pipeline.kept import Kept
    from qmerge.pipeline.kept_together import KeptTogether


@dataclass(frozen=True)
class Place:
    """Where things lie while a model is requantized. ``on_host``: both streams in main memory (`batches.Shelf`); ``ahead``: the next block is read while one is solved (`loading.Loader`), None: beside
    an accelerator."""

    on_host: bool = False
    ahead: bool | None = None


USUAL = Place()
Count = Callable[[str, int, int], None]
"""a label, what is done, what there is to do"""


def requantize_blocks(
    plan: MergePlan, merged: Merged, calibration: Calibration, model_dtype: torch.dtype, nf4_like: QuantState | None, progress: Callable[[str], None], steps: Steps | None = None,
    traffic: dict[str, Traffic] | None = None, grids: Mapping[str, Grid | None] | None = None, tuned: list[dict[str, Any]] | None = None,
    curvatures: dict[str, Curvature | Distant] | None = None, kept: Kept | KeptBehind | KeptTogether | None = None,
    ranks: Ranks = ALONE, place: Place | None = None, inside: Count | None = None,
) -> Iterator[tuple[int, dict[str, Solved]]]:
    """Yields, per block, its number and the solved linears by weight name; the head comes last, where it is requantized. One block's weights and two streams are alive at a time.
    ``traffic`` fills with what routed experts saw. ``grids``: by weight name where it is not the recipe's, None for what stays float. ``tuned`` fills with what ``--polish blocks`` did.
    ``curvatures``: by weight name how rows count together; each is taken out as it is used. ``kept``: what an earlier process has solved is not solved again (without the linears whose
    tensors are in the output already), and what is solved here is kept. ``ranks``: each passes its own batches and solves its share; all of them yield the same.
    ``place`` changes no bit of it. ``inside`` hears, within a block, how many groups of linears are solved."""
    place = place or USUAL
    skeleton, grids, traffic = plan.tree, grids or {}, traffic if traffic is not None else {}
    head = grids.get(known(skeleton.output_embedding), plan.recipe.grid) if wants_head(plan) else None
    units = len(skeleton.blocks) + (head is not None)
    if kept is not None:
        kept.expect(units)
        if kept.count >= units:  # nothing is left that text has to go through
            for index in range(units):
                yield index, _recall(kept, index, traffic, tuned)
            return
    shelf = Shelf(merged.device, place.on_host)
    batches, spread = start(plan, merged, calibration, ranks, shelf=shelf)
    passed = kept.load_streams(batches) if kept is not None else 0
    with Loader(plan, merged, place.ahead) as loader:
        work = _Blocks(plan, merged, model_dtype, nf4_like, steps, grids, curvatures if curvatures is not None else {}, traffic, batches, spread, shelf, loader, inside, kept.wait if kept is not None else None)
        for index in range(len(skeleton.blocks)):
            solved: dict[str, Solved] = {}
            if kept is not None and index < kept.count:
                solved = _recall(kept, index, traffic, tuned)
                if index >= passed:
                    work.forwards(index, solved)
                    progress(f"block {index + 1}/{len(skeleton.blocks)}: as it was solved before")
                yield index, solved
                continue
            if kept is not None:
                kept.solving(index)
            solved, record = work.solve(index)
            if record is not None and tuned is not None:
                tuned.append(record)
            progress(_line(index, len(skeleton.blocks), batches, ranks, plan.recipe.quick))
            if kept is not None:
                kept.commit(index, solved, traffic, record)
                if index + 1 < units:
                    kept.save_streams(index + 1, batches)
                kept.rest()
            yield index, solved
    if head is not None:
        if kept is not None:
            kept.solving(units - 1)
            kept.wait()
        solved = solve_head(plan, merged, [(batch.teacher, batch.runtime, batch.held_out, batch.slot) for batch in batches], head, model_dtype, nf4_like, steps, spread, shelf)
        if kept is not None:
            kept.commit(units - 1, solved, traffic, None)
            kept.rest()
        yield units - 1, solved


def _recall(kept: Kept | KeptBehind | KeptTogether, index: int, traffic: dict[str, Traffic], tuned: list[dict[str, Any]] | None) -> dict[str, Solved]:
    """A unit that was solved before, with what was noted of it."""
    traffic |= kept.traffic(index)
    if (record := kept.facts(index)["tuned"]) is not None and tuned is not None:
        tuned.append(record)
    return kept.solved(index)


@dataclass
class _Blocks:
    """What every block is solved with. A block's own tensors are held by no field of it: they go when a method ends."""

    plan: MergePlan
    merged: Merged
    model_dtype: torch.dtype
    nf4_like: QuantState | None
    steps: Steps | None
    grids: Mapping[str, Grid | None]
    curvatures: dict[str, Curvature | Distant]
    traffic: dict[str, Traffic]
    batches: list[Batch]
    spread: Spread
    shelf: Shelf
    loader: Loader
    inside: Count | None = None
    before_solving: Callable[[], None] | None = None
    tidied: float = field(default_factory=time.monotonic)

    def solve(self, index: int) -> tuple[dict[str, Solved], dict[str, Any] | None]:
        """The linears of a block, by weight name, and what ``--polish blocks`` did; both streams go on behind it."""
        plan, linears = self.plan, self.plan.tree.linears
        prefix = self._prefix(index)
        routed = self._routed(prefix)
        apart = {weight.name for weight in routed}
        wanted = [name.removeprefix(prefix).removesuffix(".weight") for name in plan.requantized if name.startswith(prefix) and name not in apart]
        experts = {f"{weight.module.removeprefix(prefix)}.{ARRIVALS}": weight.module for weight in routed}
        solved: dict[str, Solved] = {}
        alone: dict[str, Linear] = {}
        record: dict[str, Any] | None = None
        with BlockPair(*load_block(self.loader, index, self.model_dtype, routed), self.batches, index, [*wanted, *experts], self.spread, self.shelf, COMPUTE[plan.recipe.compute].sums, plan.recipe.quick) as pair:
            for number, group in enumerate(pair.groups):
                if self.inside is not None:
                    self.inside(f"in block {index + 1}:", number, len(pair.groups))
                if group.modules[0] in experts:
                    self._wait()
                    here = [weight for weight in routed if weight.module == experts[group.modules[0]]]
                    solver = pair.experts(group, here, self.merged, plan, self.model_dtype, lambda linears, train, judge: requantize_group(linears, plan.recipe.grid, train, judge, self.model_dtype, self.nf4_like, len(plan.tree.blocks), self.steps),
                                          lambda linear: round_to_nearest(linear, plan.recipe.grid, self.model_dtype, self.nf4_like))  # fmt: skip
                    solver.run()
                    solved |= {name: self._hosted(result) for name, result in solver.solved.items()}
                    self.traffic |= solver.traffic
                    continue
                for module, linear in self._group(pair, prefix, group, solved).items():
                    if "blocks" in plan.recipe.polish:
                        alone[module] = linear
                pair.leave(group, weights=not experts)
                self.tidied = tidy_heap(self.tidied)
            if alone:
                record = {"block": index} | pair.tune(solved, alone, linears, self.model_dtype)
                solved = {name: self._hosted(result) for name, result in solved.items()}
            pair.advance(again=bool(alone))
        return solved, record

    def _group(self, pair: BlockPair, prefix: str, group: Group, solved: dict[str, Solved]) -> dict[str, Linear]:
        """Linears that share their inputs: ``solved`` gets them. Returns those that this rank has solved, by module."""
        conv, ranks = self.plan.tree.linears, self.spread.ranks
        names = {f"{prefix}{module}.weight": module for module in group.modules}
        grid = self.grids.get(next(iter(names)), self.plan.recipe.grid)
        if grid is None:  # a budget leaves it float
            for module in group.modules:
                set_weight(pair.runtime, f"{module}.weight", pair.teacher.get_submodule(module).get_parameter("weight").to(self.model_dtype).float())
            return {}
        owners = share_out([pair.teacher.get_submodule(module).get_parameter("weight").numel() for module in group.modules], ranks)
        curvatures = {name: self.curvatures.pop(name, None) for name in names}
        sums = pair.statistics(group, owners, conv[next(iter(names))])
        mine = [name for name, owner in zip(names, owners, strict=True) if owner == ranks.rank]
        linears = {names[name]: self._linear(pair, name, names[name], curvatures.pop(name), grid) for name in mine}
        del curvatures
        pair.aside()
        self._wait()
        own = requantize_group(list(linears.values()), grid, known(sums[0]), known(sums[1]), self.model_dtype, self.nf4_like, len(self.plan.tree.blocks), self.steps, spent=True) if linears else []
        del sums
        found = handed(ranks, owners, list(names), {linear.name: result for linear, result in zip(linears.values(), own, strict=True)}, self.model_dtype, self.merged.device)
        if "blocks" not in self.plan.recipe.polish:
            linears = {}
        pair.back()
        for (name, module), result in zip(names.items(), found, strict=True):
            set_weight(pair.runtime, f"{module}.weight", result.weight.T.contiguous() if conv[name] else result.weight)
            solved[name] = self._hosted(result)
        return linears

    def _wait(self) -> None:
        """What is done with the block before (`behind`) ends before linears of this one are solved: that is the fullest moment."""
        if self.before_solving is not None:
            self.before_solving()

    def _linear(self, pair: BlockPair, name: str, module: str, curvature: Curvature | Distant | None, grid: Grid) -> Linear:
        return Linear(name, pair.weight(module, self.plan.tree.linears[name]), self.merged.four_bit(name, grid), self.merged.delta(name), curvature.near() if curvature is not None else None)

    def _hosted(self, result: Solved) -> Solved:
        """Its weight in main memory, where streams lie there: it is needed again only to go forwards after an interruption, or to polish."""
        return replace(result, weight=to_host(result.weight)) if self.shelf.host else result

    def forwards(self, index: int, solved: Mapping[str, Solved]) -> None:
        """Both streams through a block whose linears are solved, to the bits that they had when that was done."""
        linears, prefix = self.plan.tree.linears, self._prefix(index)
        routed = self._routed(prefix)
        teacher, runtime = load_block(self.loader, index, self.model_dtype, routed)
        apart = {weight.name: weight for weight in routed}
        for name in (name for name in self.plan.requantized if name.startswith(prefix)):
            inner = name.removeprefix(prefix)
            if name in apart:
                apart[name].region.write(runtime.get_parameter(apart[name].parameter.removeprefix(prefix)).data, to_device(solved[name].weight, self.shelf.device))
            elif name in solved:
                weight = to_device(solved[name].weight, self.shelf.device)
                set_weight(runtime, inner, weight.T.contiguous() if linears[name] else weight)
            else:  # a budget left it float
                set_weight(runtime, inner, teacher.get_parameter(inner).to(self.model_dtype).float())
        shelf = self.shelf

        def go_on(batch: Batch) -> None:
            batch.runtime = shelf.put(run_block(runtime, shelf.take(batch.runtime), batch.calls[index]))
            batch.teacher = batch.runtime if self.plan.recipe.quick else shelf.put(run_block(teacher, shelf.take(batch.teacher), batch.calls[index]))

        in_parallel(go_on, self.batches, shelf.device)

    def _prefix(self, index: int) -> str:
        return f"{self.plan.tree.blocks_name}.{index}."

    def _routed(self, prefix: str) -> list[ExpertWeight]:
        return [weight for weight in self.plan.routed if weight.name.startswith(prefix)]


def _line(index: int, count: int, batches: list[Batch], ranks: Ranks, quick: bool) -> str:
    if quick:
        return f"block {index + 1}/{count}"
    own = [(batch.number, float((batch.runtime - batch.teacher).square().sum()), float(batch.teacher.square().sum())) for batch in batches if batch.held_out]
    rows = sorted(tuple(row) for rows in ranks.hear(own) for row in rows)
    error, size = sum(row[1] for row in rows), sum(row[2] for row in rows)
    return f"block {index + 1}/{count}: held-out error of the hidden states {error / max(size, 1e-30):.2e} of their power"
