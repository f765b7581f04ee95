"""Requantized checkpoints, made by the command line, read back by the loaders that users have."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import KINDS
from oracles.dequantized import base_model, divergence, fill, load_public, loaded_weights, logits, nf4_weights, separate_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from qmerge.formats import gptq
from qmerge.formats import nf4 as nf4_format
from qmerge.numerics import nf4
from qmerge.pipeline import block_pair
from qmerge.pipeline.blocks import find_groups, record_calls
from qmerge.pipeline.skeleton import describe
from qmerge.store.checkpoint import open_checkpoint
from qmerge.store.manifest import read_manifest
from qmerge.types import Grid

pytest.importorskip("gptqmodel")
SYM, ASYM, NF4 = ("gptq",), ("gptq", "--asym", "--group-size", "32"), ("nf4",)
NAMES = {SYM: "gptq-sym", ASYM: "gptq-asym", NF4: "nf4"}
FORMATS = pytest.mark.parametrize("fmt", NAMES, ids=NAMES.get)
EVERY = pytest.mark.parametrize("kind", KINDS)
RARE = [("qwen2", ASYM), ("gpt2", ASYM), ("gemma2", SYM)]
"""slow: each of these formats, and each of these kinds of model, is in the other pairs too"""


def pairs(*without: tuple[str, tuple[str, ...]]) -> pytest.MarkDecorator:
    """Kinds of model by formats."""
    return pytest.mark.parametrize(("kind", "fmt"), [
        pytest.param(kind, fmt, id=f"{kind}-{NAMES[fmt]}", marks=[pytest.mark.slow] if (kind, fmt) in RARE else [])
        for kind in KINDS for fmt in NAMES if (kind, fmt) not in without
    ])  # fmt: skip


def unpacked(folder: Path, fmt: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """Our own reading of OUT's bytes: module name -> fp32 ``[out, in]``."""
    checkpoint = open_checkpoint(folder)
    if fmt[0] == "nf4":
        found = {name: nf4_format.unpack(name, checkpoint.load, checkpoint.specs) for name in nf4_format.find_quantized(checkpoint.specs)}
        return {name.removesuffix(".weight"): nf4.dequantize(weight.codes, weight.state) for name, weight in found.items()}
    grid = Grid("int", 4, 32 if "--asym" in fmt else 128, "--asym" not in fmt)
    modules = [name.removesuffix(".qweight") for name in checkpoint.specs if name.endswith(".qweight")]
    return {name: gptq.dequantize(gptq.unpack(name, checkpoint.load, grid)) for name in modules}


def public(kind: str, folder: Path, fmt: tuple[str, ...]) -> torch.nn.Module:
    if kind == "gpt2" and fmt[0] == "gptq":  # transformers 5.23 initializes GPT-2's packed c_proj anew and stops; gptqmodel's own loader reads the file
        from gptqmodel import GPTQModel

        return GPTQModel.load(str(folder), device="cpu", backend="gptq_torch").model.eval()
    return load_public(str(folder))


def own_model(zoo, kind: str, folder: Path, fmt: tuple[str, ...], dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """The float model filled with what we unpack."""
    model = AutoModelForCausalLM.from_pretrained(zoo.float(kind), dtype=torch.float32)
    return fill(model, unpacked(folder, fmt)).to(dtype)


def distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


@pairs()
def test_file_holds_what_the_pipeline_computed(zoo, written, kind, fmt):
    """Evidence about weights that are not in the file: codes, scales or zeros changed by packing, or scales rounded by it."""
    out, weights = written(kind, *fmt)
    found = unpacked(out, fmt)
    assert {f"{name}.weight" for name in found} == set(weights) and len(found) == {"gpt2": 8}.get(kind, 14)
    for name, weight in found.items():
        assert torch.equal(weight, weights[f"{name}.weight"]), name


@pairs(("gpt2", ASYM))  # gptqmodel loads asymmetric v1 files only where it wrote them, and transformers 5.23 no gptq GPT-2 at all
def test_public_loader_holds_and_answers_the_same(zoo, written, kind, fmt):
    """A loader that reads other weights than we wrote, leaves some at random, or keeps LoRA modules. Weights must be equal bit for bit; logits differ by no
    more than twice what bf16 arithmetic on the same weights does."""
    out, _ = written(kind, *fmt)
    ids, model = zoo.batch(), public(kind, out, fmt)
    theirs, ours = loaded_weights(model), unpacked(out, fmt)
    assert set(theirs) == set(ours)
    for name, weight in ours.items():
        assert torch.equal(theirs[name], weight), name
    wanted = logits(own_model(zoo, kind, out, fmt), ids)
    rounding = distance(logits(own_model(zoo, kind, out, fmt, torch.bfloat16), ids), wanted)
    assert distance(logits(model, ids), wanted) < 2 * rounding < 0.05
    assert not [name for name, _ in model.named_modules() if "lora" in name.lower()]
    text = model.generate(input_ids=ids[:1, :8], max_new_tokens=5, do_sample=False, pad_token_id=1)
    assert 8 < text.shape[1] <= 13 and int(text.max()) < 320


@pairs()
def test_shapes_are_the_bases_and_changed_linears_changed(zoo, written, kind, fmt):
    """A padded or transposed linear, or a fine-tune that was rounded away: every linear that the adapter changes must differ from the base's."""
    out, _ = written(kind, *fmt)
    base, adapter = nf4_weights(zoo.nf4(kind)), load_file(Path(zoo.adapter(kind)) / "adapter_model.safetensors")
    changed = {name.removeprefix("base_model.model.").partition(".lora_")[0] for name in adapter}
    for name, weight in unpacked(out, fmt).items():
        assert weight.shape == base[name].shape, name
        if name in changed:
            assert not torch.equal(weight, base[name]), name


@pairs()
def test_all_else_is_the_bases(zoo, written, kind, fmt):
    """Biases, norms or embeddings cast, lost or requantized: Qwen2's q, k, v biases and GPT-2's everywhere must be the base's, byte for byte."""
    out, weights = written(kind, *fmt)
    base, found = load_file(Path(zoo.float(kind)) / "model.safetensors"), load_file(out / "model.safetensors")
    kept = set(base) - set(weights)
    assert sum(name.endswith(".bias") for name in kept) == {"llama": 0, "qwen2": 6, "gpt2": 13, "gemma2": 0}[kind]
    for name in kept:
        assert found[name].dtype == base[name].dtype and torch.equal(found[name], base[name]), name
    parts = (".qweight", ".qzeros", ".scales", ".g_idx", ".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", "__nf4")
    assert {name for name in found if not name.endswith(parts)} - kept == (set(weights) if fmt == NF4 else set())


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=[pytest.mark.slow] if kind in ("qwen2", "gemma2") else []) for kind in KINDS])
def test_calibrated_beats_plain_rounding_and_the_bare_base(zoo, written, kind):
    """A solver that costs time and gains nothing, or a 4-bit file that passes every check of its format and has forgotten the fine-tune: KL to the separate
    model on text that it has not seen. Plain rounding onto NF4 is where the bare base is."""
    ids, adapter = zoo.batch(8), zoo.adapter(kind, "strong", relative=0.05)
    wanted = logits(separate_model(zoo.float(kind), zoo.nf4(kind), adapter), ids)
    base = divergence(wanted, logits(base_model(zoo.float(kind), zoo.nf4(kind)), ids))
    for fmt in (NF4, SYM):
        solved, rounded = (divergence(wanted, logits(own_model(zoo, kind, written(kind, *fmt, *flags, adapter=adapter)[0], fmt), ids)) for flags in ((), ("--rtn",)))
        assert solved < 0.6 * rounded, (fmt, solved, rounded)
        assert fmt == SYM or (solved < 0.6 * base and rounded > 0.8 * base), (solved, rounded, base)


@pytest.mark.parametrize("flags, groups", [(("--group-size", "64"), 2), (("--group-size", "-1"), 1), (("--group-size", "-1", "--asym"), 1)])
def test_other_group_sizes(zoo, written, flags, groups):
    """A group size that is ignored, or a whole row cut into groups; the file must still read as the config says."""
    out, weights = written("llama", "gptq", *flags)
    settings = json.loads((out / "config.json").read_text())["quantization_config"]
    name = "model.layers.0.mlp.up_proj"
    assert settings["group_size"] == int(flags[1]) and load_file(out / "model.safetensors")[f"{name}.scales"].shape[0] == groups
    assert torch.equal(loaded_weights(load_public(str(out)))[name], weights[f"{name}.weight"])


@pytest.mark.parametrize("way", ["single", "recipe", "original"])
@pytest.mark.parametrize("fmt", ["gptq", "nf4"])
def test_every_kind_of_base(zoo, written, fmt, way):
    """A quant state of another kind than the base's, or none where the base was float. nf4 keeps the base's nesting; ``original`` takes bitsandbytes' double one."""
    base, flags = {"single": (zoo.nf4("llama", False), ()), "recipe": (zoo.float("llama"), ("--nf4-recipe", "single")), "original": (zoo.float("llama"), ("--on", "original"))}[way]
    out, weights = written("llama", fmt, *flags, base=base)
    model = load_public(str(out))
    assert all(torch.equal(weight, weights[f"{name}.weight"]) for name, weight in loaded_weights(model).items()) and len(loaded_weights(model)) == 14
    if fmt == "nf4":
        nested = any(name.endswith("nested_absmax") for name in open_checkpoint(out).specs)
        config = json.loads((out / "config.json").read_text())["quantization_config"]
        assert nested == config["bnb_4bit_use_double_quant"] == (way == "original")


def test_recipe_and_saved_base_give_the_same_file(zoo, written):
    """A float base quantized on the fly giving other weights than the same base saved in NF4."""
    fly, _ = written("llama", "gptq", "--nf4-recipe", "double", base=zoo.float("llama"))
    saved, _ = written("llama", "gptq")
    assert (fly / "model.safetensors").read_bytes() == (saved / "model.safetensors").read_bytes()


@FORMATS
def test_two_runs_give_the_same_bytes(zoo, written, fmt):
    """An order of summation or a seed that is not fixed: a rerun could not be told from another model."""
    first, again = written("llama", *fmt)[0], written("llama", *fmt, fresh=True)[0]
    assert (first / "model.safetensors").read_bytes() == (again / "model.safetensors").read_bytes()
    one, two = read_manifest(first), read_manifest(again)
    assert one["files"] == two["files"] and one["inputs"] == two["inputs"] and one["linears"] == two["linears"]


@pytest.mark.parametrize("fmt", [("gptq",), ("nf4",)], ids=lambda fmt: fmt[0])
@pytest.mark.parametrize("threads, tape", [pytest.param(1, 2**31, marks=pytest.mark.slow), (3, 2**31), (2, 0)])
def test_threads_and_memory_do_not_change_the_bytes(zoo, written, fmt, threads, tape, monkeypatch):
    """A sum split over as many threads as there are, or a pass that is repeated where memory is short and is not the same pass: another machine, another model."""
    first, before = written("llama", *fmt)[0], torch.get_num_threads()
    monkeypatch.setattr(block_pair, "TAPE_BYTES", tape)
    torch.set_num_threads(threads)
    try:
        again = written("llama", *fmt, fresh=True)[0]
    finally:
        torch.set_num_threads(before)
    assert (first / "model.safetensors").read_bytes() == (again / "model.safetensors").read_bytes()


def test_another_seed_draws_other_windows(zoo, written):
    """A seed that is recorded and not used."""
    one, two = (read_manifest(written("llama", "gptq", *flags)[0])["inputs"]["calibration"] for flags in ((), ("--seed", "7")))
    assert one["token_ids_sha256"] != two["token_ids_sha256"] and (one["seed"], two["seed"]) == (0, 7)


def test_generic_text_takes_its_share(zoo, written):
    """A generic share that is read and left out, or that replaces the adapter's own text."""
    out, _ = written("llama", "gptq", "--generic", zoo.other, "--generic-share", "0.25")
    facts = read_manifest(out)["inputs"]["calibration"]
    assert (facts["in_domain"]["windows"], facts["generic"]["windows"]) == (6, 2) and facts["generic"]["source"] == "other.jsonl"
    assert facts["windows"] + facts["held_out_windows"] == 8


@pytest.mark.parametrize("fmt", ["gptq", "nf4"])
def test_saved_modules_and_untied_heads(zoo, written, fmt):
    """A saved embedding lost on the way to 4 bits, or a head left tied to it."""
    adapter = zoo.adapter("qwen2", "embedding", relative=0.05, modules_to_save=["embed_tokens"])
    out, _ = written("qwen2", fmt, adapter=adapter)
    stored, wanted = load_file(out / "model.safetensors"), load_file(Path(adapter) / "adapter_model.safetensors")
    assert torch.equal(stored["model.embed_tokens.weight"], wanted["base_model.model.model.embed_tokens.weight"].bfloat16())
    model = load_public(str(out))
    assert torch.equal(model.get_output_embeddings().weight.float(), load_file(Path(zoo.float("qwen2")) / "model.safetensors")["model.embed_tokens.weight"].float())
    assert torch.equal(model.get_input_embeddings().weight, stored["model.embed_tokens.weight"])


@pytest.mark.parametrize("fmt", ["gptq", "nf4"])
def test_verify_derives_it_again(zoo, written, cli, fmt):
    """A verification that fails on what qmerge itself wrote, or passes with another adapter."""
    out, _ = written("llama", fmt)
    answer = cli("verify", out, "--base", zoo.nf4("llama"), "--adapter", zoo.adapter("llama"))
    assert answer.code == 0, answer.out
    other = zoo.adapter("llama", "another", relative=0.3, seed=2)
    assert cli("verify", out, "--base", zoo.nf4("llama"), "--adapter", other).code == 1


@pytest.mark.parametrize("fmt", ["gptq", "nf4"])
def test_plan_promises_what_is_written(zoo, written, cli, fmt, tmp_path):
    """A dry run that is off by more than the few bytes of headers and states."""
    out, _ = written("llama", fmt)
    answer = cli("merge", "--base", zoo.nf4("llama"), "--adapter", zoo.adapter("llama"), "--out", tmp_path / "o", "--format", fmt, "--calibration", zoo.calibration, "--dry-run", "--json")
    found = json.loads(answer.out)
    held = sum(spec.nbytes for spec in open_checkpoint(out).specs.values())
    assert found["linears_requantized"] == 14 and abs(found["bytes_out"] - held) < 0.02 * held and list(tmp_path.iterdir()) == []


GROUPS = {
    "llama": [(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), None), (("self_attn.o_proj",), "<in>"),
              (("mlp.gate_proj", "mlp.up_proj"), None), (("mlp.down_proj",), "post_attention_layernorm")],
    "gpt2": [(("attn.c_attn",), None), (("attn.c_proj",), "<in>"), (("mlp.c_fc",), None), (("mlp.c_proj",), "ln_2")],
    # both branches end in a norm before they are added: their linears do not write into the stream
    "gemma2": [(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), None), (("self_attn.o_proj",), None),
               (("mlp.gate_proj", "mlp.up_proj"), None), (("mlp.down_proj",), None)],
}  # fmt: skip
GROUPS["qwen2"] = GROUPS["llama"]


@EVERY
def test_groups_and_residual_writers(zoo, kind):
    """Linears solved on each other's inputs, or a linear aimed at a residual that it is not added to. Found from tensors, never from names."""
    model = AutoModelForCausalLM.from_pretrained(zoo.float(kind), dtype=torch.float32).eval()
    skeleton = describe(model, kind)
    hidden, calls = record_calls(model, skeleton.blocks_name, [zoo.batch(1)])
    short = [name.removeprefix(f"{skeleton.blocks_name}.0.").removesuffix(".weight") for name in skeleton.inside if name.startswith(f"{skeleton.blocks_name}.0.")]
    found = find_groups(skeleton.blocks[0], short, hidden[0], calls[0][0])
    assert [(group.modules, group.residual) for group in found] == GROUPS[kind]


@EVERY
def test_streams_through_blocks_are_the_model(zoo, kind):
    """A mask, a position or a sliding window that is lost when blocks are run one by one: the hidden states must be the model's own."""
    from qmerge.pipeline.blocks import run_block

    model = AutoModelForCausalLM.from_pretrained(zoo.float(kind), dtype=torch.float32).eval()
    skeleton = describe(model, kind)
    first, second = zoo.batch(4).split(2)
    hidden, calls = record_calls(model, skeleton.blocks_name, [first, second])
    for ids, states, call in zip((first, second), hidden, calls, strict=True):
        with torch.no_grad():
            wanted = model(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states
        for index, block in enumerate(skeleton.blocks):
            torch.testing.assert_close(states, wanted[index], atol=1e-5, rtol=1e-5)
            states = run_block(block, states, call[index])
