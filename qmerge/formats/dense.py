"""How is a weight stored as plain floats?"""

from __future__ import annotations

import torch

from qmerge.errors import Refused

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
CONFIG_NAMES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def pack(name: str, weight: torch.Tensor, fmt: str) -> dict[str, torch.Tensor]:
    """One cast. Raises `Refused` where a finite value would overflow (fp16 above 65504)."""
    cast = weight.to(DTYPES[fmt])
    if not torch.isfinite(cast).all():
        if torch.isfinite(weight).all():
            raise Refused(f"a merged weight does not fit {fmt}", where=name, expected="at most 65504 in magnitude" if fmt == "fp16" else "finite values",
                          found=f"{float(weight.abs().max()):g}", fix="use --format bf16", written="the unfinished output was removed")
        raise Refused("a merged weight is not finite", where=name, found="NaN or Inf", fix="check the base and the adapter", written="the unfinished output was removed")
    return {name: cast.contiguous()}
