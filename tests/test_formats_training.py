"""Which recipe a training configuration stands for, and which ones say too little."""

from __future__ import annotations

import json

import pytest
import yaml
from transformers import BitsAndBytesConfig

from qmerge.errors import Refused, UsageProblem
from qmerge.formats.nf4_recipe import Nf4Recipe
from qmerge.formats.training import recipe_from_adapter, recipe_from_file, recipe_from_mapping

AXOLOTL = {"base_model": "m", "adapter": "qlora", "load_in_4bit": True, "bf16": "auto"}
LLAMA_FACTORY = {"model_name_or_path": "m", "finetuning_type": "lora", "quantization_bit": 4, "bf16": True}
TRL = {"model_name_or_path": "m", "use_peft": True, "load_in_4bit": True}
CASES = {
    "bitsandbytes": ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}, Nf4Recipe(64, True)),
    "bitsandbytes fp4": ({"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}, Nf4Recipe(64, False, quant_type="fp4")),
    "nested": ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}}, Nf4Recipe(64, False)),
    "skip": ({"bnb_4bit_quant_type": "nf4", "llm_int8_skip_modules": ["lm_head", "gate"]}, Nf4Recipe(64, False, skip=("lm_head", "gate"))),
    "axolotl": (AXOLOTL, Nf4Recipe(64, True, "bfloat16")),
    "axolotl fp16": (AXOLOTL | {"bf16": False, "fp16": True}, Nf4Recipe(64, True, "float16")),
    "axolotl single": (AXOLOTL | {"bnb_config_kwargs": {"bnb_4bit_use_double_quant": False, "llm_int8_skip_modules": ["lm_head"]}}, Nf4Recipe(64, False, "bfloat16", ("lm_head",))),
    "llama-factory": (LLAMA_FACTORY, Nf4Recipe(64, True, "bfloat16")),
    "llama-factory single fp4": (LLAMA_FACTORY | {"double_quantization": False, "quantization_type": "fp4", "quantization_method": "bnb"}, Nf4Recipe(64, False, "bfloat16", (), "fp4")),
    "trl": (TRL, Nf4Recipe(64, False)),
    "trl nested": (TRL | {"use_bnb_nested_quant": True, "dtype": "bfloat16"}, Nf4Recipe(64, True, "bfloat16")),
    "own": ({"blocksize": 128, "double_quant": False, "dtype": "bfloat16"}, Nf4Recipe(128, False, "bfloat16")),
}
REFUSED = {
    "nothing known": {"other": 1},
    "whose defaults": {"load_in_4bit": True},
    "no type": {"bnb_4bit_use_double_quant": True},
    "8 bits": {"load_in_8bit": True, "bnb_4bit_quant_type": "nf4"},
    "another library": {"quantization_config": {"quant_method": "gptq", "bits": 4}},
    "another type": {"bnb_4bit_quant_type": "int4"},
    "no flag": {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": "yes"},
    "empty skip": {"bnb_4bit_quant_type": "nf4", "llm_int8_skip_modules": []},
    "axolotl lora": AXOLOTL | {"adapter": "lora"},
    "axolotl float": AXOLOTL | {"load_in_4bit": False},
    "llama-factory 8": LLAMA_FACTORY | {"quantization_bit": 8},
    "llama-factory hqq": LLAMA_FACTORY | {"quantization_method": "hqq"},
    "trl float": TRL | {"load_in_4bit": False},
    "block size": {"block_size": 96, "double_quant": True},
    "dtype": {"block_size": 64, "double_quant": True, "dtype": "int8"},
    "own typo": {"double_quant": True, "blok_size": 128},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("suffix", ["json", "yaml"])
def test_what_a_configuration_stands_for(tmp_path, case, suffix):
    """A tool's default that is not the one which that tool fills in: another base than the adapter was trained on."""
    content, wanted = CASES[case]
    path = tmp_path / f"config.{suffix}"
    path.write_text(json.dumps(content) if suffix == "json" else yaml.safe_dump(content))
    assert recipe_from_file(path) == recipe_from_mapping(content, "here") == wanted


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_guessed(case):
    """A recipe made up for a file that says something else, or nothing."""
    with pytest.raises(UsageProblem) as caught:
        recipe_from_mapping(REFUSED[case], "here")
    assert "here" in str(caught.value) and caught.value.expected


@pytest.mark.parametrize("content", ["[1, 2]", "a: [", "", "x" * 1_000_001])
def test_files_that_are_no_configuration(tmp_path, content):
    """A stack trace for a file that is not there, not YAML, or no mapping."""
    path = tmp_path / "recipe.yaml"
    path.write_text(content)
    for wrong in (path, tmp_path / "absent.yaml"):
        with pytest.raises(UsageProblem):
            recipe_from_file(wrong)


def test_transformers_own_configuration():
    """Keys as ``save_pretrained`` writes them today."""
    for kind, double in (("nf4", True), ("fp4", False)):
        saved = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=double).to_dict()
        assert recipe_from_mapping(json.loads(json.dumps(saved, default=str)), "here") == Nf4Recipe(64, double, quant_type=kind)


def test_adapter_folders(tmp_path):
    """What an adapter's folder says of its base overlooked, or invented."""
    four = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    assert recipe_from_adapter({"peft_type": "LORA", "quantization_config": None}, tmp_path) is None
    assert recipe_from_adapter({"quantization_config": four}, tmp_path) == Nf4Recipe(64, True)
    (tmp_path / "training_args.yaml").write_text(yaml.safe_dump(LLAMA_FACTORY | {"double_quantization": False}))
    assert recipe_from_adapter({}, tmp_path) == Nf4Recipe(64, False, "bfloat16")
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": four}))
    assert recipe_from_adapter({}, tmp_path) == Nf4Recipe(64, True)
    with pytest.raises(Refused, match="not make again"):
        recipe_from_adapter({"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}, tmp_path)


def test_recipes_survive_json():
    """A field that the manifest loses: `verify` would derive another base."""
    recipe = Nf4Recipe(128, False, "float16", ("lm_head",), "fp4")
    row = json.loads(json.dumps(recipe.to_json()))
    assert Nf4Recipe(**row | {"skip": tuple(row["skip"])}) == recipe
