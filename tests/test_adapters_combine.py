"""PEFT's named combinations of LoRA adapters, against ``add_weighted_adapter`` on a whole model."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from qmerge.adapters.combine import _NOT_OFFERED, COMBINATIONS, SEPARATE, check_combination, combine_all
from qmerge.errors import Refused, UsageProblem
from qmerge.pipeline import recipe_values

PLAIN = {"peft_type": "LORA", "r": 4, "lora_alpha": 8}
TARGETS = (["q_proj", "down_proj", "embed_tokens"], ["q_proj", "v_proj", "embed_tokens"])
WEIGHTS = [0.7, -0.4]


def two_adapters(ranks: tuple[int, int], alphas: tuple[int, int] = (8, 4)) -> Any:
    """A tiny Llama with two random adapters that share some of their modules, embedding included."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=48, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=False
    )
    torch.manual_seed(0)
    wish = [
        LoraConfig(r=rank, lora_alpha=alpha, target_modules=names, task_type="CAUSAL_LM") for rank, alpha, names in zip(ranks, alphas, TARGETS, strict=True)
    ]
    model = get_peft_model(AutoModelForCausalLM.from_config(config), wish[0], "x")
    model.add_adapter("y", wish[1])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn_like(parameter))
    return model


def taken(model: Any) -> tuple[list[str], dict[str, list], set[str]]:
    """``(modules in PEFT's order, pairs of both, embeddings)``."""
    modules, pairs, embeddings = [], {}, set()
    for name, layer in model.base_model.model.named_modules():
        if hasattr(layer, "lora_A") and hasattr(layer, "scaling"):
            modules.append(name)
            if len(layer.lora_embedding_A):
                embeddings.add(name)
                pairs[name] = [
                    (layer.lora_embedding_A[a].data, layer.lora_embedding_B[a].data, layer.scaling[a]) if a in layer.lora_embedding_A else None for a in "xy"
                ]
            else:
                pairs[name] = [(layer.lora_A[a].weight.data, layer.lora_B[a].weight.data, layer.scaling[a]) if a in layer.lora_A else None for a in "xy"]
    return modules, pairs, embeddings


@pytest.mark.parametrize("sign", ["total", "frequency"])
@pytest.mark.parametrize("how", COMBINATIONS)
def test_a_combination_is_that_of_peft(how, sign):
    """A scaling used twice, a module's random numbers drawn in another order, a sign lost: a combination under PEFT's name that is not PEFT's."""
    model = two_adapters((4, 4) if how in SEPARATE else (4, 6))
    modules, pairs, embeddings = taken(model)
    density = None if how == "svd" else 0.6
    found = combine_all(how, modules, pairs, WEIGHTS, density=density, majority_sign=sign, seed=11, embeddings=embeddings)
    torch.manual_seed(11)
    model.add_weighted_adapter(["x", "y"], WEIGHTS, "c", how, density=density, majority_sign_method=sign)
    assert len(modules) == 7 and len(embeddings) == 1
    for name, layer in model.base_model.model.named_modules():
        if name in found:
            wanted, (a, b) = layer.get_delta_weight("c"), found[name]
            delta = (b @ a).T if name in embeddings else b @ a
            assert float(wanted.norm()) > 0.01
            torch.testing.assert_close(delta, wanted, rtol=1e-4, atol=2e-6)


def test_a_chosen_rank_is_kept():
    """The default rank of svd, the largest of the adapters', loses what the user asked to keep: here the sum has rank 10."""
    _, pairs, _ = taken(two_adapters((4, 6)))
    both = pairs["model.layers.0.self_attn.q_proj"]
    exact = sum(weight * scaling * (b @ a) for weight, (a, b, scaling) in zip(WEIGHTS, both, strict=True))
    for rank, close in ((None, False), (10, True)):
        a, b = combine_all("svd", ["layer"], {"layer": both}, WEIGHTS, rank=rank)["layer"]
        assert a.shape[0] == b.shape[1] == (rank or 6)
        assert torch.allclose(b @ a, exact, atol=1e-5) is close


def test_a_seed_decides_and_other_random_numbers_stay():
    """dare draws at random: without a seed no merge could be repeated, and with a global one all later draws would shift."""
    modules, pairs, embeddings = taken(two_adapters((4, 4)))
    state = torch.get_rng_state()
    first, again, other = (combine_all("dare_linear", modules, pairs, WEIGHTS, density=0.5, seed=seed, embeddings=embeddings) for seed in (1, 1, 2))
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(first[module][1], again[module][1]) for module in modules)
    assert not any(torch.equal(first[module][1], other[module][1]) for module in modules)


@pytest.mark.parametrize("how", ["cat", "linear"])
def test_cat_and_linear_are_not_offered(how):
    """Under these names PEFT's result is wrong or full of cross terms; the message must name the default that does what they promise."""
    with pytest.raises(UsageProblem, match=how) as problem:
        check_combination(how, [PLAIN, PLAIN])
    assert "exact weighted sum" in str(problem.value)


def test_peft_is_off_with_rslora():
    """Why rsLoRA is refused as the first adapter: should a later PEFT put it right, this test says so."""
    model = two_adapters((4, 4))
    for name in "xy":
        model.peft_config[name].use_rslora = True
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    model.add_weighted_adapter(["x", "y"], [1.0, 1.0], "c", "svd", svd_rank=8)
    exact = layer.get_delta_weight("x") + layer.get_delta_weight("y")
    assert torch.allclose(layer.get_delta_weight("c"), exact * 8**0.5, atol=1e-4)
    with pytest.raises(Refused, match="rsLoRA"):
        check_combination("svd", [PLAIN | {"use_rslora": True}, PLAIN])


@pytest.mark.parametrize("change", [
    {"use_dora": True}, {"lora_bias": True}, {"modules_to_save": ["lm_head"]}, {"target_parameters": ["mlp.experts"]}, {"bias": "all"}, {"peft_type": "LOHA"},
    {"init_lora_weights": "pissa"}, {"trainable_token_indices": [1]},
], ids=lambda change: next(iter(change)))  # fmt: skip
def test_adapters_that_are_more_than_a_and_b_are_refused(change):
    """What is beside A and B would be left out of the combination without a word."""
    with pytest.raises(Refused, match="cannot be combined"):
        check_combination("svd", [PLAIN, PLAIN | change])


@pytest.mark.parametrize(("how", "settings", "text"), [
    ("ties", {}, "share"), ("ties", {"density": 0.0}, "share"), ("dare_linear", {"density": 1.5}, "share"), ("svd", {"density": 0.5}, "keeps all"),
    ("ties", {"density": 0.5, "rank": 4}, "rank"), ("ties", {"density": 0.5, "majority_sign": "loudest"}, "majority"), ("tied", {}, "no combination"),
])  # fmt: skip
def test_settings_that_mean_nothing_are_refused(how, settings, text):
    """PEFT fails deep inside for some of these, and takes others for something else."""
    with pytest.raises(UsageProblem, match=text):
        check_combination(how, [PLAIN, PLAIN], **settings)


@pytest.mark.parametrize("how", SEPARATE)
def test_ranks_must_be_equal_where_factors_are_combined(how):
    """Factors of different ranks cannot be laid on each other."""
    with pytest.raises(Refused, match="one rank"):
        check_combination(how, [PLAIN, PLAIN | {"rank_pattern": {"q_proj": 8}}], density=0.5)
    check_combination(f"{how}_svd", [PLAIN, PLAIN | {"r": 8}], density=0.5)


def test_one_adapter_is_no_combination():
    """PEFT quietly takes ``linear`` then, which is not what was asked for."""
    with pytest.raises(UsageProblem, match="two adapters"):
        check_combination("svd", [PLAIN])


def test_what_a_combination_loses_is_said():
    """Cross terms and a cut rank are in the result; the user must hear of them."""
    assert all("cross terms" in check_combination(how, [PLAIN, PLAIN], density=0.5)[0] for how in SEPARATE)
    assert "rank 4 of a sum that may have rank 8" in check_combination("svd", [PLAIN, PLAIN])[0]
    assert check_combination("svd", [PLAIN, PLAIN], rank=8) == ()


def test_the_light_list_of_names_is_the_heavy_one():
    """A name that a recipe takes and that is neither combined by nor refused with its reason, or the other way round."""
    assert set(recipe_values.COMBINATIONS) == {*COMBINATIONS, *_NOT_OFFERED}
