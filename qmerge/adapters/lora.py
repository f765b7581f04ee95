"""Which edits does a LoRA adapter ask for: pairs, magnitudes, biases, saved modules, single tokens, fused experts?"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from qmerge.adapters.edits import Edit
from qmerge.adapters.factors import check_rank
from qmerge.adapters.lowrank import Experts, LowRank
from qmerge.adapters.promises import check_promises
from qmerge.adapters.replace import AddBias, Replace, ReplaceRows
from qmerge.adapters.several import Chain
from qmerge.errors import Refused
from qmerge.types import known

if TYPE_CHECKING:
    from qmerge.adapters.adapter import Adapter, LoraPair

Shapes = Mapping[str, tuple[int, ...]]


def lora_edits(adapter: Adapter, shapes: Shapes, model: Any = None) -> dict[str, Edit]:
    """Parameter -> edit; the order within one parameter is PEFT's: saved base, LoRA, single tokens. Raises Refused naming the tensor."""
    _check_copies(adapter)
    check_promises(adapter, shapes)
    steps: dict[str, list[Edit]] = {}
    for parameter, key in adapter.saved.items():
        steps.setdefault(parameter, []).append(_replacement(adapter, key))
    fused = _fused(adapter, shapes, model)
    for module, claims in adapter.claims.modules.items():
        parts = claims.parts
        for leaf in ("weight", "bias"):
            if f"base.{leaf}" in parts:
                steps.setdefault(f"{module}.{leaf}", []).append(_replacement(adapter, parts[f"base.{leaf}"]))
        if module in fused:
            steps.setdefault(fused[module][0], []).append(fused[module][1])
        elif module in adapter.pairs:
            pair = adapter.pairs[module]
            steps.setdefault(f"{module}.weight", []).append(_pair_edit(adapter, pair, shapes.get(f"{module}.weight")))
            if pair.bias:
                has_bias = f"{module}.bias" in shapes or f"{module}.bias" in steps
                steps.setdefault(f"{module}.bias", []).append(_bias_edit(adapter, pair, has_bias))
        if "tokens" in parts:
            before = steps.setdefault(f"{module}.weight", [])
            before.append(_token_edit(adapter, module, parts["tokens"], before[-1].shape if before else shapes.get(f"{module}.weight")))
    return {parameter: edits[0] if len(edits) == 1 else Chain(tuple(edits)) for parameter, edits in sorted(steps.items())}


def _check_copies(adapter: Adapter) -> None:
    """Refused where a file holds a trained module twice and the two differ: nobody knows which was meant."""
    for key in adapter.claims.copies:
        first = re.sub(r"\.modules_to_save(?=\.(weight|bias)$)", "", key)
        if first != key and not torch.equal(adapter.load(key), adapter.load(first)):
            raise Refused("The adapter holds a module twice, with other values.", where=f"tensor {key!r} in {adapter.name}", expected=f"the values of {first!r}", found="others",
                          fix="save the adapter again, or remove one of the two")


def _replacement(adapter: Adapter, key: str) -> Replace:
    return Replace((key,), tuple(adapter.specs[key].shape), lambda start, stop: adapter.source.rows(key, start, stop))


def _pair_edit(adapter: Adapter, pair: LoraPair, base: tuple[int, ...] | None) -> LowRank:
    a, b = adapter.specs[pair.a].shape, adapter.specs[pair.b].shape
    check_rank(adapter.source, pair.a, pair.b, pair.rank)
    keys = tuple(key for key in (pair.a, pair.b, pair.magnitude) if key)
    if pair.magnitude and tuple(adapter.specs[pair.magnitude].shape) not in ((b[0],), (b[0], 1), (1, b[0])):
        raise Refused("DoRA's magnitudes do not fit the pair that they belong to.", where=f"tensor {pair.magnitude!r} in {adapter.name}", expected=f"{b[0]} values", found=f"shape {list(adapter.specs[pair.magnitude].shape)}")
    magnitude = None if pair.magnitude is None else lambda: adapter.source.fp32(known(pair.magnitude)).reshape(-1)
    if pair.embedding:
        factors = _undone(adapter, pair, lambda source: (source.fp32(pair.a).T, source.fp32(pair.b).T))
        return LowRank(keys, (a[1], b[0]), factors, pair.scaling, magnitude, by_column=True)
    blocks_a, blocks_b = _blocks(adapter.config, pair)
    group = _pool(adapter.config, a[1], base)

    def read(source: Any) -> tuple[torch.Tensor, torch.Tensor]:
        right, left = source.fp32(pair.a), source.fp32(pair.b)
        if blocks_a > 1:
            right = torch.block_diag(*right.chunk(blocks_a))
        if blocks_b > 1:
            left = torch.block_diag(*left.chunk(blocks_b))
        if group > 1:  # QA-LoRA: the mean over each group of inputs, times the number of groups
            right = right.repeat_interleave(group, dim=1) * (right.shape[1] / group)
        return left, right

    return LowRank(keys, (b[0], a[1] * blocks_a * group), _undone(adapter, pair, read), pair.scaling, magnitude)


def _undone(adapter: Adapter, pair: LoraPair, read: Callable[[Any], tuple[torch.Tensor, torch.Tensor]]) -> Callable[[], tuple[torch.Tensor, torch.Tensor]]:
    """The factors; where the initialisation changed the base, with what it took out as a second, negative pair."""
    if adapter.initial is None:
        return lambda: read(adapter.source)
    started = adapter.initial.pairs[pair.module].scaling / pair.scaling

    before = adapter.initial.source

    def factors() -> tuple[torch.Tensor, torch.Tensor]:
        (left, right), (left0, right0) = read(adapter.source), read(before)
        return torch.cat([left, -started * left0], dim=1), torch.cat([right, right0])

    return factors


def _blocks(config: Mapping[str, Any], pair: LoraPair) -> tuple[int, int]:
    """How many diagonal blocks A and B consist of (BD-LoRA): PEFT's rule, a name of the list anywhere in the target's name."""
    settings = config.get("use_bdlora") or {}
    count = int(settings.get("nblocks", 1))
    inside_a, inside_b = (any(name in pair.module for name in settings.get(f"target_modules_bd_{side}") or []) for side in "ab")
    return count if inside_a else 1, count if inside_b and not inside_a else 1


def _pool(config: Mapping[str, Any], inputs: int, base: tuple[int, ...] | None) -> int:
    """QA-LoRA's group size where this A is pooled (PEFT pools on GPTQ layers only), else 1."""
    size = int(config.get("qalora_group_size") or 1) if config.get("use_qalora") else 1
    return size if base is not None and size > 1 and inputs * size == base[-1] else 1


def _bias_edit(adapter: Adapter, pair: LoraPair, has_bias: bool) -> AddBias:
    if not has_bias:
        raise Refused("The adapter adds a bias to a linear that has none, and the model's class would not load one.", where=f"tensor {pair.bias!r} in {adapter.name}",
                      expected=f"{pair.module}.bias in the base", found="none", fix="keep this adapter separate")
    bias = known(pair.bias)
    return AddBias((bias,), tuple(adapter.specs[bias].shape), lambda: adapter.source.fp32(bias), pair.scaling)


def _token_edit(adapter: Adapter, module: str, key: str, base: tuple[int, ...] | None) -> ReplaceRows:
    table = adapter.config.get("trainable_token_indices") or []
    if isinstance(table, dict):
        names = [name for name in table if module == name or module.endswith("." + name)]
        table = table[names[0]] if names else []
    shape = tuple(adapter.specs[key].shape)
    if len(shape) != 2 or len(table) != shape[0] or len(set(table)) != len(table):
        raise Refused("The trained tokens do not fit the adapter's list of their numbers.", where=f"tensor {key!r} in {adapter.name}",
                      expected=f"{len(set(table))} rows, as trainable_token_indices has numbers", found=f"shape {list(shape)}")
    if base is not None and (max(table, default=0) >= base[0] or shape[1] != base[1]):
        raise Refused("The trained tokens do not fit the base's embedding.", where=f"tensor {key!r} in {adapter.name}", expected=f"numbers below {base[0]}, width {base[1]}",
                      found=f"numbers up to {max(table, default=0)}, width {shape[1]}")
    return ReplaceRows((key,), base or (max(table, default=0) + 1, shape[1]), tuple(table), lambda: adapter.source.fp32(key))


def _fused(adapter: Adapter, shapes: Shapes, model: Any) -> dict[str, tuple[str, Edit]]:
    """Pairs that belong to bare parameters (fused experts): the module in the key -> (parameter, edit)."""
    loose = [module for module in adapter.pairs if f"{module}.weight" not in shapes]
    if not adapter.config.get("target_parameters") or model is None:
        return {}
    from qmerge.adapters.experts import expert_edits

    return expert_edits(adapter, loose, model, shapes, Experts, LowRank)
