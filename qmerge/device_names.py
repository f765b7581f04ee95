"""Which devices may be asked for by name? Without torch, so that a misspelt one is refused at once; `device.py` says which of them are here."""

from __future__ import annotations

import re

from qmerge.errors import UsageProblem

KNOWN = "cpu, cuda, cuda:N or auto"
TYPES = ("cpu", "cuda", "ipu", "xpu", "mkldnn", "opengl", "opencl", "ideep", "hip", "ve", "fpga", "maia", "xla", "lazy", "vulkan", "mps", "meta", "hpu", "mtia", "privateuseone")
"""torch's own words, as its message lists them; qmerge is tried on the first two alone"""


def is_device_name(wish: str) -> bool:
    """May torch know it?"""
    return wish == "auto" or re.fullmatch(f"({'|'.join(TYPES)})(:(0|[1-9][0-9]*))?", wish) is not None


def check_device_name(wish: str) -> None:
    """Raises UsageProblem."""
    if not is_device_name(wish):
        raise UsageProblem("unknown device", where=f"--device {wish}", expected=KNOWN, fix="--device auto takes the GPU where there is one")
