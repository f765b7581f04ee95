"""What does a safetensors file hold, judged by its header alone?

Format: 8 bytes little-endian header length N, N bytes of JSON (``name -> {dtype, shape, data_offsets}`` and ``__metadata__``),
then the data (https://github.com/huggingface/safetensors#format). This reader is stricter than the reference one, which lets a
duplicate name through and keeps the last.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import torch

from qmerge.errors import Refused
from qmerge.store.jsonfiles import parse_object
from qmerge.store.regular import open_plain
from qmerge.types import TensorSpec

MAX_HEADER_BYTES = 100_000_000

TORCH_DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "F32": torch.float32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}
_AGAIN = "the file is truncated or corrupt: download or save it again"


def dtype_name(dtype: torch.dtype) -> str:
    """safetensors' spelling of a torch dtype: ``dtype_name(torch.bfloat16) == "BF16"``. Refused for dtypes that no file can hold."""
    if dtype not in _NAMES:
        raise Refused("A safetensors file cannot hold this dtype.", expected=", ".join(TORCH_DTYPES), found=str(dtype))
    return _NAMES[dtype]


def read_header(path: Path | str) -> tuple[dict[str, TensorSpec], dict[str, str]]:
    """The tensors of one safetensors file, in the order of their bytes, and its metadata. Reads no tensor data.

    ``TensorSpec.start`` counts bytes from the start of the file. Raises Refused, naming file and tensor: missing or truncated
    file, header over 100 MB, malformed JSON, duplicate or empty names, unknown dtype, shape that disagrees with the byte
    count, holes or overlaps between tensors, bytes after the last tensor.
    """
    path = Path(path)
    try:
        with open_plain(path) as file:
            size = os.fstat(file.fileno()).st_size
            length = _header_length(_exactly(file, 8), size, path)
            raw = _exactly(file, length)
    except FileNotFoundError:
        raise Refused(f"{path.name} is missing.", where=str(path.parent), expected=path.name, found="no such file") from None
    except OSError as error:
        raise Refused(f"{path.name} cannot be read.", where=str(path.parent), found=error.strerror) from None
    if len(raw) != length or not raw.startswith(b"{"):
        raise Refused(f"{path.name} has no safetensors header.", where=path.name, expected="a JSON object", found=repr(raw[:8]), fix=_AGAIN)
    table = parse_object(raw, path.name, constants=False)
    _check_characters(raw, table, path)
    metadata = _metadata(table.pop("__metadata__", None), path)
    specs = [_spec(name, row, 8 + length, path) for name, row in table.items()]
    specs.sort(key=lambda spec: (spec.start, spec.nbytes))
    _check_layout(specs, 8 + length, size, path)
    return {spec.name: spec for spec in specs}, metadata


def rows_of(spec: TensorSpec, start: int, stop: int) -> TensorSpec:
    """The spec of rows ``start`` … ``stop`` (first dimension) of a tensor: a tensor of its own in the same file. A scalar is one row."""
    if not spec.shape:
        return spec
    width = math.prod(spec.shape[1:]) * TORCH_DTYPES[spec.dtype].itemsize
    return replace(spec, shape=(stop - start, *spec.shape[1:]), start=spec.start + start * width, nbytes=(stop - start) * width)


def _exactly(file: BinaryIO, count: int) -> bytes:
    """``count`` bytes, fewer where the file ends before; one read may give less than was asked for."""
    parts, left = [], count
    while left and (part := file.read(left)):
        parts.append(part)
        left -= len(part)
    return b"".join(parts)


def _header_length(first: bytes, size: int, path: Path) -> int:
    if len(first) < 8:
        raise Refused(f"{path.name} is too short for a safetensors file.", where=path.name, expected="at least 8 bytes",
                      found=f"{size} bytes", fix=_AGAIN)
    length = int.from_bytes(first, "little")
    if length > MAX_HEADER_BYTES:
        raise Refused(f"{path.name} claims a header larger than any safetensors file may have.", where=path.name,
                      expected=f"at most {MAX_HEADER_BYTES} bytes", found=f"{length} bytes", fix=_AGAIN)
    if 8 + length > size:
        raise Refused(f"{path.name} ends inside its header.", where=path.name, expected=f"{8 + length} bytes or more",
                      found=f"{size} bytes", fix=_AGAIN)
    return length


def _check_characters(raw: bytes, table: dict[str, Any], path: Path) -> None:
    """Half a character (a lone surrogate) can be spelled in JSON; safetensors refuses it, and no name with one can be written out."""
    if b"\\ud" not in raw.lower():
        return
    try:
        json.dumps(table, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise Refused(f"The header of {path.name} holds half a character.", where=path.name, expected="UTF-8 text", found=repr(error.object[error.start]), fix=_AGAIN) from None


def _metadata(value: Any, path: Path) -> dict[str, str]:
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(item, str) for item in value.values()):
        raise Refused(f"The metadata of {path.name} is malformed.", where=path.name, expected="text values only", found=repr(value)[:120])
    return value


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _spec(name: str, row: Any, data_start: int, path: Path) -> TensorSpec:
    """One entry of the header as a TensorSpec; Refused unless it has exactly the three fields, of the right kinds, that agree."""
    where = f"tensor {name!r} in {path.name}"
    if not name or not name.isprintable():
        raise Refused("A tensor has no usable name.", where=where, expected="printable text", fix=_AGAIN)
    if not isinstance(row, dict) or set(row) != {"dtype", "shape", "data_offsets"}:
        raise Refused("A header entry is malformed.", where=where, expected="dtype, shape, data_offsets", found=repr(row)[:120], fix=_AGAIN)
    dtype, shape, offsets = row["dtype"], row["shape"], row["data_offsets"]
    if not isinstance(dtype, str) or dtype not in TORCH_DTYPES:
        raise Refused("A tensor has a dtype that qmerge does not read.", where=where, expected=", ".join(TORCH_DTYPES), found=repr(dtype))
    if not isinstance(shape, list) or len(shape) > 64 or not all(_is_count(size) for size in shape):
        raise Refused("A tensor has a malformed shape.", where=where, expected="a list of sizes", found=repr(shape)[:120], fix=_AGAIN)
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_count(offset) for offset in offsets) or offsets[0] > offsets[1]:
        raise Refused("A tensor has malformed offsets.", where=where, expected="[begin, end]", found=repr(offsets)[:120], fix=_AGAIN)
    nbytes, expected = offsets[1] - offsets[0], math.prod(shape) * TORCH_DTYPES[dtype].itemsize
    if nbytes != expected:
        raise Refused("A tensor's shape and its byte count disagree.", where=where, expected=f"{expected} bytes for {dtype} {shape}",
                      found=f"{nbytes} bytes", fix=_AGAIN)
    if math.prod(filter(None, shape)) >= 2**60:  # beside a 0: safetensors multiplies in 64 bits
        raise Refused("A tensor has a malformed shape.", where=where, expected="sizes whose product fits 64 bits", found=repr(shape)[:120], fix=_AGAIN)
    return TensorSpec(name, tuple(shape), dtype, path.name, data_start + offsets[0], nbytes)


def _check_layout(specs: list[TensorSpec], data_start: int, size: int, path: Path) -> None:
    """Refused unless the tensors, sorted by start, cover ``data_start … size`` without a hole, an overlap or a rest."""
    end = data_start
    for spec in specs:
        if spec.start != end:
            kind = "overlaps the tensor before it" if spec.start < end else "leaves a hole before it"
            raise Refused(f"A tensor {kind}.", where=f"tensor {spec.name!r} in {path.name}", expected=f"data at byte {end}",
                          found=f"data at byte {spec.start}", fix=_AGAIN)
        end += spec.nbytes
        if end > size:
            raise Refused(f"{path.name} ends inside a tensor.", where=f"tensor {spec.name!r} in {path.name}",
                          expected=f"{end} bytes or more", found=f"{size} bytes", fix=_AGAIN)
    if end != size:
        raise Refused(f"{path.name} goes on after its last tensor.", where=path.name, expected=f"{end} bytes", found=f"{size} bytes", fix=_AGAIN)
