"""How fast does a GPU decode and merge a 4-bit weight, against copying as many bytes there? Not yet measured: no machine with a GPU was lent so far."""

from __future__ import annotations

import time
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

from bench_speed import in_turn, ratio

OUT, IN, RANK, BLOCK = 14336, 4096, 16, 64
"""an MLP weight of Llama-3-8B: 147 MB of codes and bf16, more than a GPU's caches hold"""
CALLS = 20
"""in a row, with one wait at the end"""
SHARE = 0.7
"""of the rate of a copy that is aimed at"""


def on_a_gpu(rounds: int) -> list[dict[str, Any]]:
    """Decoding NF4 to bf16, and decoding with a rank-16 product added (W and W + s·BA in fp32, as a merge takes both), each against a copy on the device that reads and writes as many bytes; decoding to fp32 against
    bitsandbytes' kernel; merging against bitsandbytes' kernel, torch's product and sum, as without the fused kernel."""
    import torch

    if not torch.cuda.is_available() or not find_spec("triton"):
        raise LookupError("there is no GPU here, or no Triton")
    import bitsandbytes.functional as bnb

    from qmerge.device import device_name, exact_products
    from qmerge.numerics import merge_kernels
    from qmerge.types import CodedRows

    device = torch.device("cuda")
    weight = torch.randn(OUT, IN, device=device) * 0.02
    left, right = torch.randn(OUT, RANK, device=device) * 0.01, torch.randn(RANK, IN, device=device)
    packed, state = bnb.quantize_4bit(weight, quant_type="nf4", blocksize=BLOCK)
    coded = CodedRows(packed.reshape(-1), state.absmax, state.code.float(), BLOCK, OUT, IN)
    if not torch.equal(merge_kernels.decode(coded), bnb.dequantize_4bit(packed, state)):
        raise SystemExit("the two decode to other values, so their times mean nothing")
    read = packed.numel() + 4 * state.absmax.numel()
    moved = {"decode": read + 2 * weight.numel(), "merge": read + 4 * (left.numel() + right.numel()) + 8 * weight.numel()}
    arms = {f"{name} copy": _copy(nbytes, device) for name, nbytes in moved.items()} | {
        "decode": lambda: merge_kernels.decode(coded, torch.bfloat16), "fp32": lambda: merge_kernels.decode(coded), "bitsandbytes": lambda: bnb.dequantize_4bit(packed, state),
        "merge": lambda: merge_kernels.merge(coded, left, right, 0.5), "apart": lambda: torch.mm(left, right).mul_(0.5).add_(bnb.dequantize_4bit(packed, state)),
    }  # fmt: skip
    with exact_products():
        found = in_turn(rounds, {name: _seconds_of(call) for name, call in arms.items()})
    where = f"on {device_name(device)}"
    return [
        ratio("gpu/decode/copy", f"NF4 {OUT} × {IN} to bf16 {where} / copying its bytes there", found["decode"], found["decode copy"], round(1 / SHARE, 2)),
        ratio("gpu/decode/bitsandbytes", f"NF4 to fp32 {where} / by bitsandbytes", found["fp32"], found["bitsandbytes"]),
        ratio("gpu/merge/copy", f"NF4 decoded and merged {where}, rank {RANK} / copying its bytes there", found["merge"], found["merge copy"], round(1 / SHARE, 2)),
        ratio("gpu/merge/apart", f"the same / by bitsandbytes and torch, {where}", found["merge"], found["apart"]),
    ]


def _copy(nbytes: int, device: Any) -> Callable[[], Any]:
    """Half of them read, half written."""
    import torch

    source = torch.zeros(nbytes // 2, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def _seconds_of(call: Callable[[], Any]) -> Callable[[], float]:
    """Of one call, compiled and warm; the device's own work, as far as launching keeps up with it."""
    import torch

    def timed() -> float:
        call()
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(CALLS):
            call()
        torch.cuda.synchronize()
        return (time.perf_counter() - began) / CALLS

    return timed
