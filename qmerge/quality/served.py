"""How far is the reference from itself, in the arithmetic that its users run it in?

The noise floor of every divergence: base + adapter exactly as bitsandbytes and PEFT load and run them, against the same in fp32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from qmerge.adapters.choices import AdapterSet
from qmerge.quality.arms import four_bit_config, full_recipe, load_separate
from qmerge.quality.attach import attach
from qmerge.quality.loaders import quantization_method
from qmerge.quality.plain import move
from qmerge.quality.words import public
from qmerge.store.foreign import check_model_folder


def as_served(
    base: str, adapter: str | AdapterSet, *, on: str = "dequantized", nf4_recipe: dict[str, Any] | None = None, device: str | torch.device = "cpu"
) -> tuple[nn.Module, str]:
    """``(model on device, floor_source)``. Where bitsandbytes' kernel refuses the shapes, block size or device, the model is base + adapter in
    bf16 from dequantized weights instead, and ``floor_source`` says so and why."""
    recipe, method = full_recipe(nf4_recipe), quantization_method(base)
    float_base, packer = method == "none", "bitsandbytes" if method == "none" else method
    if float_base and on == "original":
        return _in_bf16(base, adapter, on, nf4_recipe, device), "bf16 of a float base"
    if float_base and recipe["block_size"] != 64:
        return _in_bf16(base, adapter, on, nf4_recipe, device), f"bf16 from dequantized weights (no loader takes block size {recipe['block_size']} from a float base)"
    check_model_folder(base)
    options: dict[str, Any] = {"use_safetensors": True}
    if float_base:
        options["quantization_config"] = four_bit_config(recipe, bnb_4bit_compute_dtype=torch.bfloat16)
        if recipe["dtype"]:
            options["dtype"] = getattr(torch, recipe["dtype"])
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(base, device_map={"": str(device)}, trust_remote_code=False, **options)
        model = attach(model, adapter, str(device))
        probe = model(input_ids=torch.zeros(1, 8, dtype=torch.int64, device=device), use_cache=False).logits
        if not bool(torch.isfinite(probe).all()):
            raise RuntimeError("its logits are not finite")
    except (RuntimeError, ValueError, AssertionError, NotImplementedError, AttributeError, ImportError) as error:
        reason = public((str(error).splitlines() or [type(error).__name__])[0])[:120]
        return _in_bf16(base, adapter, on, nf4_recipe, device), f"bf16 from dequantized weights ({packer} does not run here: {reason})"
    compute = {str(m.compute_dtype).removeprefix("torch.") for m in model.modules() if getattr(m, "compute_dtype", None) is not None}
    compute = compute or {str(model.get_base_model().dtype).removeprefix("torch.")}
    return model, f"{packer} {'/'.join(sorted(compute))} on {torch.device(device).type}, PEFT"


def _in_bf16(base: str, adapter: str | AdapterSet, on: str, nf4_recipe: dict[str, Any] | None, device: str | torch.device) -> nn.Module:
    return move(load_separate(base, adapter, on=on, nf4_recipe=nf4_recipe).model, device, torch.bfloat16)
