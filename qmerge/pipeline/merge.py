"""What is each tensor of the merged model, in fp32, and is the merge right?"""

from __future__ import annotations

import torch

from qmerge.errors import CheckFailed, Refused
from qmerge.formats.base import Base
from qmerge.numerics.lora import lora_delta, merge_error
from qmerge.store.adapter import LoraAdapter, check_finite
from qmerge.types import QuantizedWeight


class Merged:
    """The merged model as tensors, computed when asked for and proved right each time. ``used`` counts what the adapter gave."""

    def __init__(self, base: Base, adapter: LoraAdapter, device: torch.device) -> None:
        self.base, self.adapter, self.device = base, adapter, device
        self.used: dict[str, int] = {}
        self.proofs: dict[str, float] = {}

    def four_bit(self, name: str) -> QuantizedWeight | None:
        """The base's own NF4 form of a weight, or None where it has none."""
        return self.base.four_bit(name, self.device) if self.base.is_4bit(name) else None

    def weight(self, name: str) -> torch.Tensor:
        """fp32; ``[out, in]`` for linears. W + ΔW where the adapter has a pair, its replacement where it saved the module, else W."""
        if name in self.adapter.saved:
            return self._replacement(name).float()
        weight = self.base.weight(name, self.device)
        check_finite(f"{self.base.checkpoint.name}: {name}", weight)
        module = name.removesuffix(".weight")
        if module in self.adapter.pairs and name.endswith(".weight"):
            weight = self._merge(module, weight)
        return weight.to(self.device)

    def delta(self, name: str) -> torch.Tensor | None:
        """What the adapter adds to a linear, fp32 ``[out, in]``, or None where it adds nothing."""
        pair = self.adapter.pairs.get(name.removesuffix(".weight"))
        if pair is None:
            return None
        a, b = self.adapter.load_pair(pair.module)
        return lora_delta(a.to(self.device), b.to(self.device), pair.scaling)

    def untouched(self, name: str) -> bool:
        return name not in self.adapter.saved and not (name.endswith(".weight") and name.removesuffix(".weight") in self.adapter.pairs)

    def float_tensor(self, name: str) -> torch.Tensor:
        """A tensor that stays float, in the base's dtype and file order: stored bytes where untouched, the replacement in that dtype otherwise."""
        stored = None if self.base.is_4bit(name) else self.base.stored(name)
        if stored is not None and self.untouched(name):
            return stored
        if name in self.adapter.saved:
            return self._replacement(name).to(stored.dtype).contiguous()
        merged = self.in_file_order(name, self.weight(name))
        return merged.to(stored.dtype if stored is not None else torch.bfloat16).contiguous()

    def in_file_order(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """``[out, in]`` to the order in which a float checkpoint of this model stores the weight."""
        return weight.T if name in self.base.conv else weight

    def _replacement(self, name: str) -> torch.Tensor:
        key = self.adapter.saved[name]
        tensor = self.adapter.load(key)
        check_finite(f"{self.adapter.name}: {key}", tensor)
        self.used[key] = self.used.get(key, 0) + 1
        return tensor

    def _merge(self, module: str, weight: torch.Tensor) -> torch.Tensor:
        pair = self.adapter.pairs[module]
        a, b = self.adapter.load_pair(module)
        check_finite(f"{self.adapter.name}: {pair.a}", a)
        check_finite(f"{self.adapter.name}: {pair.b}", b)
        weight, a, b = weight.to(self.device), a.to(self.device), b.to(self.device)
        delta = lora_delta(a, b, pair.scaling)
        merged = weight + delta
        if not torch.isfinite(merged).all():
            raise Refused("a merged weight is not finite in fp32", where=f"{module}.weight", found="overflow", fix="check the adapter's scaling")
        error = merge_error(weight, merged, a, b, pair.scaling)
        # one fp32 rounding of W + ΔW is 2^-24 of |W|; seen against |ΔW| it grows with ‖W‖ / ‖ΔW‖
        limit = 1e-5 + 1e-6 * float(weight.norm() / delta.norm().clamp(min=1e-30)) if error else 0.0
        if error > limit:
            raise CheckFailed("a merge could not be proved", where=f"{module}.weight", expected=f"a relative error of at most {limit:.1e}", found=f"{error:.1e}", written="nothing")
        self.proofs[module] = error
        for key in (pair.a, pair.b):
            self.used[key] = self.used.get(key, 0) + 1
        return merged

    def check_all_used(self) -> None:
        """Every tensor of the adapter must have gone into the output."""
        idle = sorted(set(self.adapter.specs) - set(self.used))
        if idle:
            raise CheckFailed("an adapter tensor went into nothing", where=f"{self.adapter.name}: {idle[0]}", found=f"{len(idle)} such tensors", written="nothing")
