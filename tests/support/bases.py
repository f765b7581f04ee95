"""Which kinds of bases are there, and which float weights does each stand for?

Every kind is written tensor by tensor from one float checkpoint, together with its twin: the same checkpoint in fp32 with each packed weight replaced by what the packing library
(bitsandbytes) or a decoder of three lines (GPTQ, AWQ) makes of it. The twin, loaded by transformers, is what PEFT's adapter is attached to.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from support.architectures import Architecture

Packed = tuple[dict[str, torch.Tensor], torch.Tensor]
"""tensors by the ending that follows the module's name, and the weight ``[out, in]`` in fp32 that they stand for"""


@dataclass(frozen=True)
class Kind:
    """``pack``: None leaves linears float. ``config``: quantization_config of the file. ``flags``: what the merge is told. ``experts``: are experts packed too, one by one?"""

    title: str
    pack: Callable[[torch.Tensor], Packed] | None = None
    twin: Callable[[torch.Tensor], Packed] | None = None
    config: dict[str, Any] = field(default_factory=dict)
    flags: dict[str, Any] = field(default_factory=dict)
    experts: bool = False


def _four_bit(quant: str = "nf4", nested: bool = True, block: int = 64, storage: torch.dtype = torch.uint8) -> Callable[[torch.Tensor], Packed]:
    def pack(weight: torch.Tensor) -> Packed:
        from bitsandbytes import functional

        codes, state = functional.quantize_4bit(weight, blocksize=block, compress_statistics=nested, quant_type=quant, quant_storage=storage)
        tensors = {"weight": codes} | {f"weight.{key}": value for key, value in state.as_dict(packed=True).items()}
        state.dtype, state.shape = torch.float32, torch.Size((1, weight.numel()))  # as one row: see oracles.dequantized.loaded_weights
        return tensors, functional.dequantize_4bit(codes, state).reshape(weight.shape)

    return pack


def _int8(weight: torch.Tensor) -> Packed:
    from bitsandbytes import functional

    codes, scales, _ = functional.int8_vectorwise_quant(weight.half())
    return {"weight": codes, "SCB": scales, "weight_format": torch.tensor(0, dtype=torch.uint8)}, functional.int8_vectorwise_dequant(codes, scales).float()


GROUP = 16


def _codes(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Asymmetric 4-bit ``(codes [in, out], scales [groups, out] fp16, zeros [groups, out])`` by plain rounding; zeros of 1 to 15, as gptq v1 can store."""
    groups = weight.float().T.reshape(-1, GROUP, weight.shape[0])
    low, high = groups.amin(1).clamp(max=0), groups.amax(1).clamp(min=0)
    scales = ((high - low) / 15).clamp(min=1e-4).half()
    zeros = (-low / scales.float()).round().clamp(1, 15)
    codes = (groups / scales.float()[:, None] + zeros[:, None]).round().clamp(0, 15)
    return codes.reshape(weight.shape[1], -1).int(), scales, zeros.int()


def _decoded(codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor) -> torch.Tensor:
    spread = [part.repeat_interleave(GROUP, dim=0) for part in (scales.float(), zeros.float())]
    return ((codes.float() - spread[1]) * spread[0]).T.contiguous()


def _words(values: torch.Tensor, order: tuple[int, ...] = tuple(range(8))) -> torch.Tensor:
    """Eight 4-bit values of each row in one int32: value ``order[n]`` of a group of eight in bits ``4n`` and up."""
    groups = values.long().reshape(values.shape[0], -1, 8)[..., list(order)]
    words = sum(groups[..., n] << (4 * n) for n in range(8))
    return torch.where(words >= 2**31, words - 2**32, words).int()


def _gptq(weight: torch.Tensor) -> Packed:
    codes, scales, zeros = _codes(weight)
    order = torch.arange(weight.shape[1], dtype=torch.int32) // GROUP
    return {"qweight": _words(codes.T).T.contiguous(), "qzeros": _words(zeros - 1), "scales": scales, "g_idx": order}, _decoded(codes, scales, zeros)


AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def _awq(weight: torch.Tensor) -> Packed:
    codes, scales, zeros = _codes(weight)
    return {"qweight": _words(codes, AWQ_ORDER), "qzeros": _words(zeros, AWQ_ORDER), "scales": scales}, _decoded(codes, scales, zeros)


def _bnb(**settings: Any) -> dict[str, Any]:
    return {"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False} | settings


NF4 = _bnb(bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype="bfloat16", bnb_4bit_quant_storage="uint8")
SINGLE = {"bnb_4bit_use_double_quant": False}
_INTS = {"bits": 4, "group_size": GROUP, "desc_act": False, "sym": False}
KINDS = {
    "nf4": Kind("NF4, double quantization", _four_bit(), config=NF4),
    "nf4-single": Kind("NF4, single quantization", _four_bit(nested=False), config=NF4 | SINGLE),
    "nf4-128": Kind("NF4, blocks of 128", _four_bit(block=128), config=NF4),
    "nf4-256": Kind("NF4, blocks of 256, single quantization", _four_bit(block=256, nested=False), config=NF4 | SINGLE),
    "nf4-bf16": Kind("NF4, stored as bf16 (`bnb_4bit_quant_storage`, FSDP)", _four_bit(storage=torch.bfloat16), config=NF4 | {"bnb_4bit_quant_storage": "bfloat16"}),
    "nf4-experts": Kind("NF4, experts too, one by one (transformers 4)", _four_bit(), config=NF4, experts=True),
    "fp4": Kind("FP4", _four_bit("fp4", nested=False), config=NF4 | SINGLE | {"bnb_4bit_quant_type": "fp4"}),
    "fp4-double": Kind("FP4, double quantization", _four_bit("fp4"), config=NF4 | {"bnb_4bit_quant_type": "fp4"}),
    "int8": Kind("LLM.int8", _int8, config=_bnb(load_in_4bit=False, load_in_8bit=True)),
    "gptq": Kind("GPTQ, experts too", _gptq, config=_INTS | {"quant_method": "gptq", "checkpoint_format": "gptq"}, experts=True),
    "awq": Kind("AWQ (GEMM), experts too", _awq, config=_INTS | {"quant_method": "awq", "version": "gemm", "zero_point": True}, experts=True),
    "float": Kind("float, `--on original`", flags={"on": "original"}),
    "recipe-double": Kind("float, `--nf4-recipe double`", twin=_four_bit(), flags={"nf4_recipe": "double"}),
    "recipe-single": Kind("float, `--nf4-recipe single`", twin=_four_bit(nested=False), flags={"nf4_recipe": "single"}),
    "original": Kind("NF4, merged onto `--original` float", _four_bit(), config=NF4, flags={"on": "original"}),
}


@dataclass(frozen=True)
class Written:
    """``folder``: what qmerge reads; ``twin``: the float checkpoint that it stands for; ``source``: the float checkpoint that both were made of."""

    folder: Path
    twin: Path
    source: Path


def save_float(architecture: Architecture, folder: Path) -> Path:
    """A bf16 checkpoint as transformers writes it, biases and norms off their initial values."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(architecture.config(), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


def write_base(architecture: Architecture, kind: Kind, source: Path, folder: Path, twin: Path) -> Written:
    """``source`` as a base of this kind in ``folder``, and its float twin."""
    tensors = load_file(source / "model.safetensors")
    turned = _linears(source)
    wanted = {name for name in tensors if name in turned or (kind.experts and architecture.apart and re.search(r"experts\.\d+\.\w+\.weight$", name))}
    packed, floats = dict(tensors), {name: tensor.float() for name, tensor in tensors.items()}
    for name in sorted(wanted):
        weight = tensors[name].T.contiguous() if turned.get(name) else tensors[name]
        if kind.pack is not None:
            parts, dequantized = kind.pack(weight)
            del packed[name]
            packed |= {f"{name.removesuffix('weight')}{ending}": part for ending, part in parts.items()}
        elif kind.twin is not None:
            dequantized = kind.twin(weight)[1]
        if (kind.pack or kind.twin) and kind.flags.get("on") != "original":
            floats[name] = dequantized.T.contiguous() if turned.get(name) else dequantized
    _save(folder, source, packed, kind.config)
    _save(twin, source, floats, {})
    return Written(folder, twin, source)


def _linears(source: Path) -> dict[str, bool]:
    """Weights of linears but the head, and whether each lies ``[in, out]`` in the file."""
    from accelerate import init_empty_weights
    from torch import nn
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.pytorch_utils import Conv1D

    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source))
    return {f"{name}.weight": isinstance(module, Conv1D) for name, module in model.named_modules()
            if isinstance(module, (nn.Linear, Conv1D)) and module is not model.get_output_embeddings()}  # fmt: skip


def _save(folder: Path, source: Path, tensors: dict[str, torch.Tensor], quantization: dict[str, Any]) -> None:
    folder.mkdir(parents=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | ({"quantization_config": quantization} if quantization else {})))
    for extra in source.glob("generation_config.json"):
        shutil.copy(extra, folder)


def save_moving_adapter(base: str, folder: Path, trained_on: str, relative: float = 0.05, seed: int = 1, **lora: Any) -> str:
    """A PEFT adapter on every linear and, where there are routed experts, on their fused parameters; each delta is ``relative`` of its weight, every expert's too."""
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora import LoraLayer
    from torch import nn
    from transformers import AutoModelForCausalLM
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    head = model.get_output_embeddings()
    linears = [name for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D)) and module is not head]
    fused = [name for name, parameter in model.named_parameters() if parameter.dim() == 3 and name.rpartition(".")[0].endswith(".experts")]
    wish = {"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM", "init_lora_weights": False, "target_modules": linears, "target_parameters": fused or None} | lora
    model = get_peft_model(model, LoraConfig(**wish))
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, LoraLayer) and "default" in getattr(module, "lora_B", {}):
                weight = module.get_param() if hasattr(module, "get_param") else module.get_base_layer().weight
                module.lora_B["default"].weight.mul_(relative * weight.norm() / module.get_delta_weight("default").norm())
    model.peft_config["default"].base_model_name_or_path = trained_on
    model.save_pretrained(folder, save_embedding_layers=False)
    return str(folder)
