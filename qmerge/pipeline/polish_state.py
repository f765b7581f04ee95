"""How does a training go on after it was killed, and end in the same bytes?

One safetensors file: the tensors, and the numbers as JSON in its header. It is written beside its place, brought to the disk and renamed, so there is always a
whole one. Its key is a digest of everything that decides the result; a state of other inputs is left aside, and that is said.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from qmerge.pipeline.requantize import Solved
from qmerge.store.durable import sync, write_chunks

FILE = "distill.safetensors"
TENSORS = ("theta", "mean", "square", "best")
NUMBERS = ("step", "start_kl", "best_kl", "best_step", "idle")


@dataclass
class State:
    """``theta``: the changes; ``mean``, ``square``: Adam's moments; ``best``: the changes with the lowest held-out KL so far; all fp32 ``[n]``."""

    theta: torch.Tensor
    mean: torch.Tensor
    square: torch.Tensor
    best: torch.Tensor
    start_kl: float
    best_kl: float
    step: int = 0
    best_step: int = 0
    idle: int = 0
    """looks since the best one"""

    @classmethod
    def begin(cls, size: int, kl: float) -> State:
        return cls(torch.zeros(size), torch.zeros(size), torch.zeros(size), torch.zeros(size), kl, kl)

    def look(self, kl: float) -> None:
        """Keep the changes where they are the best so far."""
        self.idle += 1
        if kl < self.best_kl:
            self.best, self.best_kl, self.best_step, self.idle = self.theta.clone(), kl, self.step, 0


def state_key(recipe: Mapping[str, Any], settings: Any, tensors: Sequence[torch.Tensor], solved: Mapping[str, Solved]) -> str:
    """sha256 over the recipe, the settings, the tokens and the teacher's answers to them (which base and adapter decide), and the solver's result."""
    digest = hashlib.sha256(json.dumps([recipe, asdict(settings)], sort_keys=True).encode())
    for tensor in tensors:
        _add(digest, tensor)
    for name, result in sorted(solved.items()):
        digest.update(name.encode())
        _add(digest, result.quantized.codes)
        _add(digest, result.weight)
    return digest.hexdigest()


def _add(digest: Any, tensor: torch.Tensor) -> None:
    digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


class Keeper:
    """Saves and finds the state in ``folder`` (made where it is missing); with None it does nothing."""

    def __init__(self, folder: Path | None, key: str, progress: Callable[[str], None]) -> None:
        self.path, self.key, self.progress = folder / FILE if folder is not None else None, key, progress

    def load(self, size: int) -> State | None:
        """The saved state of this very work, or None."""
        from safetensors import SafetensorError, safe_open

        if self.path is None or not self.path.exists():
            return None
        try:
            with safe_open(self.path, "pt") as file:
                facts = json.loads((file.metadata() or {}).get("state", "{}"))
                tensors = {name: file.get_tensor(name) for name in TENSORS} if facts.get("key") == self.key else {}
        except (SafetensorError, OSError, ValueError) as problem:
            self.progress(f"{FILE} cannot be read ({str(problem).splitlines()[0][:100]}); distillation starts from the beginning")
            return None
        if not tensors or any(tensor.shape != (size,) for tensor in tensors.values()):
            self.progress(f"{FILE} is of other inputs or settings; distillation starts from the beginning")
            return None
        self.progress(f"distill: goes on after step {facts['step']}")
        return State(**tensors, **{name: facts[name] for name in NUMBERS})

    def save(self, state: State) -> None:
        from safetensors.torch import save

        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        facts = {name: getattr(state, name) for name in NUMBERS} | {"key": self.key}
        raw = save({name: getattr(state, name).contiguous() for name in TENSORS}, {"state": json.dumps(facts, sort_keys=True)})
        fresh = self.path.with_name(f"{FILE}.new")
        fresh.unlink(missing_ok=True)
        write_chunks(fresh, [raw])
        fresh.replace(self.path)
        sync(self.path.parent)
