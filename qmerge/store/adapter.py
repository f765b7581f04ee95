"""What does an adapter folder hold, and which tensor of it belongs to which module?

Keys are PEFT's: ``base_model.model.<module>.lora_A.weight`` and so on. Each tensor of the file is claimed exactly once, as A, as B
or as a saved module, or the adapter is refused by that tensor's name. `adapter_config.py` decides what the config may ask for.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from qmerge.errors import Refused
from qmerge.store.adapter_config import check_config, rank_and_scaling
from qmerge.store.headers import read_header
from qmerge.store.hub import resolve
from qmerge.store.jsonfiles import read_object
from qmerge.store.tensors import read_tensor
from qmerge.types import TensorSpec

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
# PEFT saves these unasked when the vocabulary was resized
_EMBEDDINGS = ("embed_tokens", "lm_head")
# PEFT lists both names for these tasks, whichever of them the model has
_HEADS = {"SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score")}
_FLOATS = ("F16", "BF16", "F32", "F64")
_PAIR = re.compile(r"(?P<module>.+?)\.lora_(?P<side>[AB])(?:\.(?P<adapter>[^.]+))?\.weight")
_SAVED = re.compile(r"(?P<module>.+?)\.modules_to_save(?:\.(?P<adapter>[^.]+))?\.(?P<leaf>weight|bias)")


@dataclass(frozen=True)
class LoraPair:
    """The delta of one module: ``scaling * B @ A``. ``a`` and ``b`` name tensors of the file: A ``[rank, in]``, B ``[out, rank]``."""

    module: str
    a: str
    b: str
    rank: int
    scaling: float


@dataclass(frozen=True)
class LoraAdapter:
    """An adapter folder. ``pairs``: module -> LoraPair. ``saved``: parameter of the base (``"lm_head.weight"``) -> tensor of the file
    that replaces it whole. ``specs``: every tensor of the file; pairs and saved together claim each exactly once."""

    path: Path
    name: str
    config: dict[str, Any]
    pairs: dict[str, LoraPair]
    saved: dict[str, str]
    specs: dict[str, TensorSpec]
    revision: str | None = field(default=None)

    @property
    def fan_in_fan_out(self) -> bool:
        """Does the base store the adapted weights as ``[in, out]`` (Conv1D)? A and B are ``[rank, in]`` and ``[out, rank]`` either way."""
        return bool(self.config.get("fan_in_fan_out"))

    def load(self, tensor_name: str) -> torch.Tensor:
        """A tensor of the file as stored. Refused for an unknown name."""
        if tensor_name not in self.specs:
            raise Refused("The adapter has no such tensor.", where=self.name, expected=tensor_name, found=f"{len(self.specs)} other tensors")
        return read_tensor(self.path, self.specs[tensor_name])

    def load_pair(self, module: str) -> tuple[torch.Tensor, torch.Tensor]:
        """``(A [rank, in], B [out, rank])`` of ``module`` in fp32, checked to be finite. Refused for a module without a pair, NaN and Inf."""
        if module not in self.pairs:
            raise Refused("The adapter does not change this module.", where=self.name, expected=module, found=f"{len(self.pairs)} other modules")
        pair = self.pairs[module]
        tensors = []
        for tensor_name in (pair.a, pair.b):
            tensor = self.load(tensor_name).float()
            check_finite(tensor_name, tensor)
            tensors.append(tensor)
        return tensors[0], tensors[1]

    def files(self) -> list[Path]:
        """The weight files."""
        return [self.path / WEIGHTS]

    def config_files(self) -> list[Path]:
        """The other files that decide what the weights mean."""
        return [self.path / CONFIG]

    @property
    def weight_bytes(self) -> int:
        """Bytes on disk of all weight files, headers included."""
        return sum(path.stat().st_size for path in self.files())


def check_finite(name: str, tensor: torch.Tensor) -> None:
    """Refused, naming the tensor and counting each kind, if a floating-point ``tensor`` holds NaN, +Inf or -Inf."""
    if not tensor.is_floating_point():
        return
    values = tensor.float() if tensor.element_size() == 1 else tensor
    if bool(torch.isfinite(values).all()):
        return
    counts = [("NaN", int(torch.isnan(values).sum())), ("+Inf", int(torch.isposinf(values).sum())), ("-Inf", int(torch.isneginf(values).sum()))]
    raise Refused("A tensor holds values that are not finite.", where=f"tensor {name!r}", expected=f"{tensor.numel()} finite values",
                  found=", ".join(f"{count} {kind}" for kind, count in counts if count), fix="this training run diverged: use an earlier checkpoint")


def open_adapter(path_or_id: str | Path, revision: str | None = None) -> LoraAdapter:
    """Open a PEFT adapter folder or hub id: its config and header are read and checked, no weights.

    Supported: LoRA, rsLoRA, rank_pattern, alpha_pattern, fan_in_fan_out, modules_to_save. Everything else that could change the merged
    weights raises Refused by its name, as do: missing files, pickle weights, A without B, ranks that differ from the config,
    tensors that belong to nothing, and a saved module whose tensors are missing.
    """
    folder, name, commit = resolve(path_or_id, revision)
    config = read_object(folder / CONFIG, what="the adapter's config")
    check_config(config, f"{CONFIG} of {name}")
    if not (folder / WEIGHTS).is_file():
        if (folder / "adapter_model.bin").is_file():
            raise Refused("The adapter's weights are there as pickle only, which qmerge does not read (a pickle can run code).", where=name,
                          expected=WEIGHTS, found="adapter_model.bin", fix="convert once: PeftModel.from_pretrained(base, folder).save_pretrained(new_folder)")
        raise Refused("The adapter's weights are missing.", where=name, expected=WEIGHTS, found="no such file")
    specs = read_header(folder / WEIGHTS)[0]
    pairs, saved = _claim(specs, config, name)
    _check_saved_complete(saved, config, name)
    if not pairs and not saved:
        raise Refused("The adapter holds no tensors.", where=name, expected="LoRA pairs", found="an empty header")
    return LoraAdapter(folder, name, config, pairs, saved, specs, commit)


def _claim(specs: Mapping[str, TensorSpec], config: dict[str, Any], name: str) -> tuple[dict[str, LoraPair], dict[str, str]]:
    """``(pairs, saved)``, both sorted by name; Refused for the first tensor that is neither or is there twice."""
    sides: dict[str, dict[str, str]] = {}
    saved: dict[str, str] = {}
    for tensor in sorted(specs):
        where = f"tensor {tensor!r} in {name}"
        if specs[tensor].dtype not in _FLOATS:
            raise Refused("An adapter tensor is not floating point.", where=where, expected=", ".join(_FLOATS), found=specs[tensor].dtype)
        key = tensor.removeprefix(PREFIX)
        pair = _PAIR.fullmatch(key)
        table, slot = (sides.setdefault(pair["module"], {}), pair["side"]) if pair else (saved, "")
        if key == tensor:
            raise Refused("An adapter tensor has a name that PEFT does not write.", where=where, expected=f"{PREFIX}…")
        if not pair:
            slot = _saved_parameter(key, config, where)
        if slot in table:
            raise Refused("Two adapter tensors are for one parameter; the file seems to hold several adapters.", where=where,
                          expected="one adapter per file", found=table[slot])
        table[slot] = tensor
    pairs = {module: _pair(module, found, specs, config, name) for module, found in sorted(sides.items())}
    return pairs, dict(sorted(saved.items()))


def _saved_parameter(key: str, config: dict[str, Any], where: str) -> str:
    """The base parameter that a tensor which is no LoRA factor replaces (``"lm_head.weight"``); Refused when it is none."""
    listed = config.get("modules_to_save") or []
    match = _SAVED.fullmatch(key)
    parameter = f"{match['module']}.{match['leaf']}" if match else key
    module, _, leaf = parameter.rpartition(".")
    if re.search(r"(^|\.)(lora_\w+|base_layer|token_adapter|trainable_tokens_\w+|modules_to_save|original_module)(\.|$)", parameter):
        raise Refused("The adapter holds a kind of tensor that qmerge does not merge yet.", where=where,
                      expected="lora_A, lora_B, or a module in modules_to_save", fix="keep this adapter separate")
    parts = module.split(".")
    owners = [".".join(parts[:count]) for count in range(1, len(parts) + 1)]
    if leaf and (any(owner.endswith(tuple(listed)) for owner in owners) or (leaf == "weight" and parts[-1] in _EMBEDDINGS)):
        return parameter
    raise Refused("An adapter tensor pairs with nothing: it is no LoRA factor and in no module of modules_to_save.", where=where,
                  expected="lora_A, lora_B, or a module of " + repr(listed))


def _pair(module: str, found: dict[str, str], specs: Mapping[str, TensorSpec], config: dict[str, Any], name: str) -> LoraPair:
    """The checked pair of ``module``; Refused when a half is missing or a shape disagrees with the config's rank."""
    for side, other in (("A", "B"), ("B", "A")):
        if side not in found:
            raise Refused(f"An adapter tensor lacks its other half: lora_{other} without lora_{side}.", where=f"tensor {found[other]!r} in {name}",
                          expected=f"{module}.lora_{side}.weight beside it")
    rank, scaling = rank_and_scaling(config, module)
    for side, axis in (("A", 0), ("B", 1)):
        spec = specs[found[side]]
        where = f"tensor {spec.name!r} in {name}"
        if len(spec.shape) != 2:
            raise Refused("Only LoRA on linear layers can be merged.", where=where, expected="2 dimensions", found=list(spec.shape))
        if spec.shape[axis] != rank:
            raise Refused("An adapter tensor has another rank than the adapter's config says.", where=where,
                          expected=f"rank {rank} in dimension {axis}", found=f"shape {list(spec.shape)}")
    return LoraPair(module, found["A"], found["B"], rank, scaling)


def _check_saved_complete(saved: Mapping[str, str], config: dict[str, Any], name: str) -> None:
    """Refused when a module of modules_to_save has no tensor in the file: merging would silently keep the base's."""
    heads = _HEADS.get(str(config.get("task_type")), ())
    for listed in config.get("modules_to_save") or []:
        if listed not in heads and not any(re.search(rf"{re.escape(listed)}(\.|$)", parameter) for parameter in saved):
            raise Refused("The adapter's config promises a saved module that the file does not hold.", where=f"{WEIGHTS} of {name}",
                          expected=f"tensors of {listed!r}", found="none", fix="the adapter was saved incompletely: save it again")
