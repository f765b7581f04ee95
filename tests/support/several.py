"""Rows of the support matrix for several adapters at once, QA-LoRA, and the PEFT types beside LoRA."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from oracles.peft_types import ELSEWHERE, SETTINGS
from safetensors.torch import load_file, save_file
from support.adapters import WEIGHTS, Cell, Exact, Refusal, settings
from support.architectures import Architecture
from support.bases import GROUP
from support.features import Feature, lora
from support.references import by_hand, pooled

from qmerge.adapters.delegated_types import MERGED, REFUSED


def both(weights: tuple[float, ...] = (1.0, 1.0), *, first: dict[str, Any] | None = None, second: dict[str, Any] | None = None, **flags: Any) -> Feature:
    """Two adapters, the second on other modules too."""

    def cell(arch: Architecture) -> Exact:
        other = Exact(lora(arch, **{"r": 4, "target_modules": arch.attention[:1]} | (second or {})))
        return Exact(lora(arch, target_modules=arch.attention, **(first or {})), others=(other,), weights=weights, flags=flags)

    return cell


def refused(message: str, why: str, feature: Feature) -> Feature:
    return lambda arch: Refusal(message, why, feature(arch))


def replaced_by_one(arch: Architecture) -> Cell:
    return Exact(lora(arch, target_modules=arch.attention, modules_to_save=[arch.norm]), others=(Exact(lora(arch, target_modules=arch.attention)),), weights=(1.0, 0.5))


def replaced_by_both(arch: Architecture) -> Cell:
    saved = Exact(lora(arch, target_modules=arch.attention, modules_to_save=[arch.norm]))
    return Refusal("replaces a tensor", "a tensor that is replaced whole has no delta to weigh", Exact(saved.lora, others=(saved,), weights=(1.0, 1.0)))


def pooled_inputs(arch: Architecture) -> Cell:
    """A as PEFT makes it on gptqmodel's layers: one column per group of inputs."""

    def change(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        save_file({name: tensor[:, ::GROUP].contiguous() if ".lora_A." in name else tensor for name, tensor in tensors.items()}, folder / WEIGHTS, {"format": "pt"})
        settings(use_qalora=True, qalora_group_size=GROUP)(folder)

    return Exact(lora(arch), change=change, base="gptq", oracle=partial(by_hand, change=pooled),
                 note="PEFT loads this on gptqmodel's own layers alone, so the reference is PEFT's QA-LoRA forward, layer by layer, on the dequantized base")  # fmt: skip


SEVERAL: dict[str, dict[str, Feature]] = {
    "Several adapters": {
        "exact sum": both(),
        "exact sum, weights 0.7 and -0.4": both((0.7, -0.4), second={"r": 6, "use_rslora": True}),
        "one adapter, weight 0.5": lambda arch: Exact(lora(arch), weights=(0.5,)),
        "exact sum, one replaces a norm": replaced_by_one,
        "exact sum, both replace one tensor": replaced_by_both,
        "`--combine svd`": both((0.7, 0.5), combine="svd"),
        "`--combine ties`": both((0.7, 0.5), combine="ties", density=0.5),
        "`--combine dare_ties`, a seed": both((0.7, 0.5), combine="dare_ties", density=0.5, seed=3),
        "`--combine magnitude_prune`": both((0.7, 0.5), combine="magnitude_prune", density=0.5),
        "`--combine dare_linear_svd`, a seed and a rank": both((0.7, 0.5), combine="dare_linear_svd", density=0.5, seed=3, combine_rank=5),
        "`--combine cat`": refused("'cat' is not offered", "PEFT makes it sqrt(rank) times too large for rsLoRA; the exact sum is the same and right", both(combine="cat")),
        "`--combine linear`": refused("'linear' is not offered", "its cross terms are no adapter's; the exact sum is offered instead", both(combine="linear")),
        "`--combine ties` with DoRA": refused("DoRA cannot be combined", "a combination is defined on A and B alone", both(combine="ties", density=0.5, first={"use_dora": True})),
        "`--each`": both(each=True),
    },
    "QA-LoRA": {
        "`use_qalora` on a GPTQ base": pooled_inputs,
        "`use_qalora` on any other base, where PEFT passes over it": lambda arch: Exact(lora(arch, use_qalora=True, qalora_group_size=GROUP)),
    },
}


def of_type(kind: str) -> Feature:
    def cell(arch: Architecture) -> Cell:
        targets = ["q_proj", "v_proj"] if kind in ELSEWHERE or kind == "BEFT" else ["q_proj", "v_proj", "down_proj"]
        base = {"target_modules": ELSEWHERE.get(kind, targets)} | SETTINGS[kind]
        if kind == "IA3":
            base["feedforward_modules"] = ["down_proj"]
        loose = {"tolerance": 1e-4, "note": "within 1e-4: PEFT's own merge of it is as far from its separate layers (tests/test_adapters_delegated.py)"} if kind == "RANDLORA" else {}
        case = Exact(base, kind=kind, **loose)
        return Refusal("bias to a linear that has none", "it trains biases, and these linears have none", case) if kind == "BEFT" and not arch.biased else case

    return cell


def not_a_weight(kind: str) -> Feature:
    return lambda arch: Refusal(f"A {kind} adapter cannot be merged", REFUSED[kind], Exact(lora(arch), change=settings(peft_type=kind)))


COLUMNS = ("llama", "qwen2")
"""the other types are tested on these; tests/test_adapters_delegated.py has their variants"""
TYPES: dict[str, Feature] = {
    **{kind: of_type(kind) for kind in sorted(MERGED)},
    **{kind: not_a_weight(kind) for kind in sorted(REFUSED)},
}
