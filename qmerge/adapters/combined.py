"""Which edits do several LoRA adapters ask for under one of PEFT's named combinations?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from qmerge.adapters.adapter import Adapter
from qmerge.adapters.combine import PRODUCTS, combine_all
from qmerge.adapters.edits import Edit
from qmerge.adapters.lowrank import LowRank
from qmerge.errors import Refused

if TYPE_CHECKING:
    from qmerge.adapters.choices import Combination


def combined_edits(
    adapters: Sequence[Adapter], weights: Sequence[float], combination: Combination, shapes: Mapping[str, tuple[int, ...]], model: Any = None
) -> dict[str, Edit]:
    """Parameter -> edit. The factors are combined now, module after module in PEFT's order, because those that drop values at random share one stream of numbers.

    ``model``: the module tree, whose order is PEFT's. Raises Refused for an adapter that holds more than plain pairs.
    """
    for adapter in adapters:
        if adapter.initial is not None:
            raise Refused("A named combination is defined for adapters on the base as it is.", where=adapter.name, expected="no initialisation that changed the base",
                          found=str(adapter.config.get("init_lora_weights")), fix="leave --combine out: the exact sum of deltas")
        loose = sorted(set(adapter.saved) | {module for module, claims in adapter.claims.modules.items() if module not in adapter.pairs or "base.bias" in claims.parts})
        if loose:
            raise Refused("A named combination is defined for plain LoRA only.", where=adapter.name, expected="lora_A and lora_B alone", found=loose[0], fix="leave --combine out: the exact sum of deltas")
    held = {module for adapter in adapters for module in adapter.pairs}
    order = [name for name, _ in model.named_modules() if name in held] if model is not None else sorted(held)
    if missing := held - set(order):
        raise Refused("the adapter was made for another base: it changes a module that this base lacks", where=adapters[0].name, expected=f"{min(missing)} in the module tree", found="none", fix="qmerge inspect ADAPTER names the base that it was trained on: give that one")
    embeddings = [module for module in order if any(module in adapter.pairs and adapter.pairs[module].embedding for adapter in adapters)]
    turned = [module for module in order if model is not None and type(model.get_submodule(module)).__name__ == "Conv1D"]
    pairs = {module: [(*adapter.load_pair(module), adapter.pairs[module].scaling) if module in adapter.pairs else None for adapter in adapters] for module in order}
    found = combine_all(combination.how, order, pairs, weights, density=combination.density, rank=_rank(adapters, combination),
                        seed=combination.seed, embeddings=embeddings, turned=turned, init_lora_weights=adapters[0].config.get("init_lora_weights", True))
    edits: dict[str, Edit] = {}
    for module, (a, b) in found.items():
        keys = tuple(key for adapter in adapters if module in adapter.pairs for key in (adapter.pairs[module].a, adapter.pairs[module].b))
        left, right = (a.T, b.T) if module in embeddings else (b, a)
        edits[f"{module}.weight"] = LowRank(keys, (left.shape[0], right.shape[1]), _held(left.float(), right.float()))
    return edits


def _rank(adapters: Sequence[Adapter], combination: Combination) -> int | None:
    """The rank to cut to, None for those that keep the adapters' own. PEFT's rule: the largest that any config names, whether a module has it or not."""
    if combination.how not in PRODUCTS:
        return combination.rank
    return combination.rank or max(rank for adapter in adapters for rank in (adapter.config["r"], *(adapter.config.get("rank_pattern") or {}).values()))


def _held(left: torch.Tensor, right: torch.Tensor) -> Any:
    return lambda: (left, right)
