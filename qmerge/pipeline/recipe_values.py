"""Which values may a setting of a recipe take, alone and with a format? For the reader of recipes and for their JSON Schema."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

from qmerge.device_names import KNOWN, is_device_name
from qmerge.formats import BITS, BLOCK_SIZES, BUILT, GROUP_SIZES, HEADS, MIXED, PADDED, QUANTIZING

COMPUTES = ("auto", "fp32", "mixed", "bf16")
COMBINATIONS = ("svd", "linear", "cat", "ties", "ties_svd", "dare_linear", "dare_ties", "dare_linear_svd", "dare_ties_svd", "magnitude_prune", "magnitude_prune_svd")
"""PEFT's names; `qmerge.adapters.combine` refuses two of them with the reason"""
POLISH = ("blocks", "distill")
FIXED: dict[str, dict[str, Any]] = {"awq": {"symmetric": False}}
"""settings of its grid that a format leaves no choice of; a recipe that asks for another value is refused"""

WORDS: dict[str, tuple[str | int, ...]] = {
    "format": BUILT, "on": ("dequantized", "original"), "combine": ("sum", *COMBINATIONS), "compute": COMPUTES, "low_traffic": ("pooled", "rtn"), "group_size": GROUP_SIZES,
    "block_size": tuple(dict.fromkeys(size for sizes in BLOCK_SIZES.values() for size in sizes)),
}  # fmt: skip
"""settings that take one of a few values"""


@dataclass(frozen=True)
class Range:
    """Numbers from ``least`` to ``most``. ``above`` and ``below``: the end itself is not among them. ``says``: for people."""

    least: int
    most: int
    says: str
    above: bool = False
    below: bool = False

    def holds(self, value: float) -> bool:
        return (self.least < value if self.above else self.least <= value) and (value < self.most if self.below else value <= self.most)


MOST = 2**31
"""counts of windows and tokens that no run reaches"""
RANGES: dict[str, Range] = {
    "bits_per_weight": Range(4, 16, "4 to 16"),
    "density": Range(0, 1, "above 0, at most 1", above=True),
    "generic_share": Range(0, 1, "at least 0 and below 1", below=True),
    "samples": Range(2, MOST, f"at least 2 (some are held out to choose with) and at most {MOST}"),
    "tokens": Range(2, MOST, f"at least 2 and at most {MOST}"),
    "curvature_tokens": Range(0, MOST, f"at least 0 (none) and at most {MOST}"),
    "seed": Range(0, 2**63, "at least 0 and below 2^63", below=True),
}


def value_fault(name: str, value: Any) -> str | None:
    """Why ``value``, of the right kind, cannot be the setting ``name``; None where it can, or where only other settings tell."""
    if value is None:
        return None
    flag, shown = name.replace("_", "-"), str(value)[:40]
    if (words := WORDS.get(name)) and value not in words:
        return f"--{flag} {shown}: expected {' or '.join(map(str, words)) if len(words) == 2 else 'one of ' + ', '.join(map(str, words))}"
    if name == "device" and not is_device_name(value):
        return f"--device {shown}: expected {KNOWN}"
    if (held := RANGES.get(name)) and not held.holds(value):
        return f"--{flag} {shown}: expected {held.says}"
    return None


def by_format() -> Iterator[tuple[tuple[str, ...], str, tuple[Any, ...]]]:
    """(formats, a setting, the values that it may take with them); the empty string stands for an empty list too."""
    for bits in dict.fromkeys(BITS.values()):
        yield tuple(name for name in BITS if BITS[name] == bits), "bits", bits
    yield _others(BITS), "bits", (4,)
    for name, formats, neutral in (("block_size", BLOCK_SIZES, None), ("double_quant", BLOCK_SIZES, None), ("bits_per_weight", MIXED, None), ("quantize_head", HEADS, False), ("pad", PADDED, False), ("polish", QUANTIZING, "")):
        yield _others(formats), name, (neutral,)
    yield from (((name,), setting, (value,)) for name, fixed in FIXED.items() for setting, value in fixed.items())


def _others(formats: Collection[str]) -> tuple[str, ...]:
    return tuple(name for name in BUILT if name not in formats)
