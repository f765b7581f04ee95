"""Every arm holds exactly what its public loader holds, and differs from the others in its weights only."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from bitsandbytes import functional
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from qmerge.errors import Refused, UsageProblem
from qmerge.quality import arms
from qmerge.quality.attach import as_set
from qmerge.quality.merging import linear_rows, merge_in_memory, model_edits
from qmerge.quality.plain import dense_weights, make_plain, move, place, round_trip_nf4
from qmerge.quality.served import as_served

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TEXT = [f"the cat number {i} sat on mat {i % 7} and then ran to tree {i % 5} where {i} birds sang a song" for i in range(60)]


def build_tokenizer() -> PreTrainedTokenizerFast:
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    raw.train_from_iterator(TEXT, trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>")


def build(root: Path) -> SimpleNamespace:
    """A float base, the same in NF4, an adapter trained a little on ``TEXT``, and the held-out rest of it as a file."""
    torch.manual_seed(0)
    made = SimpleNamespace(**{name: str(root / name) for name in ("float", "nf4", "adapter")}, text=str(root / "held_out.jsonl"), tokenizer=build_tokenizer())
    config = LlamaConfig(vocab_size=300, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
                         num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=True, bos_token_id=0, eos_token_id=1)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(made.float)
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16)
    AutoModelForCausalLM.from_pretrained(made.float, quantization_config=quantization, device_map={"": "cpu"}).save_pretrained(made.nf4, save_original_format=False)
    for folder in (made.float, made.nf4):
        made.tokenizer.save_pretrained(folder)
    model = get_peft_model(arms.load_base(made.nf4).model, LoraConfig(r=4, lora_alpha=16, target_modules=LINEARS, task_type="CAUSAL_LM"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    ids = made.tokenizer([f"<s>{t}</s>" for t in TEXT[:40]], padding=False)["input_ids"]
    batch = torch.tensor([row[:24] for row in ids])
    for _ in range(25):
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step(), optimizer.zero_grad()
    model.save_pretrained(made.adapter)
    Path(made.text).write_text("\n".join(json.dumps({"text": t}) for t in TEXT[40:]))
    return made


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return build(tmp_path_factory.mktemp("tiny"))


@torch.inference_mode()
def logits(model) -> torch.Tensor:
    return model(input_ids=torch.arange(2, 34)[None]).logits.float()


def test_base_arm_is_the_checkpoint_dequantized_by_hand(tiny):
    """Weights rounded through the compute dtype, nesting lost, or a linear that was left in 4 bits."""
    base = arms.load_base(tiny.nf4)
    fresh = AutoModelForCausalLM.from_pretrained(tiny.nf4, device_map={"": "cpu"})
    by_hand = AutoModelForCausalLM.from_pretrained(tiny.float, dtype=torch.float32)
    weights = dense_weights(base.model)
    for name, module in fresh.named_modules():
        if type(module).__name__ == "Linear4bit":
            module.weight.quant_state.dtype = torch.float32
            expected = functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            assert torch.equal(weights[name], expected), name
            by_hand.get_submodule(name).weight.data = expected
    assert torch.equal(logits(base.model), logits(by_hand.eval()))
    assert {p.dtype for p in base.model.parameters()} == {torch.float32} and not base.model.training
    assert base.nbytes == sum(p.stat().st_size for p in Path(tiny.nf4).glob("*.safetensors"))


def test_separate_equals_merged_to_rounding_and_not_base(tiny):
    """A wrong scaling, a transposed factor or a forgotten module."""
    separate, merged, base = arms.load_separate(tiny.nf4, tiny.adapter), arms.load_merged(tiny.nf4, tiny.adapter), arms.load_base(tiny.nf4)
    torch.testing.assert_close(logits(separate.model), logits(merged.model), atol=2e-5, rtol=1e-5)
    assert float((logits(separate.model) - logits(base.model)).abs().max()) > 0.1
    assert set(dense_weights(separate.model)) == set(dense_weights(base.model))
    assert merged.nbytes == 2 * sum(p.numel() for p in base.model.parameters()) and merged.path is None


@pytest.mark.parametrize("block_size", [64, 128])
def test_float_base_with_nf4_recipe(tiny, block_size):
    """Evaluating the float weights when the adapter was trained on their NF4 rounding."""
    weights = dense_weights(arms.load_base(tiny.float, nf4_recipe={"block_size": block_size, "double_quant": True}).model)
    plain = dense_weights(arms.load_base(tiny.float, on="original").model)
    name = "model.layers.0.mlp.up_proj"
    assert torch.equal(weights[name], round_trip_nf4(plain[name], block_size, True)) and not torch.equal(weights[name], plain[name])
    assert torch.equal(weights["lm_head"], plain["lm_head"])
    with pytest.raises(UsageProblem, match="recipe"):
        arms.load_base(tiny.float, nf4_recipe={"blocksize": 64})


def test_rtn_arm_rounds_merged_weights(tiny):
    """`merge_and_unload` on a 4-bit model, without its arithmetic."""
    rtn, merged = (dense_weights(f(tiny.nf4, tiny.adapter).model) for f in (arms.load_rtn, arms.load_merged))
    name = "model.layers.1.self_attn.o_proj"
    assert torch.equal(rtn[name], round_trip_nf4(merged[name], 64, True))
    assert torch.equal(rtn["lm_head"], merged["lm_head"])


def test_merging_on_the_original_float_base(tiny):
    """Arms C and E must start from the float weights then, and C must ask for them."""
    below = arms.load_base(tiny.float, on="original").model
    float_weights, edits = dense_weights(below), model_edits(below, as_set(tiny.adapter))
    for arm in (arms.load_merged(tiny.nf4, tiny.adapter, on="original", original=tiny.float), arms.load_original(tiny.float, tiny.adapter)):
        rows = linear_rows(float_weights, dense_weights(arm.model), edits)
        assert all(row["delta_survival"] == pytest.approx(1.0, abs=1e-4) and row["error_ratio"] < 1e-4 for row in rows.values())
    with pytest.raises(UsageProblem, match="original"):
        arms.load_merged(tiny.nf4, tiny.adapter, on="original")


def test_linear_rows_know_base_merged_and_half(tiny):
    """Survival must be 0 for the base, 1 for merged, ½ in the middle, whatever the error."""
    base, merged = (dense_weights(f.model) for f in (arms.load_base(tiny.nf4), arms.load_merged(tiny.nf4, tiny.adapter)))
    half = {name: (base[name] + merged[name]) / 2 for name in base}
    edits = model_edits(arms.load_base(tiny.nf4).model, as_set(tiny.adapter))
    for weights, survival, error in ((base, 0.0, 1.0), (merged, 1.0, 0.0), (half, 0.5, 0.5)):
        rows = linear_rows(base, weights, edits)
        assert len(rows) == 14
        for row in rows.values():
            assert (row["delta_survival"], row["error_ratio"]) == pytest.approx((survival, error), abs=1e-4)
            assert row["delta_ratio"] > 0


def pack(rows: torch.Tensor) -> torch.Tensor:
    """Eight 4-bit values per int32, the first in the lowest bits, along the last axis."""
    return (rows.long().reshape(rows.shape[0], -1, 8) << torch.arange(0, 32, 4)).sum(-1).to(torch.int32)


def write_gptq(tiny, folder: Path) -> dict[str, torch.Tensor]:
    """A hand-packed v1 GPTQ checkpoint (4 bits, groups of 32) of the float base; returns the weights it means, fp32 ``[out, in]``."""
    model = AutoModelForCausalLM.from_pretrained(tiny.float, dtype=torch.float16)
    meant, state = {}, {k: v.clone() for k, v in model.state_dict().items() if k != "lm_head.weight"}
    for name in dense_weights(model):
        if name == "lm_head":
            continue
        w = state.pop(f"{name}.weight").float()
        groups = w.reshape(w.shape[0], -1, 32)
        low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
        scales = ((high - low) / 15).to(torch.float16).float()
        zeros = (-low / scales).round().clamp(1, 15)
        codes = (groups / scales[..., None] + zeros[..., None]).round().clamp(0, 15)
        meant[name] = (scales[..., None] * (codes - zeros[..., None])).reshape(w.shape)
        state |= {f"{name}.qweight": pack(codes.reshape(w.shape)).T.contiguous(), f"{name}.qzeros": pack(zeros.T - 1).contiguous(),
                  f"{name}.scales": scales.T.contiguous().half(), f"{name}.g_idx": (torch.arange(w.shape[1]) // 32).int()}
    folder.mkdir()
    config = json.loads((Path(tiny.float) / "config.json").read_text())
    config |= {"dtype": "float16", "quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False, "desc_act": False, "checkpoint_format": "gptq"}}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return meant


def test_gptq_candidate_is_read_as_its_loader_holds_it(tiny, tmp_path):
    """Zeros off by one, a transposed weight, or scales rounded once more."""
    pytest.importorskip("gptqmodel"), pytest.importorskip("optimum")
    meant = write_gptq(tiny, tmp_path / "gptq")
    arm = arms.load_candidate("gptq", str(tmp_path / "gptq"))
    found = dense_weights(arm.model)
    assert arm.kind == "gptq" and set(found) == set(meant) | {"lm_head"}
    for name, weight in meant.items():
        torch.testing.assert_close(found[name], weight, atol=1e-7, rtol=1e-6, msg=name)
    assert bool(torch.isfinite(logits(arm.model)).all())


def test_float_and_nf4_candidates(tiny, tmp_path):
    """A bf16 candidate must not be rounded again, an NF4 one not be read through its compute dtype."""
    arms.load_merged(tiny.nf4, tiny.adapter).model.save_pretrained(tmp_path / "merged", save_original_format=False)
    candidate = arms.load_candidate("merged-fp32", str(tmp_path / "merged"))
    assert candidate.kind == "none" and torch.equal(logits(candidate.model), logits(arms.load_merged(tiny.nf4, tiny.adapter).model))
    again = arms.load_candidate("again", tiny.nf4)
    assert again.kind == "bitsandbytes" and torch.equal(logits(again.model), logits(arms.load_base(tiny.nf4).model))


def test_unknown_or_missing_candidates_are_refused(tiny, tmp_path):
    """Evaluating something else than what was asked for."""
    with pytest.raises(Refused, match="no checkpoint"):
        arms.load_candidate("x", str(tmp_path / "nothing"))
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "hqq"}}))
    save_file({"weight": torch.zeros(2, 2)}, tmp_path / "model.safetensors")
    with pytest.raises(Refused, match="hqq"):
        arms.load_candidate("x", str(tmp_path))
    with pytest.raises(Refused, match="hqq"):
        arms.load_base(str(tmp_path))


def test_a_repacked_model_is_refused(tiny):
    """bitsandbytes repacks in place at the first eval forward on some CPUs; what is read afterwards is not the checkpoint."""
    model = AutoModelForCausalLM.from_pretrained(tiny.nf4, device_map={"": "cpu"})
    model.model.layers[0].mlp.up_proj.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(Refused, match="repacked"):
        make_plain(model)


def test_saved_embedding_unties_the_head_as_peft_does(tiny, tmp_path):
    """A merge that lets the tied head follow `modules_to_save` gives another model than PEFT runs."""
    torch.manual_seed(1)
    model = get_peft_model(arms.load_base(tiny.nf4).model, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens"], task_type="CAUSAL_LM"))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path)
    below = arms.load_base(tiny.nf4).model
    separate = PeftModel.from_pretrained(arms.load_base(tiny.nf4).model, str(tmp_path)).eval()
    torch.testing.assert_close(logits(merge_in_memory(below, str(tmp_path))), logits(separate), atol=2e-5, rtol=1e-5)


def test_served_reference_is_near_and_says_how(tiny):
    """The floor must come from the public loaders, or say that it does not."""
    model, source = as_served(tiny.nf4, tiny.adapter)
    assert "bitsandbytes" in source
    difference = (logits(model) - logits(arms.load_separate(tiny.nf4, tiny.adapter).model)).abs().max()
    assert 0.0 < float(difference) < 1.0


def test_moving_casts_parameters_only():
    """A rotary table in fp16 loses positions."""
    module = torch.nn.Linear(2, 2)
    module.register_buffer("table", torch.ones(2))
    assert place(module, "cpu").weight.dtype == torch.float32
    move(module, "cpu", torch.float16)
    assert module.weight.dtype == torch.float16 and module.table.dtype == torch.float32
