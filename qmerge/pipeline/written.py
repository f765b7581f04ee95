"""Does a written checkpoint's own content hold together, whatever format its config names?

Asked of the files alone: each quantized weight unpacks, packs again to the very bytes of the file, has finite scales and the shape that the model's class wants.
"""

from __future__ import annotations

from typing import Any

import torch

from qmerge.errors import QmergeError, Refused
from qmerge.formats import registry
from qmerge.formats.integers import group_index
from qmerge.pipeline.experts_names import held_one_by_one
from qmerge.pipeline.merge import stretches
from qmerge.pipeline.outputs import config_dtype
from qmerge.pipeline.skeleton import Skeleton
from qmerge.store.checkpoint import Checkpoint
from qmerge.store.headers import rows_of
from qmerge.store.tensors import read_tensor
from qmerge.types import QuantizedWeight, known

MALFORMED = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""what unpacking raises where parts contradict each other or the config: formats check what a solver could get wrong, not what a stranger could write"""


class Written:
    """The weights of a written checkpoint as fp32 ``[out, in]``. Raises `Refused` where the config names a quantization that this version does not write."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        settings = checkpoint.config.get("quantization_config") or {}
        if not isinstance(settings, dict):
            raise Refused("the config's quantization_config is no object", where="config.json", found=type(settings).__name__, fix="take config.json from where the checkpoint came from, or merge again")
        self.settings: dict[str, Any] = settings
        self.format = registry.of_settings(settings)
        if settings and self.format is None:
            raise Refused("the config names a quantization that this version does not write", where="config.json", expected="one of qmerge's formats", found=str(settings.get("quant_method")), fix="verify checks what qmerge merge and qmerge run wrote")
        self.linears = self.format.find(checkpoint.specs) if self.format else []

    @property
    def parts(self) -> set[str]:
        """The tensors of the file that make up the quantized weights."""
        return {part for name in self.linears for part in self.parts_of(name)}

    def parts_of(self, name: str) -> tuple[str, ...]:
        return tuple(part for part in known(self.format).components(name) if part in self.checkpoint.specs)

    def quantized(self, name: str) -> QuantizedWeight:
        """Raises `Refused` where a part of the weight is missing, or the config does not say how it is quantized."""
        try:
            return known(self.format).unpack(name, self.checkpoint.load, self.checkpoint.specs, self.settings)
        except QmergeError as problem:  # of a part, whose name need not tell the linear's
            raise Refused(problem.what, where=name, expected=problem.expected, found=problem.found or problem.where) from problem
        except MALFORMED as problem:
            raise Refused("a quantized weight cannot be unpacked as the config says", where=name, found=_first_line(problem), fix="do not serve this checkpoint; merge again") from problem

    def linear(self, name: str) -> torch.Tensor:
        """Raises as `quantized`."""
        try:
            return known(self.format).dequantize(self.quantized(name))
        except MALFORMED as problem:
            raise Refused("a quantized weight's parts contradict each other", where=name, found=_first_line(problem), fix="do not serve this checkpoint; merge again") from problem

    def fault(self, name: str, skeleton: Skeleton | None) -> str | None:
        """What is wrong with one quantized weight, or None."""
        held = self.quantized(name)
        wanted = _shape_in_class(skeleton, name)
        if wanted is not None and tuple(held.codes.shape) != wanted:
            return f"{name} has shape {list(held.codes.shape)}, the model's class wants {list(wanted)}"
        if held.scales is not None and not bool((held.scales > 0).all() if not held.grid.symmetric else (held.scales != 0).all()):
            return f"{name} has a scale that is {'zero or no number' if held.grid.symmetric else 'not above zero'}"
        if held.g_idx is not None and not torch.equal(held.g_idx.cpu(), group_index(held.codes.shape[1], held.grid)):
            return f"{name} has inputs in other groups than in the order of the file"
        if not bool(torch.isfinite(self.linear(name)).all()):
            return f"{name} is not finite"
        stored = {part: self.checkpoint.load(part) for part in self.parts_of(name)}
        try:
            again = known(self.format).pack(name, held, config_dtype(self.checkpoint.config))
        except MALFORMED as problem:
            return f"{name} holds what no packer writes: {_first_line(problem)}"
        wrong = next((part for part in sorted(stored.keys() | again.keys()) if part not in stored or part not in again or not same_bits(stored[part], again[part])), None)
        return f"{wrong} is not what its own codes and scales pack to" if wrong else None


def _first_line(problem: BaseException) -> str:
    return (str(problem) or type(problem).__name__).splitlines()[0][:200]


def _shape_in_class(skeleton: Skeleton | None, name: str) -> tuple[int, ...] | None:
    """``[out, in]`` of a linear as the class has it; None where the class knows no such name."""
    if skeleton is None:
        return None
    module, _, leaf = name.rpartition(".")
    try:
        shape = tuple(getattr(skeleton.model.get_submodule(module), leaf).shape)
    except AttributeError:
        return None
    return shape[::-1] if skeleton.linears.get(name) else shape


def same_bits(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Shape, dtype and every bit; a zero's sign too."""
    if found.dtype != wanted.dtype or found.shape != wanted.shape:
        return False
    return torch.equal(*(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for tensor in (found, wanted)))


def weights_fault(written: Written, skeleton: Skeleton | None) -> str | None:
    """The first fault of all weights, quantized and float, or None."""
    checkpoint, parts = written.checkpoint, written.parts
    for name in written.linears:
        if fault := written.fault(name, skeleton):
            return fault
    floats, shapes = [name for name in checkpoint.specs if name not in parts], _shapes(skeleton)
    for name in floats:
        spec = checkpoint.specs[name]
        if spec.dtype in ("BF16", "F16", "F32", "F64") and not _finite(checkpoint, name):
            return f"{name} is not finite"
        if tuple(spec.shape) != shapes.get(name, tuple(spec.shape)):
            return f"{name} has shape {list(spec.shape)}, the model's class wants {list(shapes[name])}"
    missing = _missing(skeleton, set(floats) | set(written.linears), checkpoint) if skeleton else []
    return f"{missing[0]} is missing" if missing else None


def _shapes(skeleton: Skeleton | None) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in skeleton.model.named_parameters(remove_duplicate=False)} if skeleton else {}


def _finite(checkpoint: Checkpoint, name: str) -> bool:
    spec = checkpoint.specs[name]
    return all(bool(torch.isfinite(read_tensor(checkpoint.path, rows_of(spec, *span))).all()) for span in stretches(spec.shape))


def _missing(skeleton: Skeleton, held: set[str], checkpoint: Checkpoint) -> list[str]:
    """Parameters of the class that no tensor of the file feeds, under whatever name transformers reads it."""
    tied = skeleton.tied_names
    absent = {name for name, _ in skeleton.model.named_parameters(remove_duplicate=False)} - held - tied
    absent -= held_one_by_one(skeleton, held) if absent else set()
    if not absent:
        return []
    from qmerge.adapters.names import relate

    return sorted(set(relate(skeleton.model, {name: spec.shape for name, spec in checkpoint.specs.items()}).missing) & absent)
