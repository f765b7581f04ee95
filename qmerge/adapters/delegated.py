"""Which edits does an adapter of another PEFT type than LoRA ask for, and what does PEFT make of each?

Every tensor of the file is sorted to a module or a parameter; `delegated_types.py` says which types can be merged, and `delegated_change.py` merges with
PEFT's own code.
Left out: any arithmetic of these types, which would be a second opinion on what PEFT defines.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from qmerge.adapters.delegated_change import Delegated, DelegatedBias, Load
from qmerge.adapters.delegated_layer import Layer
from qmerge.adapters.delegated_types import Kind, check_type, peft_config
from qmerge.adapters.edits import Edit
from qmerge.adapters.replace import Replace, ReplaceRows
from qmerge.adapters.several import Chain
from qmerge.errors import Refused
from qmerge.store.adapter import check_finite
from qmerge.types import TensorSpec

__all__ = ["Delegated", "DelegatedBias", "check_type", "delegated_edits"]

PREFIX = "base_model.model."
_EMBEDDINGS = ("embed_tokens", "lm_head")  # PEFT saves these unasked when the vocabulary was resized or the embedding is adapted
Shapes = Mapping[str, tuple[int, ...]]


def delegated_edits(
    folder: Path, name: str, config: dict[str, Any], specs: Mapping[str, TensorSpec], load: Load, shapes: Shapes,
    *, conv: Collection[str] | None = None, order: Sequence[str] | None = None,
) -> dict[str, Edit]:  # fmt: skip
    """Parameter in the module tree -> what becomes of it; every tensor of ``specs`` is in the ``keys`` of exactly one edit.

    ``shapes``: the base's parameters, ``[out, in]`` for linears. ``conv``: weights that the model holds as Conv1D (None: all linears, if the config says
    fan_in_fan_out). ``order``: names of the model's linears in the order of its module tree; TINYLORA and UNILORA number their tensors by it.
    Raises Refused: a type that cannot be merged, a tensor that belongs to nothing, a module that the base lacks, a bias that the base has not.
    """
    kind = check_type(config, f"adapter_config.json of {name}")
    parts = _Parts(kind, config, name, specs, shapes, conv, order)
    for key in sorted(specs):
        parts.place(key)
    return parts.edits(load)


class _Parts:
    """Tensors of one file, sorted to where they belong. ``own``: module -> keys of its adapter tensors; ``saved``: parameter -> key that replaces it."""

    def __init__(
        self,
        kind: Kind,
        config: dict[str, Any],
        name: str,
        specs: Mapping[str, TensorSpec],
        shapes: Shapes,
        conv: Collection[str] | None,
        order: Sequence[str] | None,
    ) -> None:
        self.kind, self.config, self.name, self.specs, self.shapes, self.conv, self.order = kind, config, name, specs, shapes, conv, order
        self.modules = {parameter.rpartition(".")[0] for parameter in shapes}
        self.own: dict[str, list[str]] = {}
        self.saved: dict[str, str] = {}
        self.shared: list[str] = []
        self.twins: list[str] = []  # trained tokens of a head that is the embedding under another name
        self.checked: set[tuple[Any, ...]] = set()

    def place(self, key: str) -> None:
        where = f"tensor {key!r} in {self.name}"
        if not key.startswith(PREFIX):
            if key.removeprefix("base_model.").split(".")[0] not in self.kind.shared or not key.startswith("base_model."):
                raise Refused("An adapter tensor has a name that this type does not write.", where=where, expected=f"{PREFIX}…", fix="save the adapter again with PEFT: PeftModel.save_pretrained")
            self.shared.append(key)
            return
        path = key.removeprefix(PREFIX).split(".")
        module = next((found for count in range(len(path), 0, -1) if (found := ".".join(path[:count])) in self.modules), None)
        if module is None and self.config["peft_type"] == "TRAINABLE_TOKENS" and path[-1] == "trainable_tokens_delta":
            self.twins.append(key)
            return
        if module is None:
            raise Refused("The adapter changes a module that the base does not have.", where=where, expected="a module of the base", fix="qmerge inspect ADAPTER names the base that it was trained on: give that one")
        rest = ".".join(path[module.count(".") + 1 :])
        if rest.startswith(self.kind.prefix) or rest.split(".")[0] in self.kind.shared:
            self.own.setdefault(module, []).append(key)
        else:
            self._save(key, module, rest, where)

    def _save(self, key: str, module: str, rest: str, where: str) -> None:
        leaf = rest.removeprefix("base_layer.").removeprefix("modules_to_save.")
        parameter, base = f"{module}.{leaf}", self.shapes.get(f"{module}.{leaf}")
        listed = self.config.get("modules_to_save") or []
        path = module.split(".")
        owners = [".".join(path[:count]) for count in range(1, len(path) + 1)]
        allowed = any(owner == entry or owner.endswith(f".{entry}") for owner in owners for entry in listed)
        allowed = (
            allowed
            or (leaf == "bias" and self.config.get("bias", "none") != "none")
            or module.rpartition(".")[2] in _EMBEDDINGS
            or rest.startswith("base_layer.")
        )
        if parameter in self.saved:
            raise Refused(
                "Two adapter tensors are for one parameter.", where=where, expected="one", found=self.saved[parameter], fix="keep this adapter separate"
            )
        if not allowed or base is None:
            raise Refused(
                "An adapter tensor pairs with nothing: it is no tensor of this type and in no module of modules_to_save.",
                where=where,
                expected=f"{self.kind.prefix}… of a module, or a parameter of " + repr(listed),
            )
        stored = tuple(self.specs[key].shape)
        found = stored[::-1] if self._is_conv(parameter) else stored
        if found[1:] != base[1:] or (found != base and module.rpartition(".")[2] not in _EMBEDDINGS):
            raise Refused("A saved tensor of the adapter has another shape than the base's.", where=where, expected=list(base), found=list(found))
        self.saved[parameter] = key

    def _is_conv(self, parameter: str) -> bool:
        if self.conv is None:
            return (
                bool(self.config.get("fan_in_fan_out"))
                and len(self.shapes.get(parameter, ())) == 2
                and parameter.rpartition(".")[0].rpartition(".")[2] not in (*_EMBEDDINGS, "wte", "wpe")
            )
        return parameter in self.conv

    def edits(self, load: Load) -> dict[str, Edit]:
        steps: dict[str, list[Edit]] = {}
        for parameter, key in self.saved.items():
            steps.setdefault(parameter, []).append(self._replace(parameter, key, load))
        targets, shared = self._targets(), list(self.shared)
        peers = self._peers(targets)
        for module in targets:
            for parameter, edit in self._module_edits(module, peers, load, shared).items():
                steps.setdefault(parameter, []).append(edit)
        if idle := shared or (self.twins if len(targets) != 1 else []):
            raise Refused("An adapter tensor is used by no module.", where=f"tensor {idle[0]!r} in {self.name}", expected="modules with tensors of this type")
        if not steps:
            raise Refused("The adapter holds no tensors.", where=self.name, expected=f"tensors named {self.kind.prefix}…", found="none", fix="the training run saved nothing: take another checkpoint of it")
        return {parameter: edits[0] if len(edits) == 1 else Chain(tuple(edits)) for parameter, edits in sorted(steps.items())}

    def _targets(self) -> list[str]:
        """The adapted modules, in the order of the model where the type hangs on it."""
        if self.kind.peers != "every":
            return sorted(self.own)
        if self.order is None:
            raise Refused(
                f"A {self.config['peft_type']} adapter numbers its tensors by the order of the model's modules, which is not known here.",
                where=self.name,
                expected="a model whose class transformers has",
                fix="keep this adapter separate",
            )
        targets = [module for module in self.order if module in self.own]
        if self.config["peft_type"] == "UNILORA":
            from peft.tuners.tuners_utils import check_target_module_exists

            config = peft_config(self.config, self.name)
            targets = [module for module in self.order if check_target_module_exists(config, module)]
        lost = sorted(set(self.own) - set(targets))
        if lost:
            raise Refused("The adapter changes a module that is no linear of the model.", where=f"{lost[0]} in {self.name}", expected="linears only")
        return targets

    def _peers(self, targets: Sequence[str]) -> tuple[tuple[str, tuple[int, ...]], ...]:
        if not self.kind.peers:
            return ()
        return tuple((module, self._shape(module)) for module in targets)

    def _shape(self, module: str) -> tuple[int, ...]:
        shape = self.shapes.get(f"{module}.weight")
        if shape is None or len(shape) != 2:
            raise Refused(
                "The adapter changes a module that is no linear layer or embedding.",
                where=f"{module} in {self.name}",
                expected="a weight with 2 dimensions",
                found="none" if shape is None else list(shape),
                fix="keep this adapter separate",
            )
        return tuple(shape)

    def _module_edits(self, module: str, peers: tuple[tuple[str, tuple[int, ...]], ...], load: Load, shared: list[str]) -> dict[str, Edit]:
        """The edits of one module. Tensors of ``shared`` that it is the first to use are taken off that list and counted here."""
        own = tuple(self.own.get(module, ()))
        kind = self.config["peft_type"]
        if kind == "LN_TUNING":
            return {f"{module}.{key.rpartition('.')[2]}": self._replace(f"{module}.{key.rpartition('.')[2]}", key, load) for key in own}
        if kind == "TRAINABLE_TOKENS":
            return {f"{module}.weight": self._tokens(module, own, load)}
        wanted = [key for key in self.shared if _belongs(kind, key, module)]
        first = tuple(key for key in wanted if key in shared)
        shared[:] = [key for key in shared if key not in first]
        shape, embedding = self._shape(module), any(".hira_embedding_" in key for key in own)
        biased = self.kind.bias and f"{module}.bias" in self.shapes
        layer = Layer(self.config, self.name, module, shape, self._is_conv(f"{module}.weight"), embedding, biased, _reduced(self.kind, module, peers))
        self._check(layer, (*own, *wanted))
        rest = tuple(key for key in wanted if key not in first)
        found: dict[str, Edit] = {}
        if self.kind.weight:
            found[f"{module}.weight"] = Delegated(own + first, shape, layer, load, rest)
        if self.kind.bias and self._bias_changes(kind, module):
            taken = () if self.kind.weight else own
            found[f"{module}.bias"] = DelegatedBias(taken, (shape[0],), layer, load, () if taken else own)
        return found

    def _check(self, layer: Layer, keys: tuple[str, ...]) -> None:
        """Do the tensors fit the base? Once for modules that look alike; what a pattern of the config makes different shows when the layer is merged."""
        alike = (layer.shape, layer.biased, layer.conv, *((key.rpartition(f"{layer.module}.")[2], tuple(self.specs[key].shape)) for key in keys))
        if self.kind.dry and alike not in self.checked:
            layer.check({key: self.specs[key] for key in keys}, self.kind.dry)
            self.checked.add(alike)

    def _bias_changes(self, kind: str, module: str) -> bool:
        """Does the base have a bias for this type to change? Refused where it would need one, or the weight and the bias at once."""
        has = f"{module}.bias" in self.shapes
        if kind == "BEFT" and not has:
            raise Refused(
                "The adapter adds a bias to a linear that has none, and the model's class would not load one.",
                where=f"{module} in {self.name}",
                expected=f"{module}.bias in the base",
                found="none",
                fix="keep this adapter separate",
            )
        if kind == "GLORA" and has and self.config.get("config_C", "lora") in ("lora", "vector"):
            raise Refused(
                "This GLORA adapter adds a product of the base's weight to its bias, which qmerge does not merge.",
                where=f"{module} in {self.name}",
                expected='"config_C": "none", or a linear without bias',
                found=f"config_C: {self.config.get('config_C', 'lora')}",
                fix="keep this adapter separate",
            )
        return has

    def _replace(self, parameter: str, key: str, load: Load) -> Replace:
        turned, stored = self._is_conv(parameter), tuple(self.specs[key].shape)

        def rows(start: int, stop: int) -> torch.Tensor:
            tensor = load(key).float()
            check_finite(f"{self.name}: {key}", tensor)
            return (tensor.T if turned else tensor)[start:stop].contiguous()

        base, shape = self.shapes.get(parameter), stored[::-1] if turned else stored
        if base is None or len(base) != len(shape):
            raise Refused(
                "The adapter replaces a parameter that the base does not have.", where=f"tensor {key!r} in {self.name}", expected=parameter, found=list(shape), fix="qmerge inspect ADAPTER names the base that it was trained on: give that one")
        return Replace((key,), shape, rows)

    def _tokens(self, module: str, own: tuple[str, ...], load: Load) -> ReplaceRows:
        numbers, shape = tuple(self.config.get("token_indices") or ()), self._shape(module)
        stored, keys = tuple(self.specs[own[0]].shape), (*own, *self.twins)
        if len(own) != 1 or len(set(numbers)) != len(numbers) or stored != (len(numbers), shape[1]) or any(not 0 <= number < shape[0] for number in numbers):
            raise Refused(
                "The trained tokens do not fit the adapter's list of their numbers, or the base's embedding.",
                where=f"tensor {own[0]!r} in {self.name}",
                expected=f"{len(set(numbers))} rows of width {shape[1]}, numbers below {shape[0]}",
                found=f"shape {list(stored)}",
            )

        def values() -> torch.Tensor:
            tensor = load(own[0]).float()
            check_finite(f"{self.name}: {own[0]}", tensor)
            if other := next((key for key in self.twins if not torch.equal(load(key).float(), tensor)), None):
                raise Refused(
                    "The trained tokens of the head differ from those of the embedding, which the base shares with it.",
                    where=f"tensor {other!r} in {self.name}",
                    expected=own[0],
                    fix="untie the base's head first",
                )
            return tensor

        return ReplaceRows(keys, shape, numbers, values)


def _belongs(kind: str, key: str, module: str) -> bool:
    """Does this module read that shared tensor?"""
    if kind != "FROD":
        return True
    from peft.tuners.frod.model import _category_from_key  # PEFT's rule for which modules share a projection

    return key.rpartition(".")[2] == _category_from_key(module)


def _reduced(kind: Kind, module: str, peers: tuple[tuple[str, tuple[int, ...]], ...]) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """For sizes taken over all modules, one module of each shape is enough."""
    if kind.peers != "widest":
        return peers
    first = {shape: (name, shape) for name, shape in reversed(peers)}
    own = next(peer for peer in peers if peer[0] == module)
    return tuple({**first, own[1]: own}.values())
