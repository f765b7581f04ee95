"""Which models does an evaluation compare, and how are they loaded?

Every arm comes through the loader that its users use, then becomes plain fp32 linears (``plain.py``). Arms: ``base`` (the NF4 base
alone), ``separate`` (base + adapter, the reference), ``merged`` (W + ΔW in fp32, in memory), candidates (folders on disk), and on
request ``rtn`` (merged, rounded back to NF4) and ``original`` (the adapter merged into the float base).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig

from qmerge.adapters.choices import AdapterSet
from qmerge.adapters.edits import Edit
from qmerge.errors import Refused, UsageProblem
from qmerge.extras import need_loader
from qmerge.quality.attach import as_set, attach
from qmerge.quality.loaders import from_pretrained, label, load_public, quantization_config, quantization_method
from qmerge.quality.merging import merge_in_memory, model_edits
from qmerge.quality.plain import dense_weights, make_plain, round_trip_nf4
from qmerge.quality.words import public
from qmerge.store.foreign import check_model_folder

NF4_DEFAULT: dict[str, Any] = {"block_size": 64, "double_quant": True, "dtype": None, "skip": (), "quant_type": "nf4"}
"""``dtype`` is what the float weights were cast to before they were rounded; None: as the file holds them. ``skip``: transformers' ``llm_int8_skip_modules``"""
PACKED = ("bitsandbytes", "gptq", "awq")
"""quantized bases that an adapter can be put on"""
MEASURED = ("none", *PACKED, "compressed-tensors")
"""how a checkpoint may be quantized that is measured"""


@dataclass
class Arm:
    """``kind`` is ``base``, ``separate``, ``merged``, ``rtn``, ``original`` or the quantization method of a candidate (``none``: float).

    ``nbytes`` counts weight files on disk; for arms that exist in memory only, what a checkpoint of them would take (``bytes_note`` says how).
    """

    name: str
    kind: str
    model: Any
    """transformers' or PEFT's"""
    nbytes: int | None
    path: str | None = None
    bytes_note: str | None = None
    edits: dict[str, Edit] | None = None
    """for the reference: what the adapter does to which parameter of the base"""
    loader: str | None = None
    """said where a checkpoint could not be loaded by transformers and another public loader read it"""


def load_base(base: str, *, on: str = "dequantized", nf4_recipe: dict[str, Any] | None = None) -> Arm:
    """Arm A. A quantized checkpoint through its public loader; a float one rounded to 4 bits while loading, as QLoRA training does, unless ``on`` is
    ``original``."""
    method = quantization_method(base)
    if method not in ("none", *PACKED):
        raise Refused("the base is quantized in a way that evaluation does not read", where=label(base),
                      expected=f"a float checkpoint or {', '.join(PACKED)}", found=method)
    if method != "none" or on == "original":
        model, loader = load_public(base, method)
        return Arm("base", "base", make_plain(model), weight_bytes(base), base, loader=loader)
    recipe = full_recipe(nf4_recipe)
    dtype = getattr(torch, recipe["dtype"]) if recipe["dtype"] else "auto"
    if recipe["block_size"] == 64:  # what transformers' configuration can express
        return Arm("base", "base", make_plain(from_pretrained(base, dtype=dtype, quantization_config=four_bit_config(recipe))), weight_bytes(base), base)
    model = make_plain(from_pretrained(base, dtype=dtype))
    return Arm("base", "base", _rounded(model, _quantizable(model, recipe), recipe), weight_bytes(base), base)


def four_bit_config(recipe: dict[str, Any], **options: Any) -> BitsAndBytesConfig:
    """transformers' configuration for a `full_recipe` of block size 64."""
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=recipe["quant_type"], bnb_4bit_use_double_quant=recipe["double_quant"],
                              llm_int8_skip_modules=list(recipe["skip"]) or None, **options)


def load_separate(base: str, adapter: str | AdapterSet, *, on: str = "dequantized", nf4_recipe: dict[str, Any] | None = None) -> Arm:
    """Arm B, the reference: PEFT's own loader on arm A."""
    below = load_base(base, on=on, nf4_recipe=nf4_recipe)
    opened, edits = as_set(adapter).open(), model_edits(below.model, as_set(adapter))
    size = None if below.nbytes is None else below.nbytes + sum(one.weight_bytes for one in opened)
    return Arm("separate", "separate", attach(below.model, adapter), size, str(opened[0].path), edits=edits)


def load_merged(base: str, adapter: str | AdapterSet, *, on: str = "dequantized", nf4_recipe: dict[str, Any] | None = None, original: str | None = None) -> Arm:
    """Arm C: W + ΔW in fp32. With ``on='original'`` and an NF4 base, W is the float base ``original``."""
    if on == "original" and quantization_method(base) != "none":
        if original is None:
            raise UsageProblem("merging into the original float base needs the base", expected="--original PATH", found="none")
        below = load_base(original, on="original")
    else:
        below = load_base(base, on=on, nf4_recipe=nf4_recipe)
    merge_in_memory(below.model, adapter)
    return Arm("merged", "merged", below.model, 2 * _elements(below.model), None, "as a bf16 checkpoint")


def load_rtn(base: str, adapter: str | AdapterSet, *, on: str = "dequantized", nf4_recipe: dict[str, Any] | None = None, original: str | None = None) -> Arm:
    """Arm F: arm C rounded to the nearest NF4 value, as ``merge_and_unload`` on a 4-bit model does."""
    merged = load_merged(base, adapter, on=on, nf4_recipe=nf4_recipe, original=original)
    recipe = full_recipe(nf4_recipe)
    names = _quantizable(merged.model, recipe)
    if quantization_method(base) == "bitsandbytes" and not quantization_config(base).get("load_in_8bit"):
        names, layout = nf4_layout(base)
        recipe = recipe | layout
    rounded = _rounded(merged.model, names, recipe)
    small = sum(w.numel() for n, w in dense_weights(rounded).items() if n in names)
    per_block = 1 + 4 / 256 if recipe["double_quant"] else 4
    size = int(small / 2 + small / recipe["block_size"] * per_block) + 2 * (_elements(rounded) - small)
    return Arm("rtn", "rtn", rounded, size, None, "as an NF4 checkpoint, the rest bf16")


def load_original(original: str, adapter: str | AdapterSet) -> Arm:
    """Arm E: the adapter merged into a float base that it was not trained on."""
    below = load_base(original, on="original")
    merge_in_memory(below.model, adapter)
    return Arm("original", "original", below.model, 2 * _elements(below.model), original, "as a bf16 checkpoint")


def load_candidate(name: str, path: str) -> Arm:
    """Arm D: a finished checkpoint, through the loader that its config names."""
    method = check_method(path)
    model, loader = load_public(path, method)
    return Arm(name, method, make_plain(model), weight_bytes(path), path, loader=public(loader) if loader else None)


def check_method(path: str) -> str:
    """How a checkpoint is quantized (``none``: float). Refused for a folder that is no checkpoint or that no library should open, and for what no loader here reads; reads
    headers and configs alone."""
    method = quantization_method(path)
    check_model_folder(path)
    if method not in MEASURED:
        raise Refused("evaluation does not know this quantization", where=label(path), expected=", ".join(MEASURED), found=method)
    need_loader(method)
    return method


def grow(model: Any, rows: int) -> None:
    """Embeddings of ``rows`` tokens, the new ones at the mean of the old: what a model without the adapter knows of tokens that the adapter brought."""
    before = model.get_input_embeddings().weight.shape[0]
    model.resize_token_embeddings(rows, mean_resizing=False)
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        if module is not None:
            module.weight.data[before:] = module.weight.data[:before].mean(0)
            if getattr(module, "bias", None) is not None:
                module.bias.data[before:] = module.bias.data[:before].mean()
            module.requires_grad_(False)


def nf4_layout(base: str) -> tuple[set[str], dict[str, Any]]:
    """Which linears an NF4 checkpoint rounds, and its ``block_size``, ``double_quant`` and ``quant_type``: asked of the loaded modules, for its config does
    not hold them all."""
    states = {}
    for name, module in from_pretrained(base).named_modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is not None:
            states[name] = {"block_size": int(state.blocksize), "double_quant": bool(state.nested), "quant_type": state.quant_type}
    if not states:
        raise Refused("the base says NF4 and no linear of it is", where=label(base), expected="Linear4bit modules", found="none")
    return set(states), next(iter(states.values()))


def weight_bytes(path: str) -> int | None:
    folder = Path(path)
    if not folder.is_dir():
        return None
    files = [f for pattern in ("*.safetensors", "pytorch_model*.bin", "adapter_model.bin") for f in folder.glob(pattern)]
    return sum(f.stat().st_size for f in files)


def full_recipe(recipe: dict[str, Any] | None) -> dict[str, Any]:
    """``recipe`` with the defaults filled in; ``UsageProblem`` for an unknown key or value."""
    given = recipe or {}
    dtypes = (None, "float32", "bfloat16", "float16")
    wrong = [k for k in given if k not in NF4_DEFAULT] + ([] if given.get("dtype") in dtypes else [f"dtype {given['dtype']!r}"])
    if wrong:
        raise UsageProblem("the NF4 recipe is malformed", expected=f"{', '.join(NF4_DEFAULT)}; dtype one of {dtypes}", found=", ".join(wrong))
    return NF4_DEFAULT | given


def _quantizable(model: Any, recipe: dict[str, Any]) -> set[str]:
    """What bitsandbytes rounds in a float model: every linear but the output head, or but those that ``skip`` names by transformers' rule."""
    from transformers.quantizers.quantizers_utils import should_convert_module

    skip, head = list(recipe["skip"]), model.get_output_embeddings()
    return {n for n in dense_weights(model) if (should_convert_module(n, skip) if skip else model.get_submodule(n) is not head)}


def _rounded(model: nn.Module, names: set[str], recipe: dict[str, Any]) -> nn.Module:
    for name, weight in dense_weights(model).items():
        if name in names:
            weight.copy_(round_trip_nf4(weight, recipe["block_size"], recipe["double_quant"], recipe["quant_type"]))
    return model


def _elements(model: nn.Module) -> int:
    return sum(p.numel() for p in {id(p): p for p in model.parameters()}.values())
