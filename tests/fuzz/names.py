"""Do a file's names of tensors, related to a model by transformers' own rules, always end in regions, or in a refusal?

An input is a JSON object: name of a tensor -> its shape. The model is a tiny Mixtral without weights, whose experts transformers fuses.
"""

from __future__ import annotations

import json
from random import Random

import torch
from transformers import MixtralConfig, MixtralForCausalLM

from fuzz import bending
from fuzz.places import Broken, Seeds, refused
from qmerge.adapters.names import relate
from qmerge.errors import QmergeError

_SIZES = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 32, "num_local_experts": 2, "num_experts_per_tok": 1}
with torch.device("meta"):
    _MODEL = MixtralForCausalLM(MixtralConfig(**_SIZES))
_TARGETS = {name: list(tensor.shape) for name, tensor in _MODEL.state_dict().items()}
_EXPERTS = {f"model.layers.0.block_sparse_moe.experts.{expert}.{part}.weight": shape for expert in (0, 1) for part, shape in (("w1", [16, 8]), ("w2", [8, 16]), ("w3", [16, 8]))}
_PLAIN = {name: shape for name, shape in _TARGETS.items() if "experts" not in name}
WORDS = (*_TARGETS, *_EXPERTS, "model.layers.0.block_sparse_moe.gate.weight", "model.", "layers.", ".experts.", "block_sparse_moe", "gate_up_proj", "weight", "bias", ".0.", ".1.", "model.layers.01.input_layernorm.weight")
MAX_LEN = 3000


def seeds() -> Seeds:
    accepted, lacking = (_PLAIN | _EXPERTS, _TARGETS), (_EXPERTS, {"lm_head.weight": [32, 8]}, {})
    return Seeds(tuple(json.dumps(value).encode() for value in accepted), tuple(json.dumps(value).encode() for value in lacking))


def check(data: bytes) -> bool:
    try:
        rows = json.loads(data)
    except (ValueError, RecursionError):
        return False
    if not isinstance(rows, dict):
        return False
    # what the header reader lets through: printable names, shapes of sizes
    shapes = {name: tuple(shape) for name, shape in rows.items() if name.isprintable() and name and isinstance(shape, list) and len(shape) < 65 and all(type(size) is int and 0 <= size < 1 << 20 for size in shape)}
    found = relate(_MODEL, shapes)
    whole = True
    for name in shapes:
        found.resolve(name)
        try:
            regions = found.regions_of_disk(name)
        except QmergeError as error:
            whole = refused(error)
            continue
        if name in found.unused and regions:
            raise Broken(f"{name} is unused and feeds {regions}")
    found.resolve("no.such.name")
    if "no.such.name" not in shapes:
        try:
            found.regions_of_disk("no.such.name")
        except QmergeError as error:
            refused(error)
        else:
            raise Broken("regions of a tensor that is not in the file")
    for parameter in _TARGETS:
        try:
            regions = found.regions_of_parameter(parameter)
        except QmergeError as error:
            whole = refused(error)
            continue
        if not all(region.parameter == parameter and region.disk in shapes for region in regions):
            raise Broken(f"{parameter}: {regions}")
    return whole


def mutate(data: bytes, random: Random) -> bytes:
    text = bending.bend_text(data.decode("utf-8", "replace"), random, WORDS)
    return bending.bend_bytes(data, random, WORDS) if text is None or random.random() < 0.02 else text.encode("utf-8", "surrogatepass")
