"""What will a run read, compute and write? Headers only; every refusal that can be known beforehand happens here."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qmerge import formats
from qmerge.adapters.adapter import Adapter
from qmerge.adapters.choices import SUM
from qmerge.adapters.claims import EMBEDDINGS
from qmerge.adapters.several_adapters import check_several, joint_edits
from qmerge.device import pick_compute, pick_device
from qmerge.errors import Refused
from qmerge.formats.base import Base, open_base
from qmerge.formats.nf4_recipe import Nf4Recipe
from qmerge.pipeline import outputs
from qmerge.pipeline.experts_names import ExpertWeight, float_experts, routed_weights, spell, written_edits
from qmerge.pipeline.naming import Names, foreign_modules
from qmerge.pipeline.pieces import Pieces, check_floats, expanded_config, make_pieces
from qmerge.pipeline.recipe import Recipe, nf4_recipe_of
from qmerge.pipeline.recipe_checks import check_calibration_given
from qmerge.pipeline.skeleton import Skeleton, build_skeleton, may_hold_conv1d
from qmerge.store.checkpoint import Checkpoint, open_checkpoint
from qmerge.store.publish import check_output
from qmerge.store.settings import known_settings
from qmerge.types import known
from qmerge.units import format_bytes

NARROW, RATHER_NARROW = 32, 128
"""outputs below which an int format leaves a linear float, the latter where inputs are 16 times as many: it is a gate (of a shared expert, of heads), which engines read as float"""


@dataclass(frozen=True)
class MergePlan:
    """The whole job. ``requantized`` are weight names that become 4-bit; ``routed`` are those of them that are routed experts'; ``kept_4bit`` stay as the base stores them, byte for byte. ``skeleton`` is None where the
    merge works on tensors alone. ``config`` is the base's with what the adapter changed (tokens, layers, tying)."""

    recipe: Recipe
    base: Base
    adapters: tuple[Adapter, ...]
    skeleton: Skeleton | None
    pieces: Pieces
    config: dict[str, Any]
    requantized: tuple[str, ...]
    kept_4bit: tuple[str, ...]
    bytes_in: int
    bytes_out: int
    warnings: tuple[str, ...]
    routed: tuple[ExpertWeight, ...] = ()

    @property
    def tree(self) -> Skeleton:
        """The skeleton, in a run that has one, as all have that requantize."""
        return known(self.skeleton)

    @property
    def checkpoint(self) -> Checkpoint:
        return self.base.checkpoint

    @property
    def changed(self) -> tuple[str, ...]:
        """Output tensors that the adapters change."""
        return self.pieces.edited

    @property
    def context_length(self) -> int | None:
        """Tokens that the model can see, where its config says so."""
        inner = next((value for value in self.config.values() if isinstance(value, dict) and "max_position_embeddings" in value), {})
        found = self.config.get("max_position_embeddings") or self.config.get("n_positions") or inner.get("max_position_embeddings")
        if found is None and self.skeleton is not None:
            found = getattr(self.skeleton.model.config.get_text_config(), "max_position_embeddings", None)
        return found

    def to_json(self) -> dict[str, Any]:
        return {
            "base": self.checkpoint.name,
            "adapter": self.adapters[0].name,
            "adapters": [adapter.name for adapter in self.adapters],
            "weights": [choice.weight for choice in self.recipe.choices],
            "format": self.recipe.format,
            "tensors_changed_by_the_adapter": len(self.changed),
            "linears_requantized": len(self.requantized),
            "bytes_in": self.bytes_in,
            "bytes_out": self.bytes_out,
            "warnings": list(self.warnings),
        }


def plan(recipe: Recipe, writes: bool = True) -> MergePlan:
    """Read headers and configs, check everything against everything, and say what would be done. Writes nothing. ``writes``: will this process write OUT, or another one, perhaps on another host?"""
    check_calibration_given(recipe)
    found = read_inputs(recipe)
    if writes:
        check_output(Path(recipe.out), [found.checkpoint.path, *(adapter.path for adapter in found.adapters)], recipe.overwrite)
    return with_outputs(found)


def _coarse(recipe: Recipe) -> bool:
    """Is what bf16 takes from two streams of activations small beside what rounding to the output's grid does? Measured in docs/measurements/passes-bf16.md; and where one stream passes, of which no difference is taken, in quick.md."""
    return recipe.quick or (recipe.grid.kind == "int" and recipe.grid.bits <= 4 and recipe.bits_per_weight is None)


def read_inputs(recipe: Recipe, trained_with: Nf4Recipe | None = None) -> MergePlan:
    """The plan without its output: what the merged model consists of. ``trained_with`` overrides the recipe's own word on how a float base was quantized."""
    adapters = recipe.adapter_set.open()
    warnings = check_several(adapters, recipe.adapter_set.combination)
    checkpoint = open_checkpoint(recipe.original if recipe.on == "original" and recipe.original else recipe.base)
    if recipe.on == "original" and recipe.original and (dora := next((adapter for adapter in adapters if adapter.config.get("use_dora")), None)):
        raise Refused("DoRA's magnitudes were trained over the quantized base, so they do not belong on the float one.", where=dora.name, expected="--on dequantized", found="--on original --original …",
                      fix="leave --on and --original out")
    if recipe.format in formats.QUANTIZING and not recipe.rtn:
        recipe = replace(recipe, compute=pick_compute(recipe.compute, pick_device(recipe.device), _coarse(recipe)))
    four_bit = trained_with or nf4_recipe_of(recipe, adapters)
    skeleton = build_skeleton(checkpoint) if four_bit is not None or _skeleton_needed(recipe, checkpoint, adapters) else None
    base = open_base(checkpoint, on=recipe.on, recipe=four_bit, linears=skeleton.linears if skeleton else _conv_by_adapter(adapters),
                     head=skeleton.output_embedding if skeleton and not skeleton.tied else None)
    if skeleton is None and foreign_modules(adapters, base.names):
        skeleton = _skeleton_or_none(checkpoint)
    pieces, skeleton = _pieces(recipe, base, adapters, skeleton)
    _check_consumed(adapters, pieces)
    check_floats(base, pieces)
    config = expanded_config(checkpoint.config, pieces)
    if skeleton is not None and recipe.format in formats.QUANTIZING and (pieces.layers or pieces.vocabulary):
        skeleton = build_skeleton(checkpoint, config)
    return MergePlan(recipe, base, adapters, skeleton, pieces, config, (), (), 0, 0, tuple(warnings + _warnings(recipe, base, adapters, pieces)))


def plan_each(recipe: Recipe, writes: bool = True) -> list[MergePlan]:
    """One plan per adapter, each into a folder of its own below OUT, named after the adapter."""
    labels = Counter(_label(choice.place) for choice in recipe.choices)
    if twice := [label for label, count in labels.items() if count > 1]:
        raise Refused("two adapters would be written to one folder", where=f"--each --out {recipe.out}", found=f"{twice[0]}, twice", fix="rename a folder, or merge them one by one")
    return [plan(replace(recipe, adapter=(text,), each=False, out=str(Path(recipe.out) / _label(choice.place))), writes) for text, choice in zip(recipe.adapter, recipe.choices, strict=True)]


def _label(place: str) -> str:
    return place.rstrip("/").replace("#", "/").rsplit("/", 1)[-1]


def _skeleton_needed(recipe: Recipe, checkpoint: Checkpoint, adapters: tuple[Adapter, ...]) -> bool:
    """Has the model class to be asked? To requantize, to know which linears a recipe would round, where Conv1D may turn weights, where a tie may break, and
    for adapters that go through PEFT."""
    touches_ends = any(name.rpartition(".")[2] in EMBEDDINGS for adapter in adapters for name in (*adapter.claims.modules, *(saved.rpartition(".")[0] for saved in adapter.saved)))
    return (
        recipe.format in formats.QUANTIZING or (touches_ends and (checkpoint.config.get("tie_word_embeddings") or _known(checkpoint))) or any(adapter.kind != "LORA" or adapter.config.get("target_parameters") for adapter in adapters)
        or recipe.combine != SUM or (may_hold_conv1d(checkpoint.config) and _known(checkpoint))
    )


def _known(checkpoint: Checkpoint) -> bool:
    """Does transformers have this architecture? Where it has not, a dense merge goes by the file's own order."""
    from transformers import CONFIG_MAPPING

    return checkpoint.config.get("model_type") in CONFIG_MAPPING


def _skeleton_or_none(checkpoint: Checkpoint) -> Skeleton | None:
    """The model class where transformers has one: its names may explain the adapter's. Without it the adapter's names must be the file's."""
    try:
        return build_skeleton(checkpoint)
    except Refused:
        return None


def _conv_by_adapter(adapters: tuple[Adapter, ...]) -> dict[str, bool] | None:
    """Weights that a float file stores ``[in, out]`` by the adapter's own word, where no model class is at hand."""
    turned = {f"{module}.weight": True for adapter in adapters if adapter.config.get("fan_in_fan_out") for module, pair in adapter.pairs.items() if not pair.embedding}
    return turned or None


def _pieces(recipe: Recipe, base: Base, adapters: tuple[Adapter, ...], skeleton: Skeleton | None) -> tuple[Pieces, Skeleton | None]:
    where = ", ".join(adapter.name for adapter in adapters)
    names = Names(base, skeleton)
    model = skeleton.model if skeleton else None
    edits = joint_edits(adapters, recipe.adapter_set.weights, recipe.adapter_set.combination, names.shapes(adapters), model)
    edits = names.on_disk(edits, where)
    spelling = None
    if recipe.format in formats.QUANTIZING:
        spelling = spell(names, recipe.format)
        edits = written_edits(spelling, edits, where)
    return make_pieces(base, edits, [adapter.config for adapter in adapters], skeleton, where, spelling), skeleton


def _check_consumed(adapters: tuple[Adapter, ...], pieces: Pieces) -> None:
    """Refused, naming the tensor, where an adapter holds one that no piece uses (and that is not one which only training used)."""
    used = {key for piece in pieces.table.values() if piece.edit is not None for key in (*piece.edit.keys, *getattr(piece.edit, "shared", ()))}
    for adapter in adapters:
        if idle := sorted(set(adapter.specs) - set(adapter.idle) - used):
            raise Refused("the adapter holds a tensor that changes no weight of this base", where=f"{adapter.name}: {idle[0]}", expected="every tensor used", found=f"{len(idle)} such tensors", fix="keep this adapter separate")


def with_outputs(found: MergePlan) -> MergePlan:
    """What `read_inputs` found, with what becomes of each weight. Raises `Refused` where the format cannot hold one."""
    recipe, base, pieces = found.recipe, found.base, found.pieces
    outputs.model_dtype(found)  # refuses a config that names none
    requantized, kept = outputs.split_weights(recipe, base, found.skeleton, pieces)
    narrow = [name for name in requantized if recipe.format in formats.BITS and _is_gate(*pieces.table[name].shape)]
    requantized = tuple(name for name in requantized if name not in narrow)
    routed = routed_weights(found.skeleton, pieces, recipe.format) if found.skeleton else ()
    if routed and recipe.format in formats.SYMMETRIC_EXPERTS and not recipe.symmetric:
        raise Refused(f"no loader here reads asymmetric routed experts in format {recipe.format}", where=routed[0].name, expected="a symmetric grid", found="--asym",
                      fix="leave --asym out, or use --format awq, whose asymmetric experts gptqmodel reads")
    head = [name for name in requantized if name == known(found.skeleton).output_embedding] if routed else []
    requantized = (*(name for name in requantized if name not in head), *(weight.name for weight in routed), *head)
    padded = outputs.check_shapes(recipe, pieces, requantized)
    bytes_out = sum(outputs.bytes_out(recipe, base, pieces, name, set(requantized) | set(kept)) for name in pieces.table)
    bytes_in = base.checkpoint.weight_bytes + sum(spec.nbytes for adapter in found.adapters for spec in adapter.specs.values())
    return replace(found, requantized=requantized, kept_4bit=kept, bytes_in=bytes_in, bytes_out=bytes_out, routed=routed, warnings=(*found.warnings, *padded, *_on_narrow(narrow), *_on_experts(found, routed)))


def _is_gate(outputs: int, inputs: int) -> bool:
    return outputs < NARROW or (outputs < RATHER_NARROW and outputs * 16 <= inputs)


def _on_narrow(names: list[str]) -> list[str]:
    return [f"{len(names)} linears with few outputs stay float, as engines keep such gates: {names[0].removesuffix('.weight')}" + (" …" if len(names) > 1 else "")] if names else []


def _on_experts(found: MergePlan, routed: tuple[ExpertWeight, ...]) -> list[str]:
    """A word on routed experts that a quantizing format leaves float."""
    kept = float_experts(found.skeleton, routed) if found.recipe.format in formats.QUANTIZING else ()
    if not kept:
        return []
    parameters = dict(known(found.skeleton).model.named_parameters())
    count = sum(parameters[name].shape[0] for name in kept)
    why = "transformers knows no names for them one by one" if found.recipe.format in formats.BITS else "bitsandbytes quantizes no fused parameter"
    return [f"{count} routed experts' weights stay float ({why}), e.g. {kept[0]}: {sum(parameters[name].numel() for name in kept)} values"]


def check_room(out: Path, needed: int, fitting: Sequence[str] = ()) -> None:
    """All that grows beside OUT, the whole output among it, must fit, beside an old one: it is swapped in at the end. ``fitting``: settings with which it would."""
    there = next(parent for parent in out.absolute().parents if parent.exists())
    free = shutil.disk_usage(there).free
    if free < needed:
        raise Refused("the output does not fit on the disk", where=str(out), expected=f"{format_bytes(needed)} free", found=format_bytes(free),
                      fix=", or ".join((*fitting, "make room", "choose another --out")))


def _warnings(recipe: Recipe, base: Base, adapters: tuple[Adapter, ...], pieces: Pieces) -> list[str]:
    found = []
    for adapter in adapters:
        trained_on = str(adapter.config.get("base_model_name_or_path") or "").rstrip("/").rsplit("/", 1)[-1]
        if trained_on and trained_on != base.checkpoint.name.rstrip("/").rsplit("/", 1)[-1]:
            found.append(f"{adapter.name} says it was trained on {trained_on!r}, and this base is {base.checkpoint.name!r}: shapes fit, but only you can know whether the weights do")
        if adapter.initial is not None:
            found.append(f"{adapter.name} was initialised from the base's own components; what that took out is put back from {adapter.initial.name!r}")
    if pieces.untied:
        found.append("the adapter changes one side of tied embeddings: the output holds both, and tie_word_embeddings becomes false")
    if pieces.vocabulary is not None:
        found.append(f"the adapter resizes the vocabulary: vocab_size becomes {pieces.vocabulary}")
    if pieces.layers is not None:
        found.append(f"the adapter replicates layers: the output has {len(pieces.layers)}, made from base layers {', '.join(map(str, pieces.layers))}")
    if unknown := known_settings(base.checkpoint.config)[1]:
        found.append(f"left out of config.json, as transformers knows no such settings of this architecture: {', '.join(_one_line(name) for name in unknown[:8])}" + (f" and {len(unknown) - 8} more" if len(unknown) > 8 else ""))
    if recipe.residual_base:
        found.append("--residual-base: taken at your word that this base is the one that the adapter's initialisation left behind")
    return found


def _one_line(name: str) -> str:
    """A stranger's word: no line of its own, no page."""
    return (name if name.isprintable() else ascii(name)[1:-1])[:80]


def describe_plan(found: MergePlan) -> str:
    """For people, several lines."""
    recipe = found.recipe
    target = {"gptq": f"gptq, {recipe.bits} bits, group size {recipe.group_size}, {'symmetric' if recipe.symmetric else 'asymmetric'}", "nf4": "nf4 (bitsandbytes)"}.get(recipe.format, recipe.format)
    quick = ", quick (the separate model does not run beside it)" if recipe.quick else ""
    rows = [
        f"base      {found.checkpoint.name}: {_kind(found.base)}, {format_bytes(found.checkpoint.weight_bytes)}",
        f"adapter   {', '.join(_named(found))}: changes {len(found.changed)} tensors",
        f"output    {target}: {len(found.requantized)} linears requantized, about {format_bytes(found.bytes_out)}{quick}",
    ]
    return "\n".join(rows + [f"note      {warning}" for warning in found.warnings])


def _named(found: MergePlan) -> list[str]:
    return [adapter.name + (f" × {choice.weight:g}" if choice.weight != 1.0 else "") for adapter, choice in zip(found.adapters, found.recipe.choices, strict=True)]


def _kind(base: Base) -> str:
    packed = sum(base.encoded(name) for name in base.names)
    return f"{packed} quantized weights" if packed else "float"
