"""Which models does an evaluation compare, and how are they loaded?

Every arm comes through the loader that its users use, then becomes plain fp32 linears (``plain.py``). Arms: ``base`` (the NF4 base
alone), ``separate`` (base + adapter, the reference), ``merged`` (W + ΔW in fp32, in memory), candidates (folders on disk), and on
request ``rtn`` (merged, rounded back to NF4) and ``original`` (the adapter merged into the float base).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, GPTQConfig

from qmerge.errors import Refused, UsageProblem
from qmerge.quality.merging import merge_in_memory
from qmerge.quality.plain import dense_weights, make_plain, round_trip_nf4

NF4_DEFAULT: dict[str, Any] = {"block_size": 64, "double_quant": True, "dtype": None}
"""``dtype`` is what the float weights were cast to before they were rounded; None: as the file holds them"""
PREFERRED_KERNEL = {"gptq": "gptq_torch", "awq": "torch_awq"}


@dataclass
class Arm:
    """``kind`` is ``base``, ``separate``, ``merged``, ``rtn``, ``original`` or the quantization method of a candidate (``none``: float).

    ``nbytes`` counts weight files on disk; for arms that exist in memory only, what a checkpoint of them would take (``bytes_note`` says how).
    """

    name: str
    kind: str
    model: nn.Module
    nbytes: int | None
    path: str | None = None
    bytes_note: str | None = None
    loader: str | None = None
    """said where a checkpoint could not be loaded by transformers and another public loader read it"""


def load_base(base: str, *, on: str = "dequantized", nf4_recipe: dict[str, Any] | None = None) -> Arm:
    """Arm A. An NF4 checkpoint through bitsandbytes; a float one rounded to NF4 while loading, as QLoRA training does, unless ``on`` is ``original``."""
    method = quantization_method(base)
    if method not in ("none", "bitsandbytes"):
        raise Refused("the base is neither float nor NF4", where=_label(base), expected="a float or bitsandbytes NF4 checkpoint", found=method)
    if on == "original" and method == "none":
        return Arm("base", "base", make_plain(_from_pretrained(base)), weight_bytes(base), base)
    if method == "bitsandbytes":
        return Arm("base", "base", make_plain(_from_pretrained(base)), weight_bytes(base), base)
    recipe = full_recipe(nf4_recipe)
    dtype = getattr(torch, recipe["dtype"]) if recipe["dtype"] else "auto"
    if recipe["block_size"] == 64:  # what transformers' configuration can express
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=recipe["double_quant"])
        return Arm("base", "base", make_plain(_from_pretrained(base, dtype=dtype, quantization_config=config)), weight_bytes(base), base)
    model = make_plain(_from_pretrained(base, dtype=dtype))
    return Arm("base", "base", _rounded(model, _all_but_head(model), recipe), weight_bytes(base), base)


def load_separate(base: str, adapter: str, *, on: str = "dequantized", nf4_recipe: dict[str, Any] | None = None) -> Arm:
    """Arm B, the reference: PEFT's own loader on arm A."""
    below = load_base(base, on=on, nf4_recipe=nf4_recipe)
    size = None if below.nbytes is None else below.nbytes + (weight_bytes(adapter) or 0)
    return Arm("separate", "separate", attach(below.model, adapter), size, adapter)


def load_merged(base: str, adapter: str, *, on: str = "dequantized", nf4_recipe: dict[str, Any] | None = None, original: str | None = None) -> Arm:
    """Arm C: W + ΔW in fp32. With ``on='original'`` and an NF4 base, W is the float base ``original``."""
    if on == "original" and quantization_method(base) != "none":
        if original is None:
            raise UsageProblem("merging into the original float base needs the base", expected="--original PATH", found="none")
        below = load_base(original, on="original")
    else:
        below = load_base(base, on=on, nf4_recipe=nf4_recipe)
    merge_in_memory(below.model, adapter)
    return Arm("merged", "merged", below.model, 2 * _elements(below.model), None, "as a bf16 checkpoint")


def load_rtn(base: str, adapter: str, *, on: str = "dequantized", nf4_recipe: dict[str, Any] | None = None) -> Arm:
    """Arm F: arm C rounded to the nearest NF4 value, as ``merge_and_unload`` on a 4-bit model does."""
    merged = load_merged(base, adapter, on=on, nf4_recipe=nf4_recipe)
    names, recipe = _all_but_head(merged.model), full_recipe(nf4_recipe)
    if quantization_method(base) == "bitsandbytes":
        names, recipe = nf4_layout(base)
    rounded = _rounded(merged.model, names, recipe)
    small = sum(w.numel() for n, w in dense_weights(rounded).items() if n in names)
    per_block = 1 + 4 / 256 if recipe["double_quant"] else 4
    size = int(small / 2 + small / recipe["block_size"] * per_block) + 2 * (_elements(rounded) - small)
    return Arm("rtn", "rtn", rounded, size, None, "as an NF4 checkpoint, the rest bf16")


def load_original(original: str, adapter: str) -> Arm:
    """Arm E: the adapter merged into a float base that it was not trained on."""
    below = load_base(original, on="original")
    merge_in_memory(below.model, adapter)
    return Arm("original", "original", below.model, 2 * _elements(below.model), original, "as a bf16 checkpoint")


def load_candidate(name: str, path: str) -> Arm:
    """Arm D: a finished checkpoint, through the loader that its config names."""
    method = quantization_method(path)
    options: dict[str, Any] = {}
    if method in ("gptq", "awq"):
        _need("gptqmodel", "gptq"), _need("optimum", "gptq")
        options = _plain_kernel(path, method)
    elif method == "compressed-tensors":
        _need("compressed_tensors", "compressed")
        from transformers import CompressedTensorsConfig

        options["quantization_config"] = CompressedTensorsConfig(dequantize=True)
    elif method not in ("none", "bitsandbytes"):
        raise Refused("evaluation does not know this quantization", where=_label(path), expected="none, bitsandbytes, gptq, compressed-tensors", found=method)
    loader = None
    try:
        model = _from_pretrained(path, **options)
    except AttributeError as problem:
        # transformers 5.23 initializes a packed Conv1D (GPT-2) anew and stops; gptqmodel's own loader reads the file
        if method != "gptq":
            raise
        model, loader = _from_gptqmodel(path, problem), f"GPTQModel.load; transformers stops with: {problem}"
    return Arm(name, method, make_plain(model), weight_bytes(path), path, loader=loader)


def attach(model: nn.Module, adapter: str, device: str = "cpu") -> nn.Module:
    """PEFT's loader; grows the embeddings first where the adapter's folder brings a tokenizer with more tokens than the base has rows."""
    if (Path(adapter) / "tokenizer_config.json").is_file():
        wanted = len(AutoTokenizer.from_pretrained(adapter, trust_remote_code=False))
        if wanted > model.get_input_embeddings().weight.shape[0]:
            model.resize_token_embeddings(wanted)
    return PeftModel.from_pretrained(model, adapter, is_trainable=False, torch_device=device).eval()


def quantization_config(path: str) -> dict[str, Any]:
    """The ``quantization_config`` of a checkpoint folder, ``{}`` for a float one."""
    file = Path(path) / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise Refused("no checkpoint here", where=_label(path), expected="a folder with config.json", found=error.strerror) from error
    except ValueError as error:
        raise Refused("the config is not JSON", where=_label(path) + "/config.json", found=str(error)) from error
    return config.get("quantization_config") or {}


def quantization_method(path: str) -> str:
    config = quantization_config(path)
    method = config.get("quant_method") or ("bitsandbytes" if config.get("load_in_4bit") else "none")
    if method == "bitsandbytes" and config.get("load_in_8bit"):
        raise Refused("the checkpoint is LLM.int8, not NF4", where=_label(path), expected="load_in_4bit", found="load_in_8bit")
    return str(method)


def nf4_layout(base: str) -> tuple[set[str], dict[str, Any]]:
    """Which linears an NF4 checkpoint rounds, and its ``block_size`` and ``double_quant``, which its config does not hold: asked of the loaded modules."""
    states = {}
    for name, module in _from_pretrained(base).named_modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is not None:
            states[name] = {"block_size": int(state.blocksize), "double_quant": bool(state.nested)}
    if not states:
        raise Refused("the base says NF4 and no linear of it is", where=_label(base), expected="Linear4bit modules", found="none")
    return set(states), next(iter(states.values()))


def weight_bytes(path: str) -> int | None:
    folder = Path(path)
    if not folder.is_dir():
        return None
    files = [f for pattern in ("*.safetensors", "pytorch_model*.bin", "adapter_model.bin") for f in folder.glob(pattern)]
    return sum(f.stat().st_size for f in files)


def full_recipe(recipe: dict[str, Any] | None) -> dict[str, Any]:
    """``recipe`` with the defaults filled in; ``UsageProblem`` for an unknown key or value."""
    given = recipe or {}
    dtypes = (None, "float32", "bfloat16", "float16")
    wrong = [k for k in given if k not in NF4_DEFAULT] + ([] if given.get("dtype") in dtypes else [f"dtype {given['dtype']!r}"])
    if wrong:
        raise UsageProblem("the NF4 recipe is malformed", expected=f"{', '.join(NF4_DEFAULT)}; dtype one of {dtypes}", found=", ".join(wrong))
    return NF4_DEFAULT | given


def _from_pretrained(path: str, dtype: torch.dtype | str = torch.float32, **options: Any) -> nn.Module:
    # On the CPU always: arms are read exactly there, and moved when they are measured.
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, device_map={"": "cpu"}, trust_remote_code=False, **options)


def _from_gptqmodel(path: str, problem: Exception) -> nn.Module:
    from gptqmodel import GPTQModel

    try:
        return GPTQModel.load(path, device="cpu", backend="gptq_torch").model.eval()
    except (ValueError, RuntimeError, NotImplementedError) as second:
        raise Refused("no public loader reads this gptq checkpoint", where=_label(path), found=f"transformers: {problem}; gptqmodel: {str(second).splitlines()[0]}",
                      fix="use --sym, or --format nf4") from second


def _plain_kernel(path: str, method: str) -> dict[str, Any]:
    """Ask for the torch kernel: it keeps plain codes and scales, where others repack them for their hardware."""
    stored = quantization_config(path)
    if method == "gptq":
        return {"quantization_config": GPTQConfig(bits=int(stored["bits"]), backend=PREFERRED_KERNEL["gptq"])}
    from transformers import AwqConfig

    return {"quantization_config": AwqConfig(bits=int(stored.get("bits", 4)), backend=PREFERRED_KERNEL["awq"])}


def _need(module: str, extra: str) -> None:
    import importlib.util

    if importlib.util.find_spec(module) is None:
        raise UsageProblem(f"loading this checkpoint needs {module}, which is not installed", fix=f"pip install 'qmerge[{extra}]'")


def _all_but_head(model: nn.Module) -> set[str]:
    """What bitsandbytes rounds in a float model: every linear but the output head."""
    head = model.get_output_embeddings()
    return {n for n in dense_weights(model) if model.get_submodule(n) is not head}


def _rounded(model: nn.Module, names: set[str], recipe: dict[str, Any]) -> nn.Module:
    for name, weight in dense_weights(model).items():
        if name in names:
            weight.copy_(round_trip_nf4(weight, recipe["block_size"], recipe["double_quant"]))
    return model


def _elements(model: nn.Module) -> int:
    return sum(p.numel() for p in {id(p): p for p in model.parameters()}.values())


def _label(path: str) -> str:
    return Path(path).name or str(path)
