"""What is in this folder, and would it merge?"""

from __future__ import annotations

from collections import Counter
from math import prod
from pathlib import Path
from typing import Any

from qmerge.adapters.adapter import open_adapter
from qmerge.adapters.config import changed_base
from qmerge.errors import QmergeError
from qmerge.formats import nf4 as nf4_format
from qmerge.formats.base import Base
from qmerge.pipeline.skeleton import build_skeleton
from qmerge.store.checkpoint import Checkpoint, open_checkpoint
from qmerge.store.hub import resolve
from qmerge.units import format_bytes

FEATURES = ("use_rslora", "use_dora", "lora_bias", "rank_pattern", "alpha_pattern", "modules_to_save", "fan_in_fan_out", "trainable_token_indices", "target_parameters", "layer_replication", "use_bdlora")


def inspect(path: str) -> dict[str, Any]:
    """Facts about a base or an adapter; ``problems`` are sentences, empty where nothing stands in the way."""
    folder, _, _ = resolve(path)
    return _adapter(path) if (Path(folder) / "adapter_config.json").exists() else _base(open_checkpoint(path))


def _adapter(path: str) -> dict[str, Any]:
    try:
        adapter = open_adapter(path, residual_base=True)
    except QmergeError as problem:
        return {"what": "adapter", "problems": [str(problem)]}
    config = adapter.config
    ranks = Counter(pair.rank for pair in adapter.pairs.values())
    kinds = Counter(module.rsplit(".", 1)[-1] for module in adapter.pairs)
    return {
        "what": "adapter",
        "name": adapter.name,
        "revision": adapter.revision,
        "trained_on": str(config.get("base_model_name_or_path") or "unknown").rstrip("/").rsplit("/", 1)[-1],
        "linears": len(adapter.pairs),
        "by_kind": dict(sorted(kinds.items())),
        "ranks": {str(rank): count for rank, count in sorted(ranks.items())},
        "scalings": sorted({pair.scaling for pair in adapter.pairs.values()}),
        "peft_type": adapter.kind,
        "features": sorted(key for key in FEATURES if config.get(key)) + ([f"bias={config['bias']}"] if config.get("bias") in ("all", "lora_only") else []),
        "replaced_tensors": sorted(adapter.saved),
        "bytes": adapter.weight_bytes,
        "problems": [f"its initialisation ({init}) changed the base: give the base that it left behind (--residual-base), or the adapter before training beside it"] if (init := changed_base(config)) else [],
    }


def _base(checkpoint: Checkpoint) -> dict[str, Any]:
    problems: list[str] = []
    facts: dict[str, Any] = {"what": "base", "name": checkpoint.name, "revision": checkpoint.revision, "model_type": checkpoint.config.get("model_type")}
    quantized = nf4_format.find_quantized(checkpoint.specs)
    base = Base(checkpoint, quantized, None, frozenset(), frozenset())
    method = (checkpoint.config.get("quantization_config") or {}).get("quant_method")
    if quantized:
        first = base.four_bit(next(iter(quantized)))
        facts["recipe"] = {"kind": first.state.quant_type, "block_size": first.state.block_size, "double_quantization": first.state.nested, "quantized_from": first.state.dtype}
        if set(quantized.values()) != {"nf4"}:
            problems.append("it holds 4-bit weights other than NF4, which this version does not read")
    elif method:
        facts["recipe"] = {"kind": method}
        problems.append(f"it is quantized by {method}; this version reads bitsandbytes NF4 and float bases")
    else:
        facts["recipe"] = {"kind": "float", "needs": "--nf4-recipe double|single|FILE, or --on original"}
    try:
        skeleton = build_skeleton(checkpoint)
        facts |= {"blocks": len(skeleton.blocks), "blocks_at": skeleton.blocks_name, "linears_in_blocks": len(skeleton.inside), "tied_embeddings": skeleton.tied}
    except QmergeError as problem:
        problems.append(str(problem))
    facts |= {"linears_in_4_bits": len(quantized), "parameters": sum(prod(base.shape(name)) for name in base.names), "tensors": len(checkpoint.specs)}
    facts |= {"weight_files": len(checkpoint.files()), "bytes": checkpoint.weight_bytes, "size": format_bytes(checkpoint.weight_bytes), "problems": problems}
    return facts
