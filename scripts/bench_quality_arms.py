"""Which ways to one 4-bit checkpoint are compared: ours, the peers', the references?"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

REFERENCES = {"base": "base (no adapter)", "separate": "separate (reference)", "merged": "merged, fp32", "rtn": "nearest NF4, in memory"}
"""made while measuring, in memory"""


@dataclass(frozen=True)
class Arm:
    """``tool`` is `ours` or a peer of bench_quality_peers.py; ``options`` are its settings (for ours: of the recipe). ``without``: a step of the solver that is switched: off, or on where it usually is not (`UNUSUAL`)."""

    name: str
    label: str
    tool: str
    options: dict[str, Any] = field(default_factory=dict)
    without: str | None = None
    only: tuple[str, ...] = ()
    """names of the cases that have it; empty: all"""

    @property
    def calibrated(self) -> bool:
        return self.tool != "peft"


FULL = ("light",)
"""cases with every arm of ours; the others have those that a promise is about: a format's container does not change what is in it"""
POLISHED = ("light",)
"""cases with all that polishing can do"""
DISTILLED = ("light", "strong")


ODD, PADDED = "stories", ("gptq", "compressed-tensors")
"""a case whose shapes fill neither words nor groups, and the formats of ours that write such shapes padded, as the peers do"""


def ours(name: str, label: str, only: tuple[str, ...] = (), **options: Any) -> Arm:
    return Arm(f"ours-{name}", f"qmerge {label}", "ours", options, only=only)


OURS = (
    ours("gptq-int4", "gptq int4 g128 sym", format="gptq"),
    ours("gptq-int4-quick", "gptq int4 g128 sym, quick", format="gptq", quick=True),
    ours("gptq-int4-quick-mixed", "gptq int4 g128 sym, quick, passes in fp32", ("light", "strong", "demo"), format="gptq", quick=True, compute="mixed"),
    ours("gptq-int4-quick-plain", "gptq int4 g128 sym, quick, no gradients", ("light", "strong", "demo"), format="gptq", quick=True, curvature_tokens=0),
    ours("gptq-int4-mixed", "gptq int4 g128 sym, passes in fp32", ("light", "strong", "demo"), format="gptq", compute="mixed"),
    ours("gptq-int4-bf16", "gptq int4 g128 sym, passes in bf16", ("light", "strong", "demo"), format="gptq", compute="bf16"),
    ours("gptq-int4-asym", "gptq int4 g128 asym", FULL, format="gptq", symmetric=False),
    ours("gptq-int4-g32", "gptq int4 g32 sym", FULL, format="gptq", group_size=32),
    ours("gptq-int4-blocks", "gptq int4 g128 sym, polish blocks", POLISHED, format="gptq", polish=("blocks",)),
    ours("gptq-int4-distill", "gptq int4 g128 sym, polish distill", DISTILLED, format="gptq", polish=("distill",)),
    ours("gptq-int3", "gptq int3 g128 sym", format="gptq", bits=3),
    ours("gptq-int2-g32", "gptq int2 g32 sym", format="gptq", bits=2, group_size=32),
    ours("ct-w4a16", "compressed-tensors W4A16 g128 sym", FULL, format="compressed-tensors"),
    ours("ct-w4a16-asym", "compressed-tensors W4A16 g128 asym", FULL, format="compressed-tensors", symmetric=False),
    ours("ct-w4a16-channel", "compressed-tensors W4A16 channel sym", ("stories",), format="compressed-tensors", group_size=-1),
    ours("ct-w8a16", "compressed-tensors W8A16 g128 sym", FULL, format="compressed-tensors", bits=8),
    ours("ct-w8a16-channel", "compressed-tensors W8A16 channel sym", ("stories",), format="compressed-tensors", bits=8, group_size=-1),
    ours("awq", "awq int4 g128 asym", FULL, format="awq", symmetric=False),
    ours("nf4", "nf4", format="nf4"),
    ours("nf4-bf16", "nf4, passes in bf16", ("light", "strong", "demo"), format="nf4", compute="bf16"),
    ours("nf4-blocks", "nf4, polish blocks", POLISHED, format="nf4", polish=("blocks",)),
    ours("nf4-distill", "nf4, polish distill", POLISHED, format="nf4", polish=("distill",)),
    ours("fp4", "fp4", FULL, format="fp4"),
)
CHANNEL = {
    "config_groups": {"all": {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "channel"}}},
    "scheme": None,
}
"""llm-compressor's W4A16 preset with a scale per row"""
PEERS = (
    Arm("gptqmodel", "gptqmodel int4 g128, defaults", "gptqmodel"),
    Arm("gptqmodel-desc-act", "gptqmodel int4 g128, desc_act", "gptqmodel", {"desc_act": True}),
    Arm("gptqmodel-asym", "gptqmodel int4 g128, sym=False", "gptqmodel", {"sym": False}),
    Arm("gptqmodel-mse", "gptqmodel int4 g128, mse=2.4", "gptqmodel", {"mse": 2.4}),
    Arm("gptqmodel-gptaq", "gptqmodel int4 g128, gptaq", "gptqmodel", {"gptaq": True}),
    Arm("gptqmodel-int3", "gptqmodel int3 g128", "gptqmodel", {"bits": 3}),
    Arm("gptqmodel-int2-g32", "gptqmodel int2 g32", "gptqmodel", {"bits": 2, "group_size": 32}),
    Arm("llmcompressor", "llm-compressor GPTQ W4A16 g128", "llmcompressor", only=("light", "strong", "neox", "stories", "demo")),
    Arm("llmcompressor-imatrix", "llm-compressor GPTQ W4A16 g128, imatrix_mse", "llmcompressor", {"weight_observer": "imatrix_mse"}, only=FULL),
    Arm("llmcompressor-w4a16-channel", "llm-compressor GPTQ W4A16 channel", "llmcompressor", CHANNEL, only=("stories",)),
    Arm("llmcompressor-w8a16-channel", "llm-compressor GPTQ W8A16 channel", "llmcompressor", {"scheme": "W8A16"}, only=("stories",)),
    Arm("autoround", "auto-round W4G128 sym, 200 steps", "autoround", only=("light",)),
    Arm("autoround-light", "auto-round W4G128 sym, 50 steps", "autoround", {"iters": 50}, only=FULL),
    Arm("peft-nf4", "PEFT merge_and_unload into NF4", "peft"),
)
INT4 = ("gptqmodel", "gptqmodel-desc-act", "gptqmodel-asym", "gptqmodel-mse", "gptqmodel-gptaq")
"""gptqmodel's settings at the bits of ours-gptq-int4"""
FOUR_BITS = (*INT4, "llmcompressor", "llmcompressor-imatrix", "autoround", "autoround-light")
"""all peers' at those bits"""
ABLATED: dict[str, tuple[str, ...]] = {"ours-gptq-int4": (), "ours-nf4": ("own_shift", "residual_shift", "keep_base", "descent", "coupled", "lean")}
"""arms that lose one step of the solver at a time: all steps (empty), or those that matter more there"""
ABLATED_CASES = ("light",)
UNUSUAL = ("chosen_damp",)
"""steps that are off unless asked for"""
TIMED, TIMED_CASES = ("ours-gptq-int4", "gptqmodel", "ours-nf4"), ("light", "strong")
LABELS = REFERENCES | {arm.name: arm.label for arm in (*OURS, *PEERS)}


def arms_of(case: str, wanted: list[str] | None) -> list[Arm]:
    """Of one case, those whose name starts with one of ``wanted`` (None: all); of a word that ends in ``$`` the one whose name is the rest."""
    found = [arm for arm in (*OURS, *PEERS) if not arm.only or case in arm.only]
    if case == ODD:
        found = [replace(arm, options=arm.options | {"pad": True}) if arm.options.get("format") in PADDED else arm for arm in found]
    else:
        found = [arm for arm in found if not arm.name.endswith("-channel")]
    return [arm for arm in found if wanted is None or any(arm.name == word[:-1] if word.endswith("$") else arm.name.startswith(word) for word in wanted)]


def without(name: str, step: str | None) -> Arm:
    """One of ours with one step of the solver off (None: with all on), for the ablations."""
    whole = next(arm for arm in OURS if arm.name == name)
    return Arm(
        f"{name}-without-{(step or 'nothing').replace('_', '-')}", f"{whole.label} without {step or 'nothing'}", "ours", whole.options, step
    )
