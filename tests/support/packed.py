"""Quantized bases of other kinds than NF4, as their own tools write them: bitsandbytes through transformers, and gptqmodel."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Zoo, build_tokenizer

GPTQ = {
    "gptq-4": {"bits": 4, "group_size": 32},
    "gptq-4-asym-act-v2": {"bits": 4, "group_size": 32, "sym": False, "desc_act": True, "format": "gptq_v2"},
    "gptq-3": {"bits": 3, "group_size": 32},
    "gptq-2-asym": {"bits": 2, "group_size": 64, "sym": False},
    "gptq-8": {"bits": 8, "group_size": -1, "act_group_aware": False},
    "awq": {"bits": 4, "group_size": 32, "sym": False, "method": "awq", "format": "gemm"},
}
BNB: dict[str, tuple[str, dict[str, Any]]] = {
    "nf4-odd": ("odd", {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}),
    "fp4": ("llama", {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}),
    "fp4-double-gpt2": ("gpt2", {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": True}),
    "nf4-as-bf16": ("llama", {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_quant_storage": "bfloat16"}),
    "nf4-as-fp32": ("llama", {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_quant_storage": "float32"}),
    "nf4-skipping": ("llama", {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "llm_int8_skip_modules": ["lm_head", "layers.1.mlp", "o_proj"]}),
    "int8": ("llama", {"load_in_8bit": True}),
    "int8-gpt2": ("gpt2", {"load_in_8bit": True}),
}


class Packed:
    """Checkpoints that transformers with bitsandbytes, or gptqmodel, wrote; each made once."""

    def __init__(self, root: Path, zoo: Zoo) -> None:
        self.root, self.zoo, self._made = root, zoo, {}
        os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
        os.environ.setdefault("GPTQMODEL_DISABLE_PACK_EXT", "1")  # its packer in Python: the other one is compiled for half a minute first

    def __call__(self, name: str) -> str:
        if name not in self._made:
            self._made[name] = str(self.root / name)
            (self._gptqmodel if name in GPTQ else self._bitsandbytes)(name, self._made[name])
            build_tokenizer().save_pretrained(self._made[name])
        return self._made[name]

    def float(self, kind: str) -> str:
        if kind == "odd":  # 150 is no multiple of the block size, nor of 4
            return self.zoo.float("llama", "odd", intermediate_size=150)
        return self.zoo.float(kind)

    def _bitsandbytes(self, name: str, folder: str) -> None:
        from transformers import AutoModelForCausalLM, BitsAndBytesConfig

        kind, wish = BNB[name]
        model = AutoModelForCausalLM.from_pretrained(self.float(kind), quantization_config=BitsAndBytesConfig(**wish), device_map={"": "cpu"})
        model.save_pretrained(folder, save_original_format=False)

    def _gptqmodel(self, name: str, folder: str) -> None:
        pytest.importorskip("gptqmodel"), pytest.importorskip("optimum")
        from gptqmodel import GPTQModel, QuantizeConfig

        dtype = torch.float16 if name == "awq" else torch.float32
        model = GPTQModel.load(self.zoo.float("llama"), QuantizeConfig(**GPTQ[name]), device="cpu", dtype=dtype)
        rows = torch.randint(2, 320, (16, 64), generator=torch.Generator().manual_seed(0))
        model.quantize([{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in rows], batch_size=1)
        model.save(folder)
