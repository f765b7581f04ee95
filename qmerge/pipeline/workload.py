"""How large is everything that a run handles? Counts of elements, read off a plan: no weights, no guesses about an architecture's name."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from qmerge import formats
from qmerge.device import COMPUTE
from qmerge.pipeline.gradients import curvature_width
from qmerge.pipeline.plan import MergePlan
from qmerge.pipeline.skeleton import Skeleton


@dataclass(frozen=True)
class Linears:
    """Linears that are solved side by side: they share their ``inputs``. ``writer``: its output is added to the residual stream. ``copies``: as many such groups in a block (experts)."""

    inputs: int
    outputs: tuple[int, ...]
    writer: bool = False
    edited: bool = True
    copies: int = 1

    @property
    def elements(self) -> int:
        return self.inputs * sum(self.outputs)


@dataclass(frozen=True)
class Workload:
    """Elements, not bytes, where nothing else is said.

    ``ends``: all parameters outside of the blocks, ``end`` the largest of them; ``block``: the largest block, ``groups`` what is requantized in it, in the order in which it runs; ``head``: where
    it is requantized. ``inner``: the widest activation within a block. ``eager``: attention makes its scores whole. ``cut``: shortest rows of a base's tensor that can only be read whole.
    """

    threads: int
    accelerator: bool
    format: str
    hidden: int
    vocabulary: int
    ends: int
    end: int
    blocks: int
    block: int
    groups: tuple[Linears, ...]
    head: Linears | None
    inner: int
    heads: int
    eager: bool
    base_4bit: bool
    train: int
    held_out: int
    tokens: int
    curvature_tokens: int
    curvature_width: int
    quantized: int
    """elements of all requantized weights"""
    total: int
    """elements of the whole model"""
    whole: int
    """elements of the largest tensor that the base cannot be read from by rows; 0 where there is none"""
    largest: int
    """elements of the largest tensor that an adapter changes or that is requantized"""
    quick: bool = False
    """does the requantized model run alone, without a teacher?"""
    factor_bytes: int = 4
    """of an element of the factors of sums (`--compute`)"""
    streams_on_host: bool = False
    """do the two streams lie in main memory, beside an accelerator?"""

    @property
    def windows(self) -> int:
        return self.train + self.held_out

    @property
    def calibration_tokens(self) -> int:
        return self.windows * self.tokens

    @property
    def solved(self) -> int:
        """Requantized elements of the largest block."""
        return sum(group.elements * group.copies for group in self.groups)


def measure_plan(plan: MergePlan, device: torch.device, windows: tuple[int, int] | None = None) -> Workload:
    """``windows``: (to solve on, held out) where they are known; else what the recipe asks for."""
    recipe, skeleton = plan.recipe, plan.skeleton
    table = plan.pieces.table
    sizes = {name: prod(piece.shape) for name, piece in table.items()}
    calibrated = recipe.format in formats.QUANTIZING and not recipe.rtn
    held_out = max(1, recipe.samples // 7)
    train, held_out = windows if windows is not None else (recipe.samples - held_out, held_out)
    whole = [sizes[name] for name, piece in table.items() if piece.source is not None and len(piece.shape) == 2 and plan.base.row_step(piece.source) >= piece.shape[0] > 1]
    tokens = min(recipe.tokens, plan.context_length or recipe.tokens)
    facts = _decoder(plan, skeleton) if skeleton is not None and recipe.format in formats.QUANTIZING else _no_decoder()
    return Workload(
        threads=torch.get_num_threads(), accelerator=device.type != "cpu", format=recipe.format,
        base_4bit=any(plan.base.is_4bit(piece.source) for piece in table.values() if piece.source is not None),
        train=train if calibrated else 0, held_out=held_out if calibrated else 0, tokens=tokens,
        curvature_tokens=recipe.curvature_tokens if calibrated else 0,
        curvature_width=curvature_width(plan) if calibrated else 0, quick=recipe.quick,
        quantized=sum(sizes[name] for name in plan.requantized), total=sum(sizes.values()), whole=max(whole, default=0),
        largest=max((sizes[name] for name in {*plan.requantized, *plan.changed}), default=0),
        factor_bytes=COMPUTE[recipe.compute].sums.itemsize if recipe.compute in COMPUTE else 4, **facts,
    )  # fmt: skip


def _no_decoder() -> dict[str, Any]:
    return {"hidden": 0, "vocabulary": 0, "ends": 0, "end": 0, "blocks": 0, "block": 0, "groups": (), "head": None, "inner": 0, "heads": 0, "eager": False}


def _decoder(plan: MergePlan, skeleton: Skeleton) -> dict[str, Any]:
    table, inside = plan.pieces.table, skeleton.blocks_name + "."
    outside = {name: prod(piece.shape) for name, piece in table.items() if not name.startswith(inside)}
    counts = [sum(parameter.numel() for parameter in block.parameters()) for block in skeleton.blocks]
    number = counts.index(max(counts))
    config = skeleton.model.config.get_text_config()
    entrance = table.get(skeleton.input_embedding or "")
    hidden = int(getattr(config, "hidden_size", 0) or (entrance.shape[-1] if entrance else 0))
    head = [name for name in plan.requantized if name == skeleton.output_embedding]
    prefix = f"{inside}{number}."
    groups = _groups(plan, prefix, hidden)
    widths = [max(module.shape) for name, module in _matrices(skeleton.blocks[number])]
    heads = int(getattr(config, "num_attention_heads", 0) or getattr(config, "n_head", 0) or 1)
    return {
        "hidden": hidden, "vocabulary": int(getattr(config, "vocab_size", 0)), "ends": sum(outside.values()), "end": max(outside.values(), default=0),
        "blocks": len(skeleton.blocks), "block": counts[number], "groups": groups, "head": _linears(plan, head) if head else None,
        "inner": max(widths, default=hidden), "heads": heads, "eager": getattr(config, "_attn_implementation", "eager") == "eager",
    }  # fmt: skip


def _matrices(block: torch.nn.Module) -> Iterable[tuple[str, torch.Tensor]]:
    return ((name, parameter) for name, parameter in block.named_parameters() if parameter.dim() == 2)


def _groups(plan: MergePlan, prefix: str, hidden: int) -> tuple[Linears, ...]:
    """Which linears share an input is only known once a block runs; in every decoder that transformers has, those of one parent with one width do, but for its last one, which gives the parent's
    answer. A mistake here shifts the estimate by a group's share."""
    apart = {weight.name for weight in plan.routed}
    found: dict[tuple[str, int], list[str]] = {}
    names = [name for name in plan.requantized if name.startswith(prefix) and name not in apart]
    parents = [name.removesuffix(".weight").rpartition(".")[0] for name in names]
    for place, (name, parent) in enumerate(zip(names, parents, strict=True)):
        last = parent not in parents[place + 1 :] and parents.count(parent) > 1
        found.setdefault((parent, -1 if last else plan.pieces.table[name].shape[1]), []).append(name)
    groups = [_linears(plan, members, plan.pieces.table[members[0]].shape[0] == hidden and len(members) == 1) for members in found.values()]
    return (*groups, *_expert_groups(plan, prefix))


def _expert_groups(plan: MergePlan, prefix: str) -> list[Linears]:
    """Each expert's parameters are solved one after the other."""
    found: dict[tuple[int, str], list[str]] = {}
    for weight in plan.routed:
        if weight.name.startswith(prefix):
            found.setdefault((weight.expert, weight.parameter), []).append(weight.name)
    kinds: dict[tuple[int, tuple[int, ...]], list[list[str]]] = {}
    for members in found.values():
        one = _linears(plan, members)
        kinds.setdefault((one.inputs, one.outputs), []).append(members)
    return [_linears(plan, many[0], copies=len(many)) for many in kinds.values()]


def _linears(plan: MergePlan, names: list[str], writer: bool = False, copies: int = 1) -> Linears:
    table = plan.pieces.table
    return Linears(table[names[0]].shape[1], tuple(table[name].shape[0] for name in names), writer, any(table[name].edit is not None for name in names), copies)
