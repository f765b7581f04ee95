"""What do PEFT's named combinations make of several LoRA adapters?

PEFT's ``add_weighted_adapter`` itself computes them, on a tree of the adapted layers with base weights of one number: a combination never looks at the base.
Left out: ``cat`` and ``linear``, see `check_combination`; the exact weighted sum of deltas is in `several.py`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from qmerge.adapters.config import changed_base
from qmerge.adapters.delegated_layer import put
from qmerge.errors import Refused, UsageProblem

Pair = tuple[torch.Tensor, torch.Tensor, float]
"""A ``[rank, in]``, B ``[out, rank]``, scaling; embeddings: A ``[rank, tokens]``, B ``[dim, rank]``"""

SEPARATE = ("ties", "dare_ties", "dare_linear", "magnitude_prune")
"""combine the A of all adapters, and their B, each for itself; they need one rank"""
PRODUCTS = ("svd", "ties_svd", "dare_ties_svd", "dare_linear_svd", "magnitude_prune_svd")
"""combine the products B A and cut the result to a rank"""
COMBINATIONS = SEPARATE + PRODUCTS
_NOT_OFFERED = {
    "cat": "of rsLoRA adapters PEFT makes it sqrt(rank) times too large",
    "linear": "PEFT adds the A and the B of the adapters each for itself, so that the product has cross terms which no adapter was trained with",
}
# a combination is made of A and B alone; field -> what it is, for people
_NOT_PLAIN = {
    "use_dora": "DoRA",
    "lora_bias": "a bias on lora_B",
    "modules_to_save": "modules_to_save, which PEFT does not combine",
    "target_parameters": "target_parameters",
    "trainable_token_indices": "trained tokens",
    "layer_replication": "replicated layers",
    "use_bdlora": "block-diagonal factors",
    "use_qalora": "pooled inputs (QA-LoRA)",
}


def check_combination(
    how: str, configs: Sequence[Mapping[str, Any]], *, density: float | None = None, rank: int | None = None, majority_sign: str = "total",
) -> tuple[str, ...]:  # fmt: skip
    """Sentences to warn with. ``configs`` are the adapters' own, in order.

    Raises UsageProblem for names and numbers that mean nothing, Refused for adapters that PEFT does not combine, or not rightly.
    """
    if how in _NOT_OFFERED:
        raise UsageProblem(
            f"The combination {how!r} is not offered: {_NOT_OFFERED[how]}.",
            expected="no named combination: the exact weighted sum of deltas, or one of " + ", ".join(COMBINATIONS),
            found=how,
            fix="leave the combination out: the default is the exact weighted sum of the adapters' deltas",
        )
    if how not in COMBINATIONS:
        raise UsageProblem("There is no combination of this name.", expected=", ".join(COMBINATIONS), found=how)
    _check_numbers(how, density, rank, majority_sign)
    if len(configs) < 2:
        raise UsageProblem("A combination needs at least two adapters.", expected="two or more", found=len(configs))
    for number, config in enumerate(configs, 1):
        _check_plain(config, f"adapter {number}")
    if configs[0].get("use_rslora"):
        raise Refused(
            "PEFT makes a combination sqrt(rank) times too large where the first adapter uses rsLoRA.",
            where="adapter 1",
            expected="use_rslora: false",
            fix="leave the combination out: the default is the exact weighted sum of the adapters' deltas",
        )
    ranks = [max([config["r"], *(config.get("rank_pattern") or {}).values()]) for config in configs]
    if how in SEPARATE and len(set(ranks)) > 1:
        raise Refused(
            f"{how} needs adapters of one rank.", where="the adapters' configs", expected="equal ranks", found=", ".join(map(str, ranks)), fix=f"use {how}_svd"
        )
    if how in SEPARATE:
        return (
            f"{how} combines the A and the B of the adapters each for itself, as PEFT does: the product has cross terms which no adapter was trained with.",
        )
    return (f"{how} keeps rank {rank or max(ranks)} of a sum that may have rank {sum(ranks)}: the rest is lost.",) if (rank or max(ranks)) < sum(ranks) else ()


def _check_numbers(how: str, density: float | None, rank: int | None, majority_sign: str) -> None:
    if how != "svd" and (density is None or not 0 < density <= 1):
        raise UsageProblem(f"{how} needs the share of values that it keeps.", expected="density: above 0, at most 1", found=density)
    if how == "svd" and density is not None:
        raise UsageProblem("svd keeps all values.", expected="no density", found=density)
    if rank is not None and (how in SEPARATE or rank < 1):
        raise UsageProblem(
            "A rank can be chosen for the combinations that end in svd.",
            expected="rank: a positive integer, with " + ", ".join(PRODUCTS),
            found=f"{how}, rank {rank}",
        )
    if majority_sign not in ("total", "frequency"):
        raise UsageProblem("There is no such way to find the sign of the majority.", expected="total or frequency", found=majority_sign)


def _check_plain(config: Mapping[str, Any], where: str) -> None:
    what = next((text for field, text in _NOT_PLAIN.items() if config.get(field)), None)
    if config.get("peft_type") != "LORA":
        what = f"the type {config.get('peft_type')}"
    elif config.get("bias") not in (None, "none"):
        what = "trained biases"
    elif (init := changed_base(dict(config))) is not None:
        what = f"an initialisation that changed the base ({init})"
    if what:
        raise Refused(
            f"An adapter with {what} cannot be combined by name.",
            where=where,
            expected="plain LoRA: A and B alone",
            fix="leave the combination out: the default is the exact weighted sum of the adapters' deltas",
        )


def combine_all(
    how: str, modules: Sequence[str], pairs: Mapping[str, Sequence[Pair | None]], weights: Sequence[float],
    *, density: float | None = None, rank: int | None = None, majority_sign: str = "total", seed: int = 0, embeddings: Collection[str] = (),
    turned: Collection[str] = (), init_lora_weights: bool | str = True,
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:  # fmt: skip
    """Module -> ``(A' [rank, in], B' [out, rank])`` in fp32 with the delta ``B' @ A'``: what ``add_weighted_adapter`` gives after ``torch.manual_seed(seed)``; the caller's random numbers stay.

    ``modules``: all adapted modules in the order of the model's tree. ``pairs``: module -> one per adapter, None where an adapter has none there. ``rank``
    None is the largest of any pair. ``turned``: Conv1D modules, whose products PEFT combines lying ``[in, out]``: what is dropped at random falls elsewhere. ``init_lora_weights``: the first adapter's, which decides how many numbers PEFT draws before the combination.
    Raises Refused, UsageProblem.
    """
    if how not in COMBINATIONS:
        raise UsageProblem("There is no combination of this name.", expected=", ".join(COMBINATIONS), found=how)
    _check_numbers(how, density, rank, majority_sign)
    if len(weights) < 2 or any(len(pairs[module]) != len(weights) or not any(pairs[module]) for module in modules):
        raise UsageProblem(
            "A combination needs a weight for each of at least two adapters.", expected="one pair and one weight per adapter", found=f"{len(weights)} weights"
        )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        tuner = _tuner(modules, pairs, len(weights), frozenset(embeddings), frozenset(turned), init_lora_weights)
        names = [f"a{number}" for number in range(len(weights))]
        torch.default_generator.manual_seed(seed)  # the CPU's alone: a GPU's is not put back
        try:
            tuner.add_weighted_adapter(
                names, list(weights), "combined", how, svd_rank=rank, svd_full_matrices=False, density=density, majority_sign_method=majority_sign
            )
        except (RuntimeError, ValueError, TypeError) as problem:
            raise Refused(f"PEFT cannot combine these adapters with {how}.", where="the adapters' tensors", found=str(problem)[:300], fix="leave --combine out: the exact sum of deltas takes any ranks") from problem
    results = {module: _factors(tuner.model.get_submodule(module), "combined", module in embeddings) for module in modules}
    broken = next((module for module, found in results.items() if not all(bool(torch.isfinite(factor).all()) for factor in found)), None)
    if broken:
        raise Refused(f"{how} gave values that are not finite.", where=broken, fix="choose another density, or leave the combination out")
    return results


def _tuner(modules: Sequence[str], pairs: Mapping[str, Sequence[Pair | None]], count: int, embeddings: frozenset[str], turned: frozenset[str], init: Any) -> Any:
    """PEFT's LoraModel around a tree of these modules alone, with all pairs in it."""
    from peft import LoraConfig
    from peft.tuners.lora import LoraModel

    tree, tuner = nn.Module(), None
    for module in modules:
        a, b, _ = next(pair for pair in pairs[module] if pair is not None)
        put(tree, module, _leaf(a.shape[1], b.shape[0], module in embeddings, module in turned))
    for number in range(count):
        ranks = {module: pair[0].shape[0] for module in modules if (pair := pairs[module][number]) is not None}
        if not ranks:
            raise UsageProblem("An adapter of the combination changes none of the modules.", expected="at least one pair", found=f"adapter {number + 1}")
        config = LoraConfig(
            r=max(ranks.values()),
            lora_alpha=1,
            target_modules=list(ranks),
            rank_pattern={re.escape(name): rank for name, rank in ranks.items()},
            init_lora_weights=init,
            fan_in_fan_out=bool(turned),
        )
        if tuner is None:
            tuner = LoraModel(tree, config, "a0")
        else:
            tuner.peft_config[f"a{number}"] = config
            tuner.inject_adapter(tree, f"a{number}")
        for module in ranks:
            _fill(tree.get_submodule(module), f"a{number}", pairs[module][number], module in embeddings)
    return tuner


def _leaf(inputs: int, outputs: int, embedding: bool, turned: bool) -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    with torch.device("meta"):
        leaf: nn.Module = nn.Embedding(inputs, outputs) if embedding else Conv1D(outputs, inputs) if turned else nn.Linear(inputs, outputs, bias=False)
    leaf.weight = nn.Parameter(torch.zeros(1, 1).expand(leaf.get_parameter("weight").shape), requires_grad=False)
    return leaf


def _factors(layer: Any, adapter: str, embedding: bool) -> tuple[torch.Tensor, torch.Tensor]:
    if embedding:
        return layer.lora_embedding_A[adapter].data, layer.lora_embedding_B[adapter].data
    return layer.lora_A[adapter].weight.data, layer.lora_B[adapter].weight.data


def _fill(layer: Any, adapter: str, pair: Pair | None, embedding: bool) -> None:
    assert pair is not None
    for slot, values in zip(_factors(layer, adapter, embedding), pair[:2], strict=True):
        slot.copy_(values)
    layer.scaling[adapter] = float(pair[2])
