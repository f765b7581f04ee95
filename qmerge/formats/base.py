"""What does a base checkpoint hold, seen as float tensors?

Three kinds of base, one reading: a serialized bitsandbytes 4-bit checkpoint; a float checkpoint with the NF4 recipe that the adapter was
trained under (quantized on the fly by bitsandbytes itself); a float checkpoint that is merged into as it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from qmerge.errors import Refused
from qmerge.formats import nf4 as nf4_format
from qmerge.numerics import nf4
from qmerge.store.checkpoint import Checkpoint
from qmerge.types import Grid, QuantizedWeight, QuantState


@dataclass(frozen=True)
class Nf4Recipe:
    """How a float base was quantized while the adapter was trained. ``dtype`` is the dtype of the weights at that moment."""

    block_size: int = 64
    double_quant: bool = True
    dtype: str | None = None

    def to_json(self) -> dict[str, Any]:
        return {"block_size": self.block_size, "double_quant": self.double_quant, "dtype": self.dtype}


@dataclass(frozen=True)
class Base:
    """A checkpoint read as logical tensors. Weights of linears come as ``[out, in]`` whatever the file's order.

    ``quantized`` are weights stored in 4 bits, with their type; ``fly`` those that become so by ``recipe``; ``conv`` are weights of Conv1D modules, which
    float files store ``[in, out]`` (bitsandbytes files store ``[out, in]`` all the same).
    """

    checkpoint: Checkpoint
    quantized: dict[str, str]
    recipe: Nf4Recipe | None
    fly: frozenset[str]
    conv: frozenset[str]

    @property
    def names(self) -> tuple[str, ...]:
        """Logical tensor names, sorted; the parts of a 4-bit weight count as one."""
        parts = {part for weight, kind in self.quantized.items() for part in nf4_format.components(weight, kind)[1:]}
        return tuple(sorted(name for name in self.checkpoint.specs if name not in parts))

    def is_4bit(self, name: str) -> bool:
        return name in self.quantized or name in self.fly

    def shape(self, name: str) -> tuple[int, ...]:
        """``[out, in]`` of linears; the stored shape of everything else. Reads the quant state of a 4-bit weight, never its codes."""
        if name in self.quantized:
            raw = self.checkpoint.load(f"{name}{nf4_format.STATE_KEY}{self.quantized[name]}")
            return tuple(nf4_format._read_meta(raw, name)["shape"])
        shape = tuple(self.checkpoint.specs[name].shape)
        return shape[::-1] if name in self.conv else shape

    def stored(self, name: str) -> torch.Tensor:
        """A float tensor as the file holds it (dtype and order). Raises for a weight that the file holds in 4 bits."""
        if name in self.quantized:
            raise KeyError(f"{name} is stored in 4 bits")
        return self.checkpoint.load(name)

    def four_bit(self, name: str, device: torch.device | str = "cpu") -> QuantizedWeight:
        """Codes and quant state of a 4-bit weight, stored or made on the fly exactly as bitsandbytes makes it."""
        if name in self.quantized:
            return nf4_format.unpack(name, self.checkpoint.load, self.checkpoint.specs, self.quantized[name])
        return quantize_as_bitsandbytes(self._oriented(name), self.recipe, device)

    def weight(self, name: str, device: torch.device | str = "cpu") -> torch.Tensor:
        """fp32 ``[out, in]`` (linears) or the tensor in fp32, on ``device``: what the adapter was trained on.

        NF4 is decoded by plain torch on a CPU and by bitsandbytes' kernels on CUDA; both give the same bits.
        """
        if self.is_4bit(name):
            found = self.four_bit(name, device)
            return nf4.dequantize(found.codes, found.state) if torch.device(device).type == "cpu" else decode_with_bitsandbytes(found, device)
        return self._oriented(name).float().to(device)

    def _oriented(self, name: str) -> torch.Tensor:
        tensor = self.checkpoint.load(name)
        return tensor.T.contiguous() if name in self.conv else tensor


def open_base(checkpoint: Checkpoint, *, on: str, recipe: Nf4Recipe | None, linears: dict[str, bool] | None) -> Base:
    """Decide what kind of base this is, or refuse to guess.

    ``linears`` maps the weight names that bitsandbytes would quantize to whether they are Conv1D (stored ``[in, out]`` in float files); None when
    the caller has no model at hand, which is enough for serialized 4-bit bases of plain linears.
    """
    quantized = nf4_format.find_quantized(checkpoint.specs)
    settings = checkpoint.config.get("quantization_config") or {}
    method = settings.get("quant_method")
    conv = frozenset(name for name, is_conv in (linears or {}).items() if is_conv)
    if quantized:
        _check_serialized(checkpoint, quantized, settings, on, recipe)
        return Base(checkpoint, quantized, None, frozenset(), conv)
    if method:
        raise Refused("the base is quantized in a way that this version does not read", where=checkpoint.name, expected="a bitsandbytes NF4 checkpoint or a float one", found=f"quant_method {method}")
    if on == "original":
        if recipe:
            raise Refused("an NF4 recipe was given together with --on original", where="--nf4-recipe", fix="give one of the two")
        return Base(checkpoint, {}, None, frozenset(), conv)
    if recipe is None:
        raise Refused(
            "the base is a float checkpoint, and which base the adapter was trained on must not be guessed",
            where=checkpoint.name,
            expected="an NF4 checkpoint, or a float one with a word on how it was used",
            found="float weights, no --nf4-recipe and no --on original",
            fix="--nf4-recipe double|single|FILE if it was loaded with load_in_4bit while training (QLoRA); --on original if it was trained on in float",
        )
    return Base(checkpoint, {}, recipe, frozenset(linears or {}), conv)


def _check_serialized(checkpoint: Checkpoint, quantized: dict[str, str], settings: dict, on: str, recipe: Nf4Recipe | None) -> None:
    if on == "original":
        raise Refused("--on original needs the float base itself", where=checkpoint.name, expected="a float checkpoint", found="a bitsandbytes 4-bit checkpoint",
                      fix="name the float base with --original, or leave --on out")
    if recipe is not None:
        raise Refused("the base is in NF4 already and brings its own quant states", where=checkpoint.name, found="--nf4-recipe given", fix="leave --nf4-recipe out")
    kinds = sorted(set(quantized.values()))
    if kinds != ["nf4"]:
        raise Refused("the base holds 4-bit weights that are not NF4", where=checkpoint.name, expected="nf4", found=", ".join(kinds), fix="this version reads NF4")
    missing = [name for name in quantized if name not in checkpoint.specs]
    if missing:
        raise Refused("a quant state has no weight", where=missing[0], found="no such tensor")
    if not settings:
        raise Refused("the base holds 4-bit weights, and its config.json does not say so", where=checkpoint.name, expected="quantization_config", found="none")


def quantize_as_bitsandbytes(weight: torch.Tensor, recipe: Nf4Recipe, device: torch.device | str = "cpu") -> QuantizedWeight:
    """``weight`` ``[out, in]`` to NF4 by bitsandbytes' own code, as ``load_in_4bit`` would have done."""
    import bitsandbytes.functional as bnb

    dtype = getattr(torch, recipe.dtype) if recipe.dtype else weight.dtype
    packed, state = bnb.quantize_4bit(
        weight.to(device=device, dtype=dtype).contiguous(), blocksize=recipe.block_size, compress_statistics=recipe.double_quant, quant_type="nf4"
    )
    nested = state.state2
    own = QuantState(
        absmax=state.absmax.cpu(),
        code=state.code.float().cpu(),
        block_size=state.blocksize,
        shape=tuple(weight.shape),
        dtype=str(dtype).removeprefix("torch."),
        nested_absmax=nested.absmax.float().cpu() if nested else None,
        nested_code=nested.code.float().cpu() if nested else None,
        nested_block_size=nested.blocksize if nested else 256,
        offset=float(state.offset) if nested else 0.0,
    )
    codes = nf4.unpack_nibbles(packed.cpu().reshape(-1).view(torch.uint8), weight.numel()).reshape(weight.shape)
    return QuantizedWeight(codes, Grid("nf4", 4, recipe.block_size, True, recipe.double_quant), state=own)


def decode_with_bitsandbytes(weight: QuantizedWeight, device: torch.device | str) -> torch.Tensor:
    """fp32 ``[out, in]`` on ``device`` by bitsandbytes' kernels, nested absmax undone by them too."""
    import bitsandbytes.functional as bnb

    own, nested = weight.state, None
    if own.nested:
        nested = bnb.QuantState(own.nested_absmax.to(device), code=own.nested_code.to(device), blocksize=own.nested_block_size, dtype=torch.float32)
    state = bnb.QuantState(
        own.absmax.to(device), shape=torch.Size((1, weight.codes.numel())), code=own.code.to(device), blocksize=own.block_size, quant_type=own.quant_type,
        dtype=torch.float32, offset=torch.tensor(own.offset, device=device) if own.nested else None, state2=nested,
    )
    return bnb.dequantize_4bit(nf4.pack_nibbles(weight.codes).to(device), quant_state=state).reshape(own.shape)
