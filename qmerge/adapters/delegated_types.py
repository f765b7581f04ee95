"""Which adapter types of PEFT other than LoRA can be merged, and what does one layer of each need?

Every member of PEFT's ``PeftType`` (0.21.2) but LORA is in exactly one of the two tables below; a type that is in neither is newer than this file and refused.
A type is merged where the file holds all that its layers need, or where config, shapes and order of the adapted modules give the rest.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from qmerge.adapters.config import check_choices
from qmerge.errors import Refused


@dataclass(frozen=True)
class Kind:
    """``prefix``: how the tensors of one module begin. ``shared``: tensors of the whole adapter, ``base_model.<name>``. ``bias``: it changes a linear's bias.

    ``peers``: what PEFT looks at beyond the one module: nothing, the ``widest`` of the adapted modules, or ``every`` one in the order of the model.
    ``weight``: False where only the bias changes. ``dry``: the device on which a layer is built without values to see whether the
    shapes fit; empty: PEFT computes on them, so that shows only when the layer is merged.
    """

    prefix: str
    shared: tuple[str, ...] = ()
    peers: str = ""
    bias: bool = False
    weight: bool = True
    dry: str = "meta"


MERGED = {
    "ADALORA": Kind("lora_", dry="cpu"),
    "BEFT": Kind("beft_", bias=True, weight=False),
    "BOFT": Kind("boft_"),
    "C3A": Kind("c3a_"),
    "DEFT": Kind("deft_"),
    "DELORA": Kind("delora_"),
    "FOURIERFT": Kind("fourierft_"),
    "FROD": Kind("frod_", shared=("frod_V", "frod_s_indices", "frod_s_size"), dry=""),
    "GLORA": Kind("glora_", bias=True),
    "GRALORA": Kind("gralora_"),
    "HIRA": Kind("hira_"),
    "HRA": Kind("hra_"),
    "IA3": Kind("ia3_", bias=True),
    "LN_TUNING": Kind("ln_tuning_"),
    "LOHA": Kind("hada_"),
    "LOKR": Kind("lokr_"),
    "MISS": Kind("miss_"),
    "OFT": Kind("oft_"),
    "OSF": Kind("osf_"),
    "PEANUT": Kind("peanut_"),
    "PVERA": Kind("pvera_lambda_", shared=("pvera_A", "pvera_B"), peers="widest", dry="cpu"),
    "RANDLORA": Kind("randlora_", shared=("randlora_A", "randlora_B"), peers="widest", dry="cpu"),
    "ROAD": Kind("road_", bias=True),
    "SHIRA": Kind("shira_", dry="cpu"),
    "SUPERTUNING": Kind("supertuning_"),
    "TINYLORA": Kind("tinylora_", shared=("tinylora_v",), peers="every", dry=""),
    "TRAINABLE_TOKENS": Kind("trainable_tokens_"),
    "UNILORA": Kind("unilora_", shared=("unilora_theta_d",), peers="every"),
    "VBLORA": Kind("vblora_", shared=("vblora_vector_bank",)),
    "VERA": Kind("vera_lambda_", shared=("vera_A", "vera_B"), peers="widest", dry="cpu"),
    "WAVEFT": Kind("waveft_"),
}

_TOKENS = "it puts trained vectors before the text and leaves every weight as it is, so there is nothing to merge"
_OTHER_BASE = (
    "it is written relative to singular vectors of the base that it was trained on, which are not in the file: "
    "an SVD of other weights or on another machine gives other ones"
)
REFUSED = {
    "ADAMSS": f"{_OTHER_BASE}, and with them other rows in each of its subspaces",
    "ADAPTION_PROMPT": "it adds a gated attention over trained tokens, which no weight of the model can express",
    "CARTRIDGE": "it is a trained key-value cache that stands before the text, so there is nothing to merge",
    "CPT": _TOKENS,
    "LILY": "its layers mix experts by what the tokens of a batch are, which no single weight can express",
    "MULTITASK_PROMPT_TUNING": _TOKENS,
    "POLY": "it mixes its modules by the task of each input, which no single weight can express",
    "PREFIX_TUNING": "it is a trained key-value cache that stands before the text, so there is nothing to merge",
    "PROMPT_TUNING": _TOKENS,
    "PSOFT": _OTHER_BASE,
    "P_TUNING": _TOKENS,
    "SHADOW": "it runs a second network beside the model and adds its state between layers, which no weight can express",
    "XLORA": "it weighs several adapters anew for each token, which no single weight can express",
}
# fields of a PEFT config that say how it was made or trained; unknown ones are refused as soon as they are set
_DROPPED = frozenset({"runtime_config"})


def check_type(config: dict[str, Any], where: str) -> Kind:
    """What the adapter's type needs. Refused, naming the type, where it cannot be merged, and for settings that PEFT or this file does not know."""
    name = config.get("peft_type")
    if not isinstance(name, str):
        raise Refused("The adapter's config does not say its type.", where=where, expected="peft_type: LORA, …", found=repr(name)[:120], fix="save the adapter again with PEFT: PeftModel.save_pretrained")
    if name in REFUSED:
        raise Refused(f"A {name} adapter cannot be merged: {REFUSED[name]}.", where=where, found=f"peft_type: {name}", fix=_fix(name))
    if name not in MERGED:
        raise Refused("The adapter is of a type that qmerge does not know.", where=where, expected="LORA, " + ", ".join(sorted(MERGED)), found=repr(name)[:120], fix="keep this adapter separate")
    _check_settings(str(name), config, where)
    check_choices(config, where)
    peft_config(config, where)
    return MERGED[str(name)]


def _fix(name: str) -> str:
    if name == "PSOFT":
        return "where it was trained, make a LoRA of it (peft.save_as_lora), then merge that"
    return "keep this adapter separate"


def _check_settings(name: str, config: dict[str, Any], where: str) -> None:
    """Refused for settings of a type that can be merged otherwise."""
    problem = ""
    if name == "PVERA" and config.get("sample_at_inference"):
        problem = "sample_at_inference: its layers answer at random, which no weight can express"
    if name in ("FROD", "RANDLORA") and not config.get("save_projection", True):
        problem = (
            "save_projection is off: its projections are not in the file and hang on the machine that trained it"
            if name == "RANDLORA"
            else "save_projection is off: its projections are not in the file and hang on all weights of the base that it was trained on"
        )
    if name == "SUPERTUNING" and not config.get("save_precomputed_indices", True):
        problem = "save_precomputed_indices is off: which elements it changes is not in the file; they were the largest of the base that it was trained on"
    if config.get("target_parameters") or config.get("trainable_token_indices") or config.get("layer_replication"):
        problem = "target_parameters, trainable_token_indices or layer_replication, which only LoRA adapters can have"
    if problem:
        raise Refused(f"This {name} adapter cannot be merged: {problem}.", where=where, fix="keep this adapter separate, or train one without it")


def peft_config(config: dict[str, Any], where: str) -> Any:
    """PEFT's config object. Refused for fields that the installed PEFT does not know and that are set, and for values that it refuses."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    kind = PEFT_TYPE_TO_CONFIG_MAPPING[config["peft_type"]]
    known = set(inspect.signature(kind.__init__).parameters)
    for field, value in config.items():
        if field not in known and field not in _DROPPED and value not in (None, False, [], {}, ""):
            raise Refused(
                f"The adapter's config sets {field!r}, which the installed PEFT does not know.",
                where=where,
                expected=f"{field} unset",
                found=repr(value)[:120],
                fix="install the PEFT that wrote it: pip install -U peft",
            )
    try:
        return kind(**{field: value for field, value in config.items() if field in known})
    except (TypeError, ValueError, KeyError, AttributeError) as problem:
        raise Refused("PEFT refuses the adapter's config.", where=where, found=str(problem)[:300], fix="it may have been written by a newer PEFT than the one that pip show peft names") from problem
