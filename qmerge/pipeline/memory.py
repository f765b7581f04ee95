"""How much memory does each phase of a run hold at its fullest moment?

Sums of what is alive at once, read off the code that allocates it: each figure is so many bytes per element of a weight, a square of inputs, or a token. The places are
named, so that whoever changes what is held finds the figure. `tests/test_estimate_measured.py` holds the sums against the peaks of real processes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from qmerge.pipeline.distill import PIECE_TOKENS
from qmerge.pipeline.gradients import BATCH, HELD_BYTES, LEAST_WINDOWS
from qmerge.pipeline.merge import STRETCH
from qmerge.pipeline.streams import TAPE_BYTES, TOKENS_PER_BATCH
from qmerge.pipeline.workload import Linears, Workload
from qmerge.store.direct import BUFFER_BYTES
from qmerge.store.stream import MOST_WAITING

FP32, FP64 = 4, 8
STATISTICS = 16
"""of inputs squared: H and D of the windows to solve on and of those to choose with, fp32 (numerics.hessian.Statistics); their means (requantize._Known) as much again"""
FACTORING = 46
"""of inputs squared, in passing: the ordered Hessian, damped, flipped, its factor, the inverse and its parts in fp64 (numerics.hessian.factor)"""
FINISHING = 62
"""of a linear's elements, in passing: target, grid, values, and what is compared in fp64 (requantize._solve and _finish)"""
AIM = 4
"""of a linear's elements, while its group is solved: W D (numerics.shift.Judge)"""
INT_GRID, BOOK_GRID = 8, 4
"""of a linear's elements, for each grid tried: scale and zero, or the scale alone, element by element (numerics.gptq.ElementGrid)"""
COUPLING, COUPLING_FACTORING = 8, 46
"""of a curvature's elements: the metric and the feed; in passing as `FACTORING`, of one block of rows (numerics.coupled._rows)"""
ROUNDING = 75
"""of a linear's elements, where it is rounded without calibration (requantize.round_to_nearest)"""
LOGITS = 24
"""of a window's logits while gradients by them are taken (gradients._draw) or KL is (distill._piece)"""
ACTIVATIONS = 12, 6
"""per token of a backward pass through a block: times hidden, and times the widest inner width, fp32 values that autograd keeps"""
STRETCHES = 6
"""fp32 copies of a stretch that a worker of the float merge holds (dense._merge)"""


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


def _phase(name: str, host: dict[str, float], anywhere: dict[str, float]) -> Phase:
    return Phase(name, (*(Part(key, round(value), True) for key, value in host.items() if value), *(Part(key, round(value)) for key, value in anywhere.items() if value)))


def phases(work: Workload, shard_bytes: int, bytes_out: int, polish: tuple[str, ...] = (), budget: bool = False, outputs: int = 1) -> tuple[Phase, ...]:
    """Every phase that the run goes through. ``shard_bytes``: largest weight file; a quantizing run collects one in memory. ``budget``: bits are divided by measured losses.
    ``outputs``: as many float checkpoints are written side by side."""
    if not work.quantized and not work.train:
        return (_stream(work, outputs),)
    pending = {"the shard that is being filled": min(shard_bytes, bytes_out)}
    if not work.train:
        return (_phase("rounding", pending, {"the largest linear": ROUNDING * work.largest, "a whole tensor of the base": 2 * FP32 * work.whole}),)
    found = [_embedding(work), *_gradients(work, budget), *_blocks(work, pending)]
    if work.head is not None:
        ends = {"embeddings and head": FP32 * work.ends, "two streams of hidden states": 2 * _hidden(work, work.calibration_tokens), "what the head receives": 3 * _hidden(work, work.calibration_tokens)}
        found.append(_phase("head", pending | {"the last block": 5 * work.solved}, ends | _solving(work, work.head)))
    if "blocks" in polish:
        found.append(_tuning(work, pending))
    if "distill" in polish:
        found.append(_distilling(work, pending))
    return tuple(found)


def _hidden(work: Workload, tokens: int) -> int:
    return FP32 * tokens * work.hidden


def _stream(work: Workload, outputs: int) -> Phase:
    ahead = 2 * work.threads * 2 * STRETCH  # finished stretches in 16 bits that wait for their turn
    writing = outputs * (2 * BUFFER_BYTES + MOST_WAITING * 2 * STRETCH)
    whole = work.threads * STRETCHES * FP32 * work.whole
    return _phase("streaming", {"stretches being merged": work.threads * STRETCHES * FP32 * STRETCH + ahead, "buffers of the writer": writing, "whole tensors of the base": whole}, {})


def _embedding(work: Workload) -> Phase:
    again = 1 if work.curvature_tokens else 0  # the tensors of the first time are there while the second ones are read
    return _phase("embedding", {"curvatures": curvatures_bytes(work)}, {"embeddings and head": FP32 * work.ends, "the largest of them, in parts": (1 + again) * FP32 * work.end, "hidden states": _hidden(work, work.calibration_tokens)})


def curvature_rows(work: Workload) -> int:
    """Elements of the curvatures of one block."""
    return sum(out * min(out, work.curvature_width) * group.copies for group in work.groups if group.copies == 1 for out in group.outputs)


def curvatures_bytes(work: Workload) -> int:
    """In bf16, of all blocks, until a block takes its own."""
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
    ends = {"embeddings and head": FP32 * work.ends}
    between = {"hidden states between blocks": (work.blocks + 1) * _hidden(work, tokens)}
    logits = together * LOGITS * work.tokens * work.vocabulary
    batch = max(BATCH, work.tokens)
    kept = together * FP32 * batch * (ACTIVATIONS[0] * work.hidden + ACTIVATIONS[1] * work.inner) + together * _scores(work, batch)
    rows = curvature_rows(work)
    backwards = ends | {"two blocks in fp32": 2 * FP32 * work.block, "gradients by hidden states": 2 * _hidden(work, tokens), "a pass backwards": kept, "curvatures being summed": FP32 * rows * (2 + together)}
    if budget:
        backwards |= {"inputs of a block": FP32 * tokens * sum(group.inputs for group in work.groups)} | _largest(_measuring(work, group) for group in work.groups)
    return [
        _phase("gradients at the end", between, ends | {"logits": logits, "gradients by hidden states": 2 * _hidden(work, tokens)}),
        _phase("gradients", between | {"curvatures": curvatures_bytes(work)}, backwards),
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
    once = _captured(work) if taped else 0
    walked = 0 if work.accelerator else once
    held = {"embeddings and head": FP32 * work.ends}
    host = pending | {"curvatures": curvatures_bytes(work)}
    several = work.blocks > 1
    entering = held | {
        "two streams of hidden states": (3 if taped else 2) * hidden, "inputs of linears": once + (2 * walked if several else walked),
        "a pass forwards": passing, "blocks in fp32": FP32 * work.block * (3 if several else 1),
    }
    found = [_phase("entering a block", host | {"codes": work.solved if several else 0}, entering)]
    before = {"the block before": 5 * work.solved if several else 0}
    solved, best = 0, None
    for group in work.groups:
        solved += group.elements * group.copies
        weights = FP32 * work.block + solved * (FP32 + 1 + (FP32 if group.edited else 0) + (1 if work.base_4bit else 0)) - FP32 * group.elements
        tokens = work.train * work.tokens if taped else together * batch
        moving = FP32 * tokens * (group.inputs + (work.hidden if group.writer else 0)) + (0 if taped else passing)
        parts = held | before | {"two streams of hidden states": (3 if taped else 2) * hidden, "inputs of linears": once + walked, "a block in fp32, its deltas and codes": weights}
        here = _phase("solving", host, parts | _group(work, group, moving))
        if best is None or here.ram(False) > best.ram(False):
            best = here
    return [*found, best] if best is not None else found


def _group(work: Workload, group: Linears, moving: int) -> dict[str, int]:
    """The fuller of two moments: while statistics are summed, and while the group is solved."""
    return _largest(({"statistics": _sums(group), "the slot that is open": _slot(group), "differences of inputs": moving}, _solving(work, group)))


def _sums(group: Linears) -> int:
    residual = 2 * FP32 * group.elements if group.writer else 0
    return STATISTICS * group.inputs**2 + residual


def _slot(group: Linears) -> int:
    """H, D and the residual's product of the slot that is open, beside those of the slots before it (numerics.hessian.Statistics)."""
    return STATISTICS // 2 * group.inputs**2 + (FP32 * group.elements if group.writer else 0)


def _solving(work: Workload, group: Linears) -> dict[str, int]:
    """Statistics and their means; then either H is factored, or the linears are solved, as many at a time as there are threads."""
    squares, known = group.inputs**2, _sums(group) + STATISTICS * group.inputs**2 + (FP32 * group.elements if group.writer else 0)
    grids = INT_GRID if work.format not in formats_of_books() else BOOK_GRID * (2 if work.base_4bit else 1)
    coupled = sum(out * min(out, work.curvature_width) for out in group.outputs) if work.curvature_tokens and group.copies == 1 and group is not work.head else 0
    side = sorted(group.outputs, reverse=True)[: 1 if work.accelerator else work.threads]
    lasting = FP32 * squares + group.elements * (AIM + grids) + COUPLING * coupled
    passing = sum(FINISHING * out * group.inputs + FP32 * squares for out in side)
    if coupled:
        passing = max(passing, sum(COUPLING_FACTORING * min(out, work.curvature_width) ** 2 for out in side))
    return {"statistics": known, "solving the largest group": max(FACTORING * squares, lasting + passing)}


def formats_of_books() -> tuple[str, ...]:
    from qmerge.formats import BLOCK_SIZES

    return tuple(BLOCK_SIZES)


def _tuning(work: Workload, pending: dict[str, int]) -> Phase:
    """``--polish blocks``: a copy of the block, offsets with their gradients, and passes backwards."""
    hidden = _hidden(work, work.calibration_tokens)
    passes = work.threads * FP32 * PIECE_TOKENS * (ACTIVATIONS[0] * work.hidden + ACTIVATIONS[1] * work.inner)
    weights = FP32 * work.block * 3 + work.solved * (FP32 + 2 + 12 + FP32 * (1 + work.threads))
    return _phase("tuning a block", pending | {"curvatures": curvatures_bytes(work)}, {
        "embeddings and head": FP32 * work.ends, "the block before": 5 * work.solved, "two streams of hidden states": 4 * hidden, "inputs of linears": _captured(work), "weights, offsets and their gradients": weights, "a pass backwards": passes,
    })  # fmt: skip


def _distilling(work: Workload, pending: dict[str, int]) -> Phase:
    """``--polish distill``: the whole student in fp32, a gradient of that size per thread, every solved linear, and the logits of pieces."""
    piece = max(PIECE_TOKENS, work.tokens)
    passes = work.blocks * FP32 * piece * (ACTIVATIONS[0] * work.hidden + ACTIVATIONS[1] * work.inner) + LOGITS * piece * work.vocabulary
    return _phase("distilling", pending, {
        "embeddings and head, three times": 3 * FP32 * work.ends, "the last hidden states": _hidden(work, work.calibration_tokens), "every solved linear": 6 * work.quantized,
        "the student": FP32 * work.total, "gradients": work.threads * FP32 * work.total, "passes backwards": work.threads * passes,
    })  # fmt: skip
