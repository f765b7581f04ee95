"""How does bitsandbytes store a 4-bit weight in a checkpoint?

``<w>`` uint8 ``[n / 2, 1]`` (or the same bytes as another dtype), NF4 or FP4, ``<w>.absmax``, ``<w>.quant_map``, with double quantization also
``<w>.nested_absmax`` and
``<w>.nested_quant_map``, and the rest as JSON bytes in ``<w>.quant_state.bitsandbytes__nf4``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from typing import Any

import torch

from qmerge.errors import Refused
from qmerge.formats.integers import Layout
from qmerge.formats.nf4_recipe import Nf4Recipe
from qmerge.formats.rows import Reader, four_bit_reader
from qmerge.numerics import nf4
from qmerge.store.checkpoint import Checkpoint
from qmerge.store.jsonfiles import parse_object
from qmerge.store.tensors import read_bytes
from qmerge.types import Grid, QuantizedWeight, QuantState, known

STATE_KEY = ".quant_state.bitsandbytes__"
NOTHING = "no_module"
"""transformers leaves the head float where it is told of no module to skip; a name that no module has means none"""
_PARTS = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map")
NESTED = frozenset({"nested_blocksize", "nested_offset"})


def find_quantized(names: Iterable[str]) -> dict[str, str]:
    """Weight name to quant type (``"nf4"`` or ``"fp4"``) of every 4-bit weight among a checkpoint's tensor names."""
    found = {}
    for name in names:
        weight, key, kind = name.rpartition(STATE_KEY)
        if key:
            found[weight] = kind
    return found


def components(weight: str, quant_type: str = "nf4") -> tuple[str, ...]:
    """The names of the tensors that may belong to ``weight``, itself first."""
    return (weight, *(weight + part for part in _PARTS), f"{weight}{STATE_KEY}{quant_type}")


def read_state(weight: str, load: Callable[[str], torch.Tensor], names: Iterable[str], quant_type: str = "nf4") -> QuantState:
    """Everything of one stored weight but its codes. ``load`` gives a tensor by name. Raises `Refused` where parts are missing or do not fit each other."""
    held = set(names)
    state_name = f"{weight}{STATE_KEY}{quant_type}"
    missing = [name for name in (weight, weight + ".absmax", weight + ".quant_map", state_name) if name not in held]
    if missing:
        raise Refused("a 4-bit weight is incomplete", where=weight, expected=", ".join(missing), found="no such tensor", fix="download it again, or save it again with save_pretrained")
    meta = _read_meta(load(state_name), state_name)
    code = load(weight + ".quant_map").float()
    if code.numel() != 16 or not torch.allclose(code, nf4.code_book(quant_type), atol=1e-6):
        raise Refused(f"a 4-bit weight brings a code book that is not {quant_type.upper()}'s", where=weight + ".quant_map",
                      fix="bitsandbytes itself would ignore it")
    if meta.get("quant_type", quant_type) != quant_type:
        raise Refused("a quant state says another type than its name", where=state_name, expected=quant_type, found=repr(meta["quant_type"])[:60])
    nested = bool(meta.keys() & NESTED)
    parts = [weight + ".nested_absmax", weight + ".nested_quant_map"]
    if found := [name for name in parts if (name in held) != nested]:
        raise Refused("a 4-bit weight does not fit its own quant state", where=weight, expected="both of " + ", ".join(parts) if nested else "single quantization", found=f"{found[0]}: {'absent' if nested else 'there'}")
    state = QuantState(
        absmax=load(weight + ".absmax"),
        code=code,
        block_size=meta["blocksize"],
        shape=tuple(meta["shape"]),
        dtype=meta["dtype"],
        quant_type=quant_type,
        nested_absmax=load(weight + ".nested_absmax").float() if nested else None,
        nested_code=load(weight + ".nested_quant_map").float() if nested else None,
        nested_block_size=meta.get("nested_blocksize", 256),
        offset=_as_fp32(meta.get("nested_offset", 0.0)),
    )
    _check_state(weight, state)
    return state


def _check_state(weight: str, state: QuantState) -> None:
    if state.nested and state.absmax.dtype != torch.uint8:
        raise Refused("a doubly quantized 4-bit weight has block maxima that are no codes", where=weight + ".absmax", expected="uint8",
                      found=str(state.absmax.dtype))
    floats = [state.absmax] if not state.nested else [known(state.nested_absmax), known(state.nested_code)]
    if not all(part.is_floating_point() for part in floats):
        raise Refused("a 4-bit weight has block maxima that are no numbers", where=weight + ".absmax", expected="floating point", found=str(floats[0].dtype))
    blocks = -(-state.shape[0] * state.shape[1] // state.block_size)
    nested_blocks = -(-blocks // state.nested_block_size)
    found = f"{state.absmax.numel()} block maxima" + (f", {known(state.nested_absmax).numel()} nested ones" if state.nested else "")
    if state.absmax.numel() != blocks or (state.nested and (known(state.nested_absmax).numel() != nested_blocks or known(state.nested_code).numel() != 256)):
        raise Refused("a 4-bit weight does not fit its own quant state", where=weight, found=found,
                      expected=f"{blocks} block maxima for shape {state.shape}" + (f", {nested_blocks} nested ones" if state.nested else ""))


def _check_codes(weight: str, state: QuantState, nbytes: int) -> None:
    wanted = -(-state.shape[0] * state.shape[1] // 2)
    if nbytes != wanted:
        raise Refused("a 4-bit weight does not fit its own quant state", where=weight, expected=f"{wanted} bytes of codes for shape {state.shape}",
                      found=f"{nbytes} bytes")


def lost_parts(names: Iterable[str]) -> list[str]:
    """Parts of 4-bit weights whose quant state is not among ``names``: what is left of a weight that would be copied as plain numbers."""
    held = set(names)
    known = find_quantized(held)
    return sorted(name for name in held if (part := next((part for part in _PARTS if name.endswith(part)), None)) and name.removesuffix(part) not in known)


def unpack(weight: str, load: Callable[[str], torch.Tensor], names: Iterable[str], quant_type: str = "nf4") -> QuantizedWeight:
    """Codes and state of one stored weight. ``load`` gives a tensor by name. Raises `Refused` where the parts do not fit each other."""
    state = read_state(weight, load, names, quant_type)
    packed = load(weight).reshape(-1).view(torch.uint8)
    _check_codes(weight, state, packed.numel())
    codes = nf4.unpack_nibbles(packed, state.shape[0] * state.shape[1]).reshape(state.shape)
    return QuantizedWeight(codes, Grid(quant_type, 4, state.block_size, True, state.nested), state=state)


def open_rows(weight: str, checkpoint: Checkpoint, quant_type: str = "nf4") -> Reader:
    """Rows of one stored weight: the state is read now, codes as they are asked for, whatever dtype ``bnb_4bit_quant_storage`` gave them."""
    state, spec = read_state(weight, checkpoint.load, checkpoint.specs, quant_type), checkpoint.specs[weight]
    _check_codes(weight, state, spec.nbytes)
    return four_bit_reader(state, lambda start, stop: read_bytes(checkpoint.path, spec, start, stop))


def read_meta(weight: str, load: Callable[[str], torch.Tensor], quant_type: str = "nf4") -> dict[str, Any]:
    """``shape``, ``dtype``, ``blocksize`` and the rest of the JSON state. Raises `Refused` where it cannot be read."""
    name = f"{weight}{STATE_KEY}{quant_type}"
    return _read_meta(load(name), name)


def _read_meta(raw: torch.Tensor, where: str) -> dict[str, Any]:
    """The JSON state, every value of it in its range. What only double quantization has comes whole or not at all: a default instead of a lost value would be another weight."""
    if raw.dtype != torch.uint8 or raw.dim() != 1:
        raise Refused("a quant state cannot be read", where=where, expected="bytes", found=f"{raw.dtype} {list(raw.shape)}")
    try:
        meta = parse_object(bytes(raw.tolist()), where, constants=False)
    except Refused as problem:
        raise Refused("a quant state cannot be read", where=where, expected="a JSON object, no key twice", found=problem.found) from None
    nested = meta.keys() & NESTED
    wrong = [] if _count(meta.get("blocksize"), 2) and meta["blocksize"] % 2 == 0 else ["blocksize"]
    shape = meta.get("shape")
    wrong += [] if isinstance(shape, list) and len(shape) == 2 and all(_count(size, 1) for size in shape) else ["shape"]
    wrong += [] if meta.get("dtype") in ("float16", "bfloat16", "float32") else ["dtype"]
    if nested:
        offset = meta.get("nested_offset")
        wrong += [] if _count(meta.get("nested_blocksize"), 1) else ["nested_blocksize"]
        wrong += [] if isinstance(offset, (int, float)) and not isinstance(offset, bool) and abs(offset) < 1e38 else ["nested_offset"]
    if wrong:
        raise Refused("a quant state cannot be read", where=where, expected="blocksize, shape, dtype as bitsandbytes writes them, and with double quantization nested_blocksize and nested_offset",
                      found=", ".join(f"{key}: {repr(meta.get(key))[:60]}" for key in wrong))
    return meta


def _count(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value < 2**40


def _as_fp32(value: float) -> float:
    return float(torch.tensor(float(value), dtype=torch.float32))


def pack(weight: str, quantized: QuantizedWeight) -> dict[str, torch.Tensor]:
    """The tensors to store for one weight, by name, as ``save_pretrained`` names them."""
    state = known(quantized.state)
    meta: dict[str, Any] = {"quant_type": state.quant_type, "blocksize": state.block_size, "dtype": state.dtype, "shape": list(state.shape)}
    tensors = {weight: nf4.pack_nibbles(quantized.codes), weight + ".absmax": state.absmax, weight + ".quant_map": state.code}
    if state.nested:
        meta |= {"nested_blocksize": state.nested_block_size, "nested_dtype": "float32", "nested_offset": state.offset}
        tensors |= {weight + ".nested_absmax": known(state.nested_absmax), weight + ".nested_quant_map": known(state.nested_code)}
    tensors[f"{weight}{STATE_KEY}{state.quant_type}"] = torch.tensor(list(json.dumps(meta).encode()), dtype=torch.uint8)
    return tensors


def stored_bytes(shape: tuple[int, int], block_size: int, double_quant: bool) -> int:
    """Bytes of the tensors that `pack` makes, up to the few of the JSON state (taken as 180)."""
    count = shape[0] * shape[1]
    blocks = -(-count // block_size)
    nested = -(-blocks // 256) * 4 + 256 * 4 if double_quant else 3 * blocks
    return -(-count // 2) + blocks + nested + 64 + 180


def config(layout: Layout) -> dict[str, Any]:
    """``quantization_config`` for ``config.json``: the base's own where it had one, as far as it is still true. Block sizes are in the tensors' states."""
    kinds = {(grid.kind, grid.double_quant) for grid in layout.grids.values()} or {("nf4", True)}
    quant_type, double_quant = min(kinds)  # a loader takes both from each tensor's own state; mixed nesting only where the base mixes it
    settings: dict[str, Any] = {
        "quant_method": "bitsandbytes",
        "_load_in_4bit": True,
        "_load_in_8bit": False,
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_compute_dtype": layout.dtype,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": None,
        "llm_int8_threshold": 6.0,
    } | dict(layout.old or {})
    settings |= {"bnb_4bit_quant_storage": "uint8", "bnb_4bit_quant_type": quant_type}
    if layout.old is None or len({nested for _, nested in kinds}) == 1:
        settings["bnb_4bit_use_double_quant"] = double_quant
    return settings | {"llm_int8_skip_modules": _skipped(layout, settings["llm_int8_skip_modules"])}


def _skipped(layout: Layout, told: list[str] | None) -> list[str] | None:
    """The modules that a loader must leave float: what the base said where that is still right, None where only the head is (then nothing need be said)."""
    head = [layout.head] if layout.head is not None else []
    rule = Nf4Recipe(skip=tuple(told or head or ("lm_head",)))
    if all(rule.skips(module) for module in layout.floats) and not any(rule.skips(module) for module in layout.grids):
        return told
    return sorted(layout.floats) or [NOTHING]
