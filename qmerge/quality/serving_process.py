"""What does one arm cost to load and to run, in a process that does nothing else?

The child of `serving.py`: one job as JSON on stdin, one answer as JSON on stdout (what libraries print there goes to stderr). Models come through the public loaders as a
user calls them, in the dtype and with the kernel that those choose. Decoding is a loop of its own over ``model(…, past_key_values=…)``, greedy, always as many tokens as
asked for: ``generate`` would hide where prefill ends, and stop early.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from qmerge.device import PeakMemory, wait_for
from qmerge.extras import LOADERS, packages
from qmerge.types import known


def main(began: float) -> None:
    """``began``: `time.perf_counter` when the process had imported nothing yet."""
    answer_to = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    job = json.loads(sys.stdin.read())
    try:
        answer = measure(job, began)
    except Exception as problem:  # a loader can raise anything, and all of it is the answer
        answer = {"error": _first_line(problem)}
    with answer_to:
        json.dump(answer, answer_to)


def measure(job: dict[str, Any], began: float) -> dict[str, Any]:
    """``job``: ``path``, ``method``, ``adapter`` (None, or an AdapterSet as data), ``nf4_recipe``, ``device``, ``batches``, ``prompt_tokens``, ``new_tokens``, ``repeats``, ``seed``.

    Gives ``import_s``, ``load_s``, ``peak_load_bytes``, ``process_bytes`` (the process before it loads), ``batches`` {size: {"prefill_s", "decode_s": per repeat, "peak_prefill_bytes", "peak_decode_bytes"} or
    {"error"}}, ``kernel``, ``packages``, ``threads``, ``memory`` (what the peaks count), and ``loader`` where a plain ``from_pretrained`` did not do.
    """
    device, wanted = torch.device(job["device"]), (*(("peft",) if job["adapter"] else ()), *LOADERS.get(job["method"], ()))
    _import(job["path"], wanted)
    answer: dict[str, Any] = {"import_s": time.perf_counter() - began}
    if job["adapter"]:  # ours, which no server needs
        importlib.import_module("qmerge.quality.attach"), importlib.import_module("qmerge.quality.arms")
    _read_ahead(Path(job["path"]))
    memory = PeakMemory(device)
    answer["process_bytes"] = memory.peak()
    model, answer["loader"], began = _separate(job) if job["adapter"] else load_checkpoint(job["path"], job["method"], job["device"])
    wait_for(device)
    answer |= {"load_s": time.perf_counter() - began, "peak_load_bytes": memory.peak(), "memory": memory.how}
    model.eval()
    answer["batches"] = {str(size): _batch(model, size, job, memory) for size in job["batches"]}
    answer["kernel"] = kernel(model, job["prompt_tokens"])
    answer["packages"] = packages(*(name for name in wanted if name in sys.modules))
    answer["threads"] = torch.get_num_threads()
    return answer


def _import(path: str, packages: tuple[str, ...]) -> None:
    """What loading will import, so that the time to load is not the time to import. What is missing is for the loader to name."""
    from transformers import AutoConfig, AutoModelForCausalLM

    for name in packages:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    AutoModelForCausalLM._model_mapping.get(type(AutoConfig.from_pretrained(path, trust_remote_code=False)), None)  # imports the module of the model's classes


def load_checkpoint(path: str, method: str, device: str) -> tuple[nn.Module, str | None, float]:
    """A checkpoint folder as its users load it, a word where that took more than ``from_pretrained(path)``, and when the call that did it began (`time.perf_counter`)."""
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    options, began = {"device_map": {"": device}, "trust_remote_code": False, "use_safetensors": True}, time.perf_counter()
    try:
        model = AutoModelForCausalLM.from_pretrained(path, **options)
    except (RuntimeError, ValueError) as problem:
        if method != "compressed-tensors":
            raise
        # transformers 5.23 builds packed zero points in another shape than the library stores
        wish, began = CompressedTensorsConfig(dequantize=True), time.perf_counter()
        return AutoModelForCausalLM.from_pretrained(path, quantization_config=wish, **options), f"CompressedTensorsConfig(dequantize=True), as without it transformers stops: {_first_line(problem)}", began
    except AttributeError as problem:
        if method != "gptq":
            raise
        return _gptqmodel(path, device, f"transformers stops: {_first_line(problem)}")
    if method in ("gptq", "awq") and (left := _unread(path, model)):
        del model
        return _gptqmodel(path, device, f"transformers leaves {left[0]} at random")
    return model, None, began


def _gptqmodel(path: str, device: str, why: str) -> tuple[nn.Module, str, float]:
    from gptqmodel import GPTQModel

    began = time.perf_counter()
    return GPTQModel.load(path, device=device, trust_remote_code=False).model, f"GPTQModel.load, as {why}", began


def _unread(path: str, model: nn.Module) -> list[str]:
    from qmerge.quality.loaders import unread

    return unread(path, model)


def _separate(job: dict[str, Any]) -> tuple[nn.Module, str | None, float]:
    """Base and adapter as transformers and PEFT serve them; a float base is quantized while it loads, as QLoRA users do."""
    from transformers import AutoModelForCausalLM

    from qmerge.adapters.choices import AdapterSet, Choice, Combination
    from qmerge.quality.arms import four_bit_config
    from qmerge.quality.attach import attach

    began, told = time.perf_counter(), job["adapter"]
    options: dict[str, Any] = {"use_safetensors": True}
    adapter = AdapterSet(tuple(Choice(**choice) for choice in told["choices"]), Combination(**told["combination"]), told["residual_base"], told["allow_pickle"])
    if (recipe := job["nf4_recipe"]) is not None:
        if recipe["block_size"] != 64:
            raise ValueError(f"no public loader quantizes a float base to block size {recipe['block_size']} while loading")
        options["quantization_config"] = four_bit_config(recipe, bnb_4bit_compute_dtype=torch.bfloat16)
        if recipe["dtype"]:
            options["dtype"] = getattr(torch, recipe["dtype"])
    base = AutoModelForCausalLM.from_pretrained(job["path"], device_map={"": job["device"]}, trust_remote_code=False, **options)
    return attach(base, adapter, job["device"]), None, began


def _read_ahead(folder: Path) -> None:
    """The weights into the page cache, so that no arm pays for being the first to touch its file."""
    for file in folder.glob("*.safetensors"):
        with file.open("rb", buffering=0) as stream:
            while stream.read(1 << 24):
                pass


class _Laps:
    """Called at the borders of the phases. What it does itself (waiting, reading the peak) lies between ``stops`` and ``starts``, in no phase."""

    def __init__(self, device: torch.device, memory: PeakMemory) -> None:
        self.device, self.memory = device, memory
        self.stops: list[float] = []
        self.starts: list[float] = []
        self.peaks: list[int] = []

    def __call__(self) -> None:
        wait_for(self.device)
        self.stops.append(time.perf_counter())
        self.peaks.append(self.memory.peak())
        self.memory.reset()
        self.starts.append(time.perf_counter())

    def seconds(self) -> list[float]:
        return [stop - start for start, stop in zip(self.starts, self.stops[1:], strict=False)]


def _batch(model: Any, size: int, job: dict[str, Any], memory: PeakMemory) -> dict[str, Any]:
    """Peaks are over all turns, the warm-up's too: kernels repack weights then, and a server needs that memory as well."""
    device = torch.device(job["device"])
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.randint(0, vocabulary, (size, job["prompt_tokens"]), generator=torch.Generator().manual_seed(job["seed"])).to(device)
    turns = []
    try:
        for _ in range(1 + job["repeats"]):
            turns.append(_Laps(device, memory))
            greedy(model, ids, job["new_tokens"], turns[-1])
    except (RuntimeError, MemoryError, NotImplementedError) as problem:  # one batch that does not fit leaves the others
        return {"error": _first_line(problem)}
    prefill, decode = zip(*(turn.seconds() for turn in turns[1:]), strict=True)
    peaks = {f"peak_{phase}_bytes": max(turn.peaks[index] for turn in turns) for index, phase in ((1, "prefill"), (2, "decode"))}
    return {"prefill_s": list(prefill), "decode_s": list(decode)} | peaks


@torch.inference_mode()
def greedy(model: nn.Module, ids: torch.Tensor, new: int, mark: Callable[[], None]) -> torch.Tensor:
    """``new`` + 1 greedy tokens ``[batch, new + 1]`` after ``ids`` ``[batch, prompt]``. ``mark`` is called at the start, when the first token is there, and at the end, ``new`` steps later."""
    mark()
    out = model(input_ids=ids, use_cache=True, **_last_only(model))
    tokens = [out.logits[:, -1:].argmax(-1)]
    mark()
    for _ in range(new):
        out = model(input_ids=tokens[-1], past_key_values=out.past_key_values, use_cache=True)
        tokens.append(out.logits[:, -1:].argmax(-1))
    mark()
    return torch.cat(tokens, 1)


def _last_only(model: Any) -> dict[str, int]:
    """As ``generate`` does: no head over the whole prompt, where the class can leave it out."""
    import inspect

    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(inner.forward).parameters else {}


class _Seen(TorchDispatchMode):
    """Names of the operators that run, those inside a fused one left out."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's, without types
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@torch.inference_mode()
def kernel(model: Any, prompt: int) -> str:
    """The class of most linears but the head, as loaded, with its package, and the operators that it was seen to run for one token (and for a prompt, where other)."""
    linears = list(_linears(model))
    if not linears:
        return "no linear layer that is known here"
    chosen = Counter(type(module) for module in linears).most_common(1)[0][0]
    module = next(module for module in linears if type(module) is chosen)
    name = f"{chosen.__name__} ({chosen.__module__.split('.')[0]})"
    status = getattr(getattr(module, "quantization_status", None), "value", None)
    if status:
        name += f", compressed-tensors {status}"
    if hasattr(module, "base_layer"):
        below = type(module.base_layer)
        name += f" on {below.__name__} ({below.__module__.split('.')[0]})"
    one, many = (_operators(module, tokens, model.dtype) for tokens in (1, prompt))
    return f"{name}: {one}" if one == many else f"{name}: {one}; for a prompt {many}"


def _linears(model: Any) -> Iterator[nn.Module]:
    """Linears as the model calls them: a LoRA layer stands for what it wraps."""
    head = model.get_output_embeddings()
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if name.startswith(inside) or module is head:
            continue
        if hasattr(module, "base_layer"):
            inside = (*inside, f"{name}.")
        if _width(module) is not None:
            yield module


def _width(module: nn.Module) -> int | None:
    """Inputs of a linear; None for what is none."""
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, Conv1D):
        return int(module.nx)
    return getattr(module, "in_features", None) if isinstance(module, nn.Linear) or hasattr(module, "qweight") or hasattr(module, "base_layer") else None


def _operators(module: nn.Module, tokens: int, dtype: torch.dtype) -> str:
    held = next(iter((*module.parameters(), *module.buffers())))
    x = torch.randn(1, tokens, known(_width(module)), dtype=dtype, device=held.device)
    with _Seen() as seen:
        module(x)
    names = list(dict.fromkeys(name.split(".")[0] for name in seen.names))
    own = [name for name in names if not name.startswith(("aten::", "prims::"))]
    products = [name for name in names if name.startswith("aten::") and any(part in name for part in ("mm", "matmul", "linear", "mv"))]
    packed = hasattr(getattr(module, "base_layer", module), "qweight")
    return ("dequantized at every call, then " if packed and not own and "aten::_weight_int4pack_mm_for_cpu" not in products else "") + (", ".join([*own, *products]) or "no operator that is known here")


def _first_line(problem: BaseException) -> str:
    return f"{type(problem).__name__}: {(str(problem).strip().splitlines() or [''])[0][:300]}"
