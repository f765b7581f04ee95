"""What is in an adapter, and which edits of a base does it ask for?

`open_adapter` reads config and header and checks both; `Adapter.edits` says, for the shapes of a given base, what becomes of which parameter. LoRA is qmerge's own
arithmetic (`lora.py`); other PEFT types go through PEFT (`delegated.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qmerge.adapters.claims import Claims, check_saved_complete, claim
from qmerge.adapters.config import changed_base, check_config, rank_and_scaling
from qmerge.adapters.edits import Edit
from qmerge.adapters.factors import check_rank
from qmerge.adapters.initial import find_initial
from qmerge.errors import Refused
from qmerge.store.adapter import AdapterFiles, open_files
from qmerge.types import TensorSpec


@dataclass(frozen=True)
class LoraPair:
    """The factors of one module: ``a`` ``[rank, in]`` and ``b`` ``[out, rank]`` name tensors of the file; ``embedding``: A ``[rank, tokens]``, B ``[dim, rank]``."""

    module: str
    a: str
    b: str
    rank: int
    scaling: float
    magnitude: str | None = None
    bias: str | None = None
    embedding: bool = False


@dataclass(frozen=True)
class Adapter:
    """``pairs``: module -> `LoraPair`; ``saved``: parameter of the base (``"lm_head.weight"``) -> tensor of the file that replaces it whole.
    ``initial``: the adapter as it was before training, where its initialisation changed the base and the folder keeps it (PiSSA)."""

    source: AdapterFiles
    pairs: dict[str, LoraPair]
    saved: dict[str, str]
    claims: Claims
    initial: Adapter | None = None

    @property
    def path(self) -> Path:
        return self.source.path

    @property
    def name(self) -> str:
        return self.source.name

    @property
    def revision(self) -> str | None:
        return self.source.revision

    @property
    def config(self) -> dict[str, Any]:
        return self.source.config

    @property
    def specs(self) -> dict[str, TensorSpec]:
        return self.source.specs

    @property
    def kind(self) -> str:
        """PEFT's type: ``LORA``, ``LOHA``, …"""
        return str(self.config.get("peft_type"))

    @property
    def weight_bytes(self) -> int:
        return self.source.weight_bytes + (self.initial.weight_bytes if self.initial else 0)

    def files(self) -> list[Path]:
        return self.source.files()

    def config_files(self) -> list[Path]:
        return self.source.config_files()

    def load(self, key: str) -> torch.Tensor:
        """A tensor of the file as stored. Refused for an unknown name."""
        return self.source.load(key)

    def load_pair(self, module: str) -> tuple[torch.Tensor, torch.Tensor]:
        """``(A, B)`` of ``module`` in fp32, checked to be finite. Refused for a module without a pair, NaN and Inf."""
        if module not in self.pairs:
            raise Refused("The adapter does not change this module.", where=self.name, expected=module, found=f"{len(self.pairs)} other modules")
        return self.source.fp32(self.pairs[module].a), self.source.fp32(self.pairs[module].b)

    @property
    def idle(self) -> tuple[str, ...]:
        """Tensors that go into nothing: those that only training used, those of other adapters in the same file, and second copies."""
        return tuple(key for module in self.claims.modules.values() for key in module.idle) + self.claims.others + self.claims.copies

    def edits(self, shapes: Mapping[str, tuple[int, ...]], model: Any = None) -> dict[str, Edit]:
        """Parameter in the module tree -> what becomes of it. ``shapes``: the base's parameters; ``model``: its module tree, needed for fused experts only."""
        if self.kind != "LORA":
            from qmerge.adapters.delegated import delegated_edits

            conv, order = _tree(model) if model is not None else (None, None)
            return delegated_edits(self.path, self.name, self.config, self.specs, self.source.load, shapes, conv=conv, order=order)
        from qmerge.adapters.lora import lora_edits

        return lora_edits(self, shapes, model)


def open_adapter(path_or_id: str | Path, revision: str | None = None, *, allow_pickle: bool = False, residual_base: bool = False) -> Adapter:
    """Open a PEFT adapter folder or hub id (``folder#name`` picks one of several): config and header are read and checked, no weights.

    ``residual_base``: the base at hand is the one that the adapter's initialisation (PiSSA, LoftQ, …) left behind.
    Raises Refused: missing files, pickle weights without ``allow_pickle``, whatever cannot be merged, A without B, ranks that differ from the config,
    tensors that belong to nothing, a saved module whose tensors are missing, an initialisation that changed the base and cannot be undone.
    """
    source = open_files(path_or_id, revision, allow_pickle)
    where = f"adapter_config.json of {source.name}"
    if not source.specs:
        raise Refused("The adapter holds no tensors.", where=source.name, expected="LoRA pairs", found="an empty header", fix="the training run saved nothing: take another checkpoint of it")
    if source.config.get("peft_type") != "LORA":
        from qmerge.adapters.delegated import check_type

        check_type(source.config, where)
        return Adapter(source, {}, {}, Claims({}, {}))
    check_config(source.config, where)
    claims = claim(source.specs, source.config, source.name, source.wanted)
    check_saved_complete(claims.saved, source.config, source.name)
    pairs = {module: pair for module in claims.modules if (pair := _pair(module, claims, source)) is not None}
    initial = None
    if (init := changed_base(source.config)) and not residual_base:
        initial = find_initial(source, init, where, lambda folder: open_adapter(folder, allow_pickle=allow_pickle, residual_base=True))
    return Adapter(source, pairs, claims.saved, claims, initial)


def _tree(model: Any) -> tuple[list[str], list[str]]:
    """``(weights of Conv1D modules, linears and embeddings in the order of the module tree)``."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    named = list(model.named_modules())
    return [f"{name}.weight" for name, module in named if isinstance(module, Conv1D)], [name for name, module in named if isinstance(module, (nn.Linear, Conv1D, nn.Embedding))]


def _pair(module: str, claims: Claims, source: AdapterFiles) -> LoraPair | None:
    """The checked pair of ``module``, None where it has none (trained biases, single tokens); Refused when a half is missing or a rank is not the config's."""
    parts = claims.modules[module].parts
    embedding = "lora_embedding_A" in parts or "lora_embedding_B" in parts
    if "tokens" in parts and not source.config.get("trainable_token_indices"):
        raise Refused("The adapter holds single trained tokens, and its config does not say which.", where=f"tensor {parts['tokens']!r} in {source.name}", expected="trainable_token_indices", found="none")
    first, second = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A", "lora_B")
    if first not in parts and second not in parts:
        extra = sorted(set(parts) - {"base.weight", "base.bias", "tokens"})
        if extra or ("base.weight" in parts and "tokens" not in parts):
            raise Refused("An adapter tensor lacks the LoRA pair that it belongs to.", where=f"tensor {parts[(extra or ['base.weight'])[0]]!r} in {source.name}",
                          expected=f"{module}.lora_A and lora_B beside it", fix="save the adapter again with PEFT: PeftModel.save_pretrained")
        return None
    for side, other in ((first, second), (second, first)):
        if side not in parts:
            raise Refused(f"An adapter tensor lacks its other half: {other} without {side}.", where=f"tensor {parts[other]!r} in {source.name}",
                          expected=f"{module}.{side} beside it", fix="save the adapter again with PEFT: PeftModel.save_pretrained")
    rank, scaling = rank_and_scaling(source.config, module)
    if not source.config.get("target_parameters"):  # factors of fused parameters have rank × experts, which is checked against the base
        check_rank(source, parts[first], parts[second], rank)
    for flag, slot in (("use_dora", "magnitude"), ("lora_bias", "lora_B.bias")):
        if bool(source.config.get(flag)) != (slot in parts) and not (embedding and flag == "lora_bias"):
            raise Refused(f"The adapter's config and its tensors disagree about {flag}.", where=f"{module} in {source.name}",
                          expected=f"{slot} {'beside the pair' if source.config.get(flag) else 'absent'}", found="none" if slot not in parts else parts[slot], fix="take the config and the weights of one training run")
    return LoraPair(module, parts[first], parts[second], rank, scaling, parts.get("magnitude"), parts.get("lora_B.bias"), embedding)
