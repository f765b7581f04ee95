"""How far does a weight lie from the one it stands for, as a whole and band by band of its rows?"""

from __future__ import annotations

import base64
from dataclasses import dataclass

import torch

BAND, MOST_BANDS = 1 << 16, 1024
"""a band has about this many elements at least, and a weight at most this many bands"""


@dataclass(frozen=True)
class Fit:
    """``distance``: ``‖found - wanted‖ / ‖wanted‖``; ``slope`` of the regression of ``found`` on ``wanted`` through zero. (0, 1) is equality; ``bands`` holds the same of each
    band of rows, as text (`pack_bands`). The slope sees a wrong scale that the distance drowns: codes right and scales 2 % off move it by 0.02.
    """

    distance: float
    slope: float
    bands: str


def fit(found: torch.Tensor, wanted: torch.Tensor) -> Fit:
    """The `Fit` of two matrices ``[out, in]``, in fp64."""
    sums = _sums(found, wanted)
    distance, lean = _ratios(sums.sum(0, keepdim=True))[0].tolist()
    return Fit(distance, 1.0 + lean, pack_bands(_ratios(sums)))


def band_rows(shape: tuple[int, ...]) -> int:
    """Rows of a band of a weight ``[out, in]``: ``band_rows((4096, 4096)) == 16``."""
    return max(1, -(-BAND // max(1, shape[1])), -(-shape[0] // MOST_BANDS))


def pack_bands(ratios: torch.Tensor) -> str:
    """fp64 ``[bands, 2]`` (distance, slope - 1) as base64 of little-endian fp32. The slope less 1, so that fp32 holds ten digits of it; base64 without ``/``, so that
    nobody takes it for a path."""
    return base64.urlsafe_b64encode(ratios.to(torch.float32).cpu().contiguous().numpy().astype("<f4").tobytes()).decode("ascii")


def unpack_bands(text: str) -> torch.Tensor:
    """The inverse of `pack_bands`, fp32. Raises ValueError where ``text`` is none of it."""
    raw = base64.b64decode(text.encode("ascii"), altchars=b"-_", validate=True)
    if len(raw) % 8:
        raise ValueError(f"{len(raw)} bytes are no pairs of fp32")
    return torch.frombuffer(bytearray(raw), dtype=torch.float32).reshape(-1, 2) if raw else torch.empty(0, 2)


def _sums(found: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """fp64 ``[bands, 3]``: ``‖found - wanted‖²``, ``<found - wanted, wanted>``, ``‖wanted‖²``."""
    rows = band_rows(found.shape) if found.dim() == 2 else max(1, len(found))
    sums = []
    for start in range(0, max(1, len(found)), rows):
        there = wanted[start : start + rows].double().reshape(-1)
        off = found[start : start + rows].double().reshape(-1) - there
        sums.append(torch.stack((torch.dot(off, off), torch.dot(off, there), torch.dot(there, there))))
    return torch.stack(sums).cpu()


def _ratios(sums: torch.Tensor) -> torch.Tensor:
    """fp64 ``[n, 2]``: distance, and slope - 1; (0, 0) where both weights are zero, (inf, inf) where only the wanted one is."""
    error, lean, size = sums.unbind(1)
    nothing, endless = (size == 0) & (error == 0), (size == 0) & (error != 0)
    ratios = torch.stack(((error / size).sqrt(), lean / size), dim=1)
    ratios[nothing] = 0.0
    ratios[endless] = float("inf")
    return ratios
