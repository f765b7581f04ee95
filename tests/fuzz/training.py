"""Does the reader of training configurations (how was the base quantized?) answer for any YAML or JSON?

An input is the file.
"""

from __future__ import annotations

from fuzz import yamlish
from fuzz.places import Broken, Seeds, folder, refused
from qmerge.errors import QmergeError
from qmerge.formats import BLOCK_SIZES
from qmerge.formats.training import OWN, recipe_from_adapter, recipe_from_file

WORDS = (
    *OWN, "bnb_4bit_quant_type", "load_in_4bit", "_load_in_8bit", "quant_method", "bitsandbytes", "quantization_config", "adapter", "qlora", "bnb_config_kwargs", "bf16", "fp16", "quantization_bit", "quantization_method", "bnb",
    "quantization_type", "double_quantization", "use_bnb_nested_quant", "use_peft", "torch_dtype", "nf4", "fp4", "bfloat16", "float16", "torch.float16", "auto",
)  # fmt: skip
MAX_LEN = 1024
_FOLDER = folder("training")
_FILE = _FOLDER / "training_args.yaml"
mutate = yamlish.mutator(WORDS)


def seeds() -> Seeds:
    transformers = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "llm_int8_skip_modules": ["lm_head"]}
    axolotl = {"adapter": "qlora", "load_in_4bit": True, "bnb_config_kwargs": {"bnb_4bit_quant_type": "nf4"}, "bf16": "auto"}
    factory = {"quantization_bit": 4, "quantization_method": "bnb", "double_quantization": False, "fp16": True}
    trl = {"load_in_4bit": True, "use_bnb_nested_quant": True, "bnb_4bit_quant_type": "nf4", "dtype": "bfloat16"}
    return yamlish.documents(transformers, {"quantization_config": transformers}, axolotl, factory, trl, {"block_size": 64, "double_quant": True, "skip": ["a"]})


def check(data: bytes) -> bool:
    _FILE.write_bytes(data)
    try:
        recipe_from_adapter({}, _FOLDER)
    except QmergeError as error:
        refused(error)
    try:
        recipe = recipe_from_file(_FILE)
    except QmergeError as error:
        return refused(error)
    if recipe.block_size not in BLOCK_SIZES["nf4"] or not isinstance(recipe.double_quant, bool) or not all(isinstance(name, str) for name in recipe.skip):
        raise Broken(f"{recipe}")
    return True
