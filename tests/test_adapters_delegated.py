"""Adapters of other PEFT types than LoRA: merged layer by layer, they must answer as PEFT's own separate adapter does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from oracles.peft_types import SETTINGS, TARGETS, edited, fresh_base, save_adapter

from qmerge.adapters.delegated_types import MERGED, REFUSED

TOLERANCE = 2e-4
"""of the logits' largest difference from the base's; measured: at most 2e-5, and 6e-5 for RandLoRA, as far as PEFT's own merge is from its separate layers"""
CONV1D = ("ADALORA", "DEFT", "FOURIERFT", "FROD", "GRALORA", "HIRA", "IA3", "PVERA", "RANDLORA", "TINYLORA", "UNILORA", "VBLORA", "VERA", "WAVEFT")
# beyond the defaults of each type; named by what would break
VARIANTS = {
    "adalora-budget": ("ADALORA", "llama", {"rank_pattern": True}),
    "boft-butterflies": ("BOFT", "llama", {"boft_n_butterfly_factor": 2}),
    "deft-para": ("DEFT", "llama", {"para": True, "decomposition_method": "qr"}),
    "glora-vectors": ("GLORA", "qwen2", {"config_A_B": "vector", "config_D_E": "vector"}),
    "hira-embedding": ("HIRA", "llama", {"target_modules": ["embed_tokens", "q_proj"]}),
    "hra-gram-schmidt": ("HRA", "llama", {"apply_GS": True}),
    "lokr-both": ("LOKR", "llama", {"decompose_both": True, "decompose_factor": 4}),
    "miss-bat": ("MISS", "llama", {"init_weights": "bat", "r": 16}),
    "oft-shared-cayley": ("OFT", "llama", {"block_share": True, "use_cayley_neumann": False, "coft": True, "eps": 0.1}),
    "oft-bias": ("OFT", "qwen2", {"bias": "oft_only"}),
    "road-4": ("ROAD", "qwen2", {"variant": "road_4"}),
    "saved-head": ("LOHA", "llama", {"modules_to_save": ["lm_head"]}),
    "saved-norms": ("VERA", "gpt2", {"modules_to_save": ["ln_1"]}),
    "all-biases": ("VERA", "gpt2", {"bias": "all"}),
    "beft": ("BEFT", "qwen2", {"target_modules": ["q_proj", "v_proj"]}),
    "tinylora-seeded": ("TINYLORA", "llama", {"save_projection": False}),
    "tied-tokens": ("TRAINABLE_TOKENS", "qwen2", {}),
    "unilora-indices": ("UNILORA", "llama", {"save_indices": True}),
    "vblora-topk": ("VBLORA", "llama", {"save_only_topk_weights": True}),
    "vera-seeded": ("VERA", "llama", {"save_projection": False}),
    "waveft-budget": ("WAVEFT", "llama", {"proportional_parameters": True}),
}
CASES = (
    {f"{kind.lower()}-llama": (kind, "llama", {}) for kind in SETTINGS if kind != "BEFT"}
    | {f"{kind.lower()}-conv1d": (kind, "gpt2", {}) for kind in CONV1D}
    | {f"{kind.lower()}-biases": (kind, "qwen2", {}) for kind in ("DEFT", "IA3", "GLORA", "ROAD", "SUPERTUNING", "BOFT")}
    | VARIANTS
)


@torch.no_grad()
def merge(model: Any, folder: Path) -> float:
    """Apply all edits to ``model``; the largest proof in units of its own limit."""
    from transformers.pytorch_utils import Conv1D

    worst = 0.0
    for name, edit in edited(model, folder)[0].items():
        owner, leaf = model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
        turned = isinstance(owner, Conv1D) and leaf == "weight"
        weight = getattr(owner, leaf).data
        rows = (weight.T if turned else weight).contiguous()
        change, before = edit.load(torch.device("cpu")), rows.clone()
        after = change.apply(rows, 0)
        assert torch.equal(rows, before) and tuple(after.shape) == edit.shape, name
        proof = change.prove(rows, after, 0)
        worst = max(worst, proof.relative / proof.limit)
        getattr(owner, leaf).data = after.T.contiguous() if turned else after
    return worst


@pytest.fixture(scope="module")
def answers() -> dict[str, torch.Tensor]:
    with torch.no_grad():
        return {kind: fresh_base(kind)(TOKENS).logits for kind in TARGETS}


TOKENS = torch.arange(64).reshape(2, 32) * 7 % 96


@pytest.mark.parametrize("case", sorted(CASES))
def test_merged_answers_as_separate(case, tmp_path, answers):
    """A scale, a transpose, a bias, a seed or a neighbour's size lost on the way: the merged model is not the one that was trained."""
    from peft import PeftModel

    kind, base, changes = CASES[case]
    folder = save_adapter(tmp_path, kind, base, changes)
    merged = fresh_base(base)
    worst = merge(merged, folder)
    with torch.no_grad():
        wanted = PeftModel.from_pretrained(fresh_base(base), folder).eval()(TOKENS).logits
        found = merged(TOKENS).logits
    size = float((wanted - answers[base]).abs().max())
    assert size > 0.02, "the adapter changes too little to tell"
    error = float((found - wanted).abs().max()) / size
    print(f"{case}: logits move {size:.3f}, error {error:.1e}, proof {worst:.2f} of its limit")
    assert error < TOLERANCE
    assert worst <= 1


def test_every_tensor_is_counted_once(tmp_path):
    """A shared projection counted by two edits, or by none: the run would stop at the end, or lose a tensor."""
    for kind in ("VERA", "IA3", "FROD", "TINYLORA", "VBLORA", "BEFT"):
        found, specs = edited(fresh_base("qwen2"), save_adapter(tmp_path / kind, kind, "qwen2", {"target_modules": ["q_proj", "v_proj"]}))
        assert sorted(key for edit in found.values() for key in edit.keys) == sorted(specs), kind


def test_every_type_of_the_installed_peft_is_decided():
    """A type that a newer PEFT brings must be looked at, not fall through."""
    from peft.utils.peft_types import PeftType

    assert not set(MERGED) & set(REFUSED)
    assert {kind.value for kind in PeftType} == set(MERGED) | set(REFUSED) | {"LORA"}
    assert {kind for kind, _, _ in CASES.values()} == set(MERGED) == set(SETTINGS)


def test_prefixes_are_those_of_peft():
    """A prefix that PEFT renames would send every tensor of the type to the refusals."""
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

    assert {kind: found.prefix for kind, found in MERGED.items()} == {kind: PEFT_TYPE_TO_TUNER_MAPPING[kind].prefix for kind in MERGED}


def test_the_proof_sees_a_wrong_merge(tmp_path):
    """A proof that forgives the bare base, or one wrong row, proves nothing."""
    model = fresh_base("llama")
    edit = edited(model, save_adapter(tmp_path, "OFT", "llama", {}))[0]["model.layers.0.self_attn.q_proj.weight"]
    base = model.get_parameter("model.layers.0.self_attn.q_proj.weight").data
    change = edit.load(torch.device("cpu"))
    right = change.apply(base, 0)
    wrong = right.clone()
    wrong[5] = base[5]
    assert change.prove(base, right, 0).relative < change.prove(base, right, 0).limit
    for after in (base, wrong):
        assert change.prove(base, after, 0).relative > 100 * change.prove(base, after, 0).limit


def test_a_merge_leaves_torch_random_numbers_alone(tmp_path):
    """PEFT draws initial values; a calibration sample drawn afterwards would depend on the adapter's type."""
    model = fresh_base("llama")
    edit = edited(model, save_adapter(tmp_path, "LOHA", "llama", {}))[0]["model.layers.0.self_attn.q_proj.weight"]
    state = torch.get_rng_state()
    edit.load(torch.device("cpu")).apply(model.get_parameter("model.layers.0.self_attn.q_proj.weight").data, 0)
    assert torch.equal(state, torch.get_rng_state())
