"""Which LoRA configs can be merged, and with what rank and scaling per module?

Every field of PEFT's LoraConfig (0.21.2) is in exactly one of the tables below. A field that is in none of them is newer than
this file; it is refused as soon as it is set to something, because nobody here knows what it does to the weights.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import Any

from qmerge.adapters.patterns import check_compiles, check_pattern
from qmerge.errors import Refused

# no influence on merged weights: where the adapter came from, how it was trained, which modules were chosen (the file says which).
# MonteCLoRA samples and VeLoRA compresses while training only; both answer as plain LoRA afterwards.
HARMLESS = frozenset({
    "base_model_name_or_path", "revision", "task_type", "inference_mode", "auto_mapping", "peft_version", "lora_dropout",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "megatron_config", "megatron_core",
    "runtime_config", "eva_config", "corda_config", "lora_ga_config", "monteclora_config", "velora_config",
})  # fmt: skip
# what the merge reads; fan_in_fan_out says how the base stores its weight, A and B keep their shapes
USED = frozenset({
    "peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "modules_to_save", "init_lora_weights", "fan_in_fan_out", "bias",
    "use_dora", "lora_bias", "trainable_token_indices", "layer_replication", "target_parameters", "ensure_weight_tying", "use_bdlora", "use_qalora",
    "qalora_group_size", "loftq_config",
})  # fmt: skip
# field -> why it is not merged, for people. Refused unless None, False or empty.
REFUSED = {
    "alora_invocation_tokens": "activated LoRA, which cannot be merged: it applies to some tokens only",
    "arrow_config": "Arrow routing between adapters, which cannot be merged: each token takes other adapters",
    "kasa_config": "KaSA, which cuts the smallest singular components out of the base before it adds its delta: on the base as it is, that is another model",
}
# These initialise A and B only (mica: B from the base's minor components, base untouched). All others subtract from the base.
MOST_LAYERS = 10_000
INIT_KEEPS_BASE = frozenset({"gaussian", "eva", "orthogonal", "mica"})


def check_config(config: dict[str, Any], where: str) -> None:
    """Refused, naming the field, where merging is not defined for what this LoRA config asks for, or a value is malformed."""
    for name, value in config.items():
        if name in HARMLESS or name in USED or not value:
            continue
        what = REFUSED.get(name)
        raise Refused(
            f"The adapter uses {what}." if what else f"The adapter's config sets {name!r}, which qmerge does not know.",
            where=where, expected=f"{name} unset", found=repr(value)[:120],
            fix="keep this adapter separate, or train one without it" if what else "if it cannot change the weights, remove it from the config",
        )  # fmt: skip
    if config.get("bias") not in (None, "none", "all", "lora_only"):
        raise Refused("The adapter's bias setting is malformed.", where=where, expected="bias: none, all or lora_only", found=repr(config["bias"])[:120])
    _check_kinds(config, where)
    check_choices(config, where)
    _check_token_indices(config.get("trainable_token_indices"), where)
    _check_replication(config.get("layer_replication"), where)
    if config.get("use_bdlora") and not isinstance(config["use_bdlora"], dict):
        raise Refused("use_bdlora is malformed.", where=where, expected="an object with nblocks", found=repr(config["use_bdlora"])[:120])


def check_choices(config: dict[str, Any], where: str) -> None:
    """Refused where a setting that says which modules were adapted is one that PEFT would match for ever."""
    for field in ("target_modules", "exclude_modules", "layers_pattern"):
        value = config.get(field)
        for pattern in [value] if isinstance(value, str) else value if field == "layers_pattern" and isinstance(value, list) else []:
            check_pattern(pattern, f"{field} in {where}")


def changed_base(config: dict[str, Any]) -> str | None:
    """The initialisation that left the adapter a changed base (PiSSA, OLoRA, LoftQ, …), or None where the base is as it was."""
    init = config.get("init_lora_weights", True)
    if init is None or isinstance(init, bool) or (isinstance(init, str) and init.lower() in INIT_KEEPS_BASE):
        return None
    return str(init)


def _check_token_indices(value: Any, where: str) -> None:
    tables = list(value.values()) if isinstance(value, dict) else [value or []]
    if all(isinstance(table, list) and all(isinstance(index, int) and not isinstance(index, bool) and index >= 0 for index in table) for table in tables):
        return
    raise Refused("trainable_token_indices is malformed.", where=where, expected="a list of token numbers, or one per module", found=repr(value)[:120], fix="correct adapter_config.json, or save the adapter again with PEFT")


def _check_replication(value: Any, where: str) -> None:
    spans = value or []
    if not isinstance(spans, list) or sum(span[1] - span[0] for span in spans if isinstance(span, list) and len(span) == 2 and all(isinstance(end, int) for end in span)) > MOST_LAYERS:
        raise Refused("layer_replication is malformed.", where=where, expected=f"[[start, end], …], at most {MOST_LAYERS} layers", found=repr(value)[:120], fix="correct adapter_config.json, or save the adapter again with PEFT")
    for span in spans:
        if not (isinstance(span, (list, tuple)) and len(span) == 2 and all(isinstance(end, int) for end in span) and 0 <= span[0] < span[1] <= MOST_LAYERS):
            raise Refused("layer_replication is malformed.", where=where, expected="[[start, end], …]", found=repr(value)[:120], fix="correct adapter_config.json, or save the adapter again with PEFT")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -1e30 < value < 1e30


def _is_rank(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**31


def _check_kinds(config: dict[str, Any], where: str) -> None:
    """Refused unless ranks are positive integers, alphas are numbers, flags are flags and patterns compile."""
    if not _is_rank(config.get("r")):
        raise Refused("The adapter's rank is malformed.", where=where, expected="r: a positive integer", found=f"r: {config.get('r')!r}")
    if not _is_number(config.get("lora_alpha")):
        raise Refused("The adapter's alpha is malformed.", where=where, expected="lora_alpha: a number", found=f"lora_alpha: {config.get('lora_alpha')!r}")
    for flag in ("use_rslora", "fan_in_fan_out", "use_dora", "lora_bias", "use_qalora", "ensure_weight_tying"):
        if not isinstance(config.get(flag, False), (bool, type(None))):
            raise Refused("A flag of the adapter's config is malformed.", where=where, expected=f"{flag}: true or false", found=repr(config[flag]))
    for field, accepts in (("rank_pattern", _is_rank), ("alpha_pattern", _is_number)):
        table = config.get(field) or {}
        if not isinstance(table, dict):
            raise Refused("A pattern of the adapter's config is malformed.", where=where, expected=f"{field}: an object", found=repr(table)[:120])
        for pattern, value in table.items():
            if not accepts(value):
                raise Refused("A pattern of the adapter's config has a malformed value.", where=f"{field}[{pattern[:80]!r}] in {where}", found=repr(value)[:120], fix="correct adapter_config.json, or save the adapter again with PEFT")
            check_pattern(pattern, f"{field}[{pattern[:80]!r}] in {where}")
            check_compiles(_wrapped(pattern), f"{field}[{pattern[:80]!r}] in {where}")
    saved = config.get("modules_to_save") or []
    if not isinstance(saved, list) or not all(isinstance(name, str) and name for name in saved):
        raise Refused("modules_to_save is malformed.", where=where, expected="a list of module names", found=repr(saved)[:120])


def _wrapped(pattern: str) -> str:
    """As PEFT matches it. Not every expression may stand within another: global flags must come first."""
    return rf"(.*\.)?({pattern})$"


def matching_key(patterns: Iterable[str], module: str) -> str:
    """The first of ``patterns`` that matches ``module``, whole or from some dot on to its end; ``module`` itself when none does.

    PEFT's rule (``get_pattern_key``): ``matching_key(["q_proj"], "model.layers.0.q_proj") == "q_proj"``; the order of the file decides.
    """
    return next((pattern for pattern in patterns if re.match(_wrapped(pattern), module)), module)


def rank_and_scaling(config: dict[str, Any], module: str) -> tuple[int, float]:
    """``(rank, scaling)`` of ``module`` by a checked config: alpha / rank, or alpha / sqrt(rank) with rsLoRA (arXiv:2312.03732).

    ``rank_and_scaling({"r": 16, "lora_alpha": 32}, "q_proj") == (16, 2.0)``
    """
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    rank = ranks.get(matching_key(ranks, module), config["r"])
    alpha = alphas.get(matching_key(alphas, module), config["lora_alpha"])
    return rank, alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
