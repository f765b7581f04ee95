"""Which adapter configs can be merged, and with what rank and scaling per module?

Every field of PEFT's LoraConfig (0.21.2) is in exactly one of the tables below. A field that is in none of them is newer than
this file; it is refused as soon as it is set to something, because nobody here knows what it does to the weights.
Left out: the arithmetic of the refused kinds (DoRA, biases, replicated layers, …), which `pipeline` may learn one by one.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import Any

from qmerge.errors import Refused

# no influence on merged weights: where the adapter came from, how it was trained, which modules were chosen (the file says which)
HARMLESS = frozenset({
    "base_model_name_or_path", "revision", "task_type", "inference_mode", "auto_mapping", "peft_version", "lora_dropout",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "megatron_config", "megatron_core",
    "runtime_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size",
})  # fmt: skip
# read by this file or by adapter.py; fan_in_fan_out says how the base stores its weight, A and B keep their shapes
USED = frozenset({
    "peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "modules_to_save", "init_lora_weights", "fan_in_fan_out", "bias",
})  # fmt: skip
# field -> what it is, for people. Refused unless None, False or empty.
REFUSED = {
    "use_dora": "DoRA (a magnitude vector beside the low-rank delta)",
    "lora_bias": "a bias on lora_B",
    "layer_replication": "replicated layers",
    "trainable_token_indices": "single trained token embeddings",
    "target_parameters": "LoRA on bare parameters (fused experts)",
    "alora_invocation_tokens": "activated LoRA, which cannot be merged: it applies to some tokens only",
    "arrow_config": "Arrow routing between adapters, which cannot be merged",
    "use_qalora": "QALoRA (pooled inputs)",
    "use_bdlora": "block-diagonal LoRA",
    "kasa_config": "KaSA (truncates the base weight)",
    "monteclora_config": "MonteCLoRA (sampled adapter weights)",
    "velora_config": "VeLoRA",
    "loftq_config": "LoftQ (changes the base weight)",
    "ensure_weight_tying": "adapters that are tied between layers",
}
# These initialise A and B only (mica: B from the base's minor components, base untouched). All others subtract from the base.
_INIT_KEEPS_BASE = frozenset({"gaussian", "eva", "orthogonal", "mica"})


def check_config(config: dict[str, Any], where: str) -> None:
    """Refused, naming the field, unless merging ``scaling * B @ A`` and replacing saved modules is all that this config asks for."""
    if config.get("peft_type") != "LORA":
        raise Refused("Only LoRA adapters can be merged.", where=where, expected='"peft_type": "LORA"', found=repr(config.get("peft_type")))
    for name, value in config.items():
        if name in HARMLESS or name in USED or not value:
            continue
        what = REFUSED.get(name)
        raise Refused(
            f"The adapter uses {what}, which qmerge does not merge yet." if what else f"The adapter's config sets {name!r}, which qmerge does not know.",
            where=where, expected=f"{name} unset", found=repr(value)[:120],
            fix="keep this adapter separate, or train one without it" if what else "if it cannot change the weights, remove it from the config",
        )  # fmt: skip
    if config.get("bias") not in (None, "none"):
        raise Refused("The adapter trained biases of the base, which qmerge does not merge yet.", where=where, expected='"bias": "none"',
                      found=repr(config["bias"]))
    _check_init(config.get("init_lora_weights", True), where)
    _check_kinds(config, where)


def _check_init(init: Any, where: str) -> None:
    if init is None or isinstance(init, bool) or (isinstance(init, str) and init.lower() in _INIT_KEEPS_BASE):
        return
    raise Refused("The adapter's initialisation changed the base weights, so the delta does not belong on the unchanged base.", where=where,
                  expected="init_lora_weights: true, false, " + ", ".join(sorted(_INIT_KEEPS_BASE)), found=f"init_lora_weights: {init!r}",
                  fix="convert it to a plain LoRA first (PEFT: save_pretrained(…, path_initial_model_for_weight_conversion=…))")


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
    for flag in ("use_rslora", "fan_in_fan_out"):
        if not isinstance(config.get(flag, False), (bool, type(None))):
            raise Refused("A flag of the adapter's config is malformed.", where=where, expected=f"{flag}: true or false", found=repr(config[flag]))
    for field, accepts in (("rank_pattern", _is_rank), ("alpha_pattern", _is_number)):
        table = config.get(field) or {}
        if not isinstance(table, dict):
            raise Refused("A pattern of the adapter's config is malformed.", where=where, expected=f"{field}: an object", found=repr(table)[:120])
        for pattern, value in table.items():
            if not accepts(value):
                raise Refused("A pattern of the adapter's config has a malformed value.", where=f"{field}[{pattern!r}] in {where}", found=repr(value))
            try:
                _compiled(pattern)
            except (re.error, RecursionError, OverflowError) as error:
                raise Refused("A pattern of the adapter's config is no regular expression.", where=f"{field}[{pattern!r}] in {where}",
                              found=str(error)) from None
    saved = config.get("modules_to_save") or []
    if not isinstance(saved, list) or not all(isinstance(name, str) and name for name in saved):
        raise Refused("modules_to_save is malformed.", where=where, expected="a list of module names", found=repr(saved)[:120])


def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(rf"(.*\.)?({pattern})$")


def matching_key(patterns: Iterable[str], module: str) -> str:
    """The first of ``patterns`` that matches ``module``, whole or from some dot on to its end; ``module`` itself when none does.

    PEFT's rule (``get_pattern_key``): ``matching_key(["q_proj"], "model.layers.0.q_proj") == "q_proj"``; the order of the file decides.
    """
    return next((pattern for pattern in patterns if _compiled(pattern).match(module)), module)


def rank_and_scaling(config: dict[str, Any], module: str) -> tuple[int, float]:
    """``(rank, scaling)`` of ``module`` by a checked config: alpha / rank, or alpha / sqrt(rank) with rsLoRA (arXiv:2312.03732).

    ``rank_and_scaling({"r": 16, "lora_alpha": 32}, "q_proj") == (16, 2.0)``
    """
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    rank = ranks.get(matching_key(ranks, module), config["r"])
    alpha = alphas.get(matching_key(alphas, module), config["lora_alpha"])
    return rank, alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
