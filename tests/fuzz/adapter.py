"""Does opening an adapter answer for any config and any names of tensors?

An input is adapter_config.json, a zero byte, and the header of adapter_model.safetensors.
"""

from __future__ import annotations

import json
import math
from random import Random

import peft  # noqa: F401  its import takes seconds, and would count as an input's

from fuzz import bending
from fuzz.header import file_of, laid_out
from fuzz.index import joined
from fuzz.places import Broken, Seeds, folder, refused
from qmerge.adapters.adapter import open_adapter
from qmerge.adapters.config import HARMLESS, REFUSED, USED
from qmerge.adapters.delegated_types import MERGED
from qmerge.errors import QmergeError
from qmerge.store.adapter import CONFIG, WEIGHTS

_Q, _K = "base_model.model.model.layers.0.self_attn.q_proj", "base_model.model.model.layers.1.self_attn.k_proj"
WORDS = (
    *sorted(HARMLESS | USED), *REFUSED, "LORA", *sorted(MERGED)[:12], "PREFIX_TUNING", "CAUSAL_LM", "pissa", "gaussian", "q_proj", "k_proj", "none", "all", "lora_only", f"{_Q}.lora_A.weight", f"{_Q}.lora_B.weight", f"{_Q}.lora_B.bias",
    f"{_Q}.lora_magnitude_vector", f"{_Q}.lora_A.default.weight", "base_model.model.model.embed_tokens.lora_embedding_A", "base_model.model.lm_head.weight", "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta",
    "base_model.model.lm_head.modules_to_save.default.weight", f"{_Q}.base_layer.weight", "_orig_mod.", "F32", "BF16", "dtype", "shape", "data_offsets", ".*q_proj", "^model.layers.(0|1).*", "layers.0.self_attn.q_proj",
)  # fmt: skip
MAX_LEN = 3072
_FOLDER = folder("adapter")


def _header(**shapes: list[int]) -> str:
    end, rows = 0, {}
    for name, shape in shapes.items():
        rows[name] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end + 4 * math.prod(shape)]}
        end += 4 * math.prod(shape)
    return json.dumps(rows)


def seeds() -> Seeds:
    plain = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", "bias": "none", "lora_dropout": 0.0, "inference_mode": True, "base_model_name_or_path": "org/base"}
    pair = {f"{_Q}.lora_A.weight": [2, 3], f"{_Q}.lora_B.weight": [3, 2]}
    second = {f"{_K}.lora_A.weight": [3, 2], f"{_K}.lora_B.weight": [2, 3]}
    saved = {"base_model.model.lm_head.weight": [2, 2]}
    everything = plain | {"rank_pattern": {"k_proj": 3}, "alpha_pattern": {"^model.layers.1.*": 5.5}, "use_rslora": True, "modules_to_save": ["lm_head"], "fan_in_fan_out": False, "init_lora_weights": "gaussian"}
    dora = plain | {"use_dora": True, "lora_bias": True}
    tokens = plain | {"trainable_token_indices": {"embed_tokens": [1, 2]}, "layer_replication": [[0, 1], [0, 2]]}
    other = {"peft_type": "LOHA", "r": 2, "alpha": 4, "target_modules": ["q_proj"]}
    patterns = [r"(a|a)" * 40, "q?" * 40 + "q" * 40, "(.*q){9}x", r"(\w+\.?)+!", ".*" * 9 + "x"]
    weights = _header(**pair)
    accepted = (
        joined(json.dumps(plain), weights),
        joined(json.dumps(everything), _header(**pair, **second, **saved)),
        joined(json.dumps(dora), _header(**pair, **{f"{_Q}.lora_magnitude_vector": [3], f"{_Q}.lora_B.bias": [3]})),
        joined(json.dumps(tokens), _header(**pair, **{"base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta": [2, 2]})),
        joined(json.dumps(plain), _header(**{name.replace("lora_A.", "lora_A.x.").replace("lora_B.", "lora_B.x."): shape for name, shape in pair.items()})),
        joined(json.dumps(other), _header(**{f"{_Q}.hada_w1_a": [2, 2]})),
    )
    many = _header(**{f"base_model.model.{'q' * 40}.{'a' * 40}.lora_{side}.weight": [2, 2] for side in "AB"})
    return Seeds(accepted, (*(joined(json.dumps(plain | {"rank_pattern": {pattern: 3}}), many) for pattern in patterns), b"{}", joined(json.dumps(plain), "{}")))


def check(data: bytes) -> bool:
    config, _, header = data.partition(b"\0")
    (_FOLDER / CONFIG).write_bytes(config)
    (_FOLDER / WEIGHTS).write_bytes(file_of(header, _claimed(header)))
    try:
        adapter = open_adapter(_FOLDER)
    except QmergeError as error:
        return refused(error)
    if adapter.kind != "LORA":
        return True
    used = {key for pair in adapter.pairs.values() for key in (pair.a, pair.b, pair.magnitude, pair.bias) if key} | set(adapter.saved.values()) | set(adapter.idle)
    used |= {key for module in adapter.claims.modules.values() for key in module.parts.values()}
    if used != set(adapter.specs):
        raise Broken(f"unclaimed {sorted(set(adapter.specs) ^ used)}")
    for pair in adapter.pairs.values():
        if not (isinstance(pair.rank, int) and pair.rank > 0 and math.isfinite(pair.scaling)):
            raise Broken(f"rank {pair.rank!r}, scaling {pair.scaling!r}")
        adapter.load_pair(pair.module)
    return True


def _claimed(header: bytes) -> int:
    found = [int(part.split(b"]")[0]) for part in header.split(b",")[1:] if part.split(b"]")[0].strip().isdigit()]
    return min(max(found, default=0), 2048)


def mutate(data: bytes, random: Random) -> bytes:
    config, _, header = data.partition(b"\0")
    if random.random() < 0.6:
        text = bending.bend_text(config.decode("utf-8", "replace"), random, WORDS)
        config = bending.bend_bytes(config, random, WORDS) if text is None or random.random() < 0.05 else text.encode("utf-8", "surrogatepass")
    else:
        text = bending.bend_text(header.decode("utf-8", "replace"), random, WORDS)
        header = bending.bend_bytes(header, random, WORDS) if text is None or random.random() < 0.05 else laid_out(text).encode("utf-8", "surrogatepass")
    return config.replace(b"\0", b"") + b"\0" + header
