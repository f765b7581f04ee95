"""How much memory does measuring a merged model take? By formula, from sizes alone, before anything is merged or loaded.

The reference and one other arm are alive at a time, both in fp32 with plain linears. What a loader holds while it unpacks comes on top of it.
"""

from __future__ import annotations

from dataclasses import dataclass

from qmerge.quality.measure import BATCH_TOKENS, CHUNK_BYTES, LOGIT_BYTES
from qmerge.quality.reference import CACHE_BYTES

FP32 = 4
ARMS = 2
"""models that are alive at a time (running.Run)"""
CHUNKS = 14
"""tensors of a chunk of logits: both models' logits, log-probabilities, probabilities, and KL's terms in fp64 (divergence.compare_logits)"""
LINEAR = 40
"""bytes for each element of the largest linear, while it is set against ΔW in fp64 (merging.linear_rows)"""
LOADERS = {"none": 0, "bitsandbytes": 0, "compressed-tensors": 10_000_000, "gptq": 110_000_000, "awq": 10_000_000}
"""what a candidate's public loader takes over bitsandbytes': `python scripts/measure_evaluation.py`, one run each (docs/measurements/evaluation-memory.md); gptqmodel 76 MB on the demo and 110 MB on a
model of 34M, the others on the demo alone"""
PASSES = 12, 6
"""fp32 values per token of a batch, times hidden and times the widest inner width, while a model runs"""


@dataclass(frozen=True)
class Measured:
    """Elements: of the whole model, of its largest linear, its widths. ``packed_bytes``: of the candidate's files; ``method``: of its quantization; ``text_tokens``: about, of all texts."""

    parameters: int
    largest: int
    hidden: int
    inner: int
    vocabulary: int
    packed_bytes: int
    method: str
    text_tokens: int
    window: int


def evaluation_bytes(sizes: Measured) -> int:
    """Peak beside the process as it stands before."""
    models = ARMS * FP32 * sizes.parameters + sizes.packed_bytes
    states = min(CACHE_BYTES, FP32 * sizes.text_tokens * sizes.hidden)
    batch = max(sizes.window, min(sizes.text_tokens, max(BATCH_TOKENS, LOGIT_BYTES // (4 * max(1, sizes.vocabulary)))))  # windows go through together, as many as there are
    passing = FP32 * batch * (PASSES[0] * sizes.hidden + PASSES[1] * sizes.inner)
    measuring = CHUNKS * CHUNK_BYTES + passing + states
    return models + LOADERS.get(sizes.method, 0) + max(measuring, LINEAR * sizes.largest)
