"""Which tensors does the merged model consist of, from which tensor of the base does each start, and what does the adapter do to it?

Every base tensor ends in the output once (layer replication and untied heads are named), every edit lands on exactly one tensor, or the plan refuses.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from qmerge.adapters.edits import Edit
from qmerge.adapters.regions import Region
from qmerge.adapters.tying import Both, head_edit, head_follows
from qmerge.errors import Refused
from qmerge.formats.base import Base
from qmerge.pipeline.skeleton import Skeleton
from qmerge.store.headers import TORCH_DTYPES
from qmerge.types import known

_LAYER = re.compile(r"((?:.*\.)?(?:layers|layer|h|blocks))\.(\d+)\.(.+)")


@dataclass(frozen=True)
class Piece:
    """One tensor of the merged model. ``shape`` is ``[out, in]`` for linears. ``source``: the base tensor that it starts from, None where it comes from the adapter alone.
    ``cut``: where it lies in that tensor, where it is one expert's part of it."""

    name: str
    source: str | None
    shape: tuple[int, ...]
    edit: Edit | None = None
    cut: Region | None = None


@dataclass(frozen=True)
class Spelling:
    """How the output spells the module tree. ``sources``: output name -> base tensor. ``cuts``: output name -> the part of that tensor that it is, where it is not all of it.
    ``made_of``: parameter -> the output tensors that it is made of, where that is not just one of its own name."""

    sources: Mapping[str, str]
    cuts: Mapping[str, Region] = field(default_factory=dict)
    made_of: Mapping[str, tuple[tuple[str, Region], ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Pieces:
    """``table``: output name -> piece. ``made_of`` as in `Spelling`. ``untied``: the head that no longer shares its tensor with the embedding. ``vocabulary``: the new number of rows, where it
    changed. ``layers``: for replicated layers, the base layer of each output layer."""

    table: dict[str, Piece]
    untied: str | None = None
    vocabulary: int | None = None
    layers: tuple[int, ...] | None = None
    notes: tuple[str, ...] = field(default_factory=tuple)
    made_of: Mapping[str, tuple[tuple[str, Region], ...]] = field(default_factory=dict)

    @property
    def edited(self) -> tuple[str, ...]:
        return tuple(name for name, piece in self.table.items() if piece.edit is not None)


def make_pieces(base: Base, edits: Mapping[str, Edit], configs: Iterable[Mapping[str, Any]], skeleton: Skeleton | None, where: str, spelling: Spelling | None = None) -> Pieces:
    """``edits`` are by output name. ``spelling``: None where output and base spell all alike. ``configs`` of all adapters. Raises Refused, naming the adapter's tensor."""
    spelling = spelling or Spelling({name: name for name in base.names})
    sources, cuts, configs = dict(spelling.sources), spelling.cuts, list(configs)
    layers = _replicated(sources, configs, where)
    if layers is not None:
        if spelling.made_of:
            raise Refused("The adapter replicates layers whose experts the output holds one by one.", where=where, expected="a format that keeps them fused", found="layer_replication", fix="use --format bf16")
        sources = _replicate(sources, layers)
    sources, edits, untied = _tied(sources, dict(edits), configs, skeleton)
    shapes = {name: cuts[name].shape if name in cuts else base.shape(source) for name, source in sources.items()}
    vocabulary = _vocabulary(shapes, edits, skeleton, where)
    for name, edit in edits.items():
        _check_edit(base, name, edit, sources, shapes, vocabulary, skeleton, where)
    table = {name: Piece(name, sources[name], edits[name].shape if name in edits else shapes[name], edits.get(name), cuts.get(name)) for name in sorted(sources)}
    return Pieces(table, untied, vocabulary, layers, made_of=spelling.made_of)


def _replicated(sources: Mapping[str, str], configs: list[Mapping[str, Any]], where: str) -> tuple[int, ...] | None:
    spans = next((config["layer_replication"] for config in configs if config.get("layer_replication")), None)
    if spans is None:
        return None
    if len(configs) > 1:
        raise Refused("An adapter replicates layers, and others are to be merged beside it.", where=where, expected="one adapter", found=f"{len(configs)}", fix="merge it alone")
    count = 1 + max((int(match[2]) for name in sources if (match := _LAYER.fullmatch(name))), default=-1)
    layers = tuple(index for start, stop in spans for index in range(start, stop))
    if not layers or max(layers) >= count:
        raise Refused("The adapter replicates layers that this base lacks.", where=where, expected=f"layers below {count}", found=f"layer_replication {spans}", fix="give the base that it was trained on: qmerge inspect ADAPTER names it")
    return layers


def _replicate(sources: Mapping[str, str], layers: tuple[int, ...]) -> dict[str, str]:
    """The new stack's names: layer ``j`` starts from base layer ``layers[j]``."""
    found = {}
    by_layer: dict[int, list[tuple[str, str, str]]] = {}
    for name, source in sources.items():
        if match := _LAYER.fullmatch(name):
            by_layer.setdefault(int(match[2]), []).append((match[1], match[3], source))
        else:
            found[name] = source
    for number, layer in enumerate(layers):
        found |= {f"{stack}.{number}.{rest}": source for stack, rest, source in by_layer[layer]}
    return found


def _tied(sources: dict[str, str], edits: dict[str, Edit], configs: list[Mapping[str, Any]], skeleton: Skeleton | None) -> tuple[dict[str, str], dict[str, Edit], str | None]:
    """A head tied to the embedding: does it follow the embedding's edit, or does it become a tensor of its own?"""
    entrance, head = (None, None) if skeleton is None or not skeleton.tied else (skeleton.input_embedding, skeleton.output_embedding)
    if entrance is None or head is None or head == entrance:
        return sources, edits, None
    first, second = edits.get(entrance), edits.get(head)
    stored = head in sources
    if first is None and second is None:
        return sources, edits, None
    if head_follows(entrance, first, second, configs):
        if second is not None:  # one and the same, so one of them goes into the tensor, and both are consumed
            edits[entrance] = first = Both(known(first), second.keys)
        edits.pop(head, None)
        if stored:
            edits[head] = known(first)
        return sources, edits, None
    if (own := head_edit(first, second)) is not None:
        edits[head] = own
    return (sources if stored else sources | {head: sources[entrance]}), edits, head


def _vocabulary(shapes: Mapping[str, tuple[int, ...]], edits: Mapping[str, Edit], skeleton: Skeleton | None, where: str) -> int | None:
    """The new number of tokens, where the adapter brings an embedding or head of another height."""
    if skeleton is None:
        return None
    ends = [name for name in (skeleton.input_embedding, skeleton.output_embedding) if name is not None and name in shapes]
    rows = {name: edits[name].shape[0] if name in edits else shapes[name][0] for name in ends}
    if all(rows[name] == shapes[name][0] for name in ends):
        return None
    if len(set(rows.values())) > 1:
        raise Refused("The adapter resizes the vocabulary on one side only.", where=where, expected="embedding and head of one height", found=", ".join(f"{name}: {count}" for name, count in rows.items()),
                      fix="save both with the adapter: PEFT's save_embedding_layers=True")
    return next(iter(rows.values()))


def _check_edit(
    base: Base, name: str, edit: Edit, sources: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]], vocabulary: int | None, skeleton: Skeleton | None, where: str
) -> None:
    tensor = f"{where}: {', '.join(edit.keys[:3])}"
    if name not in sources:
        raise Refused("the adapter was made for another base: it changes a tensor that this base lacks", where=tensor, expected=f"{name} in {base.checkpoint.name}", found="none", fix="qmerge inspect ADAPTER names the base that it was trained on: give that one")
    ends = (skeleton.input_embedding, skeleton.output_embedding) if skeleton else ()
    resized = vocabulary is not None and name in ends and edit.shape[1:] == shapes[name][1:]
    if edit.shape != shapes[name] and not resized:
        raise Refused("the adapter was made for another base: the shapes differ", where=tensor, expected=f"{list(shapes[name])} as {name} in {base.checkpoint.name}", found=str(list(edit.shape)), fix="qmerge inspect ADAPTER names the base that it was trained on: give that one")
    if not edit.needs_base and base.encoded(sources[name]):
        raise Refused("the adapter replaces a tensor that the base holds quantized", where=tensor, expected="a float tensor", found=f"{name}, quantized",
                      fix="train modules_to_save on float modules (PEFT cannot save a quantized one either)")


def expanded_config(config: Mapping[str, Any], pieces: Pieces) -> dict[str, Any]:
    """The base's config with what the adapter changed: number of tokens, layers, tying."""
    found = dict(config)
    inner = next((key for key in ("text_config", "llm_config", "language_config") if isinstance(found.get(key), dict)), None)
    target = dict(found[inner]) if inner else found
    if pieces.vocabulary is not None:
        (target if "vocab_size" in target or not inner else found)["vocab_size"] = pieces.vocabulary
    if pieces.layers is not None:
        key = next((key for key in ("num_hidden_layers", "n_layer", "num_layers") if key in target), "num_hidden_layers")
        before = target.get(key)
        target |= {name: [value[layer] for layer in pieces.layers] for name, value in target.items() if isinstance(value, list) and len(value) == before and name != "architectures"}
        target[key] = len(pieces.layers)
    if inner:
        found[inner] = target
    if pieces.untied:
        found["tie_word_embeddings"] = False
        if inner:
            found[inner] = target | {"tie_word_embeddings": False}
    return found


def check_floats(base: Base, pieces: Pieces) -> None:
    """Refused where an adapter changes a weight that is stored as whole numbers, or in 8 bits with a scale beside it, without a quantization that is read here: the sum would be cut to
    whole numbers, or be of values that nothing has multiplied by their scale."""
    specs = base.checkpoint.specs
    for name in pieces.edited:
        source = pieces.table[name].source
        if source is None or base.encoded(source) or source not in specs:
            continue
        stem, dtype = source.removesuffix("weight"), specs[source].dtype
        scale = next((other for other in specs if other != source and other.startswith(stem) and "scale" in other.removeprefix(stem)), None) if dtype.startswith("F8") else None
        if scale is None and TORCH_DTYPES[dtype].is_floating_point:
            continue
        raise Refused("an adapter changes a weight that is stored in a way that qmerge does not decode", where=source, expected="floating-point values, or a quantization that the config names and qmerge reads",
                      found=f"{dtype}" + (f", with {scale} beside it" if scale else ""), fix="give the float base, or one quantized with bitsandbytes, GPTQ or AWQ")
