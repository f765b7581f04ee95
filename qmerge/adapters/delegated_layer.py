"""How is one layer of an adapter built with PEFT's own code, without the model around it?

A tree that holds one real layer at its dotted path, in fp32, and stand-ins for the other adapted modules where PEFT looks at their shapes or their number.
PEFT wraps it, loads the layer's tensors and answers: the merged weight, or what the unmerged layer makes of an input.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from qmerge.adapters.delegated_types import peft_config
from qmerge.errors import Refused
from qmerge.types import TensorSpec

ADAPTER = "default"
# PEFT makes these anew; ranknum is the number of AdaLoRA's ranks, the others of TinyLoRA and UniLoRA follow from seed and order
_MADE = ("ranknum", "tinylora_P", "unilora_indices_A", "unilora_indices_B", "unilora_scales_A", "unilora_scales_B")


@dataclass(frozen=True)
class Layer:
    """``shape`` is ``[out, in]`` (embeddings ``[tokens, dim]``). ``peers``: the adapted modules in order, with shapes, this one among them; empty: this one
    alone. ``biased``: the base's linear has a bias, and the type has tensors for it."""

    config: dict[str, Any] = field(repr=False)
    name: str
    module: str
    shape: tuple[int, ...]
    conv: bool = False
    embedding: bool = False
    biased: bool = False
    peers: tuple[tuple[str, tuple[int, ...]], ...] = field(default=(), repr=False)

    def build(self, tensors: Mapping[str, torch.Tensor], weight: torch.Tensor, bias: torch.Tensor | None = None) -> nn.Module:
        """PEFT's layer over base ``weight`` fp32 ``[out, in]`` with the adapter's ``tensors``, unmerged, in eval mode. Refused where they do not fit."""
        from peft import PeftModel

        tree = nn.Module()
        if bias is None and self.biased:
            bias = torch.zeros(self.shape[0], device=weight.device)
        for name, shape in self.peers or ((self.module, self.shape),):
            put(tree, name, self._leaf(weight, bias) if name == self.module else self._stand_in(shape))
        try:
            with torch.random.fork_rng(devices=[]):  # PEFT draws initial values that are overwritten below
                model = PeftModel(tree, self._tailored(tensors)).eval().requires_grad_(False)
            self._load(model, tensors)
        except (RuntimeError, ValueError, TypeError, KeyError, IndexError, NotImplementedError) as problem:
            raise Refused(
                "PEFT cannot put the adapter's tensors on this module.",
                where=f"{self.module} in {self.name}",
                expected=f"a layer {list(self.shape)}",
                found=str(problem)[:400],
            ) from problem
        inner: Any = model.base_model.model
        found: nn.Module = inner.get_submodule(self.module)
        return found

    def check(self, specs: Mapping[str, TensorSpec], device: str) -> None:
        """Refused where tensors of these shapes do not fit a layer of this shape. ``device``: ``meta`` computes nothing, ``cpu`` works on zeros."""
        self.build({key: torch.zeros(spec.shape, device=device) for key, spec in specs.items()}, torch.zeros(self.shape, device=device))

    def _leaf(self, weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Module:
        if self.conv and bias is None:  # a Conv1D always has one
            bias = torch.zeros(self.shape[0], device=weight.device)
        leaf = nn.Embedding(self.shape[0], self.shape[1], device="meta") if self.embedding else self._empty(self.shape[0], self.shape[1], bias=bias is not None)
        # a copy: some types merge in place
        leaf.weight = nn.Parameter((weight.T if self.conv else weight).clone(memory_format=torch.contiguous_format), requires_grad=False)
        if bias is not None:
            leaf.bias = nn.Parameter(bias.clone(), requires_grad=False)
        return leaf

    def _stand_in(self, shape: tuple[int, ...]) -> nn.Module:
        """A linear of that shape whose weight is one number; TinyLoRA, which would take its SVD, only counts it."""
        rows, columns = (1, 1) if self.config["peft_type"] == "TINYLORA" else shape
        leaf = self._empty(rows, columns, bias=False)
        leaf.weight = nn.Parameter(torch.zeros(1, 1).expand(leaf.get_parameter("weight").shape), requires_grad=False)
        if self.conv:
            leaf.bias = nn.Parameter(torch.zeros(rows), requires_grad=False)
        return leaf

    def _empty(self, rows: int, columns: int, bias: bool) -> nn.Module:
        if not self.conv:
            return nn.Linear(columns, rows, bias=bias, device="meta")
        from transformers.pytorch_utils import Conv1D

        with torch.device("meta"):
            return Conv1D(rows, columns)

    def _tailored(self, tensors: Mapping[str, torch.Tensor]) -> Any:
        """The adapter's config, for the modules of this tree alone."""
        config = peft_config(self.config, self.name)
        wish: dict[str, Any] = {
            "target_modules": {name for name, _ in self.peers or ((self.module, self.shape),)}, "exclude_modules": None, "layers_to_transform": None,
            "layers_pattern": None, "modules_to_save": None, "bias": "none", "inference_mode": True, "fan_in_fan_out": self.conv, "progressbar": False,
            "runtime_offload_base_weight": False,
        }  # fmt: skip
        if config.peft_type == "WAVEFT":  # the file says how many, whatever shares of a budget PEFT gave to which module
            wish |= {"n_frequency": max(tensor.numel() for tensor in tensors.values()), "n_frequency_pattern": {}, "proportional_parameters": False}
        if config.peft_type == "ADALORA":
            wish["rank_pattern"] = {key: kept for key, kept in (config.rank_pattern or {}).items() if key.startswith(f"{self.module}.lora_")} or None
        if config.peft_type in ("VERA", "PVERA"):
            wish["save_projection"] = any(key.startswith(("base_model.vera_", "base_model.pvera_")) for key in tensors)
        if config.peft_type == "TINYLORA":
            wish["save_projection"] = any(".tinylora_P" in key for key in tensors)
        for name, value in wish.items():
            if hasattr(config, name):
                setattr(config, name, value)
        return config

    def _load(self, model: Any, tensors: Mapping[str, torch.Tensor]) -> None:
        from peft.utils.save_and_load import set_peft_model_state_dict

        result: Any = set_peft_model_state_dict(model, dict(tensors), adapter_name=ADAPTER)
        # projections that a type keeps in one place and every layer refers to are listed once per layer
        shared = {key.rpartition(".")[2] for key in tensors if not key.startswith("base_model.model.")}
        lacking = [
            key
            for key in result.missing_keys
            if f".{self.module}." in key and ".base_layer." not in key and not any(f".{made}." in key for made in (*_MADE, *shared))
        ]
        lacking += [key for key in result.missing_keys if not key.startswith("base_model.model.")]
        if lacking or result.unexpected_keys:
            what = f"missing {lacking[0]}" if lacking else f"{result.unexpected_keys[0]} fits nothing"
            raise ValueError(what)
        if self.config["peft_type"] == "FROD":
            # PEFT takes U from the projections that it made before it loaded the file's; the file's are those of the training
            layer = model.base_model.model.get_submodule(self.module)
            weight = layer.get_base_layer().weight
            layer.frod_U[ADAPTER] = layer._calculate_frod_u_and_lambda(layer.frod_V[ADAPTER], weight.T if self.conv else weight)[0]


def put(tree: nn.Module, path: str, leaf: nn.Module) -> None:
    """Hang ``leaf`` into ``tree`` at a dotted path, with empty modules on the way."""
    *parents, last = path.split(".")
    for name in parents:
        if name not in tree._modules:
            tree.add_module(name, nn.Module())
        tree = tree.get_submodule(name)
    tree.add_module(last, leaf)
