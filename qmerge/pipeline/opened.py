"""Which numbers of a requantized model may still change, and what is the model then?

Scales and block maxima by a factor e^θ, norms and biases by θ times their own size: one flat vector of relative changes. What the model computes with is rounded
to what a file holds and a loader keeps; the gradient passes the rounding as if it were not there (straight-through).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from qmerge.device import in_parallel
from qmerge.numerics.stored_scales import StoredScales, stored_scales
from qmerge.pipeline.merge import Merged
from qmerge.pipeline.plan import MergePlan
from qmerge.pipeline.requantize import Solved
from qmerge.pipeline.student import as_loaded, student_model


class Opened:
    """The student with its numbers opened. ``size``: how many there are, scales first; ``scale_count``: how many of them are scales.

    Not opened: embeddings, the head where it is float, biases and norms that are all zero.
    """

    def __init__(self, plan: MergePlan, merged: Merged, solved: Mapping[str, Solved], model_dtype: torch.dtype) -> None:
        self.merged, self.model_dtype = merged, model_dtype
        self.model = student_model(plan, merged, {name: result.weight for name, result in solved.items()}, model_dtype)
        held = dict(self.model.named_parameters())
        self.regions = {routed.name: (routed.parameter, routed.region) for routed in plan.routed if routed.name in solved}
        """where a routed expert's weight lies: the fused parameter and its part of it"""
        self.scales: dict[str, StoredScales] = {
            name: stored_scales(result.quantized, model_dtype) for name, result in solved.items() if name in held or name in self.regions
        }
        self.turned = {name for name in self.scales if plan.tree.linears.get(name)}
        self.floats: dict[str, tuple[torch.Tensor, float]] = {}
        """vectors that stay float: their start and their root mean square"""
        for name, parameter in held.items():
            if parameter.dim() == 1 and name not in self.scales and name in merged.pieces.table and bool(parameter.any()):
                self.floats[name] = (parameter.detach().clone(), float(parameter.double().square().mean().sqrt()))
        sizes = {name: part.start.numel() for name, part in self.scales.items()} | {
            name: start.numel() for name, (start, _) in self.floats.items()
        }
        ends = torch.tensor(list(sizes.values())).cumsum(0).tolist()
        self.spans = {name: slice(end - size, end) for (name, size), end in zip(sizes.items(), ends, strict=True)}
        self.size, self.scale_count = sum(sizes.values()), sum(part.start.numel() for part in self.scales.values())
        self.owners = {name: self.regions[name][0] if name in self.regions else name for name in self.spans}
        self.parameters = {owner: held[owner].requires_grad_(True) for owner in self.owners.values()}

    def value(self, name: str, theta: torch.Tensor) -> torch.Tensor:
        """The scales ``[runs]`` of a linear, or a vector, as the file holds them; fp32, on the CPU for scales."""
        change = theta[self.spans[name]]
        if name in self.scales:
            part = self.scales[name]
            # where nothing has moved the start is kept: exp(0) is 1, and the start is storable
            return part.storable(part.start * change.exp())
        start, size = self.floats[name]
        return as_loaded(start + size * change.to(start.device), self.merged.out_dtype(name), self.model_dtype)

    def set(self, theta: torch.Tensor) -> None:
        """The model with ``theta`` fp32 ``[size]``, on the CPU."""
        in_parallel(lambda name: self._put(name, theta), list(self.spans), torch.device("cpu"))

    @torch.no_grad()
    def _put(self, name: str, theta: torch.Tensor) -> None:
        value, parameter = self.value(name, theta), self.parameters[self.owners[name]]
        if name in self.scales:
            value = self.scales[name].weight(value).to(parameter.device)
        if name in self.regions:
            self.regions[name][1].write(parameter.data, value)
        else:
            parameter.copy_(value.T if name in self.turned else value)

    def reduce(self, gradients: Sequence[torch.Tensor]) -> torch.Tensor:
        """Gradients by ``parameters`` to the gradient by θ, fp32 ``[size]``, on the CPU. By a scale's logarithm it is the sum of dW·W over its run."""
        found, parts = dict(zip(self.parameters, gradients, strict=True)), []
        for name, owner in self.owners.items():
            gradient = found[owner]
            if name in self.scales:
                product = self._part(name, gradient) * self._part(name, self.parameters[owner].detach())
                parts.append(self.scales[name].sums(product).cpu())
            else:
                parts.append((gradient * self.floats[name][1]).cpu())
        return torch.cat(parts)

    def _part(self, name: str, parameter: torch.Tensor) -> torch.Tensor:
        """``[out, in]`` of one linear out of its parameter."""
        if name in self.regions:
            return self.regions[name][1].read(parameter)
        return parameter.T.contiguous() if name in self.turned else parameter
