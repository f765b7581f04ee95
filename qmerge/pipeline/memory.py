"""How much memory does each phase of a run hold at its fullest moment?

Sums of what is alive at once, read off the code that allocates it: each figure is so many bytes per element of a weight, a square of inputs, or a token. The places are
named, so that whoever changes what is held finds the figure. `tests/test_estimate_measured.py` holds the sums against the peaks of real processes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from qmerge.numerics.hessian import SLOTS, STRIP
from qmerge.pipeline.distill import PIECE_TOKENS
from qmerge.pipeline.gradients import BATCH, HELD_BYTES, LEAST_WINDOWS
from qmerge.pipeline.gradients import LOGITS as LOGITS_TOGETHER
from qmerge.pipeline.merge import STRETCH as MERGED
from qmerge.pipeline.requantize import STRETCH
from qmerge.pipeline.streams import TAPE_BYTES, TOKENS_PER_BATCH
from qmerge.pipeline.workload import Linears, Workload
from qmerge.store.direct import BUFFER_BYTES
from qmerge.store.pending import WAITING_BYTES
from qmerge.store.stream import MOST_WAITING

FP32 = 4
STATISTICS = 16
"""of inputs squared: H and D of the windows to solve on and of those to choose with, fp32 (numerics.hessian.Statistics); sums become means where they lie"""
FACTORING, FACTOR = 12, 4
"""of inputs squared, in passing: the damped Hessian in fp64, in which it is factored and inverted (numerics.hessian.factor), and the factor in fp32; the factor stays"""
DAMPED = 4
"""of inputs squared: H + λI (known.Known), on an accelerator beside H, on a CPU in its place"""
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
COUPLING, COUPLING_FACTORING = 8, 36
"""of a curvature's elements: the metric and the feed; in passing, of one block of rows, that in fp64 in its order, reversed, and its inverse (numerics.coupled._rows)"""
ROUNDING = 75
"""of a linear's elements, where it is rounded without calibration (requantize.round_to_nearest)"""
LOGITS = 24
"""of a window's logits while gradients by them are taken (gradients._draw) or KL is (distill._piece)"""
ACTIVATIONS = 12, 6
"""per token of a backward pass through a block: times hidden, and times the widest inner width, fp32 values that autograd keeps"""
STRETCHES = 6
"""fp32 copies of a stretch that a worker of the float merge holds (dense._merge)"""


HOLES, MOST_HOLES_BYTES = 0.55, 5 << 28
"""Of what a calibrated run holds in main memory, and at most: free pages between what is alive. Activations live for a block, temporaries among them for a moment, of many sizes; what is 32 MB or
more leaves no hole (device.one_heap). Measured (docs/measurements/estimates.md), not derived. Handing the pages back between linears halves them and took a tenth of the run's time."""


@dataclass(frozen=True)
class Part:
    """``host``: in main memory whatever the device."""

    name: str
    nbytes: int
    host: bool = False


@dataclass(frozen=True)
class Phase:
    """One moment: what is held beside the interpreter and its libraries."""

    name: str
    parts: tuple[Part, ...]

    def ram(self, accelerator: bool) -> int:
        return sum(part.nbytes for part in self.parts if part.host or not accelerator)

    def on_device(self, accelerator: bool) -> int:
        return sum(part.nbytes for part in self.parts if not part.host) if accelerator else 0


def holes_bytes(work: Workload, phase: Phase) -> int:
    """Free pages of the heap at that moment."""
    return min(MOST_HOLES_BYTES, round(HOLES * phase.ram(work.accelerator))) if work.train else 0


def _phase(name: str, host: Mapping[str, float], anywhere: Mapping[str, float]) -> Phase:
    return Phase(name, (*(Part(key, round(value), True) for key, value in host.items() if value), *(Part(key, round(value)) for key, value in anywhere.items() if value)))


def phases(work: Workload, shard_bytes: int, bytes_out: int, polish: tuple[str, ...] = (), budget: bool = False, outputs: int = 1) -> tuple[Phase, ...]:
    """Every phase that the run goes through. ``shard_bytes``: largest weight file; of one that is being collected, some are in memory (store.pending). ``budget``: bits are divided by measured losses.
    ``outputs``: as many float checkpoints are written side by side."""
    if not work.quantized and not work.train:
        return (_stream(work, outputs),)
    pending = {"the shard that is being filled": min(shard_bytes, bytes_out, WAITING_BYTES)}
    if not work.train:
        return (_phase("rounding", pending, {"the largest linear": ROUNDING * work.largest, "a whole tensor of the base": 2 * FP32 * work.whole}),)
    found = [_embedding(work), *_gradients(work, budget), *_blocks(work, pending)]
    if work.head is not None:
        ends = {"what lies around the blocks": FP32 * _around(work), "the head and its delta": 2 * FP32 * work.head.elements, "two streams of hidden states": 2 * _hidden(work, work.calibration_tokens), "what the head receives": 3 * _hidden(work, work.calibration_tokens)}
        found.append(_phase("head", pending | {"the last block": 5 * work.solved}, ends | _solving(work, work.head)))
    if "blocks" in polish:
        found.append(_tuning(work, pending))
    if "distill" in polish:
        found.append(_distilling(work, pending))
    return tuple(found)


def _hidden(work: Workload, tokens: int) -> int:
    return FP32 * tokens * work.hidden


def _stream(work: Workload, outputs: int) -> Phase:
    ahead = 2 * work.threads * 2 * MERGED  # finished stretches in 16 bits that wait for their turn
    writing = outputs * (2 * BUFFER_BYTES + MOST_WAITING * 2 * MERGED)
    whole = work.threads * STRETCHES * FP32 * work.whole
    return _phase("streaming", {"stretches being merged": work.threads * STRETCHES * FP32 * MERGED + ahead, "buffers of the writer": writing, "whole tensors of the base": whole}, {})


def _around(work: Workload) -> int:
    """Elements outside the blocks, but for embedding and head, which are there only while they are needed (pipeline.ends)."""
    return work.ends - work.end * (2 if work.ends >= 2 * work.end else 1)


def _embedding(work: Workload) -> Phase:
    return _phase("embedding", {}, {"what lies around the blocks": FP32 * _around(work), "the embedding, and its parts": 2 * FP32 * work.end, "hidden states": _hidden(work, work.calibration_tokens)})


def curvature_rows(work: Workload) -> int:
    """Elements of the curvatures of one block."""
    return sum(out * min(out, work.curvature_width) * group.copies for group in work.groups if group.copies == 1 for out in group.outputs)


def curvatures_bytes(work: Workload) -> int:
    """In bf16, of all blocks, while gradients are taken. From then on they lie on the disk (kept.Kept), but where writing them would have taken longer than they are worth: those are small."""
    return 2 * curvature_rows(work) * work.blocks if work.curvature_tokens else 0


def gradient_tokens(work: Workload) -> int:
    """As `gradients._few` draws them."""
    windows = max(LEAST_WINDOWS, min(work.curvature_tokens // work.tokens, HELD_BYTES // (4 * work.tokens * max(1, work.hidden) * max(1, work.blocks))))
    return min(windows, work.windows) * work.tokens


def _gradients(work: Workload, budget: bool) -> list[Phase]:
    if not work.curvature_tokens:
        return []
    tokens = gradient_tokens(work)
    together = min(work.threads, -(-tokens // BATCH)) if not work.accelerator else 1
    ends = {"what lies around the blocks": FP32 * _around(work)}
    between = {"hidden states between blocks": (work.blocks + 1) * _hidden(work, tokens)}
    back = {"hidden states between blocks, then curvatures": max(between["hidden states between blocks"], curvatures_bytes(work))}  # one goes as the other comes
    logits = together * LOGITS * min(work.tokens * work.vocabulary, max(LOGITS_TOGETHER, work.vocabulary))
    batch = max(BATCH, work.tokens)
    kept = together * FP32 * batch * (ACTIVATIONS[0] * work.hidden + ACTIVATIONS[1] * work.inner) + together * _scores(work, batch)
    rows = curvature_rows(work)
    backwards = ends | {"two blocks in fp32": 2 * FP32 * work.block, "gradients by hidden states": 2 * _hidden(work, tokens), "a pass backwards": kept, "curvatures being summed": FP32 * rows * (2 + together)}
    if budget:
        backwards |= {"inputs of a block": FP32 * tokens * sum(group.inputs for group in work.groups)} | _largest(_measuring(work, group) for group in work.groups)
    return [
        _phase("gradients at the end", between, ends | {"the head, and its parts": FP32 * work.end + max(FP32 * work.end, logits), "gradients by hidden states": 2 * _hidden(work, tokens)}),
        _phase("gradients", back, backwards),
    ]


def _measuring(work: Workload, group: Linears) -> dict[str, int]:
    """Several grids of a linear are tried side by side (budget_loss)."""
    return {"grids tried": (3 * STATISTICS + FACTORING) * group.inputs**2 + work.threads * 32 * group.inputs * max(group.outputs)}


def _largest(many: Iterable[dict[str, int]]) -> dict[str, int]:
    return max(many, key=lambda parts: sum(parts.values()), default={})


def _scores(work: Workload, tokens: int) -> int:
    """Attention scores where they are formed whole: themselves, masked, and softmax."""
    return 3 * FP32 * tokens * work.tokens * work.heads if work.eager else 0


def inside_bytes(work: Workload) -> int:
    """What every module of a block gives out, over all tokens: decides whether each stream passes a block once (streams.TAPE_BYTES)."""
    outputs = sum(sum(group.outputs) for group in work.groups if group.copies == 1)
    return FP32 * work.calibration_tokens * (outputs + 6 * work.hidden + work.inner)


def _captured(work: Workload) -> int:
    """Inputs of all groups of a block, and the residual stream half-way, of one stream."""
    return FP32 * work.calibration_tokens * (sum(group.inputs for group in work.groups if group.copies == 1) + work.hidden)


def _blocks(work: Workload, pending: dict[str, int]) -> list[Phase]:
    """Two moments of each block: when the next one is loaded while the last is still held, and while a group is solved."""
    taped = inside_bytes(work) <= TAPE_BYTES
    hidden, together = _hidden(work, work.calibration_tokens), 1 if work.accelerator else min(work.threads, -(-work.calibration_tokens // TOKENS_PER_BATCH))
    batch = min(max(TOKENS_PER_BATCH, work.tokens), work.calibration_tokens)
    passing = together * (FP32 * batch * (3 * work.inner + 4 * work.hidden) + _scores(work, batch))
    once = _captured(work) if taped and not work.quick else 0
    walked = _captured(work) if taped and not work.accelerator else 0
    streams = (3 if taped else 2) - work.quick
    kept_streams = (not work.quick) + (not work.accelerator)
    """streams whose inputs of linears are kept"""
    held = {"what lies around the blocks": FP32 * _around(work)}
    host = pending | {"curvatures of a block": 2 * curvature_rows(work) if work.curvature_tokens else 0}
    several = work.blocks > 1
    entering = held | {
        "streams of hidden states": streams * hidden, "inputs of linears": once + (2 * walked if several else walked),
        "a pass forwards": passing, "blocks in fp32": FP32 * work.block * (3 if several else 1),
    }
    found = [_phase("entering a block", host | {"codes": work.solved if several else 0}, entering)]
    solved, best = 0, None
    for number, group in enumerate(work.groups):
        solved += group.elements * group.copies
        own = 0 if taped else FP32  # of the run-time block, beside the teacher's: those of solved groups are let go where nothing passes them again
        weights = FP32 * work.block + solved * (1 + own) + group.elements * ((FP32 if group.edited else 0) + (1 if work.base_4bit else 0) - own)
        passed = FP32 * work.calibration_tokens * sum(other.inputs for other in work.groups[:number] if other.copies == 1) if taped else 0
        tokens = work.train * work.tokens if taped else together * batch
        moving = FP32 * tokens * (group.inputs + (work.hidden if group.writer else 0)) + (0 if taped else passing)
        parts = held | {"streams of hidden states": streams * hidden, "inputs of linears": once + walked - passed * kept_streams, "a block in fp32, its codes, deltas of a group": weights}
        here = _phase("solving", host, parts | _group(work, group, moving))
        if best is None or here.ram(False) > best.ram(False):
            best = here
    return [*found, best] if best is not None else found


def _group(work: Workload, group: Linears, moving: int) -> dict[str, int]:
    """The fuller of two moments: while statistics are summed, and while the group is solved."""
    return _largest(({"statistics": _sums(work, group), "slots and strips that are open": _slot(work, group), "differences of inputs": moving}, _solving(work, group)))


def _sums(work: Workload, group: Linears) -> int:
    if work.quick:  # H alone
        return STATISTICS // 2 * group.inputs**2
    residual = 2 * FP32 * group.elements if group.writer else 0
    return STATISTICS * group.inputs**2 + residual


def _slot(work: Workload, group: Linears) -> int:
    """Strips of the slot that is being summed; all of it where a slot's batches do not come in one go (numerics.hessian.Statistics)."""
    batches = -(-work.train // max(1, TOKENS_PER_BATCH // max(1, work.tokens)))
    strips = work.threads * FP32 * 3 * min(STRIP, group.inputs) * group.inputs
    if batches <= SLOTS or (inside_bytes(work) <= TAPE_BYTES and not work.accelerator):
        return strips
    return strips + STATISTICS // (4 if work.quick else 2) * group.inputs**2 + (FP32 * group.elements if group.writer and not work.quick else 0)


def _solving(work: Workload, group: Linears) -> dict[str, int]:
    """The fullest of three moments: W D is formed; H is factored; rows of the linears are solved, as many stretches at a time as there are threads."""
    squares, known = group.inputs**2, _sums(work, group)
    small = [out <= group.inputs for out in group.outputs]
    aims = AIM * group.inputs * sum(out * (2 if less else 1) for out, less in zip(group.outputs, small, strict=True))
    left = known - (STATISTICS // 2 * squares if all(small) and group.copies == 1 and not work.quick else 0)  # D is needed no more
    grids = INT_GRID if work.format not in formats_of_books() else BOOK_GRID * (2 if work.base_4bit else 1)
    width = work.curvature_width if work.curvature_tokens and group.copies == 1 and group is not work.head else 0
    coupled = sum(out * min(out, width) for out in group.outputs)
    side = sorted(group.outputs, reverse=True)[: 1 if work.accelerator else work.threads]
    solving = aims + (FACTOR + (DAMPED if work.accelerator else 0)) * squares + group.elements * (grids + TURNS) + COUPLING * coupled
    rows = sum(FINISHING * out * group.inputs for out in side)
    rows = max(rows, RUNNING * _running(work, group, width), sum(COUPLING_FACTORING * min(out, width) ** 2 for out in side))
    return _largest(({"statistics": known, "what outputs should be": aims}, {"statistics": left, "what outputs should be": aims, "factoring": FACTORING * squares}, {"statistics": left, "solving the largest group": round(solving + rows)}))


def _running(work: Workload, group: Linears, width: int) -> int:
    """Elements of the rows that threads solve side by side (requantize._Job.stretches)."""
    if work.accelerator:
        return max(group.outputs) * group.inputs
    wide = width * group.inputs
    stretch = [min(out * group.inputs, max(wide if wide >= STRETCH else STRETCH + wide, group.inputs)) for out in group.outputs]
    return min(group.elements, work.threads * max(stretch))


def formats_of_books() -> tuple[str, ...]:
    from qmerge.formats import BLOCK_SIZES

    return tuple(BLOCK_SIZES)


def _tuning(work: Workload, pending: dict[str, int]) -> Phase:
    """``--polish blocks``: a copy of the block, offsets with their gradients, and passes backwards."""
    hidden = _hidden(work, work.calibration_tokens)
    passes = work.threads * FP32 * PIECE_TOKENS * (ACTIVATIONS[0] * work.hidden + ACTIVATIONS[1] * work.inner)
    weights = FP32 * work.block * 3 + work.solved * (FP32 + 2 + 12 + FP32 * (1 + work.threads))
    return _phase("tuning a block", pending | {"curvatures of a block": 2 * curvature_rows(work) if work.curvature_tokens else 0}, {
        "what lies around the blocks": FP32 * _around(work), "the block before": 5 * work.solved, "two streams of hidden states": 4 * hidden, "inputs of linears": _captured(work), "weights, offsets and their gradients": weights, "a pass backwards": passes,
    })  # fmt: skip


def _distilling(work: Workload, pending: dict[str, int]) -> Phase:
    """``--polish distill``: the whole student in fp32, a gradient of that size per thread, every solved linear, and the logits of pieces."""
    piece = max(PIECE_TOKENS, work.tokens)
    passes = work.blocks * FP32 * piece * (ACTIVATIONS[0] * work.hidden + ACTIVATIONS[1] * work.inner) + LOGITS * piece * work.vocabulary
    return _phase("distilling", pending, {
        "embeddings and head, three times": 3 * FP32 * work.ends, "the last hidden states": _hidden(work, work.calibration_tokens), "every solved linear": 6 * work.quantized,
        "the student": FP32 * work.total, "gradients": work.threads * FP32 * work.total, "passes backwards": work.threads * passes,
    })  # fmt: skip
