"""Run as a process of its own with TRITON_INTERPRET=1: the kernels that decode and merge, in Triton's interpreter. Prints what was found as JSON.

    python tests/support/interpreted_merge.py                           # the kernels, against sums in order and the plain code
    python tests/support/interpreted_merge.py '[["merge", "--base", …]]'  # commands, as they would run on a GPU
"""

from __future__ import annotations

import io
import json
import sys
from collections import Counter
from contextlib import redirect_stderr, redirect_stdout
from typing import Any

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from triton.runtime import interpreter

from qmerge.formats import rows
from qmerge.numerics import merge_kernels, nf4
from qmerge.pipeline import merge
from qmerge.types import CodedRows

SIZES = {"whole tiles": (32, 256, 16), "short blocks, odd edges": (19, 300, 7), "odd width": (23, 129, 5), "one column": (40, 1, 3), "one row": (1, 514, 1), "high rank": (16, 128, 100)}
BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)


def once_rounded(self: Any, x: Any, y: Any, z: Any) -> Any:
    """The interpreter rounds a fused multiply-add twice, a device once. Of fp32 numbers fp64 holds the product whole; what it rounds of the sum turns the result once in 2^29."""
    return interpreter.TensorHandle((x.data.astype(np.float64) * y.data + z.data).astype(np.float32), z.dtype.scalar)


def drawn(shape: tuple[int, int], block_size: int, kind: str, seed: int) -> CodedRows:
    generator = torch.Generator().manual_seed(seed)
    count = shape[0] * shape[1]
    codes = torch.randint(0, 16, (count,), dtype=torch.uint8, generator=generator)
    absmax = torch.rand(-(-count // block_size), generator=generator) * 0.1
    absmax[::7] = 0  # a block of zeros: some of them are -0
    return CodedRows(nf4.pack_nibbles(codes).reshape(-1), absmax, nf4.code_book(kind), block_size, *shape)


def plain(coded: CodedRows) -> torch.Tensor:
    return nf4.decode(coded.packed, coded.absmax, nf4.pair_table(coded.levels), coded.block_size, coded.rows * coded.columns).view(coded.rows, coded.columns)


def in_order(base: torch.Tensor, left: torch.Tensor, right: torch.Tensor, scaling: float) -> torch.Tensor:
    """W + s · B A by fused multiply-adds from the first of the rank to the last."""
    total = torch.zeros_like(base)
    for k in range(right.shape[0]):
        total = (left[:, k : k + 1].double() * right[k].double() + total).float()
    return total * scaling + base


def apart(one: torch.Tensor, two: torch.Tensor) -> int:
    """How many numbers differ in a bit."""
    size = {4: torch.int32, 2: torch.int16}[one.element_size()]
    return int((one.view(size) != two.view(size)).sum()) if one.dtype == two.dtype and one.shape == two.shape else one.numel()


def one(shape: tuple[int, int], rank: int, block_size: int, kind: str, seed: int) -> dict[str, float]:
    coded, generator = drawn(shape, block_size, kind, seed), torch.Generator().manual_seed(seed + 1)
    left, right = torch.randn(shape[0], rank, generator=generator) * 0.1, torch.randn(rank, shape[1], generator=generator) * 0.1
    base = plain(coded)
    before, out = merge_kernels.merge(coded, left, right, 0.3)
    same, from_floats = merge_kernels.merge(base, left, right, 0.3)
    found: dict[str, float] = {
        "decoded": apart(merge_kernels.decode(coded), base), "before": apart(before, base) + apart(same, base), "merged": apart(out, in_order(base, left, right, 0.3)),
        "from floats": apart(from_floats, out), "far from the CPU's": float((out - torch.mm(left, right).mul_(0.3).add_(base)).abs().max() / out.abs().max()),
        "changed": float((out != base).float().mean()), "fp16": apart(merge_kernels.decode(coded, torch.float16), base.half()) + apart(merge_kernels.merge(coded, left, right, 0.3, torch.float16)[1], out.half()),
        # the interpreter cuts where devices round: half a step or one
        "bf16": float(((merge_kernels.decode(coded, torch.bfloat16).float() - base).abs() / base.abs().clamp(min=1e-30)).max()),
    }  # fmt: skip
    return found


def kernels() -> dict[str, Any]:
    found: dict[str, Any] = {f"{name}, {kind} {block}": one((rows_, columns), rank, block, kind, block) for name, (rows_, columns, rank) in SIZES.items() for kind, block in (("nf4", 64), ("fp4", 32))}
    found |= {f"blocks of {block}": one((9, 1026), 4, block, "nf4", 1) for block in BLOCKS}
    narrow = merge_kernels._wide
    merge_kernels._wide = lambda count: True  # numbered in 64 bits, as a weight of more than 2^31 elements is
    found |= {f"numbered in 64 bits, {columns} columns": one((9, columns), 4, 64, "nf4", 2) for columns in (130, 129)}
    merge_kernels._wide = narrow
    anything()
    return {"cases": found, "bitsandbytes": {str(block): against_bitsandbytes(block) for block in BLOCKS}}


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(shape=st.tuples(st.integers(1, 40), st.integers(1, 300)), rank=st.integers(1, 20), half_block=st.integers(1, 300), kind=st.sampled_from(("nf4", "fp4")), seed=st.integers(0, 1000))
def anything(shape: tuple[int, int], rank: int, half_block: int, kind: str, seed: int) -> None:
    """Any shape, rank and even block size."""
    found = one(shape, rank, 2 * half_block, kind, seed)
    wrong = {name: count for name, count in found.items() if name in ("decoded", "before", "merged", "from floats", "fp16") and count}
    assert not wrong, f"{wrong} of {shape}, rank {rank}, block size {2 * half_block}, {kind}"


def against_bitsandbytes(block_size: int) -> int:
    """A weight that bitsandbytes itself packed and decodes, on the CPU."""
    from bitsandbytes import functional

    weight = torch.randn(24, 520, generator=torch.Generator().manual_seed(block_size)) * 0.05
    packed, state = functional.quantize_4bit(weight, blocksize=block_size, quant_type="nf4")
    coded = CodedRows(packed.reshape(-1), state.absmax, state.code.float(), block_size, *weight.shape)
    return apart(merge_kernels.decode(coded), functional.dequantize_4bit(packed, state))


def as_on_a_gpu(commands: list[list[str]]) -> list[dict[str, Any]]:
    """Exit codes of ``qmerge …``, and what the kernel was given: rows as stored, or as floats."""
    from qmerge.cli.main import main

    taken: Counter[str] = Counter()
    inner = merge_kernels.merge

    def counted(source: Any, *rest: Any) -> Any:
        taken["stored" if isinstance(source, CodedRows) else "floats"] += 1
        return inner(source, *rest)

    merge.runs_triton = rows.runs_triton = lambda device: True
    merge_kernels.merge = counted
    found = []
    for words in commands:
        taken.clear()
        sys.argv, said = ["qmerge", *words], io.StringIO()
        try:
            with redirect_stdout(io.StringIO()), redirect_stderr(said):
                main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        found.append({"code": code, "said": said.getvalue()[-2000:], **taken})
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    interpreter.InterpreterBuilder.create_fma = once_rounded
    print(json.dumps(as_on_a_gpu(json.loads(sys.argv[1])) if len(sys.argv) > 1 else kernels()))
