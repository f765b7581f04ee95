"""OUT is complete: it loads where there is no PEFT, brings all that a server reads, and nothing of the base's old quantization."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import VOCABULARY
from oracles.dequantized import load_public, logits
from transformers import AutoTokenizer, GenerationConfig

pytest.importorskip("gptqmodel")

# peft is hidden as if it were not installed: not found, rather than broken on import
WITHOUT_PEFT = """
import sys

class Hidden:
    def __init__(self, finder):
        self.finder = finder
    def __getattr__(self, name):
        return getattr(self.finder, name)
    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] == "peft" else self.finder.find_spec(name, path, target)

sys.meta_path[:] = [Hidden(finder) for finder in sys.meta_path]
try:
    import peft
    sys.exit("peft is there")
except ModuleNotFoundError:
    pass
import torch
torch.compiler.set_stance("force_eager")
from oracles.dequantized import load_public, logits
ids = torch.load(sys.argv[1])
torch.save(logits(load_public(sys.argv[3]), ids), sys.argv[2])
assert "peft" not in sys.modules and "qmerge" not in sys.modules
"""


@pytest.mark.parametrize("fmt", ["nf4", pytest.param("gptq", marks=pytest.mark.slow)])
def test_loads_without_peft(zoo, written, tmp_path, fmt):
    """A checkpoint that still wants the adapter's library, or qmerge's: in a process that has neither, with the logits that this one gets."""
    folder = str(written("llama", fmt)[0])
    ids = zoo.batch()
    torch.save(ids, tmp_path / "ids.pt")
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run([sys.executable, "-c", WITHOUT_PEFT, str(tmp_path / "ids.pt"), str(tmp_path / "logits.pt"), folder],
                          capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    found, wanted = torch.load(tmp_path / "logits.pt"), logits(load_public(folder), ids)
    assert float((found - wanted).norm() / wanted.norm()) < 1e-3


@pytest.mark.slow
def test_default_kernel(zoo, written):
    """The kernel that gptqmodel picks by itself reading our file otherwise than its plain one. It may compile for minutes the first time."""
    folder = str(written("llama", "gptq")[0])
    plain, picked = logits(load_public(folder), zoo.batch()), logits(load_public(folder, kernel=None), zoo.batch())
    assert float((plain - picked).norm() / plain.norm()) < 0.03


@pytest.mark.parametrize("fmt", ["gptq", "nf4", "bf16"])
def test_side_files(zoo, written, fmt):
    """A server that starts with another chat template, other special tokens or other sampling than the base's, because a file was not copied."""
    out, base = written("llama", fmt)[0], Path(zoo.nf4("llama"))
    tokenizer, wanted = AutoTokenizer.from_pretrained(out), AutoTokenizer.from_pretrained(base)
    talk = [{"role": "user", "content": "the cat sat"}]
    assert tokenizer.apply_chat_template(talk, tokenize=False) == wanted.apply_chat_template(talk, tokenize=False) == "<s>user: the cat sat</s>\n"
    assert tokenizer("seven birds</s>")["input_ids"] == wanted("seven birds</s>")["input_ids"] and len(tokenizer) == VOCABULARY
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1)
    assert GenerationConfig.from_pretrained(out).to_dict() == GenerationConfig.from_pretrained(base).to_dict()
    known = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "manifest.json"}
    assert {path.name for path in out.iterdir()} == known | ({"quantize_config.json"} if fmt == "gptq" else set())


def test_tokenizer_of_the_adapter_wins(zoo, written, tmp_path):
    """A chat template that the fine-tune was trained with, replaced by the base's."""
    import shutil

    adapter = tmp_path / "adapter"
    shutil.copytree(zoo.adapter("llama"), adapter)
    tokenizer = AutoTokenizer.from_pretrained(zoo.float("llama"))
    tokenizer.chat_template = "{{ messages[0]['content'] }}!"
    tokenizer.save_pretrained(adapter)
    out, _ = written("llama", "bf16", adapter=str(adapter))
    assert AutoTokenizer.from_pretrained(out).apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi!"


def config_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


def test_gptq_config(zoo, written):
    """bitsandbytes' keys left in a gptq file, or a quantize_config.json that says something else than config.json."""
    out, _ = written("llama", "gptq")
    found = config_of(out)["quantization_config"]
    assert found == json.loads((out / "quantize_config.json").read_text())
    assert not [key for key in found if "bnb" in key or "load_in" in key or "int8" in key]
    assert {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False, "lm_head": False}.items() <= found.items()


@pytest.mark.parametrize("double", [True, False], ids=["double", "single"])
def test_nf4_config_is_the_bases(zoo, written, double):
    """Nesting that differs between the config and the tensors; settings of the base (compute dtype) lost."""
    base = zoo.nf4("llama", double)
    out, _ = written("llama", "nf4", base=base)
    assert config_of(out)["quantization_config"] == config_of(Path(base))["quantization_config"]


@pytest.mark.parametrize("double", [True, False], ids=["double", "single"])
def test_nf4_config_on_the_fly_is_bitsandbytes(zoo, written, double):
    """A config written by hand that differs from the one that ``save_pretrained`` writes for the same quantization."""
    recipe = "double" if double else "single"
    out, _ = written("llama", "nf4", "--nf4-recipe", recipe, base=zoo.float("llama"))
    ours, theirs = config_of(out)["quantization_config"], config_of(Path(zoo.nf4("llama", double)))["quantization_config"]
    assert ours == theirs | {"bnb_4bit_compute_dtype": "bfloat16"}


def test_float_output_is_not_called_quantized(zoo, written):
    """A float file that a loader would try to read as NF4."""
    for fmt, dtype in (("bf16", "bfloat16"), ("fp16", "float16")):
        config = config_of(written("llama", fmt)[0])
        assert "quantization_config" not in config and config["dtype"] == dtype


@pytest.mark.parametrize("fmt", ["gptq", "nf4", "bf16"])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2", "gemma2"])
def test_the_rest_of_the_config_is_the_bases(zoo, written, kind, fmt):
    """A field of the architecture lost or changed on the way."""
    found, base = config_of(written(kind, fmt)[0]), config_of(Path(zoo.nf4(kind)))
    ignored = {"quantization_config", "dtype", "torch_dtype", "_name_or_path"}
    assert {k: v for k, v in found.items() if k not in ignored} == {k: v for k, v in base.items() if k not in ignored}


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_nf4_output_can_be_trained_again(zoo, written, kind):
    """A file that serves and cannot go back into QLoRA: PEFT must wrap its linears and send gradients through them."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(load_public(str(written(kind, "nf4")[0])), LoraConfig(r=2, target_modules=["q_proj"] if kind == "llama" else ["c_attn"]))
    model.train()
    model(input_ids=zoo.batch(1), labels=zoo.batch(1)).loss.backward()
    moved = [p for n, p in model.named_parameters() if "lora_B" in n]
    assert moved and all(p.grad is not None and float(p.grad.abs().sum()) > 0 for p in moved)
