"""Which public loader reads a finished checkpoint, and does it read all of it?

transformers first; gptqmodel's own where transformers stops or would leave weights at random. Kernels are the plain ones, which keep codes and scales as
stored.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, GPTQConfig

from qmerge.errors import Refused
from qmerge.extras import need_loader
from qmerge.store.checkpoint import open_checkpoint
from qmerge.store.foreign import check_model_folder
from qmerge.store.jsonfiles import read_object

PREFERRED_KERNEL = {"gptq": "gptq_torch", "awq": "torch_awq"}
GPTQMODEL_KERNEL = {"gptq": "gptq_torch", "awq": "awq_torch"}
_PATCHED = re.compile(r"transformers\.(models\..*\.modeling_\w+|conversion_mapping|modeling_utils)")


def load_public(path: str, method: str) -> tuple[nn.Module, str | None]:
    """A checkpoint as its public loader gives it, and a word on the loader where it is not transformers'. Refused as `check_model_folder`, before any of them opens a file."""
    check_model_folder(path)
    need_loader(method)
    if method == "compressed-tensors":
        return _from_compressed(path), None
    if method not in ("gptq", "awq"):
        return from_pretrained(path), None
    if quantization_config(path).get("lm_head"):
        return _from_gptqmodel(path, method, "it has no quantized head"), "GPTQModel.load; transformers reads no quantized head"
    try:
        model = from_pretrained(path, **_plain_kernel(path, method))
    except AttributeError as problem:
        # transformers 5.23 initializes a packed Conv1D (GPT-2) anew and stops; gptqmodel's own loader reads the file
        if method != "gptq":
            raise
        return _from_gptqmodel(path, method, problem), f"GPTQModel.load; transformers stops with: {problem}"
    if left := unread(path, model):
        # fused experts: transformers keeps them as they were initialized, and only reports it
        why = f"it leaves {left[0]} at random"
        return _from_gptqmodel(path, method, why), f"GPTQModel.load; transformers: {why}"
    return model, None


def unread(path: str, model: nn.Module) -> list[str]:
    """Packed modules of the file that the loaded model has no packed module for."""
    there = {name for name, module in model.named_modules() if hasattr(module, "qweight")}
    return sorted({name.removesuffix(".qweight") for name in open_checkpoint(path).specs if name.endswith(".qweight")} - there)


def _from_compressed(path: str) -> nn.Module:
    """transformers' loader, in fp32 throughout.

    One grid: it dequantizes while loading, in the dtype of the stored scales, so these are widened first. Several: transformers would read all as the first, so
    modules stay packed, which works for symmetric grids alone (transformers 5.23 builds packed zero points in another shape than the library stores).
    """
    import transformers

    groups = list((quantization_config(path).get("config_groups") or {}).values())
    if len(groups) > 1:
        if not all(group["weights"]["symmetric"] for group in groups):
            raise Refused("no loader here reads several asymmetric grids in one checkpoint", where=label(path), expected="one config group, or symmetric ones", found=f"{len(groups)} groups")
        return from_pretrained(path, quantization_config=transformers.CompressedTensorsConfig(dequantize=False))
    checkpoint = open_checkpoint(path)
    tensors = {name: checkpoint.load(name) for name in checkpoint.specs}
    tensors |= {name: tensor.float() for name, tensor in tensors.items() if name.endswith(".weight_scale")}
    try:
        config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=False)
        kind = _class_named(config.architectures)
        wish = transformers.CompressedTensorsConfig(dequantize=True)
        model, found = kind.from_pretrained(
            None, config=config, state_dict=tensors, dtype=torch.float32, device_map={"": "cpu"}, quantization_config=wish, output_loading_info=True
        )
    except (ValueError, KeyError, OSError, AttributeError, RuntimeError) as problem:
        raise Refused("transformers cannot load this checkpoint, so it cannot be measured", where=label(path), found=(str(problem).splitlines() or [type(problem).__name__])[0][:300], fix="qmerge verify OUT says whether the file is whole; config.json says which transformers wrote it: pip show transformers may be older") from problem
    if found["missing_keys"]:
        raise Refused("transformers finds no weights for a part of this checkpoint", where=label(path), expected="every parameter in the file", found=sorted(found["missing_keys"])[0], fix="qmerge verify OUT says whether the file is whole; if it is not, merge or download it again")
    loaded: nn.Module = model
    return loaded


def _class_named(architectures: Any) -> Any:
    """transformers' model class that a config names. Raises ValueError for every other word: any name of the package would do else, and it comes from the file."""
    import transformers

    name = architectures[0] if isinstance(architectures, list) and architectures else "none"
    kind = getattr(transformers, name, None) if isinstance(name, str) and name.isidentifier() else None
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        raise ValueError(f"transformers has no model class called {str(name)[:60]!r}")
    return kind


def quantization_config(path: str) -> dict[str, Any]:
    """The ``quantization_config`` of a checkpoint folder, ``{}`` for a float one."""
    if not (Path(path) / "config.json").exists():
        raise Refused("no checkpoint here", where=label(path), expected="a folder with config.json", found="no such file", fix="check the spelling; qmerge inspect PATH says what a folder is")
    found = read_object(Path(path) / "config.json", what="the model's config").get("quantization_config") or {}
    if not isinstance(found, dict):
        raise Refused("the config's quantization_config is malformed", where=label(path) + "/config.json", expected="an object", found=type(found).__name__)
    return found


def quantization_method(path: str) -> str:
    config = quantization_config(path)
    return str(config.get("quant_method") or ("bitsandbytes" if config.get("load_in_4bit") or config.get("load_in_8bit") else "none"))


def from_pretrained(path: str, dtype: torch.dtype | str = torch.float32, **options: Any) -> nn.Module:
    # On the CPU always: arms are read exactly there, and moved when they are measured.
    check_model_folder(path)
    try:
        return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, device_map={"": "cpu"}, trust_remote_code=False, use_safetensors=True, local_files_only=True, **options)
    except (ValueError, KeyError, OSError) as problem:
        raise Refused("transformers cannot load this checkpoint, so it cannot be measured", where=label(path), expected="a causal language model that transformers has",
                      found=(str(problem).splitlines() or [type(problem).__name__])[0][:300], fix="qmerge never runs remote code; qmerge merge --format bf16 works on tensors alone") from problem


def _from_gptqmodel(path: str, method: str, problem: object) -> nn.Module:
    with _classes_put_back(path):
        from gptqmodel import GPTQModel

        try:
            model: nn.Module = GPTQModel.load(path, device="cpu", backend=GPTQMODEL_KERNEL[method], trust_remote_code=False).model.eval()
            return model
        except (ValueError, RuntimeError, NotImplementedError) as second:
            raise Refused(f"no public loader reads this {method} checkpoint", where=label(path),
                          found=f"transformers: {problem}; gptqmodel: {str(second).splitlines()[0]}",
                          fix="use --sym, or --format nf4") from second


@contextmanager
def _classes_put_back(path: str) -> Iterator[None]:
    """gptqmodel puts classes and functions of its own into transformers' modules when it loads a model with experts, and leaves them there: models that this
    process builds afterwards would have other modules, and float ones wrong weights without a word."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    AutoModelForCausalLM._model_mapping.get(type(config), None)  # imports the module of the model's classes, so that it is among those kept
    kept = [(module, dict(vars(module))) for name, module in list(sys.modules.items()) if _PATCHED.fullmatch(name)]
    try:
        yield
    finally:
        for module, names in kept:
            vars(module).update(names)


def _plain_kernel(path: str, method: str) -> dict[str, Any]:
    """Ask for the torch kernel: it keeps plain codes and scales, where others repack them for their hardware."""
    stored = quantization_config(path)
    if method == "gptq":
        return {"quantization_config": GPTQConfig(bits=int(stored["bits"]), backend=PREFERRED_KERNEL["gptq"])}
    from transformers import AwqConfig

    backend: Any = PREFERRED_KERNEL["awq"]  # the config takes the kernel's name too
    return {"quantization_config": AwqConfig(bits=int(stored.get("bits", 4)), backend=backend)}


def label(path: str) -> str:
    """The last part of a path: local folders are in no message."""
    return Path(path).name or str(path)
