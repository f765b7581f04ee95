"""Which devices may be asked for by name? Without torch, so that a misspelt one is refused at once; `device.py` says which of them are here."""

from __future__ import annotations

import re

from qmerge.errors import UsageProblem

PATTERN = "auto|cpu|cuda(:[0-9]{1,2})?"
KNOWN = "cpu, cuda, cuda:N or auto"


def is_device_name(wish: str) -> bool:
    return re.fullmatch(PATTERN, wish) is not None


def check_device_name(wish: str) -> None:
    """Raises UsageProblem."""
    if not is_device_name(wish):
        raise UsageProblem("unknown device", where=f"--device {wish}", expected=KNOWN, fix="--device auto takes the GPU where there is one")
