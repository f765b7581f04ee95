"""How long will a run take on this machine? Operations by formula, over rates that are measured in a moment."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from qmerge.device import COMPUTE, Compute, exact_products, in_parallel
from qmerge.pipeline import memory
from qmerge.pipeline.block_pair import TAPE_BYTES
from qmerge.pipeline.workload import Linears, Workload

USUAL_FLOPS, USUAL_HASHING = 20e9, 500e6
"""of a thread"""
SIZE = 512
"""of the matrices that are multiplied for a rate"""
START_S = 5.0
"""libraries' start, reading, writing: what does not grow"""
SOLVING = 45
"""products of a linear's elements with its inputs: judging, shifting, descending, over all rounds (requantize), in operations of a matrix product's rate"""
COUPLED = 14
"""the same with the rows that count together"""
FACTORED = 3
"""of inputs cubed: the factorization and the inverse in fp64. This and SOLVING are set so that blocks of an 8B take what docs/measurements/large-shapes.md says"""
DENSE = 3.0
"""the float merge's time over that of hashing its bytes: reading, decoding, casting and proving beside it"""


@dataclass(frozen=True)
class Rates:
    """``flops``: fp32 operations per second in products, on all threads; ``bytes_hashed``: per second, on one; ``passing`` and ``summing``: operations per second in
    products of the text's passes and in its sums, where those are taken in bf16."""

    flops: float
    bytes_hashed: float
    guessed: bool = False
    """there was no memory to measure them in"""
    passing: float | None = None
    summing: float | None = None

    @classmethod
    def measured(cls, threads: int, compute: Compute = COMPUTE["fp32"]) -> Rates:
        """On the CPU, as the run computes: one product per thread. Where a limit leaves no memory for that, a guess: whether the run fits is for others to say."""
        try:
            return cls._measured(threads, compute)
        except (MemoryError, RuntimeError):  # torch says the latter
            return cls(USUAL_FLOPS * max(1, threads), USUAL_HASHING, guessed=True)

    @classmethod
    @exact_products()
    def _measured(cls, threads: int, compute: Compute) -> Rates:
        data, jobs = bytes(4 << 20), list(range(max(1, threads)))

        def flops(dtype: torch.dtype) -> float:
            one = torch.ones(SIZE, SIZE, dtype=dtype)
            return 2 * SIZE**3 * len(jobs) / _fastest(lambda: in_parallel(lambda _: one @ one, jobs, torch.device("cpu")))

        low = flops(torch.bfloat16) if compute.sums == torch.bfloat16 else None
        return cls(flops(torch.float32), len(data) / _fastest(lambda: hashlib.sha256(data)), passing=low if compute.passes == torch.bfloat16 else None, summing=low)

    @property
    def basis(self) -> str:
        if self.guessed:
            return "operations by formula at a guessed speed: there was no memory to measure it in"
        low = "" if self.summing is None else f" ({self.summing / 1e9:.0f} in bf16)"
        return f"operations by formula at {self.flops / 1e9:.0f} GFLOP/s in products{low} and {self.bytes_hashed / 1e6:.0f} MB/s of hashing, both measured now; a busy or slower disk is not foreseen"


def _fastest(work: Callable[[], object], times: int = 4) -> float:
    found = []
    for _ in range(times):
        began = time.perf_counter()
        work()
        found.append(time.perf_counter() - began)
    return max(min(found), 1e-6)


def seconds(work: Workload, rates: Rates, bytes_in: int, bytes_out: int) -> float:
    """Of the whole run."""
    moved = (bytes_in + bytes_out) / rates.bytes_hashed
    if not work.train:
        return START_S + DENSE * moved
    passing, summing = text_operations(work)
    return START_S + moved + passing / (rates.passing or rates.flops) + summing / (rates.summing or rates.flops) + (operations(work) - passing - summing) / rates.flops


def operations(work: Workload) -> float:
    """Operations of a calibrated run: two streams through every block, statistics, gradients, factorizations and the solver."""
    solving = work.blocks * sum(_solving(work, group) * group.copies for group in work.groups)
    return sum(text_operations(work)) + solving + (_solving(work, work.head) if work.head is not None else 0)


def text_operations(work: Workload) -> tuple[float, float]:
    """Those of them that grow with the text: both streams' passes; statistics and gradients."""
    tokens, blocks = work.calibration_tokens, work.blocks
    passes = 1 if memory.inside_bytes(work) <= TAPE_BYTES else 1 + len(work.groups) / 2
    forwards = (1 if work.quick else 2) * passes * 2 * tokens * (work.block + 2 * work.tokens * work.hidden)
    gradients = memory.gradient_tokens(work) * (8 * work.block + 2 * memory.curvature_rows(work)) if work.curvature_tokens else 0
    sums = sum(statistics(work, group, tokens) * group.copies for group in work.groups)
    head = statistics(work, work.head, tokens) if work.head is not None else 0
    return blocks * forwards, blocks * (gradients + sums) + head + (ends_gradients(work) if work.curvature_tokens else 0)


def ends_gradients(work: Workload) -> float:
    """The head's three products, where gradients start."""
    return 6 * memory.gradient_tokens(work) * work.hidden * work.vocabulary


def statistics(work: Workload, group: Linears, tokens: int) -> float:
    """Sums over what a group receives."""
    return tokens * (group.inputs**2 if work.quick else 3 * group.inputs**2 + (2 * group.elements if group.writer else 0))


def _solving(work: Workload, group: Linears) -> float:
    coupled = sum(COUPLED * out * group.inputs * min(out, work.curvature_width) for out in group.outputs) if work.curvature_tokens else 0
    return FACTORED * group.inputs**3 + SOLVING * group.elements * group.inputs + coupled
