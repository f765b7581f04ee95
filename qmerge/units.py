"""Numbers with their units, for people."""

from __future__ import annotations

import re

SIZE = r"\s*(\d+(?:\.\d+)?)\s*([kMGT]?i?B?)\s*"
"""a size in bytes as people write it; `parse_bytes`"""


def format_bytes(count: int) -> str:
    """Decimal bytes: ``format_bytes(8_106_936) == "8.11 MB"``."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(value) < 1000 or unit == "TB":
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.3g} {unit}"
        value /= 1000
    raise AssertionError("unreachable")


def format_seconds(seconds: float) -> str:
    """``format_seconds(75.2) == "1 min 15 s"``."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def parse_bytes(text: str) -> int:
    """``parse_bytes("5GB") == 5_000_000_000``, ``parse_bytes("1MiB") == 1_048_576``. Raises ValueError for anything else."""
    match = re.fullmatch(SIZE, text)
    if not match:
        raise ValueError(f"no size in bytes: {text!r}")
    unit = match[2].removesuffix("B")
    power = "kMGT".index(unit[0]) + 1 if unit else 0
    size = float(match[1]) * (1024 if unit.endswith("i") else 1000) ** power
    if not size < 2**63:
        raise ValueError(f"no file is so large: {text[:80]!r}")
    return int(size)
