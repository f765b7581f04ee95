"""What does a base checkpoint hold, seen as float tensors?

One reading of every kind of base: packed by bitsandbytes (NF4, FP4, LLM.int8), GPTQ or AWQ; a float checkpoint with the recipe by which bitsandbytes quantized
it while the adapter was trained; a float checkpoint that is merged into as it is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from qmerge.errors import Refused
from qmerge.formats import awq, gptq_base, int8
from qmerge.formats import nf4 as nf4_format
from qmerge.formats.fly import decode_with_bitsandbytes, fly_reader, quantize_as_bitsandbytes
from qmerge.formats.nf4_recipe import Nf4Recipe
from qmerge.formats.rows import Device, Reader, count_rows, float_reader, four_bit_step
from qmerge.store.checkpoint import Checkpoint
from qmerge.store.headers import TORCH_DTYPES
from qmerge.types import QuantizedWeight, known

__all__ = ["Base", "decode_with_bitsandbytes", "open_base", "quantize_as_bitsandbytes"]

FOUR_BIT = ("nf4", "fp4")
READ = "float, bitsandbytes NF4, FP4 or LLM.int8, GPTQ (gptq, gptq_v2) or AWQ (gemm)"


@dataclass(frozen=True)
class Base:
    """A checkpoint read as logical tensors. Weights of linears come as ``[out, in]`` whatever the file's order. Threads may read at the same time.

    ``quantized`` are weights that the files hold packed, each with its kind (``nf4``, ``fp4``, ``int8``, ``gptq``, ``awq``); ``fly`` those that become 4-bit by
    ``recipe`` (its ``dtype`` is what the whole model was loaded in, so other tensors go through it too); ``conv`` are weights of Conv1D modules, which files
    store ``[in, out]`` while they are float (packed ones lie ``[out, in]`` all the same).
    """

    checkpoint: Checkpoint
    quantized: dict[str, str]
    recipe: Nf4Recipe | None
    fly: frozenset[str]
    conv: frozenset[str]

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Logical tensor names, sorted; the parts of a packed weight count as one, ``<module>.weight``."""
        parts = {part for weight in self.quantized for part in self.parts(weight)}
        return tuple(sorted({name for name in self.checkpoint.specs if name not in parts} | self.quantized.keys()))

    def parts(self, name: str) -> tuple[str, ...]:
        """The tensors on disk that make up ``name``."""
        kind = self.quantized.get(name)
        if kind is None:
            possible: tuple[str, ...] = (name,)
        elif kind in FOUR_BIT:
            possible = nf4_format.components(name, kind)
        else:
            possible = {"int8": int8.components, "gptq": gptq_base.components, "awq": awq.components}[kind](name)
        return tuple(part for part in possible if part in self.checkpoint.specs)

    def encoded(self, name: str) -> bool:
        """Whether its values come out of a quantizer: packed in the files, or quantized by the recipe."""
        return name in self.quantized or name in self.fly

    def is_4bit(self, name: str) -> bool:
        """Whether it is a bitsandbytes 4-bit weight, stored or made on the fly: what `four_bit` can give."""
        return self.quantized.get(name) in FOUR_BIT or name in self.fly

    def shape(self, name: str) -> tuple[int, ...]:
        """``[out, in]`` of linears; the stored shape of everything else. Reads headers and quant states, never codes."""
        kind, specs = self.quantized.get(name), self.checkpoint.specs
        if kind in FOUR_BIT:
            return tuple(int(size) for size in nf4_format.read_meta(name, self.checkpoint.load, kind)["shape"])
        if kind == "gptq":
            return gptq_base.shape(name, specs, self._settings)
        if kind == "awq":
            return awq.shape(name, specs)
        shape = tuple(specs[name].shape)
        return shape[::-1] if name in self.conv and kind is None else shape

    def dtype(self, name: str) -> torch.dtype:
        """What a float output of this tensor has by default: its stored dtype; that of the quant state, the config or the scales where it is packed."""
        kind, specs = self.quantized.get(name), self.checkpoint.specs
        if kind in FOUR_BIT:
            told = str(nf4_format.read_meta(name, self.checkpoint.load, kind)["dtype"]).removeprefix("torch.")
            return _float_dtype(told, name)
        if kind is None:
            return TORCH_DTYPES[specs[name].dtype]
        stated = self.checkpoint.config.get("dtype") or self.checkpoint.config.get("torch_dtype")
        if stated:
            return _float_dtype(str(stated).removeprefix("torch."), f"{self.checkpoint.name}/config.json")
        return TORCH_DTYPES[specs[self.parts(name)[2]].dtype] if kind in ("gptq", "awq") else self._usual_dtype()

    def row_step(self, name: str) -> int:
        """What the ``start`` of `rows` must be a multiple of: 1, the rows after which a 4-bit block begins anew, or all rows. Cheap."""
        shape = self.shape(name)
        if name in self.fly:
            return four_bit_step(shape, known(self.recipe).block_size)
        kind = self.quantized.get(name)
        if kind in FOUR_BIT:
            return four_bit_step(shape, int(nf4_format.read_meta(name, self.checkpoint.load, kind)["blocksize"]))
        return max(1, shape[0]) if kind in ("gptq", "awq") or name in self.conv and kind is None else 1

    def reader(self, name: str, device: Device = "cpu") -> Reader:
        """``name``, opened: small parts are read once and held as long as the reader is. ``device`` is where a recipe quantizes; rows may go anywhere."""
        kind = self.quantized.get(name)
        if kind in FOUR_BIT:
            return nf4_format.open_rows(name, self.checkpoint, kind)
        if kind == "int8":
            return int8.open_rows(name, self.checkpoint)
        if kind == "gptq":
            return gptq_base.open_rows(name, self.checkpoint, self._settings)
        if kind == "awq":
            return awq.open_rows(name, self.checkpoint)
        if name in self.fly:
            return fly_reader(self._oriented(name), known(self.recipe), device)
        if name not in self.checkpoint.specs:
            raise Refused("The checkpoint has no such tensor.", where=self.checkpoint.name, expected=name, found=f"{len(self.checkpoint.specs)} other tensors")
        through = _float_dtype(self.recipe.dtype, "the NF4 recipe") if self.recipe and self.recipe.dtype else None
        return float_reader(self.checkpoint.path, self.checkpoint.specs[name], name in self.conv, through)

    def rows(self, name: str, start: int, stop: int, device: Device = "cpu") -> torch.Tensor:
        """Rows ``start`` to ``stop`` of ``[out, in]``, fp32 on ``device``. Opens a `reader` each time; with a recipe that quantizes the whole weight each
        time."""
        return self.reader(name, device).rows(start, stop, device)

    def weight(self, name: str, device: Device = "cpu") -> torch.Tensor:
        """All rows: fp32 ``[out, in]`` (linears) or the tensor in fp32, on ``device``: what the adapter was trained on."""
        return self.rows(name, 0, count_rows(self.shape(name)), device)

    def stored(self, name: str) -> torch.Tensor:
        """A float tensor as the file holds it (dtype and order). Raises KeyError for a weight that the file holds packed."""
        if name in self.quantized:
            raise KeyError(f"{name} is stored as {self.quantized[name]}")
        return self.checkpoint.load(name)

    def four_bit(self, name: str, device: Device = "cpu") -> QuantizedWeight:
        """Codes and quant state of a 4-bit weight, stored or made on the fly exactly as bitsandbytes makes it."""
        if name in self.quantized:
            return nf4_format.unpack(name, self.checkpoint.load, self.checkpoint.specs, self.quantized[name])
        return quantize_as_bitsandbytes(self._oriented(name), known(self.recipe), device)

    @property
    def _settings(self) -> dict[str, Any]:
        return self.checkpoint.config.get("quantization_config") or {}

    def _oriented(self, name: str) -> torch.Tensor:
        tensor = self.checkpoint.load(name)
        return tensor.T.contiguous() if name in self.conv else tensor

    def _usual_dtype(self) -> torch.dtype:
        """That of most float tensors: LLM.int8 files say nowhere what their weights were."""
        parts = {part for weight in self.quantized for part in self.parts(weight)}
        counts = Counter(spec.dtype for name, spec in self.checkpoint.specs.items() if name not in parts and TORCH_DTYPES[spec.dtype].is_floating_point)
        if not counts:
            raise Refused("nothing says which dtype the weights of this base have", where=f"{self.checkpoint.name}/config.json", expected="dtype", found="none", fix='put "dtype": "bfloat16" (or what it is) into the config.json of the base')
        return TORCH_DTYPES[counts.most_common(1)[0][0]]


def open_base(checkpoint: Checkpoint, *, on: str, recipe: Nf4Recipe | None, linears: dict[str, bool] | None, head: str | None = None) -> Base:
    """Decide what kind of base this is, or refuse to guess.

    ``linears`` maps the weight names that bitsandbytes would quantize to whether they are Conv1D (stored ``[in, out]`` in float files); None when
    the caller has no model at hand, which is enough for packed bases. ``head`` is the weight of an output head that shares nothing with the embeddings:
    transformers quantizes it too where a list of modules to skip was given that does not name it.
    """
    conv = frozenset(name for name, is_conv in (linears or {}).items() if is_conv)
    quantized = _find_packed(checkpoint)
    if quantized:
        _check_packed(checkpoint, quantized, on, recipe)
        return Base(checkpoint, quantized, None, frozenset(), conv)
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
    rounded = {*(linears or {}), *([head] if head and recipe.skip else [])}
    return Base(checkpoint, {}, recipe, frozenset(name for name in rounded if not recipe.skips(name.removesuffix(".weight"))), conv)


def _find_packed(checkpoint: Checkpoint) -> dict[str, str]:
    """Packed weights with their kind, empty for a float checkpoint. Raises `Refused` for every other method, by its name."""
    settings, specs = checkpoint.config.get("quantization_config") or checkpoint.config.get("compression_config") or {}, checkpoint.specs
    method = settings.get("quant_method") or ("bitsandbytes" if settings.get("load_in_4bit") or settings.get("load_in_8bit") else None)
    four, eight, words = nf4_format.find_quantized(specs), int8.find_quantized(specs), [name for name in specs if name.endswith(".qweight")]
    finders: dict[str, Callable[[], dict[str, str]]] = {
        "bitsandbytes": lambda: four | eight, "gptq": lambda: gptq_base.find_quantized(specs), "awq": lambda: gptq_base.find_quantized(specs, "awq"),
    }  # fmt: skip
    if not settings and (four or eight or words):
        raise Refused("the base holds packed weights, and its config.json does not say so", where=checkpoint.name, expected="quantization_config", found="none", fix="take config.json from where the weights come from")
    if not settings:
        return {}
    if method not in finders:
        raise Refused("the base is quantized in a way that this version does not read", where=checkpoint.name, expected=READ, found=f"quant_method {method}",
                      fix="name the float base that it was made from, or dequantize it once with the library that wrote it and give that folder")
    found = finders[method]()
    if lost := nf4_format.lost_parts(specs) if method == "bitsandbytes" else []:
        raise Refused("a part of a 4-bit weight lies there without the weight's quant state", where=lost[0], expected="<weight>.quant_state.bitsandbytes__nf4", found="no such tensor", fix="download or save the base again")
    others = {"bitsandbytes": words, "gptq": [*four, *eight], "awq": [*four, *eight]}[method]
    if not found or others:
        raise Refused("the config names one quantization and the weights are another", where=checkpoint.name, expected=f"weights as {method} stores them",
                      found=f"{others[0]}" if others else "float weights only", fix="load and save the model once with the library that wrote it")
    return found


def _check_packed(checkpoint: Checkpoint, quantized: dict[str, str], on: str, recipe: Nf4Recipe | None) -> None:
    kinds = " and ".join(sorted({kind.upper() for kind in quantized.values()}))
    if on == "original":
        raise Refused("--on original needs the float base itself", where=checkpoint.name, expected="a float checkpoint", found=f"a checkpoint in {kinds}",
                      fix="name the float base with --original, or leave --on out")
    if recipe is not None:
        raise Refused(f"the base is in {kinds} already and brings its own quant states", where=checkpoint.name, found="--nf4-recipe given",
                      fix="leave --nf4-recipe out")
    unknown = sorted({kind for kind in quantized.values() if kind not in (*FOUR_BIT, "int8", "gptq", "awq")})
    if unknown:
        raise Refused("the base holds 4-bit weights of an unknown type", where=checkpoint.name, expected=" or ".join(FOUR_BIT), found=", ".join(unknown))
    settings = checkpoint.config.get("quantization_config") or {}
    if "gptq" in quantized.values():
        gptq_base.check_settings(settings, checkpoint.name)
    if "awq" in quantized.values():
        awq.check_settings(settings, checkpoint.name)
    for name, kind in quantized.items():
        if kind in ("nf4", "fp4", "int8") and name not in checkpoint.specs:
            raise Refused("a quant state has no weight", where=name, found="no such tensor", fix="download it again, or save it again with save_pretrained")


def _float_dtype(name: str, where: str) -> torch.dtype:
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise Refused("a dtype is none of floats", where=where, expected="float16, bfloat16 or float32", found=repr(name))
    return found
