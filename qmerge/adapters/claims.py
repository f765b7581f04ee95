"""Which tensor of an adapter file belongs to which module, and as what?

Keys are PEFT's: ``base_model.model.<module>.lora_A.weight`` and so on. Marks that wrappers leave in names (``torch.compile``, FSDP, activation checkpointing, as
Axolotl and others save them) are taken off. Each tensor is claimed exactly once, or the adapter is refused by that tensor's name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from qmerge.errors import Refused
from qmerge.types import TensorSpec

PREFIX = "base_model.model."
EMBEDDINGS = ("embed_tokens", "lm_head", "wte", "embed_in", "embed_out", "word_embeddings", "tok_embeddings")
"""last names of modules that PEFT saves unasked when the vocabulary was resized or the embedding has a LoRA"""
# PEFT lists both names for these tasks, whichever of them the model has
_HEADS = {"SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score")}
_FLOATS = ("F16", "BF16", "F32", "F64")
_WRAPPERS = re.compile(r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_PART = re.compile(r"(?P<module>.+?)\.(?P<kind>lora_(?:A|B|embedding_A|embedding_B|magnitude_vector|diag|velora_embed|monteclora_sampler))(?:\.(?P<tail>.+))?")
_TOKENS = re.compile(r"(?P<module>.+)\.token_adapter\.trainable_tokens_delta(?:\.(?P<adapter>[^.]+))?")
_SAVED = re.compile(r"(?P<module>.+?)\.modules_to_save(?:\.(?P<adapter>[^.]+))?\.(?P<leaf>weight|bias)")
_BASE = re.compile(r"(?P<module>.+?)(?:\.token_adapter)?\.base_layer\.(?P<leaf>weight|bias)")
_COPY = re.compile(r"(?P<module>.+)\.(?:original_module|modules_to_save)\.(?P<leaf>weight|bias)")
_TRAINING_ONLY = ("lora_velora_embed", "lora_monteclora_sampler")


@dataclass
class ModuleClaims:
    """What the file holds for one module. ``parts``: ``lora_A``, ``lora_B``, ``lora_B.bias``, ``lora_embedding_A``, ``magnitude``, ``base.weight``, ``base.bias``,
    ``tokens`` -> key. ``idle``: keys of training-only tensors, which the answer does not depend on."""

    parts: dict[str, str] = field(default_factory=dict)
    idle: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Claims:
    """``modules``: module -> its parts; ``saved``: parameter of the base -> the key that replaces it whole; ``others``: keys of adapters that were not asked for;
    ``copies``: keys of what the file holds once more, which PEFT's loader passes over."""

    modules: dict[str, ModuleClaims]
    saved: dict[str, str]
    others: tuple[str, ...] = ()
    copies: tuple[str, ...] = ()


def claim(specs: Mapping[str, TensorSpec], config: Mapping[str, Any], name: str, wanted: str | None = None) -> Claims:
    """Every tensor of ``specs`` in one place; ``wanted`` picks one of several adapters in one file. Refused for the first tensor that fits nowhere or twice."""
    modules: dict[str, ModuleClaims] = {}
    saved: dict[str, str] = {}
    names: set[str] = set()
    others: list[str] = []
    copies: list[str] = []
    plain = {_key(tensor) for tensor in specs}
    for tensor in sorted(specs):
        where = f"tensor {tensor!r} in {name}"
        if specs[tensor].dtype not in _FLOATS:
            raise Refused("An adapter tensor is not floating point.", where=where, expected=", ".join(_FLOATS), found=specs[tensor].dtype, fix="save the adapter in bf16, fp16 or fp32")
        key = _key(tensor)
        if not _WRAPPERS.sub("", tensor).startswith(PREFIX):
            raise Refused("An adapter tensor has a name that PEFT does not write.", where=where, expected=f"{PREFIX}…", fix="save the adapter again with PEFT: PeftModel.save_pretrained")
        if _is_copy(key, plain):
            copies.append(tensor)
            continue
        adapter = _place(key, tensor, config, where, wanted, modules, saved)
        if adapter:
            names.add(adapter)
        if adapter and wanted and adapter != wanted:
            others.append(tensor)
    if wanted and names and wanted not in names:
        raise Refused("The file holds no adapter of this name.", where=name, expected=", ".join(sorted(names)), found=wanted)
    if wanted is None and len(names) > 1:
        raise Refused("The file holds several adapters, and none was named.", where=name, expected=f"one of {', '.join(sorted(names))}", found="no name", fix="--adapter 'folder#name'")
    return Claims(dict(sorted(modules.items())), dict(sorted(saved.items())), tuple(others), tuple(copies))


def _key(tensor: str) -> str:
    return _WRAPPERS.sub("", tensor).removeprefix(PREFIX)


def _is_copy(key: str, plain: set[str]) -> bool:
    """With ``save_embedding_layers`` PEFT writes a saved module three times: as ``<module>.weight``, which its loader reads, as it was before training, and once more."""
    copy = _COPY.fullmatch(key)
    return copy is not None and f"{copy['module']}.{copy['leaf']}" in plain


def _place(key: str, tensor: str, config: Mapping[str, Any], where: str, wanted: str | None, modules: dict[str, ModuleClaims], saved: dict[str, str]) -> str | None:
    """Put one tensor where it belongs; returns the adapter's name inside the key, where it has one."""
    part, tokens = _PART.fullmatch(key), _TOKENS.fullmatch(key)
    if found := part or tokens:
        module = found["module"]
        slot, adapter = _slot(part, where) if part else ("tokens", found["adapter"])
        table: dict[str, str] = modules.setdefault(module, ModuleClaims()).parts if not (adapter and wanted and adapter != wanted) else {}
    elif (base := _BASE.fullmatch(key)) and _may_hold_base(base, config):
        slot, adapter, table = f"base.{base['leaf']}", None, modules.setdefault(base["module"], ModuleClaims()).parts
    else:
        slot, adapter, table = *_saved_parameter(key, config, where), saved
        table = {} if adapter and wanted and adapter != wanted else table
    if slot in _TRAINING_ONLY:
        modules[module].idle.append(tensor)
    elif slot in table:
        raise Refused("Two adapter tensors are for one parameter; the file seems to hold several adapters.", where=where, expected="one adapter, or one named: --adapter 'folder#name'",
                      found=table[slot])
    else:
        table[slot] = tensor
    return adapter


def _slot(part: re.Match[str], where: str) -> tuple[str, str | None]:
    """``(slot, adapter's name or None)`` of a LoRA tensor from what follows its kind."""
    kind, rest = part["kind"], (part["tail"] or "").split(".") if part["tail"] else []
    if kind in _TRAINING_ONLY:
        return kind, None
    leaf = rest.pop() if rest and rest[-1] in ("weight", "bias") else None
    misspelt = leaf is None and kind in ("lora_A", "lora_B")
    if len(rest) > 1 or misspelt or (leaf == "bias" and kind != "lora_B") or kind == "lora_diag":
        raise Refused("The adapter holds a kind of tensor that qmerge does not merge.", where=where, expected="the tensors of LoRA, DoRA, embedding LoRA or lora_bias",
                      fix="keep this adapter separate")
    slot = {"lora_magnitude_vector": "magnitude"}.get(kind, kind) + (".bias" if leaf == "bias" else "")
    return slot, rest[0] if rest else None


def _may_hold_base(match: re.Match[str], config: Mapping[str, Any]) -> bool:
    """PEFT saves the base of an embedding that has a LoRA, and the trained biases of adapted linears."""
    trains_biases = config.get("bias") in ("all", "lora_only")
    return match["module"].rpartition(".")[2] in EMBEDDINGS if match["leaf"] == "weight" else trains_biases


def _saved_parameter(key: str, config: Mapping[str, Any], where: str) -> tuple[str, str | None]:
    """The base parameter that a tensor which is no LoRA factor replaces (``"lm_head.weight"``), and an adapter's name; Refused when it is none."""
    listed = config.get("modules_to_save") or []
    match = _SAVED.fullmatch(key)
    parameter = f"{match['module']}.{match['leaf']}" if match else key
    module, _, leaf = parameter.rpartition(".")
    if re.search(r"(^|\.)(lora_\w+|base_layer|token_adapter|trainable_tokens_\w+|modules_to_save|original_module)(\.|$)", parameter):
        raise Refused("The adapter holds a kind of tensor that qmerge does not merge.", where=where,
                      expected="lora_A, lora_B, or a module in modules_to_save", fix="keep this adapter separate")
    parts = module.split(".")
    owners = [".".join(parts[:count]) for count in range(1, len(parts) + 1)]
    trained_bias = leaf == "bias" and config.get("bias") == "all"
    if leaf and (trained_bias or any(owner.endswith(tuple(listed)) for owner in owners) or (leaf == "weight" and parts[-1] in EMBEDDINGS)):
        return parameter, match["adapter"] if match else None
    raise Refused("An adapter tensor pairs with nothing: it is no LoRA factor and in no module of modules_to_save.", where=where,
                  expected="lora_A, lora_B, or a module of " + repr(listed), fix="save the adapter again with PEFT: PeftModel.save_pretrained")


def check_saved_complete(saved: Mapping[str, str], config: Mapping[str, Any], name: str) -> None:
    """Refused when a module of modules_to_save has no tensor in the file: merging would silently keep the base's."""
    heads = _HEADS.get(str(config.get("task_type")), ())
    for listed in config.get("modules_to_save") or []:
        if listed not in heads and not any(re.search(rf"{re.escape(listed)}(\.|$)", parameter) for parameter in saved):
            raise Refused("The adapter's config promises a saved module that the file does not hold.", where=name,
                          expected=f"tensors of {listed!r}", found="none", fix="the adapter was saved incompletely: save it again")
