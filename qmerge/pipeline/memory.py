"""How much memory does each phase of a run hold at its fullest moment?

Sums of what is alive at once, read off the code that allocates it: each figure is so many bytes per element of a weight, a square of inputs, or a token. The places are
named, so that whoever changes what is held finds the figure. `tests/test_estimate_measured.py` holds the sums against the peaks of real processes.
"""

from __future__ import annotations

from qmerge.pipeline.block_pair import TAPE_BYTES
from qmerge.pipeline.distill import PIECE_TOKENS
from qmerge.pipeline.gradients import BATCH, HELD_BYTES, LEAST_QUICK, LEAST_WINDOWS
from qmerge.pipeline.gradients import LOGITS as LOGITS_TOGETHER
from qmerge.pipeline.memory_blocks import FACTORING, STATISTICS, blocks, captured_bytes, inside_bytes, solving
from qmerge.pipeline.memory_parts import FP32, Phase, around, curvature_rows, hidden_bytes, largest, lying, phase, scores
from qmerge.pipeline.merge import STRETCH as MERGED
from qmerge.pipeline.workload import Linears, Workload
from qmerge.store.direct import BUFFER_BYTES
from qmerge.store.pending import WAITING_BYTES
from qmerge.store.stream import MOST_WAITING

__all__ = ["FP32", "TAPE_BYTES", "Phase", "curvature_rows", "curvatures_bytes", "gradient_tokens", "holes_bytes", "inside_bytes", "phases"]

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


def holes_bytes(work: Workload, phase: Phase) -> int:
    """Free pages of the heap at that moment."""
    return min(MOST_HOLES_BYTES, round(HOLES * phase.ram(work.accelerator))) if work.train else 0


def phases(work: Workload, shard_bytes: int, bytes_out: int, polish: tuple[str, ...] = (), budget: bool = False, outputs: int = 1) -> tuple[Phase, ...]:
    """Every phase that the run goes through. ``shard_bytes``: largest weight file; of one that is being collected, some are in memory (store.pending). ``budget``: bits are divided by measured losses.
    ``outputs``: as many float checkpoints are written side by side."""
    if not work.quantized and not work.train:
        return (_stream(work, outputs),)
    pending = {"the shard that is being filled": min(shard_bytes, bytes_out, WAITING_BYTES)}
    if not work.train:
        return (phase("rounding", pending, {"the largest linear": ROUNDING * work.largest, "a whole tensor of the base": 2 * FP32 * work.whole}),)
    found = [_embedding(work), *_gradients(work, budget), *blocks(work, pending)]
    if work.head is not None:
        ends = {"what lies around the blocks": FP32 * around(work), "the head and its delta": 2 * FP32 * work.head.elements}
        streams = {"two streams of hidden states": 2 * hidden_bytes(work, work.calibration_tokens), "what the head receives": 3 * hidden_bytes(work, work.calibration_tokens)}
        found.append(phase("head", *lying(work, streams, pending | {"the last block": 5 * work.solved}, ends | solving(work, work.head))))
    if "blocks" in polish:
        found.append(_tuning(work, pending))
    if "distill" in polish:
        found.append(_distilling(work, pending))
    return tuple(found)


def _stream(work: Workload, outputs: int) -> Phase:
    ahead = 2 * work.threads * 2 * MERGED  # finished stretches in 16 bits that wait for their turn
    writing = outputs * (2 * BUFFER_BYTES + MOST_WAITING * 2 * MERGED)
    whole = work.threads * STRETCHES * FP32 * work.whole
    return phase("streaming", {"stretches being merged": work.threads * STRETCHES * FP32 * MERGED + ahead, "buffers of the writer": writing, "whole tensors of the base": whole}, {})


def _embedding(work: Workload) -> Phase:
    streams = {"hidden states": hidden_bytes(work, work.calibration_tokens)}
    return phase("embedding", *lying(work, streams, {}, {"what lies around the blocks": FP32 * around(work), "the embedding, and its parts": 2 * FP32 * work.end}))


def curvatures_bytes(work: Workload) -> int:
    """In bf16, of all blocks, while gradients are taken. From then on they lie on the disk (kept.Kept), but where writing them would have taken longer than they are worth: those are small."""
    return 2 * curvature_rows(work) * work.blocks if work.curvature_tokens else 0


def gradient_tokens(work: Workload) -> int:
    """As `gradients._few` draws them."""
    windows = max(LEAST_QUICK if work.quick else LEAST_WINDOWS, min(work.curvature_tokens // work.tokens, HELD_BYTES // (4 * work.tokens * max(1, work.hidden) * max(1, work.blocks))))
    return min(windows, work.windows) * work.tokens


def _gradients(work: Workload, budget: bool) -> list[Phase]:
    if not work.curvature_tokens:
        return []
    tokens = gradient_tokens(work)
    together = min(work.threads, -(-tokens // BATCH)) if not work.accelerator else 1
    ends = {"what lies around the blocks": FP32 * around(work)}
    between = {"hidden states between blocks": (work.blocks + 1) * hidden_bytes(work, tokens)}
    back = {"hidden states between blocks, then curvatures": max(between["hidden states between blocks"], curvatures_bytes(work))}  # one goes as the other comes
    logits = together * LOGITS * min(work.tokens * work.vocabulary, max(LOGITS_TOGETHER, work.vocabulary))
    batch = max(BATCH, work.tokens)
    kept = together * FP32 * batch * (ACTIVATIONS[0] * work.hidden + ACTIVATIONS[1] * work.inner) + together * scores(work, batch, work.accelerator)  # attention as plain products there (gradients._repeatable)
    rows = curvature_rows(work)
    backwards: dict[str, float] = {**ends, "two blocks in fp32": 2 * FP32 * work.block, "gradients by hidden states": 2 * hidden_bytes(work, tokens), "a pass backwards": kept, "curvatures being summed": FP32 * rows * (2 + together)}
    if budget:
        backwards |= {"inputs of a block": FP32 * tokens * sum(group.inputs for group in work.groups)} | largest(_measuring(work, group) for group in work.groups)
    return [
        phase("gradients at the end", between, ends | {"the head, and its parts": FP32 * work.end + max(FP32 * work.end, logits), "gradients by hidden states": 2 * hidden_bytes(work, tokens)}),
        phase("gradients", back, backwards),
    ]


def _measuring(work: Workload, group: Linears) -> dict[str, int]:
    """Several grids of a linear are tried side by side (budget_loss)."""
    return {"grids tried": (3 * STATISTICS + FACTORING) * group.inputs**2 + work.threads * 32 * group.inputs * max(group.outputs)}


def _tuning(work: Workload, pending: dict[str, int]) -> Phase:
    """``--polish blocks``: a copy of the block, offsets with their gradients, and passes backwards."""
    hidden = hidden_bytes(work, work.calibration_tokens)
    passes = work.threads * FP32 * PIECE_TOKENS * (ACTIVATIONS[0] * work.hidden + ACTIVATIONS[1] * work.inner)
    weights = FP32 * work.block * 3 + work.solved * (FP32 + 2 + 12 + FP32 * (1 + work.threads))
    host = pending | {"curvatures of a block": 2 * curvature_rows(work) if work.curvature_tokens else 0}
    streams = {"two streams of hidden states": 4 * hidden, "inputs of linears": captured_bytes(work)}
    return phase("tuning a block", *lying(work, streams, host, {"what lies around the blocks": FP32 * around(work), "the block before": 5 * work.solved, "weights, offsets and their gradients": weights, "a pass backwards": passes}))


def _distilling(work: Workload, pending: dict[str, int]) -> Phase:
    """``--polish distill``: the whole student in fp32, a gradient of that size per thread, every solved linear, and the logits of pieces."""
    piece = max(PIECE_TOKENS, work.tokens)
    passes = work.blocks * FP32 * piece * (ACTIVATIONS[0] * work.hidden + ACTIVATIONS[1] * work.inner) + LOGITS * piece * work.vocabulary
    return phase("distilling", pending, {
        "embeddings and head, three times": 3 * FP32 * work.ends, "the last hidden states": hidden_bytes(work, work.calibration_tokens), "every solved linear": 6 * work.quantized,
        "the student": FP32 * work.total, "gradients": work.threads * FP32 * work.total, "passes backwards": work.threads * passes,
    })  # fmt: skip
