"""What does an adapter do to one tensor of the base?

An `Edit` is a description: the adapter's tensors that it consumes and the shape of what it makes. `Edit.load` brings its factors into memory and gives a
`Change`, which turns rows of the base into merged rows in fp32, and proves each result on random inputs by a way that never forms the product that the
merge formed. Weights are ``[out, in]`` (embeddings ``[tokens, dim]``, fused experts ``[experts, ...]``); all tensors fp32 unless said otherwise.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch

PROBES = 4
"""random inputs of a proof"""


@dataclass(frozen=True)
class Proof:
    """Sums over rows: squared error of what was added, squared size of what should have been, and squared size of the base seen by the same inputs. Add them up."""

    error: float = 0.0
    wanted: float = 0.0
    base: float = 0.0

    def __add__(self, other: Proof) -> Proof:
        return Proof(self.error + other.error, self.wanted + other.wanted, self.base + other.base)

    @property
    def relative(self) -> float:
        """``‖error‖ / ‖wanted‖``; 0 where nothing was to be added and nothing was, inf where only one of the two is nothing."""
        if self.wanted == 0.0:
            return 0.0 if self.error == 0.0 else math.inf
        return math.sqrt(self.error / self.wanted)

    @property
    def limit(self) -> float:
        """What fp32 rounding explains: one rounding of W + ΔW is 2^-24 of |W|, which seen against ‖ΔW‖ grows with ‖W‖ / ‖ΔW‖."""
        return 1e-5 + 1e-6 * math.sqrt(self.base / self.wanted) if self.wanted > 0 else 1e-5


class Change(ABC):
    """An edit with its factors in memory. Safe to use from several threads."""

    rowwise = True
    """may rows be merged without seeing the other rows?"""

    def product(self, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor, float] | None:
        """``(left [rows, rank], right [rank, in], scaling)`` where `apply` does nothing to rows ``start`` … ``stop`` but add ``scaling · left @ right``; None where it does anything else."""
        return None

    @abstractmethod
    def apply(self, rows: torch.Tensor, start: int) -> torch.Tensor:
        """Merged rows for base ``rows`` (``start`` is the first row's number), a new tensor; ``rows`` stays as it is."""

    def added(self, rows: torch.Tensor, inputs: torch.Tensor, start: int) -> torch.Tensor:
        """What the adapter adds to ``rows @ inputs`` (``inputs`` ``[in, probes]``), as a separate adapter computes it: the product is never formed."""
        raise NotImplementedError

    def prove(self, before: torch.Tensor, after: torch.Tensor, start: int, delta: torch.Tensor | None = None) -> Proof:
        """How far ``after`` is from what base rows ``before`` should have become, on random inputs that depend on the shape only.

        ``delta``: ``after - before``, where the caller has it.
        """
        delta = after - before if delta is None else delta
        if before.dim() == 1:
            before, delta = before.unsqueeze(1), delta.unsqueeze(1)
        x = probes(before.shape[-1], before.device)
        wanted = self.added(before, x, start)
        error = torch.matmul(delta, x).sub_(wanted)
        return Proof(_square(error), _square(wanted), PROBES * _square(before))


def probes(size: int, device: torch.device) -> torch.Tensor:
    """The random inputs of a proof, fp32 ``[size, PROBES]``: the same for every run, so that a proof can be repeated."""
    return torch.randn(size, PROBES, generator=torch.Generator().manual_seed(size)).to(device)


def _square(tensor: torch.Tensor) -> float:
    flat = tensor.reshape(-1)
    return float(torch.dot(flat, flat))


class Edit(ABC):
    """What becomes of one tensor. ``keys`` are the adapter tensors that it consumes, ``shape`` is that of the merged tensor."""

    keys: tuple[str, ...]
    shape: tuple[int, ...]
    needs_base = True
    """False where the base's values play no part"""

    @abstractmethod
    def load(self, device: torch.device) -> Change:
        """Read the factors. Raises `Refused` for values that are not finite."""
