"""How much does a block hold while text passes it, while sums are formed, and while a group of its linears is solved?

Each figure is so many bytes per element of a weight, a square of inputs, or a token, read off the code that allocates it.
"""

from __future__ import annotations

from collections.abc import Mapping

from qmerge.numerics.hessian import SLOTS, STRIP
from qmerge.pipeline.batches import TOKENS_PER_BATCH
from qmerge.pipeline.block_pair import TAPE_BYTES
from qmerge.pipeline.memory_parts import FP32, Phase, around, curvature_rows, hidden_bytes, largest, lying, phase, scores
from qmerge.pipeline.requantize import DEVICE_STRETCH, STRETCH, TOGETHER, TRIAL_ROWS
from qmerge.pipeline.workload import Linears, Workload

STATISTICS = 16
"""of inputs squared: H and D of the windows to solve on and of those to choose with, fp32 (numerics.hessian.Statistics); sums become means where they lie"""
FACTORING, FACTOR = 12, 4
"""of inputs squared, in passing: the damped Hessian in fp64, in which it is factored and inverted (numerics.hessian.factor), and the factor in fp32; the factor stays"""
RUNNING = 62
"""of the elements of a linear's rows that go through all turns together: target, goal, grid, values and their product with H (rows.solve_rows)"""
TURNS = 5
"""of a linear's elements: its codes after each turn (rows.Rows)"""
FINISHING = 14
"""of a linear's elements, in passing: values, and what is compared (requantize._finish)"""
AIM = 4
"""of a linear's elements, while its group is solved: W D for the judge, and once more for the target where that is no larger than D (requantize._Job)"""
INT_GRID, BOOK_GRID = 0.25, 4
"""of a linear's elements, for each grid tried: scale and zero of a group, or the scale alone, element by element (numerics.gptq.ElementGrid)"""
SEARCHING = (8, 20)
"""of a linear's elements on an accelerator, in passing, for whole numbers and for code books: what a trial gives, its weights (numerics.grids); a CPU's loops need none of it"""
TRYING = 20
"""of the elements of the rows that shifts are tried with, for each of those that are tried together: targets, solved and judged (requantize._try)"""
COUPLING, COUPLING_FACTORING = 8, 36
"""of a curvature's elements: the metric and the feed; in passing, of one block of rows, that in fp64 in its order, reversed, and its inverse (numerics.coupled._rows)"""


def inside_bytes(work: Workload) -> int:
    """What every module of a block gives out, over all tokens: decides whether each stream passes a block once (streams.TAPE_BYTES)."""
    outputs = sum(sum(group.outputs) for group in work.groups if group.copies == 1)
    return FP32 * work.calibration_tokens * (outputs + 6 * work.hidden + work.inner)


def captured_bytes(work: Workload) -> int:
    """Inputs of all groups of a block, and the residual stream half-way, of one stream."""
    return FP32 * work.calibration_tokens * (sum(group.inputs for group in work.groups if group.copies == 1) + work.hidden)


def blocks(work: Workload, pending: Mapping[str, float]) -> list[Phase]:
    """The fullest moments of a block. ``pending``: what waits in main memory."""
    host = {**pending, "curvatures of a block": 2 * curvature_rows(work) if work.curvature_tokens else 0}
    return _on_device(work, host) if work.accelerator else _on_cpu(work, host)


def _on_cpu(work: Workload, host: Mapping[str, float]) -> list[Phase]:
    """When text enters it, and while a group is solved."""
    taped = inside_bytes(work) <= TAPE_BYTES
    hidden, together = hidden_bytes(work, work.calibration_tokens), min(work.threads, -(-work.calibration_tokens // TOKENS_PER_BATCH))
    batch = _batch(work)
    passing = together * _passing(work)
    once, walked = captured_bytes(work) if taped and not work.quick else 0, captured_bytes(work) if taped else 0
    streams = (3 if taped else 2) - work.quick
    held = {"what lies around the blocks": FP32 * around(work)}
    entering = held | {"streams of hidden states": streams * hidden, "inputs of linears": once + walked, "a pass forwards": passing, "a block in fp32": FP32 * work.block}
    before = {"the block before, on its way to the disk": (1 + FP32) * work.solved if work.blocks > 1 else 0}  # pipeline.behind; it is there before linears are solved
    found = [phase("entering a block", {**host, **before}, entering)]
    solved, best = 0, None
    for number, group in enumerate(work.groups):
        solved += group.elements * group.copies
        own = 0 if taped else FP32  # of the run-time block, beside the teacher's: those of solved groups are let go where nothing passes them again
        weights = FP32 * work.block + solved * (1 + own) + group.elements * ((FP32 if group.edited else 0) + _base(work, group) - own)
        passed = FP32 * work.calibration_tokens * sum(other.inputs for other in work.groups[:number] if other.copies == 1) if taped else 0
        tokens = work.train * work.tokens if taped else together * batch
        moving = FP32 * tokens * (group.inputs + (work.hidden if group.writer else 0)) + (0 if taped else passing)
        parts = held | {"streams of hidden states": streams * hidden, "inputs of linears": once + walked - passed * (1 if work.quick else 2), "a block in fp32, its codes, deltas of a group": weights}
        here = phase("solving", host, parts | _moments(work, group, moving))
        if best is None or here.ram(False) > best.ram(False):
            best = here
    return [*found, best] if best is not None else found


def _on_device(work: Workload, host: Mapping[str, float]) -> list[Phase]:
    """While text passes it, while a group's sums are formed, and while the group is solved (block_pair.BlockPair). Where streams lie in main memory, so do sums that wait and, while a group is solved,
    the block."""
    taped, away = inside_bytes(work) <= TAPE_BYTES, work.streams_on_host
    routed = sum(group.elements * group.copies for group in work.groups if group.copies > 1)
    held, whole = {"what lies around the blocks": FP32 * around(work)}, FP32 * (work.block + routed)
    streams = {"streams of hidden states": ((3 if taped else 2) - work.quick) * hidden_bytes(work, work.calibration_tokens), "inputs of linears": captured_bytes(work) if taped and not work.quick else 0,
               "what reaches the experts": 2 * hidden_bytes(work, work.calibration_tokens) if routed else 0}  # fmt: skip
    waiting = {**host, "solved linears": work.solved * (1 + FP32), "the next block, read ahead": FP32 * work.block if work.blocks > 1 else 0}
    if away:
        waiting |= {"the block, while a group is solved": whole + (0 if taped else FP32 * work.solved), "sums that wait": max((sums_bytes(work, group) for group in work.groups), default=0)}
    found = [phase("entering a block", *lying(work, streams, waiting, held | {"a pass forwards": _passing(work), "a block in fp32": whole}))]
    moments: list[Phase] = []
    solved = 0
    for group in work.groups:
        block = {"a block in fp32": whole + (0 if taped else FP32 * solved)}
        solved += group.elements if group.copies == 1 else 0
        once = sums_bytes(work, group) // 2
        sums = {"sums": once * (3 if group.copies > 1 else 1 if away else 2), "inputs of a slot": _slot_inputs(work, group), "a pass forwards": _passing(work), "strips that are open": 3 * FP32 * min(STRIP, group.inputs) * group.inputs}
        moments.append(phase("summing", *lying(work, streams, waiting, held | block | sums)))
        apart = away and group.copies == 1
        own = group.elements * ((FP32 if apart else 0) + (FP32 if group.edited else 0) + _base(work, group))
        moments.append(phase("solving", *lying(work, streams, waiting, held | ({} if apart else block) | {"weights and deltas of a group": own} | solving(work, group))))
    best = {name: max((moment for moment in moments if moment.name == name), key=lambda moment: moment.on_device(True)) for name in dict.fromkeys(moment.name for moment in moments)}
    return [*found, *best.values()]


def _base(work: Workload, group: Linears) -> int:
    """Of an element: the base's own code, where it is a candidate (and of experts)."""
    return 1 if work.base_4bit and (group.copies > 1 or work.format in formats_of_books()) else 0


def _batch(work: Workload) -> int:
    """Tokens of a batch."""
    return min(max(TOKENS_PER_BATCH, work.tokens), work.calibration_tokens)


def _passing(work: Workload) -> int:
    """What a batch's pass through a block holds."""
    return FP32 * _batch(work) * (3 * work.inner + 4 * work.hidden) + scores(work, _batch(work))


def _slot_inputs(work: Workload, group: Linears) -> int:
    """On an accelerator: a slot's factors as they are multiplied, and one batch's inputs before they are rounded to that (block_pair.BlockPair.statistics)."""
    batch = _batch(work)
    batches = -(-work.train * work.tokens // batch)
    rest = work.hidden if group.writer and not work.quick else 0
    return -(-batches // SLOTS) * batch * work.factor_bytes * ((1 if work.quick else 2) * group.inputs + rest) + FP32 * batch * 2 * (group.inputs + rest)


def _moments(work: Workload, group: Linears, moving: int) -> dict[str, float]:
    """The fuller of two moments: while statistics are summed, and while the group is solved."""
    return largest(({"statistics": sums_bytes(work, group), "slots and strips that are open": _slot(work, group), "differences of inputs": moving}, solving(work, group)))


def sums_bytes(work: Workload, group: Linears) -> int:
    """Of the windows to solve on and of those to choose with."""
    if work.quick:  # H alone
        return STATISTICS // 2 * group.inputs**2
    residual = 2 * FP32 * group.elements if group.writer else 0
    return STATISTICS * group.inputs**2 + residual


def _slot(work: Workload, group: Linears) -> int:
    """Strips of the slot that is being summed; all of it where a slot's batches do not come in one go (numerics.hessian.Statistics)."""
    batches = -(-work.train // max(1, TOKENS_PER_BATCH // max(1, work.tokens)))
    strips = work.threads * FP32 * 3 * min(STRIP, group.inputs) * group.inputs
    if batches <= SLOTS or inside_bytes(work) <= TAPE_BYTES:
        return strips
    return strips + STATISTICS // (4 if work.quick else 2) * group.inputs**2 + (FP32 * group.elements if group.writer and not work.quick else 0)


def solving(work: Workload, group: Linears) -> dict[str, float]:
    """The fullest moment: W D is formed; H is factored; scales are searched; rows of the linears are solved, as many stretches at a time as there are threads."""
    squares, known = group.inputs**2, sums_bytes(work, group)
    residual = FP32 * group.elements if group.writer and not work.quick else 0
    small = all(out <= group.inputs for out in group.outputs)  # then D is needed no more once W D is there
    aims = AIM * group.inputs * sum(out * (2 if out <= group.inputs else 1) for out in group.outputs)
    # of the sums that choose H alone is left once it is known what judges want (known.Known.learned); experts' sums are used again
    judged = work.factor_bytes if group.copies == 1 else FP32  # of each of its elements (Statistics.round_hessian)
    left = known if group.copies > 1 else (FP32 + judged) * squares + residual + (0 if work.quick or small else FP32 * squares)
    parked = judged * squares if work.streams_on_host and group.copies == 1 else 0  # that H, until it is asked for (numerics.hessian.Statistics.park)
    grids = INT_GRID if work.format not in formats_of_books() else BOOK_GRID * (2 if work.base_4bit else 1)
    width = work.curvature_width if work.curvature_tokens and group.copies == 1 and group is not work.head else 0
    coupled = sum(out * min(out, width) for out in group.outputs)
    side = sorted(group.outputs, reverse=True)[: 1 if work.accelerator else work.threads]
    held = aims + (FACTOR if group.copies == 1 or not work.accelerator else 2 * FACTOR) * squares + group.elements * (grids + TURNS) + COUPLING * coupled
    rows = sum(FINISHING * out * group.inputs for out in side) + (FP32 * group.elements if work.accelerator else 0)
    rows = max(rows, RUNNING * _running(work, group, width), sum(COUPLING_FACTORING * min(out, width) ** 2 for out in side))
    moments = [{"statistics": known - (FP32 - judged) * squares - parked, "what outputs should be": aims}, {"statistics": left - parked, "what outputs should be": aims, "factoring": FACTORING * squares},
               {"statistics": left, "solving the largest group": round(held + rows)}]  # fmt: skip
    if work.accelerator:
        moments.append({"statistics": left, "what outputs should be": aims, "trying shifts": FACTOR * squares + TRYING * TOGETHER * group.inputs * max(-(-out // max(1, out // TRIAL_ROWS)) for out in group.outputs)})
        moments.append({"statistics": left, "what outputs should be": aims, "searching scales": FACTOR * squares + SEARCHING[work.format in formats_of_books()] * side[0] * group.inputs})
    return largest(moments)


def _running(work: Workload, group: Linears, width: int) -> int:
    """Elements of the rows that threads solve side by side (requantize._Job.stretches)."""
    wide, usual = width * group.inputs, DEVICE_STRETCH if work.accelerator else STRETCH
    stretch = [min(out * group.inputs, max(wide if wide >= usual else usual + wide, group.inputs)) for out in group.outputs]
    return min(group.elements, (1 if work.accelerator else work.threads) * max(stretch))


def formats_of_books() -> tuple[str, ...]:
    from qmerge.formats import BLOCK_SIZES

    return tuple(BLOCK_SIZES)
