"""Which operations can a calibrated merge not do without, and how long would they take alone? What its time is held against at its end, and in `scripts/bench_speed.py`."""

from __future__ import annotations

from dataclasses import dataclass

from qmerge.pipeline import memory
from qmerge.pipeline.estimate import Estimate
from qmerge.pipeline.recipe import Recipe
from qmerge.pipeline.timing import Rates, ends_gradients, statistics
from qmerge.pipeline.workload import Linears, Workload
from qmerge.ranks import ALONE, Ranks

TRIALS, TRIED_ROWS = 10, 128
"""candidates (scales and shifts), each tried on so many rows of a linear; the whole is counted once"""


@dataclass(frozen=True)
class Operations:
    """By the arithmetic that a run does them in (`Rates`): passes of the text, sums and gradients, solving. Each is counted once, in products; nothing that is read, rounded, searched or written."""

    passing: float
    summing: float
    solving: float

    @property
    def total(self) -> float:
        return self.passing + self.summing + self.solving

    def seconds(self, rates: Rates) -> float:
        return self.passing / (rates.passing or rates.flops) + self.summing / (rates.summing or rates.flops) + self.solving / rates.flops


def operations(work: Workload) -> Operations:
    """The method's own, of a dense model. Passes: 2 FLOP per weight and token in each stream. Sums, once per input: the lower half of H (in² per token) and, with a teacher, the whole of E[(x̃ - x) xᵀ] (2 in²) and, where
    a linear is added to the residual stream, of that with it (2 out in). With gradients: three products per weight, the head's three, and the lower half of G (out², or its blocks). Solving: H factored and inverted (in³),
    columns updated (out in²), and as much for the rows that each candidate is tried on."""
    tokens, blocks = work.calibration_tokens, (work.total - work.ends) / max(1, work.block)  # smaller blocks count as parts of the largest
    head = [work.head] if work.head is not None else []
    passing = blocks * tokens * 2 * (1 if work.quick else 2) * work.block
    summing = blocks * sum(statistics(work, group, tokens) for group in work.groups) + sum(statistics(work, one, tokens) for one in head)
    if work.curvature_tokens:
        summing += blocks * memory.gradient_tokens(work) * (6 * work.block + memory.curvature_rows(work)) + ends_gradients(work)
    solving = blocks * sum(_solving(work, group) for group in work.groups) + sum(_solving(work, one) for one in head)
    return Operations(passing, summing, solving)


def _solving(work: Workload, group: Linears) -> float:
    trials = 1 if work.quick else TRIALS
    return group.inputs**2 * (group.inputs + sum(out + trials * min(TRIED_ROWS, out) for out in group.outputs))


def floor_seconds(found: Estimate, recipe: Recipe, resumed: bool = False, ranks: Ranks = ALONE) -> float | None:
    """Of a whole run, at the rates that the estimate measured before it. None where that would be no floor, or not this run's: a merge without calibration; routed experts, since nobody knows beforehand which text reaches
    them; steps beyond the method (``polish``, a budget of bits); an accelerator, as rates are those of the CPU; rates that were guessed; several ranks, which one linear is not split among; a run that may go on with what
    another has done (``resumed``)."""
    work = found.work
    others = recipe.polish or recipe.bits_per_weight is not None or any(group.copies > 1 for group in work.groups)
    if not work.train or not work.groups or others or work.accelerator or found.rates.guessed or resumed or not ranks.alone:
        return None
    return operations(work).seconds(found.rates)
