"""By which recipe did a training run quantize its float base, judged by its configuration?

Read: bitsandbytes' own configuration as transformers saves it, and the files of Axolotl, LLaMA-Factory and TRL, with the defaults that each of them fills in.
What a file leaves open is asked for, never assumed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from qmerge.errors import Refused, UsageProblem
from qmerge.formats import BLOCK_SIZES
from qmerge.formats.nf4_recipe import Nf4Recipe
from qmerge.store.regular import read_plain
from qmerge.store.yamlfiles import MAX_BYTES, BadYaml, read_yaml

DTYPES = (None, "float32", "bfloat16", "float16")
OWN = ("block_size", "blocksize", "bnb_4bit_blocksize", "double_quant", "bnb_4bit_use_double_quant", "dtype", "skip", "llm_int8_skip_modules", "quant_type")
ACCEPTED = (
    "bnb_4bit_quant_type, bnb_4bit_use_double_quant, llm_int8_skip_modules (transformers, also inside quantization_config); "
    "adapter: qlora, load_in_4bit, bnb_config_kwargs, bf16 | fp16 (Axolotl); "
    "quantization_bit, quantization_method, quantization_type, double_quantization, bf16 | fp16 (LLaMA-Factory); "
    "load_in_4bit, use_bnb_nested_quant, bnb_4bit_quant_type, dtype (TRL); "
    "block_size, double_quant, quant_type, dtype, skip (qmerge)"
)


def recipe_from_file(path: str | Path) -> Nf4Recipe:
    """The recipe in a JSON or YAML file. Raises `UsageProblem` for a file that cannot be read or that says too little; it names the accepted keys."""
    file = Path(path)
    try:
        content = read_yaml(file)  # JSON is YAML
    except OSError as problem:
        raise UsageProblem("the NF4 recipe cannot be read", where=str(path), expected="double, single, or a JSON or YAML file",
                           found=problem.strerror, fix="--nf4-recipe double or single says it without a file") from problem
    except BadYaml as problem:
        raise UsageProblem("the NF4 recipe is neither JSON nor YAML", where=str(path), found=str(problem), fix="double, single, or a file with the quantization settings of the training") from problem
    if not isinstance(content, dict):
        raise UsageProblem("the NF4 recipe is not a mapping", where=str(path), expected=ACCEPTED, found=type(content).__name__, fix="--nf4-recipe double or single says it without a file")
    return recipe_from_mapping(content, str(path))


def recipe_from_mapping(mapping: Mapping[str, Any], where: str) -> Nf4Recipe:
    """The recipe that a training configuration stands for. Raises `UsageProblem` where it says another quantization than 4-bit bitsandbytes, or too little."""
    nested = mapping.get("quantization_config")
    while isinstance(nested, Mapping):  # a stranger's may lie in each other deeper than calls can
        mapping, where, nested = nested, f"{where}: quantization_config"[:400], nested.get("quantization_config")
    for speaks, read in _DIALECTS:
        if speaks(mapping):
            return read(mapping, where)
    fix = "say bnb_4bit_quant_type and bnb_4bit_use_double_quant: tools fill in different ones" if mapping.get("load_in_4bit") else None
    raise UsageProblem("the NF4 recipe says nothing that qmerge can interpret", where=where, expected=ACCEPTED,
                       found=", ".join(map(str, mapping))[:200] or "nothing", fix=fix)


def recipe_from_adapter(config: Mapping[str, Any], folder: str | Path) -> Nf4Recipe | None:
    """What an adapter's folder says of the base it was trained on; None where it says nothing.

    Looks into adapter_config.json (``config``), a config.json beside it, and the training_args.yaml that LLaMA-Factory's board leaves. Raises `Refused` where
    one of them names a quantization that qmerge does not make again.
    """
    places = [("adapter_config.json", config), *((name, _read_quietly(Path(folder) / name)) for name in ("config.json", "training_args.yaml"))]
    for name, content in places:
        nested = content.get("quantization_config")
        said = nested if isinstance(nested, Mapping) else content if content.get("quantization_bit") else None
        if not said or not _quantizes(said):
            continue
        try:
            return recipe_from_mapping(said, f"{Path(folder).name}/{name}")
        except UsageProblem as problem:
            raise Refused("the adapter says that it was trained on a base quantized in a way that qmerge does not make again", where=problem.where,
                          expected=problem.expected,
                          found=problem.found or problem.what, fix="give the quantized base itself, or say --nf4-recipe") from problem
    return None


def _read_quietly(path: Path) -> Mapping[str, Any]:
    """A side file that need not be there nor be for us."""
    try:
        content = json.loads(read_plain(path, MAX_BYTES)) if path.suffix == ".json" else read_yaml(path)
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, Mapping) else {}


def _quantizes(said: Mapping[str, Any]) -> bool:
    return any(said.get(key) for key in ("load_in_4bit", "load_in_8bit", "_load_in_4bit", "_load_in_8bit", "quantization_bit")) or "bnb_4bit_quant_type" in said


def _bitsandbytes(said: Mapping[str, Any], where: str) -> Nf4Recipe:
    """transformers' BitsAndBytesConfig. Its quant type defaults to fp4, which few mean; so it has to be there."""
    method = said.get("quant_method", "bitsandbytes")
    if method != "bitsandbytes":
        raise _wrong(where, "quant_method", "bitsandbytes", method)
    _need_4bit(said, where, default=True)
    if "bnb_4bit_quant_type" not in said:
        raise UsageProblem("the NF4 recipe does not say its 4-bit type", where=where, expected="bnb_4bit_quant_type: nf4 or fp4", found="none",
                           fix="transformers fills in fp4, most training scripts say nf4: add the one that was used")
    return _build(said, where, kind=said["bnb_4bit_quant_type"], double=_flag(said, "bnb_4bit_use_double_quant", where, False))


def _axolotl(said: Mapping[str, Any], where: str) -> Nf4Recipe:
    """Axolotl: NF4 with double quantization unless ``bnb_config_kwargs`` says otherwise; weights are cast before they are quantized (``bf16: auto``: a GPU
    that has it)."""
    if said.get("adapter") != "qlora":
        raise _wrong(where, "adapter", "qlora", said.get("adapter"))
    _need_4bit(said, where, default=False)
    changes = said.get("bnb_config_kwargs") or {}
    if not isinstance(changes, Mapping):
        raise _wrong(where, "bnb_config_kwargs", "a mapping", changes)
    dtype = "bfloat16" if said.get("bf16") or said.get("bfloat16") else "float16" if said.get("fp16") or said.get("float16") else "float32"
    return _build(changes, where, kind=changes.get("bnb_4bit_quant_type", "nf4"), double=_flag(changes, "bnb_4bit_use_double_quant", where, True), dtype=dtype)


def _llama_factory(said: Mapping[str, Any], where: str) -> Nf4Recipe:
    """LLaMA-Factory: bitsandbytes, NF4 and double quantization are its defaults."""
    if str(said["quantization_bit"]) != "4":
        raise _wrong(where, "quantization_bit", "4", said["quantization_bit"])
    method = said.get("quantization_method", "bnb")
    if str(method).lower() not in ("bnb", "bitsandbytes"):
        raise _wrong(where, "quantization_method", "bnb or bitsandbytes", method)
    dtype = "bfloat16" if said.get("bf16") or said.get("pure_bf16") else "float16" if said.get("fp16") else None
    return _build({}, where, kind=said.get("quantization_type", "nf4"), double=_flag(said, "double_quantization", where, True), dtype=dtype)


def _trl(said: Mapping[str, Any], where: str) -> Nf4Recipe:
    """TRL's ModelConfig: NF4, single quantization unless ``use_bnb_nested_quant``."""
    _need_4bit(said, where, default=False)
    dtype, double = said.get("dtype", said.get("torch_dtype")), _flag(said, "use_bnb_nested_quant", where, False)
    return _build({}, where, kind=said.get("bnb_4bit_quant_type", "nf4"), double=double, dtype=None if dtype == "auto" else dtype)


def _own(said: Mapping[str, Any], where: str) -> Nf4Recipe:
    double = _flag(said, "double_quant", where, _flag(said, "bnb_4bit_use_double_quant", where, False))
    return _build(said, where, kind=said.get("quant_type", "nf4"), double=double, dtype=said.get("dtype"))


_DIALECTS: tuple[tuple[Callable[[Mapping[str, Any]], bool], Callable[[Mapping[str, Any], str], Nf4Recipe]], ...] = (
    (lambda said: "quantization_bit" in said, _llama_factory),
    (lambda said: "adapter" in said or "bnb_config_kwargs" in said, _axolotl),
    (lambda said: "use_bnb_nested_quant" in said or "use_peft" in said, _trl),
    (lambda said: bool(said) and said.keys() <= set(OWN) and bool(said.keys() & {"block_size", "blocksize", "double_quant", "quant_type"}), _own),
    (lambda said: "quant_method" in said or any(str(key).startswith("bnb_4bit_") for key in said), _bitsandbytes),
)
"""how each kind of file is told from the others, and what reads it; the first that fits"""


def _build(said: Mapping[str, Any], where: str, *, kind: Any, double: bool, dtype: Any = None) -> Nf4Recipe:
    size = next((said[key] for key in ("block_size", "blocksize", "bnb_4bit_blocksize") if key in said), 64)
    own = said.get("skip")  # ours: an empty list says nothing, as in a manifest
    skip = said.get("llm_int8_skip_modules") if own is None or own == [] else own
    dtype = str(dtype).removeprefix("torch.") if dtype is not None else None
    if kind not in ("nf4", "fp4"):
        raise _wrong(where, "the 4-bit type", "nf4 or fp4", kind)
    if isinstance(size, bool) or size not in BLOCK_SIZES["nf4"]:
        raise _wrong(where, "the block size", ", ".join(map(str, BLOCK_SIZES["nf4"])), size)
    if dtype not in DTYPES:
        raise _wrong(where, "dtype", ", ".join(map(str, DTYPES)), dtype)
    if skip is not None and (not isinstance(skip, list) or not skip or not all(isinstance(name, str) and name for name in skip)):
        raise _wrong(where, "the modules to skip", "a list of names, or none (an empty list makes transformers quantize the output head too)", skip)
    return Nf4Recipe(int(size), double, dtype, tuple(skip or ()), kind)


def _need_4bit(said: Mapping[str, Any], where: str, default: bool) -> None:
    for key in ("load_in_8bit", "_load_in_8bit"):
        if said.get(key):
            raise _wrong(where, key, "load_in_4bit: true", said[key])
    if said.get("load_in_4bit", said.get("_load_in_4bit", default)) is not True:
        raise _wrong(where, "load_in_4bit", "true", said.get("load_in_4bit", said.get("_load_in_4bit")))


def _flag(said: Mapping[str, Any], key: str, where: str, default: bool) -> bool:
    value = said.get(key, default)
    if not isinstance(value, bool):
        raise _wrong(where, key, "true or false", value)
    return value


def _wrong(where: str, key: str, expected: str, found: Any) -> UsageProblem:
    return UsageProblem("the NF4 recipe says something that qmerge cannot do", where=where, expected=f"{key}: {expected}", found=repr(found),
                        fix=f"accepted: {ACCEPTED}")
