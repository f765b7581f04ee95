"""Adapters of other PEFT types than LoRA that must be refused, by name and before anything is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles.peft_types import edited, fresh_base, save_adapter

from qmerge.adapters.delegated import check_type, delegated_edits
from qmerge.adapters.delegated_types import REFUSED
from qmerge.errors import Refused
from qmerge.store.headers import read_header
from qmerge.store.tensors import read_tensor


@pytest.mark.parametrize("kind", sorted(REFUSED))
def test_types_without_a_weight_are_refused_by_name(kind):
    """Dropping what cannot be merged would ship the bare base as a fine-tune."""
    with pytest.raises(Refused, match=kind) as problem:
        check_type({"peft_type": kind}, "a config")
    assert REFUSED[kind] in problem.value.what


def test_an_unknown_type_is_refused():
    """A type newer than the tables must not be guessed at."""
    with pytest.raises(Refused, match="does not know") as problem:
        check_type({"peft_type": "NEWLORA"}, "a config")
    assert "NEWLORA" in str(problem.value)


@pytest.mark.parametrize("config", [
    {"peft_type": "PVERA", "sample_at_inference": True},
    {"peft_type": "FROD", "save_projection": False},
    {"peft_type": "RANDLORA", "save_projection": False},
    {"peft_type": "SUPERTUNING", "save_precomputed_indices": False},
], ids=lambda config: config["peft_type"])  # fmt: skip
def test_settings_that_leave_something_out_of_the_file_are_refused(config):
    """What is drawn or computed anew on another machine or base is another adapter."""
    with pytest.raises(Refused, match=config["peft_type"]):
        check_type(config, "a config")


def test_a_setting_that_peft_does_not_know_is_refused_when_set():
    """PEFT drops it with a warning; if it changes the weights, so would the merge."""
    check_type({"peft_type": "LOHA", "r": 4, "use_new_trick": False}, "a config")
    with pytest.raises(Refused, match="use_new_trick"):
        check_type({"peft_type": "LOHA", "r": 4, "use_new_trick": True}, "a config")


def spoiled(folder: Path, change: Any) -> Path:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "adapter_model.safetensors")
    return folder


def move(tensors: dict[str, torch.Tensor], old: str, new: str) -> None:
    for name in [name for name in tensors if old in name]:
        tensors[name.replace(old, new)] = tensors.pop(name)


FIRST = "base_model.model.model.layers.0.self_attn.q_proj"
DAMAGE = {
    "no such module": (lambda t: move(t, "layers.1.", "layers.7."), "does not have"),
    "foreign tensor": (lambda t: t.update({f"{FIRST}.lora_A.weight": torch.zeros(4, 64)}), "pairs with nothing"),
    "foreign shared tensor": (lambda t: t.update({"base_model.vera_A": torch.zeros(4, 64)}), "does not write"),
    "missing half": (lambda t: t.pop(f"{FIRST}.hada_w1_b"), "cannot put"),
    "other shape": (lambda t: t.update({f"{FIRST}.hada_w1_b": torch.zeros(4, 32)}), "cannot put"),
    "unlisted saved module": (lambda t: t.update({"base_model.model.model.norm.weight": torch.ones(64)}), "pairs with nothing"),
}


@pytest.mark.parametrize("damage", sorted(DAMAGE))
def test_a_file_that_does_not_fit_is_refused_before_any_weight_is_read(damage, tmp_path):
    """A tensor that is skipped is a part of the fine-tune that is lost."""
    change, text = DAMAGE[damage]
    folder = spoiled(save_adapter(tmp_path, "LOHA", "llama", {}), change)
    with pytest.raises(Refused, match=text) as problem:
        edited(fresh_base("llama"), folder)
    assert problem.value.where and problem.value.written == "nothing"


def test_values_that_are_not_finite_are_refused(tmp_path):
    """One NaN of a diverged training would spread over a whole row."""
    folder = spoiled(save_adapter(tmp_path, "LOHA", "llama", {}), lambda t: t[f"{FIRST}.hada_w1_b"].fill_(float("nan")))
    edit = edited(fresh_base("llama"), folder)[0]["model.layers.0.self_attn.q_proj.weight"]
    with pytest.raises(Refused, match="finite"):
        edit.load(torch.device("cpu"))


def test_a_bias_that_the_base_lacks_is_refused(tmp_path):
    """The model's class would drop it in silence."""
    with pytest.raises(Refused, match="linear that has none"):
        edited(fresh_base("llama"), save_adapter(tmp_path, "BEFT", "llama", {}))


def test_glora_whose_bias_hangs_on_the_weight_is_refused(tmp_path):
    """Its bias is W·C: without the weight it would be wrong, and a linear without bias has no such part."""
    with pytest.raises(Refused, match="GLORA"):
        edited(fresh_base("qwen2"), save_adapter(tmp_path, "GLORA", "qwen2", {"config_C": "lora"}))


@pytest.mark.parametrize("kind", ["TINYLORA", "UNILORA"])
def test_types_that_number_their_modules_need_the_order(kind, tmp_path):
    """Sorted by name, layer 10 stands before layer 2, and every module would get another one's numbers."""
    folder = save_adapter(tmp_path, kind, "llama", {})
    config, specs = json.loads((folder / "adapter_config.json").read_text()), read_header(folder / "adapter_model.safetensors")[0]
    with pytest.raises(Refused, match="order"):
        delegated_edits(
            folder,
            "an adapter",
            config,
            specs,
            lambda key: read_tensor(folder, specs[key]),
            {name: tuple(p.shape) for name, p in fresh_base("llama").named_parameters()},
        )
