"""`qmerge inspect` on bases and adapters of every kind: facts, what stands in the way, and the next command."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Zoo, run_cli
from safetensors.torch import load_file, save_file
from support.packed import Packed

from qmerge.pipeline.inspection import inspect


def told(path: str | Path) -> tuple[dict[str, Any], str]:
    """The facts as JSON, and what is said next."""
    answer = run_cli("inspect", path, "--json")
    assert answer.code == 0, answer.err
    assert run_cli("inspect", path).code == 0
    return json.loads(answer.out), answer.err


def test_nf4_and_float_bases(zoo: Zoo) -> None:
    """A base whose recipe nobody names is merged with a guess."""
    facts, said = told(zoo.nf4("llama"))
    assert facts["recipe"] == {"kind": "nf4", "block_size": 64, "double_quantization": True, "quantized_from": "bfloat16"} and facts["quantized_weights"] == {"nf4": 14}
    assert (facts["blocks"], facts["linears_in_blocks"], facts["problems"], facts["notes"]) == (2, 14, [], []) and "--calibration FILE" in said and "--nf4-recipe" not in said
    assert facts["parameters"] == inspect(zoo.float("llama"))["parameters"]
    assert facts["writes"] == ["bf16", "fp16", "fp32", "gptq", "nf4", "fp4", "compressed-tensors", "awq"]
    facts, said = told(zoo.float("gpt2"))
    assert facts["recipe"]["kind"] == "float" and facts["problems"] == [] and facts["tied_embeddings"] and "--nf4-recipe double|single|FILE (or --on original)" in said


@pytest.mark.parametrize(("name", "kind", "count"), [("fp4", "fp4", 14), ("int8", "int8", 14), ("gptq-4", "gptq", 14), ("awq", "awq", 14), ("int8-gpt2", "int8", 8)])
def test_other_packed_bases(name: str, kind: str, count: int, packed: Packed) -> None:
    """What `merge` reads must not be called a problem, and packed shapes are those of the weights."""
    facts, said = told(packed(name))
    assert facts["recipe"]["kind"] == kind and facts["quantized_weights"] == {kind: count} and facts["problems"] == [] and "Next: qmerge merge --base" in said
    assert facts["parameters"] == inspect(packed.zoo.float("gpt2" if "gpt2" in name else "llama"))["parameters"]
    if kind in ("gptq", "awq"):
        assert facts["recipe"]["group_size"] == 32


def changed_config(source: str, folder: Path, **changes: Any) -> Path:
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_class_that_transformers_lacks(zoo: Zoo, tmp_path: Path) -> None:
    """A float merge of such a base works, so inspect must not call it impossible; nor may it run the base's own code."""
    folder = changed_config(zoo.float("llama"), tmp_path / "own", model_type="never_heard_of", auto_map={"AutoModelForCausalLM": "evil.Model"})
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    facts, said = told(folder)
    assert facts["problems"] == [] and "works on the tensors alone" in facts["notes"][0] and "code of its own" in facts["notes"][0]
    assert "model.layers.*.self_attn.q_proj.weight ×2" in facts["tensor_names"] and facts["writes"] == ["bf16", "fp16", "fp32"] and "--format bf16" in said
    assert not (tmp_path / "ran").exists()


def test_what_cannot_be_read_is_named(zoo: Zoo, tmp_path: Path) -> None:
    """A quantization that is not read, and packed weights that no config announces."""
    facts, said = told(changed_config(zoo.float("llama"), tmp_path / "hqq", quantization_config={"quant_method": "hqq"}))
    assert "hqq" in facts["problems"][0] and facts["tensors"] > 20 and facts["writes"] == [] and "see the problems" in said
    facts, _ = told(changed_config(zoo.nf4("llama"), tmp_path / "silent", quantization_config=None))
    assert "config.json does not say so" in facts["problems"][0]


FEATURES: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "dora": ("llama", {"use_dora": True}, ["use_dora"]),
    "rslora-patterns": ("llama", {"use_rslora": True, "rank_pattern": {"q_proj": 2}}, ["rank_pattern", "use_rslora"]),
    "bias": ("qwen2", {"bias": "all"}, ["bias=all"]),
    "tokens": ("llama", {"trainable_token_indices": [3, 5]}, ["trainable_token_indices"]),
    "saved": ("llama", {"modules_to_save": ["lm_head"]}, ["modules_to_save"]),
}


@pytest.mark.parametrize("name", FEATURES)
def test_features_of_adapters(name: str, zoo: Zoo) -> None:
    """A feature that decides the weights and is not shown."""
    kind, settings, expected = FEATURES[name]
    facts, said = told(zoo.adapter(kind, f"inspected-{name}", **settings))
    assert facts["features"] == expected and facts["problems"] == [] and facts["peft_type"] == "LORA" and facts["linears"] == sum(facts["by_kind"].values()) == sum(facts["ranks"].values())
    assert facts.get("trained_tokens") == (2 if name == "tokens" else None) and facts["replaced_tensors"] == (["lm_head.weight"] if name == "saved" else facts["replaced_tensors"])
    assert "Next: qmerge merge --base P --adapter" in said


def edited(adapter: str, folder: Path, **changes: Any) -> Path:
    shutil.copytree(adapter, folder)
    config = json.loads((folder / "adapter_config.json").read_text()) | changes
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def test_adapters_that_are_refused_say_why(zoo: Zoo, tmp_path: Path) -> None:
    """A sentence, with what the config says beside it, instead of a stack trace or a bare no."""
    plain = zoo.adapter("llama")
    facts, said = told(edited(plain, tmp_path / "prefix", peft_type="PREFIX_TUNING"))
    assert facts["peft_type"] == "PREFIX_TUNING" and "key-value cache" in facts["problems"][0] and "see the problems" in said
    facts, _ = told(edited(plain, tmp_path / "alora", alora_invocation_tokens=[1]))
    assert "activated LoRA" in facts["problems"][0]
    facts, _ = told(edited(plain, tmp_path / "pissa", init_lora_weights="pissa"))
    assert "--residual-base" in facts["problems"][0] and facts["linears"] == 14 and "init_lora_weights=pissa" in facts["features"]
    shutil.copytree(plain, tmp_path / "pissa" / "pissa_init")
    facts, _ = told(tmp_path / "pissa")
    assert facts["problems"] == [] and "pissa_init" in facts["notes"][0]
    tensors = load_file(Path(plain) / "adapter_model.safetensors")
    (broken := edited(plain, tmp_path / "half"))
    save_file({name: tensor for name, tensor in tensors.items() if "layers.1.mlp.up_proj.lora_A" not in name}, broken / "adapter_model.safetensors")
    facts, _ = told(broken)
    assert "other half" in facts["problems"][0]


def test_another_type(zoo: Zoo, tmp_path: Path) -> None:
    """IA3 and its kin are merged through PEFT, which inspect has to say."""
    from peft import IA3Config, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(zoo.float("llama"), dtype=torch.float32)
    get_peft_model(model, IA3Config(target_modules=["k_proj"], feedforward_modules=[], task_type="CAUSAL_LM")).save_pretrained(tmp_path / "ia3")
    facts, _ = told(tmp_path / "ia3")
    assert facts["peft_type"] == "IA3" and facts["tensors"] == 2 and facts["problems"] == [] and "PEFT" in facts["merged_by"]


def test_a_folder_of_several_adapters(zoo: Zoo, tmp_path: Path) -> None:
    """The names to type must be shown, and one broken adapter must not hide the others."""
    for name in ("first", "second"):
        shutil.copytree(zoo.adapter("llama"), tmp_path / "many" / name)
    edited(zoo.adapter("llama"), tmp_path / "many" / "third", peft_type="XLORA")
    facts, said = told(tmp_path / "many")
    assert facts["what"] == "adapters" and list(facts["adapters"]) == ["first", "second", "third"] and facts["adapters"]["second"]["linears"] == 14
    assert facts["problems"][0].startswith("third: ") and "many#first'" in said
    facts, _ = told(f"{tmp_path / 'many'}#second")
    assert facts["what"] == "adapter" and facts["linears"] == 14 and len(facts["other_adapters_here"]) == 2


@pytest.mark.parametrize(("said", "told_as"), [("unsloth/llama-bnb-4bit", "unsloth/llama-bnb-4bit"), ("/home/somebody/models/base-nf4/", "base-nf4"), (None, "unknown")])
def test_what_an_adapter_was_trained_on(zoo: Zoo, tmp_path: Path, said: str | None, told_as: str) -> None:
    """An id of the hub that nobody can paste because its organisation is cut off; or the folders of whoever trained it."""
    adapter = Path(shutil.copytree(zoo.adapter("llama"), tmp_path / "adapter"))
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": said}))
    assert told(adapter)[0]["trained_on"] == told_as
    assert "None" not in run_cli("inspect", adapter).out
