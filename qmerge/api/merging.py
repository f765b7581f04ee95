"""How is a merge asked for, checked and carried out? `qmerge merge` and `qmerge.merge` both go this way."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from qmerge.api.values import MergeResult
from qmerge.errors import UsageProblem
from qmerge.ranks import ALONE, Ranks

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from qmerge.pipeline.calibrate import Calibration
    from qmerge.pipeline.estimate import Estimate
    from qmerge.pipeline.plan import MergePlan
    from qmerge.pipeline.recipe import Recipe
    from qmerge.pipeline.resume import Resume
    from qmerge.pipeline.run import RunReport
    from qmerge.pipeline.stop import Stop

Place = str | Path
"""a folder, or an id of the hub (a str)"""
Adapters = Place | Sequence[Place] | Mapping[str, float]
"""one adapter, several, or several with their weights"""
Hear = Callable[[str], None]


class Settings(TypedDict, total=False):
    """What `merge` takes beside its own arguments: the fields of `qmerge.pipeline.recipe.Recipe`, which says what they are and what holds without them."""

    bits: int
    group_size: int
    symmetric: bool
    block_size: int
    double_quant: bool
    bits_per_weight: float
    polish: str | Sequence[str]
    quantize_head: bool
    pad: bool
    low_traffic: str
    template: str
    generic: Place
    generic_share: float
    samples: int
    tokens: int
    curvature_tokens: int
    quick: bool
    seed: int
    rtn: bool
    on: str
    original: Place
    nf4_recipe: Place
    device: str
    device_memory: int | str
    compute: str
    overwrite: bool
    combine: str
    density: float
    combine_rank: int
    each: bool
    residual_base: bool
    allow_pickle: bool
    shard_size: str


@dataclass(frozen=True)
class Prepared:
    """A merge, or with ``each`` several of one base, that every check has passed. Nothing is written yet."""

    plans: tuple[MergePlan, ...]
    calibration: Calibration | None
    estimate: Estimate
    resume: Resume | None
    each: bool


def merge(
    base: Place, adapter: Adapters, out: Place, *, format: str | None = None, calibration: Place | None = None, recipe: Place | None = None, resume: bool = False, check_fit: bool = True,
    progress: Hear | None = None, **settings: Unpack[Settings],
) -> MergeResult:  # fmt: skip
    """Merge ``adapter`` into ``base`` and write one checkpoint to ``out``: whole, or not at all. The same bytes as ``qmerge merge`` with the same settings.

    ``base``, ``adapter``: a folder or an id of the hub; ``"folder#name"`` is one of several adapters in a folder. Several adapters as a list, or as ``{place: weight}``.
    ``format``: ``gptq`` (what it is where neither this nor ``recipe`` says it), ``nf4``, ``fp4``, ``compressed-tensors``, ``awq``, ``bf16``, ``fp16`` or ``fp32``.
    ``calibration``: a file, folder or hub data set of text like the adapter's training text; a quantizing format wants it, or ``rtn=True``.
    ``recipe``: a YAML file of settings. ``settings``: any other field of `qmerge.pipeline.recipe.Recipe`, such as ``tokens=512`` (per window), ``samples=64`` (windows), ``group_size=64``, ``seed=1``,
    ``overwrite=True``; each is the command's option of that name, which messages spell ``--group-size``. What is given here wins over the recipe.
    ``resume``: go on with an interrupted run of this ``out``. ``check_fit=False``: start even where disk or memory will not do. ``progress`` hears a line per step: ``print``.

    Raises `UsageProblem` for settings that cannot be, `Refused` for inputs that cannot be merged (both before anything is written), `Interrupted` for a run that ``resume=True`` can go on with.
    In a process that torchrun or srun started this is still one process's work: call it on one rank, or run the command on all.
    """
    from qmerge.pipeline.floor import floor_seconds
    from qmerge.pipeline.recipe import build_recipe

    flags: dict[str, Any] = {name: str(value) if isinstance(value, Path) else value for name, value in settings.items()}
    flags |= {"base": str(base), "adapter": adapter_words(adapter), "out": str(out), "format": format, "calibration": None if calibration is None else str(calibration)}
    wanted = build_recipe(None if recipe is None else str(recipe), (), flags)
    if wanted.each:
        raise UsageProblem("each writes several checkpoints, and qmerge.merge gives one result", where="each", fix="call it once for each adapter, or run qmerge merge --each")
    hear, notes = progress or (lambda _: None), list[str]()
    prepared = prepare(wanted, resume=resume, check_fit=check_fit, warn=notes.append)
    (done,) = carry_out(prepared, hear, lambda label, count, total: hear(f"{label} {count}/{total}"), notes.append)
    survival = {name: float(row["delta_survival"]) for name, row in done.linears.items() if "delta_survival" in row}
    nbytes = sum(file.stat().st_size for file in done.out.iterdir())
    return MergeResult(done.out, wanted.format, nbytes, done.elapsed_s, done.peak_rss_bytes, survival, (*prepared.plans[0].warnings, *notes, *done.notes), floor_seconds(prepared.estimate, wanted, resume))


def adapter_words(adapter: Adapters) -> tuple[str, ...]:
    """As ``--adapter`` takes them: ``PLACE`` or ``PLACE=WEIGHT``."""
    if isinstance(adapter, Mapping):
        return tuple(f"{place}={weight!r}" for place, weight in adapter.items())
    return (str(adapter),) if isinstance(adapter, (str, Path)) else tuple(map(str, adapter))


def prepare(recipe: Recipe, *, resume: bool = False, check_fit: bool = True, warn: Hear, ranks: Ranks = ALONE) -> Prepared:
    """Everything that can be refused, asked before anything is written. ``warn`` hears what may go wrong. Raises `UsageProblem` and `Refused`."""
    from qmerge.api.first import look_at_recipe

    asked, recipe = recipe, to_plan(recipe, resume)
    look_at_recipe(recipe, ranks.first)
    from qmerge.pipeline.plan import plan, plan_each
    from qmerge.pipeline.resume import Resume
    from qmerge.pipeline.run import calibration_for

    plans = tuple(plan_each(recipe, ranks.first)) if recipe.each else (plan(recipe, ranks.first),)
    calibration = None if recipe.each else calibration_for(plans[0])
    expected = foreseen(plans, calibration, warn, check_fit=check_fit and ranks.first, resumed=resume, processes=ranks.local_size)
    return Prepared(plans, calibration, expected, Resume(asked.overwrite) if resume else None, recipe.each)


def carry_out(prepared: Prepared, step: Hear, count: Callable[[str, int, int], None], say: Hear, stop: Stop | None = None, ranks: Ranks = ALONE, inside: Callable[[str, int, int], None] | None = None) -> list[RunReport]:
    """One report per plan. ``step`` hears a line per step, ``count`` a label, what is done and what there is to do, ``inside`` the same within a step, ``say`` what a person must know. Raises as
    `qmerge.pipeline.run.run`."""
    from qmerge.pipeline.run import run, run_dense
    from qmerge.pipeline.streams import Place

    plans = list(prepared.plans)
    if prepared.each:
        return run_dense(plans, step, count, prepared.resume, stop, say, ranks)
    return [run(plans[0], step, prepared.calibration, count, resume=prepared.resume, stop=stop, say=say, ranks=ranks, place=Place(prepared.estimate.work.streams_on_host), inside=inside)]


def to_plan(recipe: Recipe, resume: bool) -> Recipe:
    """With ``resume`` the plan must not mind that OUT is there: whether it is what was asked for is seen later, and it is replaced only where ``recipe`` itself says so."""
    return replace(recipe, overwrite=True) if resume else recipe


def foreseen(plans: Sequence[MergePlan], calibration: Calibration | None, warn: Hear, *, check_fit: bool = True, resumed: bool = False, evaluating: int = 0, processes: int = 1) -> Estimate:
    """The estimate of a run, after every check that the run itself makes before it writes. Raises Refused where the run cannot fit, unless ``check_fit`` is off.
    ``evaluating``: bytes that measuring takes later; ``processes``: as many like this one share the machine's memory."""
    from qmerge.pipeline.estimate import estimate
    from qmerge.pipeline.fit import check_fit as check
    from qmerge.pipeline.run import check_adapters
    from qmerge.room import one_heap

    for plan in plans:
        check_adapters(plan)
    if plans[0].requantized:  # a float merge lives on stretches that glibc keeps at hand
        one_heap()
    found = estimate(plans, calibration)
    if check_fit:
        for word in check(found, plans, resumed, evaluating, processes):
            warn(word)
    return found
