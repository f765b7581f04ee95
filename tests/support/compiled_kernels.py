"""Run as a process of its own: what Triton's compiler makes of the device kernels for a GPU that need not be there. Prints counts of instructions as JSON.

The interpreter takes what no compiler does (a mixed type, a shape that is no power of two), and says nothing of how sums are rounded.
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from qmerge.numerics import device_kernels, merge_kernels

FLOATS = dict.fromkeys(("absmax", "levels", "left", "right", "before"), "*fp32") | {"factor": "fp32"}
COUNTS = ("rows", "columns", "high", "half", "across", "rank", "count", "nbytes", "stride")


def instructions(kernel: Any, types: dict[str, str], constants: dict[str, Any], target: int, options: dict[str, Any]) -> dict[str, int]:
    """PTX instructions by name. Pointers and counts are told to be multiples of 16, as those of real weights are."""
    names = [name for name in kernel.arg_names if name not in constants]
    signature = {name: types[name] for name in names} | dict.fromkeys(constants, "constexpr")
    order = {name: signature[name] for name in kernel.arg_names}
    even = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in names if types[name][0] == "*" or name in COUNTS}
    values = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    made = triton.compile(ASTSource(kernel, order, values, even), target=GPUTarget("cuda", target, 32), options=options)
    assert made.asm["cubin"]
    return dict(Counter(re.findall(r"^\s+(?:@!?%p\d+ )?([a-z]+[.\w:]*)", made.asm["ptx"], re.M)))


def compiled(target: int) -> dict[str, dict[str, int]]:
    found, counts = {}, dict.fromkeys(COUNTS, "i32")
    for wide in (False, True):
        for dtype in ("fp32", "bf16", "fp16"):
            types = {"packed": "*u8", "out": f"*{dtype}"} | FLOATS | counts
            constants = {"BLOCK": 64, "WIDE": wide, "RUN": merge_kernels.RUN, "RUNS": merge_kernels.BYTES // merge_kernels.RUN}
            found[f"decode {dtype} {wide}"] = instructions(merge_kernels._decode, types, constants, target, merge_kernels.EXACT)
            for kind in ("pairs", "nibbles", "floats"):
                types["source"] = "*fp32" if kind == "floats" else "*u8"
                constants = {"CODED": kind, "BLOCK": 64, "WIDE": wide, "ROWS": merge_kernels.ROWS, "COLUMNS": merge_kernels.COLUMNS}
                found[f"merge {kind} {dtype} {wide}"] = instructions(merge_kernels._merge, types, constants, target, merge_kernels.EXACT)
    for book in (False, True):
        types = dict.fromkeys(("work", "scale", "zero", "levels", "bounds", "upper", "inverse", "errors", "current", "gradient", "matrix", "steps", "moved"), "*fp32") | {"codes": "*u8", "top": "fp32"} | counts
        constants = {"BOOK": book, "LEVELS": device_kernels.LEVELS, "BLOCK": 64, "ROWS": device_kernels.ROWS}
        for name, kernel in (("round", device_kernels._round), ("descend", device_kernels._descend)):
            found[f"{name} {book}"] = instructions(kernel, types, constants, target, {})
    return found


if __name__ == "__main__":
    print(json.dumps(compiled(int(sys.argv[1]))))
