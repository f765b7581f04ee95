"""What is in this folder, and would it merge?"""

from __future__ import annotations

import re
from collections import Counter
from math import prod
from pathlib import Path
from typing import Any

from qmerge.adapters.adapter import Adapter, open_adapter
from qmerge.adapters.config import changed_base
from qmerge.errors import QmergeError
from qmerge.formats import FLOAT, QUANTIZING
from qmerge.formats.base import Base, open_base
from qmerge.formats.training import recipe_from_adapter
from qmerge.pipeline.skeleton import Skeleton, build_skeleton
from qmerge.store.adapter import CONFIG
from qmerge.store.checkpoint import Checkpoint, open_checkpoint
from qmerge.store.hub import is_hub_id, resolve, split_name
from qmerge.store.jsonfiles import read_object
from qmerge.types import known
from qmerge.units import format_bytes

FEATURES = ("use_rslora", "use_dora", "lora_bias", "rank_pattern", "alpha_pattern", "modules_to_save", "fan_in_fan_out", "trainable_token_indices", "target_parameters", "layer_replication",
            "use_bdlora", "use_qalora", "ensure_weight_tying")  # fmt: skip
SETTINGS = ("bits", "w_bit", "group_size", "q_group_size", "sym", "zero_point", "desc_act", "checkpoint_format", "version", "quant_type")
"""what a GPTQ or AWQ config says of its grid"""
SHOWN = 24
"""names of tensors that are listed where no model class explains them"""


def inspect(path: str) -> dict[str, Any]:
    """Facts about a base, an adapter (``folder#name`` picks one of several) or a folder of adapters.

    ``problems`` are sentences, empty where nothing stands in the way of merging; ``notes`` say what to know before. Headers and configs only.
    """
    place, wanted = split_name(path)
    name = wanted or ""
    folder = Path(resolve(place)[0])
    below = sorted(found.parent.name for found in folder.glob(f"*/{CONFIG}"))
    if name or (folder / CONFIG).exists():
        facts = _adapter(path, folder / name if (folder / name / CONFIG).exists() else folder)
        others = [one for one in below if one != name]
        return facts | ({"other_adapters_here": [f"{place}#{one}" for one in others]} if others else {})
    if below and not (folder / "config.json").exists():
        held = {one: _adapter(f"{place}#{one}", folder / one) for one in below}
        problems = [f"{one}: {problem}" for one, facts in held.items() for problem in facts.pop("problems")]
        return {"what": "adapters", "name": folder.name, "adapters": held, "choices": [f"{place}#{one}" for one in below], "problems": problems}
    return _base(open_checkpoint(place))


def _adapter(path: str, folder: Path) -> dict[str, Any]:
    facts: dict[str, Any] = {"what": "adapter"}
    problems: list[str] = []
    try:
        config = read_object(folder / CONFIG, what="the adapter's config")
    except QmergeError as problem:
        return facts | {"problems": [str(problem)]}
    adapter, notes = _opened(path, config, problems)
    if adapter is not None:
        facts |= {"name": adapter.name, "revision": adapter.revision}
    facts |= {"trained_on": _public(str(config.get("base_model_name_or_path") or "unknown")), "peft_type": str(config.get("peft_type")), "features": _features(config)}
    if adapter is not None:
        facts |= _contents(adapter)
    try:
        if (told := recipe_from_adapter(config, folder)) is not None:
            facts["trained_with"] = told.to_json()
    except QmergeError as problem:
        problems.append(str(problem))
    return facts | {"notes": notes, "problems": problems}


def _opened(path: str, config: dict[str, Any], problems: list[str]) -> tuple[Adapter | None, list[str]]:
    """The adapter, or None where it is refused; what stands in the way goes to ``problems``."""
    init = changed_base(config) if config.get("peft_type") == "LORA" else None
    notes: list[str] = []
    try:
        if init is None:
            return open_adapter(path), notes
        try:
            adapter = open_adapter(path)
            notes.append(f"its initialisation ({init}) changed the base; what that took out is put back from {adapter.initial.name}" if adapter.initial else f"initialised by {init}")
            return adapter, notes
        except QmergeError:
            adapter = open_adapter(path, residual_base=True)
            problems.append(f"its initialisation ({init}) changed the base: give the base that it left behind (--residual-base), or the adapter before training beside it")
            return adapter, notes
    except QmergeError as problem:
        problems.append(str(problem))
        return None, notes


def _features(config: dict[str, Any]) -> list[str]:
    init = config.get("init_lora_weights", True)
    found = sorted(key for key in FEATURES if config.get(key))
    found += [f"bias={config['bias']}"] if config.get("bias") in ("all", "lora_only") else []
    return found + ([f"init_lora_weights={init}"] if isinstance(init, str) else [])


def _contents(adapter: Adapter) -> dict[str, Any]:
    facts: dict[str, Any] = {"tensors": len(adapter.specs), "dtypes": _dtypes(adapter.specs)}
    if adapter.kind == "LORA":
        ranks = Counter(pair.rank for pair in adapter.pairs.values())
        kinds = Counter(module.rsplit(".", 1)[-1] for module in adapter.pairs)
        tokens = sum(adapter.specs[claims.parts["tokens"]].shape[0] for claims in adapter.claims.modules.values() if "tokens" in claims.parts)
        facts |= {"linears": len(adapter.pairs), "by_kind": dict(sorted(kinds.items())), "ranks": {str(rank): count for rank, count in sorted(ranks.items())},
                  "scalings": sorted({pair.scaling for pair in adapter.pairs.values()}), "replaced_tensors": sorted(adapter.saved)}  # fmt: skip
        facts |= {"trained_tokens": tokens} if tokens else {}
    else:
        facts["merged_by"] = "PEFT's own layers, one linear at a time"
    return facts | {"bytes": adapter.weight_bytes}


def _public(place: str) -> str:
    """An id of the hub whole, of a folder its last name: no output names local folders."""
    return place if is_hub_id(place) else place.rstrip("/").rsplit("/", 1)[-1]


def _dtypes(specs: Any) -> dict[str, int]:
    return dict(sorted(Counter(spec.dtype for spec in specs.values()).items()))


def _base(checkpoint: Checkpoint) -> dict[str, Any]:
    problems: list[str] = []
    notes: list[str] = []
    facts: dict[str, Any] = {"what": "base", "name": checkpoint.name, "revision": checkpoint.revision, "model_type": checkpoint.config.get("model_type")}
    skeleton = _skeleton(checkpoint, notes)
    base = _opened_base(checkpoint, skeleton, problems)
    if base is not None:
        facts["recipe"] = _recipe(base)
        facts["quantized_weights"] = dict(sorted(Counter(base.quantized.values()).items()))
    if skeleton is not None:
        facts |= {"blocks": len(skeleton.blocks), "blocks_at": skeleton.blocks_name, "linears_in_blocks": len(skeleton.inside), "tied_embeddings": skeleton.tied}
    else:
        facts["tensor_names"] = _patterns(base.names if base is not None else checkpoint.specs)
    facts["writes"] = [*FLOAT, *(QUANTIZING if skeleton is not None else ())] if base is not None else []
    if base is not None:
        facts["parameters"] = _parameters(base, problems)
    facts |= {"tensors": len(checkpoint.specs), "dtypes": _dtypes(checkpoint.specs), "weight_files": len(checkpoint.files()), "bytes": checkpoint.weight_bytes}
    return facts | {"size": format_bytes(checkpoint.weight_bytes), "notes": notes, "problems": problems}


def _skeleton(checkpoint: Checkpoint, notes: list[str]) -> Skeleton | None:
    try:
        return build_skeleton(checkpoint)
    except QmergeError as problem:
        remote = " (the config asks for code of its own, which qmerge never runs)" if checkpoint.config.get("auto_map") else ""
        notes.append(f"{problem.what}{remote}: a float merge (--format bf16) works on the tensors alone, requantizing and measuring do not")
        return None


def _opened_base(checkpoint: Checkpoint, skeleton: Skeleton | None, problems: list[str]) -> Base | None:
    packed = checkpoint.config.get("quantization_config") or checkpoint.config.get("compression_config")
    try:
        return open_base(checkpoint, on="dequantized" if packed else "original", recipe=None, linears=skeleton.linears if skeleton is not None else None)
    except QmergeError as problem:
        problems.append(str(problem))
        return None


def _recipe(base: Base) -> dict[str, Any]:
    if not base.quantized:
        return {"kind": "float", "needs": "--nf4-recipe double|single|FILE, or --on original"}
    settings = base.checkpoint.config.get("quantization_config") or {}
    first = next((name for name in base.quantized if base.is_4bit(name)), None)
    if first is not None:
        state = known(base.four_bit(first).state)
        return {"kind": state.quant_type, "block_size": state.block_size, "double_quantization": state.nested, "quantized_from": state.dtype}
    kind = next(iter(base.quantized.values()))
    return {"kind": kind} | {key: settings[key] for key in SETTINGS if kind != "int8" and key in settings}


def _parameters(base: Base, problems: list[str]) -> int | None:
    try:
        return sum(prod(base.shape(name)) for name in base.names)
    except QmergeError as problem:
        problems.append(str(problem))
        return None


def _patterns(names: Any) -> list[str]:
    """Names with their numbers as ``*``, each with how many it stands for."""
    counts = Counter(re.sub(r"(?<=\.)\d+(?=\.)", "*", name) for name in names)
    rows = [f"{pattern} ×{count}" if count > 1 else pattern for pattern, count in counts.items()]
    return rows[:SHOWN] + ([f"… and {len(rows) - SHOWN} more"] if len(rows) > SHOWN else [])
