"""The merge of whatever bytes two folders hold, one number at a time: numpy's float32, safetensors' own reader, no code of qmerge's.

For rank 1 and a power of two as scaling, every step has one rounding, so the result is exact and can be compared bit for bit. Written after bitsandbytes' file format: even
element in the high nibble, ``absmax = nested_code[code] * nested_absmax + offset``.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

STATE = ".quant_state.bitsandbytes__nf4"
PARTS = ("", ".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", STATE)


def tensors_of(folder: Path, file: str) -> dict[str, torch.Tensor]:
    """Of one file, or of all that an index names."""
    index = folder / f"{file}.index.json"
    files = sorted(set(json.loads(index.read_text())["weight_map"].values())) if index.is_file() else [file]
    return {name: tensor for one in files for name, tensor in load_file(folder / one).items()}


def dequantized(tensors: dict[str, torch.Tensor], weight: str) -> np.ndarray:
    """fp32 ``[out, in]`` of one NF4 weight."""
    meta = json.loads(bytes(tensors[weight + STATE].tolist()))
    code, packed = tensors[weight + ".quant_map"].float().numpy(), tensors[weight].reshape(-1).numpy()
    absmax = tensors[weight + ".absmax"]
    if "nested_offset" in meta:
        nested, table = tensors[weight + ".nested_absmax"].float().numpy(), tensors[weight + ".nested_quant_map"].float().numpy()
        size, offset = meta["nested_blocksize"], np.float32(meta["nested_offset"])
        maxima = [np.float32(np.float32(table[int(step)] * nested[block // size]) + offset) for block, step in enumerate(absmax)]
    else:
        maxima = list(absmax.float().numpy())
    rows, columns = meta["shape"]
    flat = np.empty(rows * columns, dtype=np.float32)
    for position in range(rows * columns):
        byte = int(packed[position // 2])
        flat[position] = np.float32(code[byte & 15 if position % 2 else byte >> 4] * maxima[position // meta["blocksize"]])
    return flat.reshape(rows, columns)


def merged(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    """name -> tensor of the bf16 checkpoint; fp32 in between, one cast at the end. Tensors that are no floats are as they were."""
    tensors, low_rank = tensors_of(base, "model.safetensors"), tensors_of(adapter, "adapter_model.safetensors")
    config = json.loads((adapter / "adapter_config.json").read_text())
    packed = [name.removesuffix(STATE) for name in tensors if name.endswith(STATE)]
    inside = {weight + part for weight in packed for part in PARTS}
    floats = {weight: torch.from_numpy(dequantized(tensors, weight)) for weight in packed}
    floats |= {name: tensor.float() for name, tensor in tensors.items() if name not in inside and tensor.is_floating_point()}
    others = {name: tensor for name, tensor in tensors.items() if name not in inside and not tensor.is_floating_point()}
    root = math.sqrt(config["r"]) if config.get("use_rslora") else config["r"]
    for name in low_rank:
        if name.endswith(".lora_A.weight"):
            module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            left, right = low_rank[name.replace(".lora_A.", ".lora_B.")].float().numpy(), low_rank[name].float().numpy()
            assert left.shape[1] == 1, "one product per element, so one rounding"
            delta = (left * right).astype(np.float32) * np.float32(config["lora_alpha"] / root)
            weight = floats[f"{module}.weight"].numpy()
            floats[f"{module}.weight"] = torch.from_numpy((delta.astype(np.float32) + weight).astype(np.float32))
    return {name: tensor.to(torch.bfloat16) for name, tensor in floats.items()} | others
