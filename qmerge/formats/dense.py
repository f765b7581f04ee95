"""Which dtypes can a checkpoint of plain floats have, and what do configs call them? How does an fp32 weight become one of them?"""

from __future__ import annotations

import torch

from qmerge.errors import Refused
from qmerge.numerics.finite import all_finite

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
CONFIG_NAMES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
FORMAT_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def cast(name: str, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """One cast, to nearest. Raises `Refused` where a finite value would overflow (fp16 above 65504)."""
    found = weight.to(dtype)
    if found.is_floating_point() and not all_finite(found):
        if bool(torch.isfinite(weight).all()):
            raise Refused(f"a merged weight does not fit {FORMAT_NAMES.get(dtype, dtype)}", where=name, expected=f"at most {torch.finfo(dtype).max:g} in magnitude",
                          found=f"{float(weight.abs().max()):g}", fix="use --format bf16", written="the unfinished output was removed")
        raise Refused("a merged weight is not finite", where=name, found="NaN or Inf", fix="check the base and the adapter", written="the unfinished output was removed")
    return found
