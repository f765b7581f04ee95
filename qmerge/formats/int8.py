"""How does bitsandbytes store an LLM.int8 weight in a checkpoint?

``<m>.weight`` int8 ``[out, in]``, ``<m>.SCB`` fp32 ``[out]``, the largest magnitude of each row, and ``<m>.weight_format``, 0 for plain rows.
W = int8 * SCB / 127. Outlier columns are taken out of activations while the model runs, never out of these weights.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from qmerge.errors import Refused
from qmerge.formats.rows import Reader
from qmerge.store.checkpoint import Checkpoint
from qmerge.store.tensors import read_rows

_STEP = 7.874015718698502e-3  # 1 / 127 as bitsandbytes writes it; it multiplies, so a division would differ in last bits


def find_quantized(names: Iterable[str]) -> dict[str, str]:
    """Weight name to ``"int8"``."""
    return {name.removesuffix("SCB") + "weight": "int8" for name in names if name.endswith(".SCB")}


def components(weight: str) -> tuple[str, ...]:
    """The names of the tensors that may belong to ``weight``, itself first."""
    module = weight.removesuffix("weight")
    return weight, f"{module}SCB", f"{module}weight_format"


def open_rows(weight: str, checkpoint: Checkpoint) -> Reader:
    """Raises `Refused` where the parts do not fit each other, or the layout is not plain rows."""
    _, scale_name, format_name = components(weight)
    spec = checkpoint.specs[weight]
    if spec.dtype != "I8" or len(spec.shape) != 2:
        raise Refused("an LLM.int8 weight is not a matrix of int8", where=weight, expected="I8 [out, in]", found=f"{spec.dtype} {list(spec.shape)}")
    scales = checkpoint.load(scale_name).float().reshape(-1)
    if scales.numel() != spec.shape[0]:
        raise Refused("an LLM.int8 weight does not fit its own scales", where=scale_name, expected=f"{spec.shape[0]} values", found=f"{scales.numel()}")
    if format_name in checkpoint.specs and int(checkpoint.load(format_name).reshape(-1)[0]) != 0:
        raise Refused("an LLM.int8 weight is stored in a layout for one kind of GPU", where=format_name, expected="0 (rows)",
                      found=str(checkpoint.load(format_name).tolist()),
                      fix="bitsandbytes itself reads rows only: load the model with the version that wrote it, and save it again")

    def read(start: int, stop: int, device: torch.device) -> torch.Tensor:
        codes = read_rows(checkpoint.path, spec, start, stop).to(device)
        return (codes * scales[start:stop].to(device).unsqueeze(1)).mul_(_STEP)

    return Reader(tuple(spec.shape), 1, read)
