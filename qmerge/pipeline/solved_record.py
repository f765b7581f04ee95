"""How do solved linears go to the disk and come back as the very same tensors?

Same values, same memory layout (a product may add up in another order where a matrix lies otherwise), same device. A weight that its codes and scales give bit by bit is not stored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch

from qmerge.numerics.stored_scales import stored_scales
from qmerge.pipeline.requantize import Choice, Solved
from qmerge.types import Grid, QuantizedWeight, QuantState, known

STATE_TENSORS = ("absmax", "code", "nested_absmax", "nested_code")
STATE_FACTS = ("block_size", "shape", "dtype", "quant_type", "nested_block_size", "offset")
PARTS = ("scales", "zeros", "g_idx")


def layout(tensor: torch.Tensor) -> list[int]:
    """The axes from the slowest to the fastest."""
    strides = tensor.stride()
    return sorted(range(tensor.dim()), key=lambda axis: (-strides[axis], axis))


def laid_flat(tensor: torch.Tensor) -> tuple[torch.Tensor, list[int]]:
    """``tensor`` contiguous and on the CPU, its axes in the order in which they lie in memory; and that order."""
    order = layout(tensor)
    return tensor.detach().permute(order).contiguous().cpu(), order


def laid_back(flat: torch.Tensor, order: list[int], device: torch.device | str = "cpu") -> torch.Tensor:
    """The inverse of `laid_flat`."""
    places = [order.index(axis) for axis in range(len(order))]
    return flat.to(device).permute(places)


def to_record(solved: Mapping[str, Solved], model_dtype: torch.dtype) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor]]:
    """Facts of each linear, in order, and the tensors of all."""
    rows, tensors = [], {}
    for number, (name, result) in enumerate(solved.items()):
        held, state = result.quantized, result.quantized.state
        row: dict[str, Any] = {"name": name, "grid": asdict(held.grid), "choice": asdict(result.choice), "distance": result.distance, "slope": result.slope, "survival": result.survival, "bands": result.bands, "record": result.to_json()}
        parts = {part: getattr(held, part) for part in PARTS}
        if state is not None:
            row["state"] = {key: getattr(state, key) for key in STATE_FACTS}
            parts |= {part: getattr(state, part) for part in STATE_TENSORS}
        parts["codes"], row["codes_shape"] = held.codes, None
        if not _follows(result, model_dtype):
            parts["weight"] = result.weight
        row["places"] = {}
        for part, tensor in parts.items():
            if tensor is not None:
                flat, order = laid_flat(tensor)
                row["places"][part] = [order, tensor.device.type]
                if part == "codes" and flat.numel() and flat.numel() % 2 == 0 and int(flat.max()) < 16:
                    row["codes_shape"], pairs = list(flat.shape), flat.reshape(-1, 2)
                    flat = pairs[:, 0] | (pairs[:, 1] << 4)
                tensors[f"{number}.{part}"] = flat
        row["weight"] = [layout(result.weight), result.weight.device.type]
        rows.append(row)
    return rows, tensors


def from_record(rows: list[dict[str, Any]], tensors: Mapping[str, torch.Tensor], model_dtype: torch.dtype, device: torch.device) -> dict[str, Solved]:
    """What `to_record` was given. ``device``: where tensors that were not on the CPU go."""
    found = {}
    for number, row in enumerate(rows):
        parts: dict[str, Any] = {}
        for part, (order, kind) in row["places"].items():
            flat = tensors[f"{number}.{part}"]
            if part == "codes" and row["codes_shape"] is not None:
                flat = torch.stack((flat & 15, flat >> 4), dim=1).reshape(row["codes_shape"])
            parts[part] = laid_back(flat, order, "cpu" if kind == "cpu" else device)
        state = None
        if "state" in row:
            facts: dict[str, Any] = row["state"] | {"shape": tuple(row["state"]["shape"])}
            state = QuantState(**(facts | {part: parts.get(part) for part in STATE_TENSORS}))
        held = QuantizedWeight(parts["codes"], Grid(**row["grid"]), state=state, **{part: parts.get(part) for part in PARTS})
        order, kind = row["weight"]
        weight = parts["weight"] if "weight" in parts else laid_back(_computed(held, model_dtype).permute(order).contiguous(), order, "cpu" if kind == "cpu" else device)
        found[row["name"]] = Solved(held, weight, Choice(**row["choice"]), row["distance"], row["slope"], row["survival"], row["bands"])
    return found


def _computed(held: QuantizedWeight, model_dtype: torch.dtype) -> torch.Tensor:
    """On the CPU, from what the file will hold."""
    scales = stored_scales(_on_cpu(held), model_dtype)
    return scales.weight(scales.start)


def _on_cpu(held: QuantizedWeight) -> QuantizedWeight:
    def here(tensor: torch.Tensor | None) -> Any:
        return None if tensor is None else tensor.cpu()

    state = held.state
    if state is not None:
        state = QuantState(**{key: getattr(state, key) for key in STATE_FACTS}, **{part: here(getattr(state, part)) for part in STATE_TENSORS})
    return QuantizedWeight(here(held.codes).contiguous(), held.grid, state=state, **{part: here(getattr(held, part)) for part in PARTS})


def _follows(result: Solved, model_dtype: torch.dtype) -> bool:
    """Do codes and scales give the weight, bit by bit (a zero's sign too)?"""
    held = result.quantized
    if held.state is None and held.codes.shape[1] % known(held.scales).shape[1]:  # the last group is short
        return False
    there = _computed(held, model_dtype)
    return there.shape == result.weight.shape and torch.equal(there.view(torch.int32), result.weight.cpu().contiguous().view(torch.int32))
