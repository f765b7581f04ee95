"""What weights does a GPTQ checkpoint hold, whoever wrote it?

``qweight`` int32 ``[ceil(in * bits / 32), out]``, ``qzeros`` int32 ``[groups, ceil(out * bits / 32)]``, ``scales`` ``[groups, out]``, ``g_idx`` int32 ``[in]``:
W = scales[g_idx] * (codes - zeros[g_idx]), transposed. ``checkpoint_format`` says whether zeros are stored as they are (``gptq_v2``) or less one (``gptq``).
Rows of ``[out, in]`` are columns of the file, so a weight is read whole. `gptq` is what this version writes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from qmerge.errors import Refused
from qmerge.formats.rows import Reader, whole_reader
from qmerge.numerics.packing import unpack_rows
from qmerge.store.checkpoint import Checkpoint
from qmerge.types import TensorSpec

BITS = (2, 3, 4, 8)
FORMATS = ("gptq", "gptq_v2")
SUFFIXES = ("qweight", "qzeros", "scales", "g_idx")
_COLUMNS = 512  # outputs decoded at once: codes are widened for these only


def find_quantized(names: Iterable[str], kind: str = "gptq") -> dict[str, str]:
    """Weight name (``<module>.weight``, which no file holds) to ``kind``."""
    return {name.removesuffix("qweight") + "weight": kind for name in names if name.endswith(".qweight")}


def components(weight: str) -> tuple[str, ...]:
    """The names of the tensors that may belong to ``weight``; ``g_idx`` is often left out where it counts up."""
    return tuple(weight.removesuffix("weight") + suffix for suffix in SUFFIXES)


def check_settings(settings: Mapping[str, Any], where: str) -> None:
    """Raise `Refused` for a layout that is not one of ``FORMATS``, by its name."""
    layout = settings.get("checkpoint_format") or settings.get("format") or "gptq"
    if layout not in FORMATS:
        raise Refused("the base is in a GPTQ layout that this version does not read", where=where, expected=" or ".join(FORMATS),
                      found=f"checkpoint_format {layout}",
                      fix="save it again as gptq with gptqmodel")
    if settings.get("pack_dtype", "int32") not in ("int32", "torch.int32"):
        raise Refused("the base packs GPTQ codes in words that this version does not read", where=where, expected="pack_dtype int32",
                      found=str(settings["pack_dtype"]))


def shape(weight: str, specs: Mapping[str, TensorSpec], settings: Mapping[str, Any]) -> tuple[int, int]:
    """``[out, in]``, from headers. Raises `Refused` where a part is missing."""
    codes, zeros, scales, index = components(weight)
    missing = [name for name in (codes, zeros, scales) if name not in specs]
    if missing:
        raise Refused("a GPTQ weight is incomplete", where=weight, expected=", ".join(missing), found="no such tensor", fix="download it again, or save it again with save_pretrained")
    inputs = specs[index].shape[0] if index in specs else specs[codes].shape[0] * 32 // int(settings.get("bits", 4))
    return specs[scales].shape[-1], inputs


def open_rows(weight: str, checkpoint: Checkpoint, settings: Mapping[str, Any]) -> Reader:
    """Raises `Refused` where the parts do not fit each other."""
    names, specs = components(weight), checkpoint.specs
    out, inputs = shape(weight, specs, settings)
    bits = _bits(weight, specs, settings, out, inputs)
    scales = checkpoint.load(names[2]).float()
    zeros = _zeros(checkpoint.load(names[1]), bits, out, settings)
    if names[3] in specs:
        index = checkpoint.load(names[3]).long()
    else:
        size = int(settings.get("group_size", -1))
        index = torch.arange(inputs) // (inputs if size < 1 else size)
    if zeros.shape != scales.shape or int(index.min()) < 0 or int(index.max()) >= scales.shape[0]:
        raise Refused("the parts of a GPTQ weight do not fit each other", where=weight, expected=f"{scales.shape[0]} groups of {out} outputs",
                      found=f"zeros {list(zeros.shape)}, groups {int(index.min())} to {int(index.max())}")

    def load(device: torch.device) -> torch.Tensor:
        packed, group = checkpoint.load(names[0]).to(device), index.to(device)
        near, there = zeros.to(device), scales.to(device)
        weights = torch.empty(out, inputs, device=device)
        for start in range(0, out, _COLUMNS):
            part = slice(start, start + _COLUMNS)
            codes = unpack_rows(packed[:, part], bits, inputs).float()
            weights[part] = codes.sub_(near[:, part][group]).mul_(there[:, part][group]).T
        return weights

    return whole_reader((out, inputs), load)


def _bits(weight: str, specs: Mapping[str, TensorSpec], settings: Mapping[str, Any], out: int, inputs: int) -> int:
    """The file's bits, or what the shapes say where ``dynamic`` gives modules bits of their own."""
    packed = specs[components(weight)[0]]
    told = int(settings.get("bits", 4))
    fits = [bits for bits in (told, *BITS) if bits in BITS and tuple(packed.shape) == (-(-inputs * bits // 32), out) and packed.dtype == "I32"]
    if not fits:
        raise Refused("a GPTQ weight is packed in a way that this version does not read", where=components(weight)[0], expected=f"int32, bits one of {BITS}",
                      found=f"{packed.dtype} {list(packed.shape)} for [out, in] = [{out}, {inputs}], bits {told}")
    return fits[0]


def _zeros(packed: torch.Tensor, bits: int, out: int, settings: Mapping[str, Any]) -> torch.Tensor:
    """fp32 ``[groups, out]``. Files of the first format hold zeros less one, taken from whole words: borrows between neighbours come back the same way."""
    first = (settings.get("checkpoint_format") or settings.get("format") or "gptq") == "gptq"
    if first and bits != 3:
        ones = sum(1 << shift for shift in range(0, 32, bits))
        packed = packed + torch.tensor(ones - (1 << 32) if ones >= 1 << 31 else ones, dtype=torch.int32)
    zeros = unpack_rows(packed.T.contiguous(), bits, out).T.contiguous()
    return ((zeros + 1) & 7 if first and bits == 3 else zeros).float()
