"""What do an NF4 base in the shape of Llama-3-8B and a LoRA adapter on it look like on disk, with random values?

bitsandbytes' names and quant states with double quantization, embeddings in bf16, shards and index. Written in pieces of at most a few
tens of megabytes: never the model in memory. Sizes are known from the shape alone. Left out: a tokenizer, a model that can speak.
"""

from __future__ import annotations

import json
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from qmerge.store.durable import sync, write_chunks, write_json

STD, EMBEDDING_STD, RELATIVE_DELTA, ALPHA = 0.02, 0.02, 0.01, 32
OFFSET, SPREAD = 0.04800000041723251, 0.007  # of a 64-block's absmax where weights are normal with STD: about 2.4 and 0.35 of it; fp32 values
NESTED_MAXIMUM = 3 * SPREAD  # what 256 normal deviations reach
SIZES = {"U8": 1, "BF16": 2, "F32": 4}
PIECE = 1 << 23  # elements
LINEARS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


@dataclass(frozen=True)
class Shape:
    """Llama-3-8B's, with as many layers as asked for."""

    layers: int = 32
    hidden: int = 4096
    ffn: int = 14336
    heads: int = 32
    kv_heads: int = 8
    vocab: int = 128256
    rank: int = 16
    shard_bytes: int = 5_000_000_000


@dataclass(frozen=True)
class Spec:
    """One stored tensor: safetensors' dtype, shape, and what it is filled with."""

    dtype: str
    shape: tuple[int, ...]
    fill: str
    content: bytes = b""
    """where the shape decides it"""

    @property
    def nbytes(self) -> int:
        return SIZES[self.dtype] * prod(self.shape)


def linears(shape: Shape) -> dict[str, tuple[int, int]]:
    """Module name to ``[out, in]`` of every quantized linear, in the order of the layers."""
    kv = shape.hidden // shape.heads * shape.kv_heads
    q, k, up = (shape.hidden, shape.hidden), (kv, shape.hidden), (shape.ffn, shape.hidden)
    sizes = dict(zip(LINEARS, (q, k, k, q, up, up, up[::-1]), strict=True))
    return {f"model.layers.{layer}.{name}": size for layer in range(shape.layers) for name, size in sizes.items()}


def floats(shape: Shape) -> dict[str, tuple[int, ...]]:
    """Tensors that stay bf16: embeddings, head, norms."""
    norms = [f"model.layers.{layer}.{name}.weight" for layer in range(shape.layers) for name in ("input_layernorm", "post_attention_layernorm")]
    tables = dict.fromkeys(("model.embed_tokens.weight", "lm_head.weight"), (shape.vocab, shape.hidden))
    return tables | dict.fromkeys((*norms, "model.norm.weight"), (shape.hidden,))


def base_specs(shape: Shape) -> dict[str, Spec]:
    """Every stored tensor of the base by name, layer by layer, the embedding first and the head last."""
    specs = {name: Spec("BF16", size, "norm" if len(size) == 1 else "embedding") for name, size in floats(shape).items()}
    for module, size in linears(shape).items():
        count, weight = prod(size), f"{module}.weight"
        blocks, state = -(-count // 64), quant_state(size)
        specs |= {
            weight: Spec("U8", (-(-count // 2), 1), "codes"),
            f"{weight}.absmax": Spec("U8", (blocks,), "absmax"),
            f"{weight}.quant_map": Spec("F32", (16,), "quant map"),
            f"{weight}.nested_absmax": Spec("F32", (-(-blocks // 256),), "nested absmax"),
            f"{weight}.nested_quant_map": Spec("F32", (256,), "nested quant map"),
            f"{weight}.quant_state.bitsandbytes__nf4": Spec("U8", (len(state),), "quant state", state),
        }

    def place(name: str) -> tuple[int, int]:
        parts = name.split(".")
        return (1, int(parts[2])) if parts[1] == "layers" else (0, 0) if "embed" in name else (2, 0)

    return {name: specs[name] for name in sorted(specs, key=place)}


def quant_state(size: tuple[int, int]) -> bytes:
    """bitsandbytes' JSON of a double-quantized weight."""
    meta = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": list(size)}
    return json.dumps(meta | {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": OFFSET}).encode()


def base_bytes(shape: Shape) -> int:
    return sum(spec.nbytes for spec in base_specs(shape).values())


def merged_bytes(shape: Shape) -> int:
    """Of the float model: two bytes per weight."""
    return 2 * sum(prod(size) for size in (linears(shape) | floats(shape)).values())


class Filler:
    """Random bytes for each kind of tensor, drawn from tables of 2^16 values. Seeded by name, so one tensor does not depend on the others."""

    def __init__(self) -> None:
        import numpy as np
        from bitsandbytes.functional import create_dynamic_map

        from qmerge.numerics.nf4 import NF4_LEVELS

        dice, count = np.random.default_rng(0), 1 << 16
        book = create_dynamic_map().numpy()
        self.fixed = {"quant map": np.array(NF4_LEVELS, "<f4").tobytes(), "nested quant map": book.astype("<f4").tobytes()}
        deviations = np.clip(dice.standard_normal(count) * SPREAD / NESTED_MAXIMUM, -1, 1)
        self.tables = {
            "embedding": as_bf16(dice.standard_normal(count) * EMBEDDING_STD),
            "norm": as_bf16(1 + dice.standard_normal(count) * 0.05),
            "absmax": np.searchsorted((book[1:] + book[:-1]) / 2, deviations).astype("u1"),
            "nested absmax": (NESTED_MAXIMUM * (1 + 0.1 * dice.standard_normal(count))).astype("<f4"),
        }

    def pieces(self, name: str, spec: Spec) -> Iterator[bytes]:
        """The bytes of one tensor, in order."""
        import numpy as np

        if spec.content or spec.fill in self.fixed:
            yield spec.content or self.fixed[spec.fill]
            return
        dice, total = np.random.default_rng(zlib.crc32(name.encode())), prod(spec.shape)
        for start in range(0, total, PIECE):
            count = min(PIECE, total - start)
            if spec.fill == "codes":
                yield dice.bytes(count)
            else:
                yield self.tables[spec.fill][dice.integers(0, 1 << 16, count, np.uint16)].tobytes()


def as_bf16(values: Any) -> Any:
    """The bits of ``values``, rounded to bf16, as int16."""
    import torch

    return torch.from_numpy(values).to(torch.bfloat16).view(torch.int16).numpy()


def write_base(folder: Path, shape: Shape) -> None:
    """A checkpoint folder that transformers and bitsandbytes load. ``folder`` must not exist."""
    folder.mkdir()
    filler, shards, size = Filler(), [{}], 0
    for name, spec in base_specs(shape).items():
        if shards[-1] and size + spec.nbytes > shape.shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = spec
        size += spec.nbytes
    weight_map = {}
    for number, specs in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_chunks(folder / file, safetensors_file(specs, filler))
        weight_map |= dict.fromkeys(specs, file)
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": base_bytes(shape)}, "weight_map": weight_map})
    write_json(folder / "config.json", config(shape))
    sync(folder)


def safetensors_file(specs: dict[str, Spec], filler: Filler) -> Iterator[bytes]:
    """Length, header, then each tensor's data: widest dtypes first, which keeps all of it aligned."""
    order = sorted(specs, key=lambda name: (-SIZES[specs[name].dtype], name))
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name in order:
        spec, start = specs[name], end
        end += spec.nbytes
        header[name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [start, end]}
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    yield len(raw).to_bytes(8, "little") + raw
    for name in order:
        yield from filler.pieces(name, specs[name])


def config(shape: Shape) -> dict[str, Any]:
    quantization = {
        "quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False, "_load_in_4bit": True, "_load_in_8bit": False,
        "bnb_4bit_compute_dtype": "bfloat16", "bnb_4bit_quant_storage": "uint8", "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True,
    }  # fmt: skip
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16", "hidden_act": "silu", "hidden_size": shape.hidden,
        "intermediate_size": shape.ffn, "num_attention_heads": shape.heads, "num_key_value_heads": shape.kv_heads, "num_hidden_layers": shape.layers,
        "vocab_size": shape.vocab, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "tie_word_embeddings": False,
        "bos_token_id": 128000, "eos_token_id": 128001, "attention_bias": False, "mlp_bias": False, "quantization_config": quantization,
    }  # fmt: skip


def write_adapter(folder: Path, shape: Shape, base_name: str) -> None:
    """A PEFT adapter, fp32, on all seven kinds of linears: ‖ΔW‖ is `RELATIVE_DELTA` of the ‖W‖ that `STD` and the code book give."""
    import torch
    from safetensors.torch import save_file

    from qmerge.numerics.nf4 import NF4_LEVELS

    folder.mkdir()
    generator, tensors = torch.Generator().manual_seed(1), {}
    code_rms = sum(level**2 for level in NF4_LEVELS) / 16
    weight_rms = (code_rms * (OFFSET**2 + SPREAD**2)) ** 0.5
    for module, (out, inputs) in linears(shape).items():
        a, b = torch.randn(shape.rank, inputs, generator=generator) / inputs**0.5, torch.randn(out, shape.rank, generator=generator)
        norm = float(((b.T @ b) * (a @ a.T)).sum().sqrt()) * ALPHA / shape.rank  # of B·A: tr(AᵀBᵀBA), without forming it
        tensors[f"base_model.model.{module}.lora_A.weight"] = a
        tensors[f"base_model.model.{module}.lora_B.weight"] = b * (RELATIVE_DELTA * weight_rms * (out * inputs) ** 0.5 / norm)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    targets = [name.split(".")[-1] for name in LINEARS]
    write_json(folder / "adapter_config.json", {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base_name, "r": shape.rank, "lora_alpha": ALPHA, "lora_dropout": 0.0,
        "target_modules": targets, "bias": "none", "fan_in_fan_out": False, "inference_mode": True, "init_lora_weights": True, "use_rslora": False,
        "use_dora": False, "modules_to_save": None, "rank_pattern": {}, "alpha_pattern": {}, "layers_to_transform": None, "layers_pattern": None,
    })  # fmt: skip
    sync(folder / "adapter_model.safetensors")
    sync(folder)


def main() -> None:
    """``synthetic_llama.py '{"base": …, "adapter": …, "shape": {…}}'``"""
    job = json.loads(sys.argv[1])
    shape = Shape(**job["shape"])
    write_base(Path(job["base"]), shape)
    write_adapter(Path(job["adapter"]), shape, Path(job["base"]).name)


if __name__ == "__main__":
    main()
