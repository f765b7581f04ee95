"""How does an engine load a checkpoint in the format that was written, and which engines do?

Formats go by what an arm or a config calls them (``gptq``, ``bitsandbytes``, ``compressed-tensors``, ``awq``, ``none`` for float weights).
Commands name the folder as ``MODEL``.
"""

from __future__ import annotations

from dataclasses import dataclass

from qmerge.extras import LOADERS, packages

NAMES = {"none": "float", "bitsandbytes": "nf4", "nf4": "nf4", "fp4": "fp4", "gptq": "gptq", "awq": "awq", "compressed-tensors": "compressed-tensors", "bf16": "bf16", "fp16": "fp16", "fp32": "fp32"}
FLOAT = ("none", "bf16", "fp16", "fp32", "merged", "original")
METHODS = {"nf4": "bitsandbytes", "fp4": "bitsandbytes"}
"""formats whose configs name another method"""


@dataclass(frozen=True)
class Engine:
    """``formats``: those that it loads from a folder; ``several``: serves several adapters on one base, picked per request, with this option."""

    name: str
    formats: tuple[str, ...]
    several: str


ENGINES = {
    "transformers": Engine("transformers", (*FLOAT, "gptq", "awq", "bitsandbytes", "nf4", "fp4", "compressed-tensors"), "PEFT's adapter_names"),
    "vllm": Engine("vLLM", (*FLOAT, "gptq", "awq", "bitsandbytes", "nf4", "compressed-tensors"), "--enable-lora"),
    "sglang": Engine("SGLang", (*FLOAT, "gptq", "awq", "bitsandbytes", "nf4", "compressed-tensors"), "--lora-paths"),
}

TRANSFORMERS = """from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("MODEL", dtype="auto", device_map="auto")
tokenizer = AutoTokenizer.from_pretrained("MODEL")
inputs = tokenizer("Hello", return_tensors="pt").to(model.device)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=20)[0], skip_special_tokens=True))"""


def format_name(kind: object) -> str:
    """What people call it: ``format_name("bitsandbytes") == "nf4"``."""
    return NAMES.get(str(kind), str(kind))


def loads(engine: str, kind: object) -> bool:
    return str(kind) in ENGINES[engine].formats


def snippets(kind: str) -> list[tuple[str, str, str]]:
    """(engine, language, code) for every engine that loads ``kind``."""
    needed = " ".join(("transformers", "accelerate", *packages(*LOADERS.get(METHODS.get(kind, kind), ()))))
    found = [("transformers", "python", f"# pip install torch {needed}\n{TRANSFORMERS}")]
    if loads("vllm", kind):
        found.append(("vLLM", "sh", "vllm serve MODEL"))
    if loads("sglang", kind):
        found.append(("SGLang", "sh", "python -m sglang.launch_server --model-path MODEL"))
    return found
