"""fp32 models made of other people's code: the base as bitsandbytes dequantizes it, PEFT's adapter on top, and any model filled with given weights."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D


def nf4_weights(folder: str) -> dict[str, torch.Tensor]:
    """Module name -> fp32 ``[out, in]`` of every 4-bit linear, through transformers' loader and bitsandbytes' dequantization."""
    from transformers import AutoModelForCausalLM

    return loaded_weights(AutoModelForCausalLM.from_pretrained(folder, device_map={"": "cpu"}))


def fill(model: nn.Module, weights: Mapping[str, torch.Tensor]) -> nn.Module:
    """``model`` with its linears set to ``weights`` (``[out, in]`` by module name); a Conv1D gets the transpose."""
    for name, weight in weights.items():
        module = model.get_submodule(name)
        module.weight = nn.Parameter(weight.T.contiguous() if isinstance(module, Conv1D) else weight.contiguous(), requires_grad=False)
    return model.eval()


def base_model(float_folder: str, nf4_folder: str | None) -> nn.Module:
    """The base in fp32: the float folder's model, its linears replaced by what the NF4 folder's dequantize to."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(float_folder, dtype=torch.float32)
    return fill(model, nf4_weights(nf4_folder) if nf4_folder else {})


def separate_model(float_folder: str, nf4_folder: str | None, adapter: str) -> nn.Module:
    """The reference: PEFT's adapter kept apart on `base_model`."""
    from peft import PeftModel

    return PeftModel.from_pretrained(base_model(float_folder, nf4_folder), adapter).eval()


@torch.no_grad()
def logits(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids).logits.float()


def divergence(reference: torch.Tensor, candidate: torch.Tensor) -> float:
    """Mean KL(reference ‖ candidate) in nats per token."""
    p, q = reference.double().log_softmax(-1), candidate.double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def load_public(folder: str, kernel: str | None = "gptq_torch") -> nn.Module:
    """A finished checkpoint as a user loads it. gptq: gptqmodel's plain torch kernel, unless ``kernel`` is None; its other CPU kernels compile for minutes first."""
    import json
    from pathlib import Path

    from transformers import AutoModelForCausalLM, GPTQConfig

    method = json.loads((Path(folder) / "config.json").read_text()).get("quantization_config", {}).get("quant_method")
    options = {"quantization_config": GPTQConfig(bits=4, backend=kernel)} if method == "gptq" and kernel else {}
    return AutoModelForCausalLM.from_pretrained(folder, device_map={"": "cpu"}, **options).eval()


def loaded_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Module name -> fp32 ``[out, in]`` of every quantized linear of a freshly loaded model, as bitsandbytes and gptqmodel themselves dequantize it."""
    from bitsandbytes import functional

    found = {}
    for name, module in model.named_modules():
        if type(module).__name__ == "Linear4bit":
            state = copy.copy(module.weight.quant_state)
            out, inputs = state.shape
            # as one row: bitsandbytes' AVX512 kernel (0.50.2) is wrong for [out, in] where 16 divides ``in`` and the block size does not
            state.dtype, state.shape = torch.float32, torch.Size((1, out * inputs))
            found[name] = functional.dequantize_4bit(module.weight.data, state).reshape(out, inputs)
        elif hasattr(module, "qweight"):
            kept = module.scales.data
            module.scales.data = kept.float()
            found[name] = type(module).dequantize_weight(module).T.float().contiguous()
            module.scales.data = kept
    return found
