"""How does a model, as its public loader gave it, become plain fp32 linears?

The loader decides what the weights are; only then is every quantized linear replaced by ``nn.Linear`` with the values that the loaded
module itself dequantizes to. So arms differ in their weights and in nothing else: no kernel, no compute dtype.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from qmerge.errors import Refused


def make_plain(model: nn.Module) -> nn.Module:
    """``model`` itself, in eval mode, all parameters fp32, every bitsandbytes, gptqmodel (GPTQ, AWQ) and compressed-tensors
    linear replaced by ``nn.Linear``.

    Use it on a fresh load: where the CPU has AVX512-BF16, bitsandbytes repacks a ``Linear4bit`` in place at its first eval forward.
    Raises ``Refused`` for a quantized module of another kind.
    """
    for name, module in list(model.named_modules()):
        reader = _reader(module)
        if reader is not None:
            weight = reader(module)
            model.set_submodule(name, _linear(weight, getattr(module, "bias", None)))
        elif _is_foreign(module):
            raise Refused("a quantized module of a kind that evaluation cannot read", where=name,
                          expected="bitsandbytes 4-bit or 8-bit, gptqmodel GPTQ or AWQ, compressed-tensors", found=type(module).__name__)
    for parameter in model.parameters():
        # Buffers stay as they are: casting a rotary table through a 16-bit dtype would damage it.
        parameter.requires_grad_(False)
        parameter.data = parameter.data.float()
    _forget_quantization(model)
    return model.eval()


def dense_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """``{module name: weight [out, in]}`` of every ``nn.Linear`` and ``Conv1D``, as views; a PEFT model under the names of its base."""
    weights = {}
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, Conv1D)):
            if ".lora_" in name or ".modules_to_save." in name:
                continue
            weight = module.weight.data
            weights[name.removeprefix("base_model.model.").replace(".base_layer", "").replace(".original_module", "")] = weight.T if isinstance(module, Conv1D) else weight
    return weights


def place(model: nn.Module, device: str | torch.device) -> nn.Module:
    """Move to where it is measured: fp32 on the CPU, fp16 elsewhere."""
    return model if torch.device(device).type == "cpu" else move(model, device, torch.float16)


def move(model: nn.Module, device: str | torch.device, dtype: torch.dtype) -> nn.Module:
    """Parameters to ``device`` and ``dtype``; buffers keep their dtype: a rotary table in 16 bits loses positions."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(device, dtype)
    for module in model.modules():
        for key, buffer in module.named_buffers(recurse=False):
            module._buffers[key] = buffer.to(device)
    return model


def round_trip_nf4(weight: torch.Tensor, block_size: int, double_quant: bool, quant_type: str = "nf4") -> torch.Tensor:
    """Round ``[out, in]`` to NF4 (or FP4) and back, fp32, with bitsandbytes' own quantizer."""
    from bitsandbytes import functional

    codes, state = functional.quantize_4bit(weight.float().contiguous(), blocksize=block_size, compress_statistics=double_quant, quant_type=quant_type)
    return _dequantize(codes, state)


def _reader(module: nn.Module) -> Callable[[nn.Module], torch.Tensor] | None:
    names = {f"{cls.__module__.split('.')[0]}.{cls.__name__}" for cls in type(module).__mro__}
    if "bitsandbytes.Linear4bit" in names:
        return _bitsandbytes_weight
    if "bitsandbytes.Linear8bitLt" in names:
        return _int8_weight
    if "gptqmodel.AWQuantLinear" in names:
        return _awq_weight
    if "gptqmodel.BaseQuantLinear" in names and hasattr(type(module), "dequantize_weight"):
        return _gptqmodel_weight
    if hasattr(module, "weight_packed") and hasattr(module, "quantization_scheme"):
        return _compressed_weight
    return None


def _is_foreign(module: nn.Module) -> bool:
    # Everything that packs weights keeps integers: no module of a float model holds an integer parameter or these buffers.
    return any(not p.is_floating_point() for p in module.parameters(recurse=False)) or any(
        hasattr(module, key) for key in ("qweight", "weight_packed", "SCB")
    )


def _bitsandbytes_weight(module: Any) -> torch.Tensor:
    state = module.weight.quant_state
    if getattr(state, "packing_format_for_cpu", False):
        raise Refused("a bitsandbytes linear was already repacked by a forward pass; its weights can no longer be read exactly", fix="load it again")
    return _dequantize(module.weight.data, state)


def _dequantize(codes: torch.Tensor, state: Any) -> torch.Tensor:
    from bitsandbytes import functional

    exact = copy.copy(state)
    # As one row: bitsandbytes 0.50's AVX512 kernel misreads weights whose width is no multiple of the block size.
    exact.dtype, exact.shape = torch.float32, torch.Size((1, state.shape.numel()))
    return functional.dequantize_4bit(codes, quant_state=exact).reshape(tuple(state.shape)).float()


def _int8_weight(module: Any) -> torch.Tensor:
    """LLM.int8: a module that ran already has moved its scales from the weight to its state."""
    from bitsandbytes import functional

    scales = module.weight.SCB if getattr(module.weight, "SCB", None) is not None else module.state.SCB
    if module.weight.dtype != torch.int8 or scales is None:
        raise Refused("an LLM.int8 linear is not quantized", expected="int8 weights with SCB", found=str(module.weight.dtype),
                      fix="load it again, without llm_int8_has_fp16_weight")
    found: torch.Tensor = functional.int8_vectorwise_dequant(module.weight.data, scales.float())
    return found


def _awq_weight(module: Any) -> torch.Tensor:
    """gptqmodel's own AWQ dequantization, scales widened first: ``[in, out]``."""
    from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm

    size = module.in_features // module.scales.shape[0]
    found: torch.Tensor = dequantize_gemm(module.qweight, module.qzeros, module.scales.float(), module.bits, size).T.contiguous()
    return found


def _gptqmodel_weight(module: Any) -> torch.Tensor:
    """gptqmodel's dequantization gives ``[in, out]`` in the dtype of its scales, act-order undone through ``g_idx``."""
    module.scales.data = module.scales.data.float()
    # Taken from the class: the instance's own attribute is a torch.compile wrapper.
    weight: torch.Tensor = type(module).dequantize_weight(module)
    return weight.T[: module.out_features].float().contiguous()


def _compressed_weight(module: Any) -> torch.Tensor:
    """compressed-tensors' own decompression by the module's scheme, scales widened first: it computes in their dtype."""
    from compressed_tensors.compressors import BaseCompressor

    parts = {name: value.data for name, value in module.named_parameters(recurse=False) if name.startswith("weight_")}
    scheme = module.quantization_scheme
    compressor = BaseCompressor.get_value_from_registry(scheme.format or "pack-quantized")
    found: torch.Tensor = compressor.decompress(parts | {"weight_scale": parts["weight_scale"].float()}, scheme)["weight"].float()
    return found


def _linear(weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.detach(), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach().float(), requires_grad=False)
    return linear


def _forget_quantization(model: nn.Module) -> None:
    """Without these marks transformers and PEFT treat the model as what it now is, a float one."""
    for module in model.modules():
        for key in ("is_quantized", "quantization_method", "hf_quantizer", "is_loaded_in_4bit", "is_loaded_in_8bit", "quantize_config"):
            module.__dict__.pop(key, None)
        config = getattr(module, "config", None)
        if config is not None and getattr(config, "quantization_config", None) is not None:
            del config.quantization_config
