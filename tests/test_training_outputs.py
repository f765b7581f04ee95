"""Adapters as Unsloth, Axolotl and LLaMA-Factory leave them merge to what PEFT gives: their key prefixes, their pickles, their copies of the start, their configs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from oracles.dequantized import base_model, logits, separate_model
from safetensors.torch import load_file, save_file
from test_merge_identity import bits_differ, tensors_of
from transformers import AutoModelForCausalLM

SAME = 1e-5
LORA = {"target_modules": ["q_proj", "k_proj", "down_proj"], "r": 8, "lora_alpha": 16}


class Training:
    def __init__(self, zoo: Any, cli: Any, root: Path) -> None:
        self.zoo, self.cli, self.root, self.count = zoo, cli, root, 0
        self.plain = zoo.adapter("llama", "training", relative=0.1, **LORA)

    def adapter(self) -> Path:
        self.count += 1
        return Path(shutil.copytree(self.plain, self.root / f"adapter{self.count}"))

    def merge(self, base: str, adapter: object, *flags: object) -> Path:
        self.count += 1
        out = self.root / f"out{self.count}"
        answer = self.cli("merge", "--base", base, "--adapter", adapter, "--out", out, "--format", "fp32", "--device", "cpu", *flags)
        assert answer.code == 0, answer.err
        return out

    def answers(self, folder: Path) -> torch.Tensor:
        return logits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), self.zoo.batch())

    def distance(self, folder: Path, model: Any) -> float:
        wanted = logits(model, self.zoo.batch())
        return float((self.answers(folder) - wanted).norm() / wanted.norm())


@pytest.fixture
def training(zoo, cli, tmp_path):
    return Training(zoo, cli, tmp_path)


def rename(folder: Path, name: Callable[[str], str]) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file({name(key): tensor for key, tensor in tensors.items()}, folder / "adapter_model.safetensors", {"format": "pt"})


SPELLINGS: dict[str, Callable[[str], str]] = {
    "torch.compile around the model (Axolotl)": lambda key: key.replace("base_model.model.", "base_model.model._orig_mod.", 1),
    "torch.compile around everything": lambda key: f"_orig_mod.{key}",
    "torch.compile around each block": lambda key: key.replace(".self_attn.", "._orig_mod.self_attn.").replace(".mlp.", "._orig_mod.mlp."),
    "FSDP": lambda key: key.replace("base_model.model.", "base_model.model._fsdp_wrapped_module.", 1).replace(".mlp.", "._fsdp_wrapped_module.mlp."),
    "activation checkpointing": lambda key: key.replace(".self_attn.", "._checkpoint_wrapped_module.self_attn."),
    "the adapter's name in the keys": lambda key: key.replace(".lora_A.", ".lora_A.default.").replace(".lora_B.", ".lora_B.default."),
}


@pytest.mark.parametrize("case", SPELLINGS)
def test_spellings_of_keys(training, case):
    """A wrapper's mark in the names: PEFT itself loads such a file with a warning and an adapter of zeros."""
    adapter, base = training.adapter(), training.zoo.nf4("llama")
    rename(adapter, SPELLINGS[case])
    assert not bits_differ(tensors_of(training.merge(base, adapter)), tensors_of(training.merge(base, training.plain)))


PARTS, LINEARS = "self_attn|attention|attn|mlp|feed_forward|ffn|dense", "q_proj|k_proj|down_proj"
IN_LAYERS = rf"(?:\bmodel\.layers\.[\d]{{1,}}\.(?:{PARTS})\.(?:(?:{LINEARS})))"
TARGETS = {
    "short": r"(?:.*?(?:self_attn|mlp).*?(?:q_proj|k_proj|down_proj).*?)",
    "text": rf"(?:.*?(?:language|text).*?(?:{PARTS}).*?(?:{LINEARS}).*?)|{IN_LAYERS}",
    "text and images": rf"(?:.*?(?:vision|image|visual|patch|language|text).*?(?:{PARTS}).*?(?:{LINEARS}|correlation|embedding).*?)|{IN_LAYERS}",
    "without experts": rf"(?!.*\.experts\.\d)(?:.*?(?:language|text).*?(?:{PARTS}).*?(?:{LINEARS}).*?)|{IN_LAYERS}",
}
"""regular expressions in the shapes of Unsloth's"""


@pytest.mark.parametrize("targets", TARGETS)
def test_an_unsloth_folder(training, targets):
    """Unsloth writes a regular expression as target_modules (one with several repeats in a row was refused as if it could take for ever), names its own copy of the base, and leaves checkpoints and a README beside the adapter."""
    adapter, base = training.adapter(), training.zoo.nf4("llama")
    config = json.loads((adapter / "adapter_config.json").read_text())
    config |= {"base_model_name_or_path": "unsloth/llama-bnb-4bit", "target_modules": TARGETS[targets],
               "auto_mapping": {"base_model_class": "LlamaForCausalLM", "parent_library": "transformers.models.llama.modeling_llama", "unsloth_fixed": True}}  # fmt: skip
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    shutil.copytree(training.plain, adapter / "checkpoint-60")
    (adapter / "README.md").write_text("---\nbase_model: unsloth/llama-bnb-4bit\n---\n")
    out = training.merge(base, adapter)
    assert training.distance(out, separate_model(training.zoo.float("llama"), base, str(adapter))) < SAME
    assert not (out / "checkpoint-60").exists() and not (out / "adapter_config.json").exists()


def test_a_pickle_of_an_old_peft(training):
    """adapter_model.bin, as DeepSpeed runs and PEFT before 0.7 leave it: merged when asked for, to the same bits."""
    adapter, base = training.adapter(), training.zoo.nf4("llama")
    torch.save(load_file(adapter / "adapter_model.safetensors"), adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink()
    out = training.merge(base, adapter, "--allow-pickle")
    assert not bits_differ(tensors_of(out), tensors_of(training.merge(base, training.plain)))
    assert training.distance(out, separate_model(training.zoo.float("llama"), base, str(adapter))) < SAME


# ---- an initialisation that changed the base


def pissa(training: Training, folder: Path, **more: Any) -> Any:
    """PiSSA training as LLaMA-Factory and PEFT's recipe do it: ``folder``, the start in ``folder/pissa_init``. Returns the trained model."""
    from peft import LoraConfig, get_peft_model

    model = AutoModelForCausalLM.from_pretrained(training.zoo.float("llama"), dtype=torch.float32)
    tuned = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", init_lora_weights="pissa", **LORA | more))
    tuned.save_pretrained(folder / "pissa_init", save_embedding_layers=False)
    dice = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=dice))
    tuned.save_pretrained(folder, save_embedding_layers=False)
    return tuned.eval()


@pytest.mark.parametrize("more", [{}, {"use_rslora": True, "r": 4}, {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"k_proj": 5}}])
def test_pissa_with_its_start(training, more):
    """The principal components counted twice: on the unchanged base the delta is B A - B0 A0. The trained model itself is the reference."""
    folder = training.root / "pissa"
    tuned = pissa(training, folder, **more)
    out = training.merge(training.zoo.float("llama"), folder, "--on", "original")
    assert training.distance(out, tuned) < SAME < training.distance(out, base_model(training.zoo.float("llama"), None)) / 1000


def test_pissa_without_its_start_is_refused(training):
    """The trained adapter merged onto the unchanged base, a model that nobody trained; --residual-base is for the base that PiSSA left behind."""
    folder = training.root / "pissa"
    tuned = pissa(training, folder)
    shutil.rmtree(folder / "pissa_init")
    words = ["merge", "--adapter", folder, "--format", "fp32", "--on", "original", "--device", "cpu", "--out", training.root / "out"]
    answer = training.cli(*words, "--base", training.zoo.float("llama"))
    assert answer.code == 4 and "init_lora_weights" in answer.err and "--residual-base" in answer.err and not (training.root / "out").exists()
    residual = training.root / "residual"
    shutil.copytree(training.zoo.float("llama"), residual)
    left = {name.replace(".base_layer", "").removeprefix("base_model.model."): tensor for name, tensor in tuned.state_dict().items() if "lora_" not in name}
    save_file({name: tensor.contiguous().clone() for name, tensor in left.items()}, residual / "model.safetensors", {"format": "pt"})
    out = training.merge(str(residual), folder, "--on", "original", "--residual-base")
    assert training.distance(out, tuned) < SAME


def test_the_start_of_another_adapter_is_refused(training):
    """A pissa_init that was left by another run: shapes fit no longer, or values are not finite."""
    folder = training.root / "pissa"
    pissa(training, folder)
    words = ["merge", "--adapter", folder, "--format", "fp32", "--on", "original", "--device", "cpu", "--base", training.zoo.float("llama"), "--out", training.root / "out"]
    file = folder / "pissa_init" / "adapter_model.safetensors"
    tensors = load_file(file)
    name = sorted(tensors)[0]
    save_file(tensors | {name: tensors[name].clone().fill_(float("nan"))}, file, {"format": "pt"})
    answer = training.cli(*words)
    assert answer.code == 4 and name in answer.err and "NaN" in answer.err and not (training.root / "out").exists()
    save_file({key: tensor for key, tensor in tensors.items() if key != name}, file, {"format": "pt"})
    answer = training.cli(*words)
    assert answer.code == 4 and "pissa_init" in answer.err and not (training.root / "out").exists()


# ---- training configs that say how a float base was quantized

AXOLOTL = {"base_model": "x", "load_in_4bit": True, "adapter": "qlora", "bf16": "auto", "lora_r": 8, "lora_target_linear": True, "datasets": [{"path": "d", "type": "alpaca"}]}
FACTORY = {"model_name_or_path": "x", "stage": "sft", "finetuning_type": "lora", "quantization_bit": 4, "quantization_method": "bnb", "bf16": True, "lora_rank": 8}
TRL = {"model_name_or_path": "x", "use_peft": True, "load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "use_bnb_nested_quant": True, "lora_r": 8}
BNB = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": False, "bnb_4bit_compute_dtype": "bfloat16"}
CONFIGS: dict[str, tuple[dict[str, Any], bool]] = {
    "Axolotl": (AXOLOTL, True),
    "Axolotl, single": (AXOLOTL | {"bnb_config_kwargs": {"bnb_4bit_use_double_quant": False}}, False),
    "LLaMA-Factory": (FACTORY, True),
    "LLaMA-Factory, single": (FACTORY | {"double_quantization": False}, False),
    "TRL": (TRL, True),
    "TRL, single": (TRL | {"use_bnb_nested_quant": False}, False),
    "BitsAndBytesConfig": (BNB, False),
    "a model's config": ({"model_type": "llama", "quantization_config": BNB | {"quant_method": "bitsandbytes", "bnb_4bit_use_double_quant": True}}, True),
}


@pytest.mark.parametrize("suffix", [".yaml", ".json"])
@pytest.mark.parametrize("case", CONFIGS)
def test_training_configs_as_recipes(training, case, suffix):
    """A default of the tool filled in wrongly: the float base must become bit for bit what bitsandbytes makes of it under that config."""
    content, double = CONFIGS[case]
    path = training.root / f"config{suffix}"
    path.write_text(json.dumps(content) if suffix == ".json" else yaml.safe_dump(content))
    found = tensors_of(training.merge(training.zoo.float("llama"), training.plain, "--nf4-recipe", path))
    wanted = tensors_of(training.merge(training.zoo.nf4("llama", double), training.plain))
    assert not bits_differ(found, wanted)
    if suffix == ".yaml":
        out = training.merge(training.zoo.float("llama"), training.plain, "--nf4-recipe", path)
        assert training.cli("verify", out, "--base", training.zoo.float("llama"), "--adapter", training.plain).code == 0


@pytest.mark.parametrize("content", [{"learning_rate": 1e-4}, AXOLOTL | {"adapter": "lora"}, FACTORY | {"quantization_bit": 8}, {"load_in_4bit": True}])
def test_configs_that_leave_it_open_are_refused(training, content):
    """A guess, where the file does not say it."""
    path = training.root / "config.yaml"
    path.write_text(yaml.safe_dump(content))
    out = training.root / "out"
    answer = training.cli("merge", "--base", training.zoo.float("llama"), "--adapter", training.plain, "--out", out, "--format", "bf16", "--device", "cpu", "--nf4-recipe", path)
    assert answer.code == 2 and "NF4 recipe" in answer.err and "Traceback" not in answer.err and not out.exists()


def test_what_llama_factory_leaves_in_the_folder(training):
    """training_args.yaml beside the adapter tells how the base was quantized: no flag is needed, and the manifest says what was used."""
    adapter = training.adapter()
    (adapter / "training_args.yaml").write_text(yaml.safe_dump(FACTORY | {"double_quantization": False}))
    out = training.merge(training.zoo.float("llama"), adapter)
    assert not bits_differ(tensors_of(out), tensors_of(training.merge(training.zoo.nf4("llama", False), training.plain)))
    assert json.loads((out / "manifest.json").read_text())["recipe"]["nf4"]["double_quant"] is False
    assert training.cli("verify", out, "--base", training.zoo.float("llama"), "--adapter", adapter).code == 0
