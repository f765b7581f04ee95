"""names.py and regions.py against the loader itself: what from_pretrained puts into the model is what the regions say."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qmerge.adapters.names import relate, saved_shapes
from qmerge.adapters.regions import Group, Region, trace
from qmerge.errors import Refused

KINDS = ("llama", "gpt2", "mixtral", "qwen3_moe", "gpt_oss", "hrm_text", "qwen3_vl_moe")


def config_of(kind: str, **changes):
    import transformers as tf

    common = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
              "head_dim": 8, "max_position_embeddings": 64, "initializer_range": 0.1, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None,
              "tie_word_embeddings": False}  # fmt: skip
    if kind == "llama":
        return tf.LlamaConfig(**common | changes)
    if kind == "gpt2":
        return tf.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.1, bos_token_id=0, eos_token_id=1, **changes)
    if kind == "mixtral":
        return tf.MixtralConfig(**common | {"num_local_experts": 4, "num_experts_per_tok": 2} | changes)
    if kind == "qwen3_moe":
        return tf.Qwen3MoeConfig(**common | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24} | changes)
    if kind == "gpt_oss":
        return tf.GptOssConfig(**common | {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 24, "pad_token_id": 0} | changes)
    if kind == "hrm_text":
        return tf.AutoConfig.for_model("hrm_text", **common | {"num_key_value_heads": 4, "pad_token_id": 0} | changes)
    text = common | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "decoder_sparse_step": 1,
                     "rope_scaling": {"rope_type": "default", "mrope_section": [2, 1, 1]}}  # fmt: skip
    vision = {"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 16, "out_hidden_size": 32,
              "deepstack_visual_indexes": [0], "num_position_embeddings": 16}  # fmt: skip
    return tf.Qwen3VLMoeConfig(text_config=text, vision_config=vision, tie_word_embeddings=False, image_token_id=60, video_token_id=61,
                               vision_start_token_id=62, vision_end_token_id=63, **changes)  # fmt: skip


def class_of(kind: str):
    import transformers as tf

    return tf.AutoModelForImageTextToText if kind == "qwen3_vl_moe" else tf.AutoModelForCausalLM


def meta_model(kind: str, **changes):
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        return class_of(kind).from_config(config_of(kind, **changes))


def save_tiny(kind: str, folder: Path, **changes) -> str:
    """A base as the hub has it, in one file; biases and norms random as well."""
    torch.manual_seed(0)
    model = class_of(kind).from_config(config_of(kind, **changes), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    if kind == "gpt2":  # OpenAI's file on the hub: no "transformer." before the names
        tensors = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    if kind == "qwen3_vl_moe":  # Qwen's file on the hub: [experts, in, out], which transformers turns when it loads
        tensors = {name: tensor.transpose(1, 2).contiguous() if ".experts." in name else tensor for name, tensor in tensors.items()}
    save_file(tensors, file, metadata={"format": "pt"})
    return str(folder)


def disk_of(folder: str) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "model.safetensors")


def load(folder: str, kind: str):
    return class_of(kind).from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    made: dict[str, str] = {}

    def get(kind: str) -> str:
        if kind not in made:
            made[kind] = save_tiny(kind, tmp_path_factory.mktemp(kind))
        return made[kind]

    return get


@pytest.fixture(scope="module")
def related(tiny):
    def get(kind: str):
        disk = disk_of(tiny(kind))
        return relate(meta_model(kind), {name: tensor.shape for name, tensor in disk.items()}), disk

    return get


@pytest.mark.parametrize("kind", KINDS)
def test_regions_place_what_the_loader_places(kind, tiny, related):
    """Gate for up, expert 1 for expert 10, a transposition forgotten: the merged delta lands on other weights than PEFT's."""
    names, disk = related(kind)
    loaded = load(tiny(kind), kind).state_dict()
    for parameter, wanted in loaded.items():
        if parameter in names.missing:
            continue
        made = torch.full(wanted.shape, torch.nan)
        for region in names.regions_of_parameter(parameter):
            region.write(made, disk[region.disk])
        assert torch.equal(made, wanted), parameter


@pytest.mark.parametrize("kind", KINDS)
def test_regions_make_the_file_from_the_model(kind, tiny, related):
    """A disk tensor that several parameters share gets only one of them, or one that is turned is written as it lies in the model."""
    names, disk = related(kind)
    loaded = load(tiny(kind), kind).state_dict()
    for name, wanted in disk.items():
        made = torch.full(wanted.shape, torch.nan)
        for region in names.regions_of_disk(name):
            region.write_disk(made, loaded[region.parameter])
        assert torch.equal(made, wanted), name


@pytest.mark.parametrize("kind", KINDS)
def test_every_tensor_of_a_whole_file_has_a_place(kind, related):
    """A variant of naming that is not recognized: the base's tensors count as unknown."""
    names, _ = related(kind)
    assert names.unused == ()
    assert set(names.missing) <= {"lm_head.weight"}  # GPT-2's is tied


def test_equal_names_need_no_tracing(related):
    """Plain models pay for the machinery, or get selectors where the tensor is simply the parameter."""
    names, disk = related("llama")
    assert all(region.same and region.disk == region.parameter for name in disk for region in names.regions_of_disk(name))
    assert not names._traced


def test_twelve_experts_keep_their_numeric_order():
    """Sorted as text, expert 10 comes before expert 2."""
    model = meta_model("mixtral", num_local_experts=12)
    names = relate(model, saved_shapes(model))
    (region,) = names.regions_of_disk("model.layers.1.block_sparse_moe.experts.10.w3.weight")
    assert region.parameter == "model.layers.1.mlp.experts.gate_up_proj"
    assert torch.equal(region.rows, torch.arange(10 * 96 + 48, 11 * 96))


def test_fused_file_of_a_model_that_hubs_store_split():
    """A base that transformers saved as it holds it (save_original_format=False) counts as unknown because its experts are not split."""
    model = meta_model("mixtral")
    names = relate(model, {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()})
    assert not names.unused and not names.missing
    assert names.regions_of_parameter("model.layers.0.mlp.experts.gate_up_proj")[0].same


def test_layers_of_one_kind_share_selectors():
    """48 layers of 128 experts are traced 48 times, or keep gigabytes of selectors."""
    model = meta_model("qwen3_moe")
    names = relate(model, saved_shapes(model))
    first, second = (names.regions_of_disk(f"model.layers.{layer}.mlp.experts.3.up_proj.weight")[0] for layer in (0, 1))
    assert first.rows is second.rows and (first.parameter, second.parameter) == tuple(f"model.layers.{layer}.mlp.experts.gate_up_proj" for layer in (0, 1))


def test_saved_shapes_are_those_of_the_saved_file(related):
    """Old adapters are looked up under names that no file has."""
    for kind in ("mixtral", "qwen3_moe", "gpt_oss", "llama"):
        _, disk = related(kind)
        assert saved_shapes(meta_model(kind)) == {name: tuple(tensor.shape) for name, tensor in disk.items()}


def test_old_spellings_of_a_name_resolve(related):
    """An adapter that names the router as Mixtral's first release did is said to change nothing of this model."""
    names, _ = related("mixtral")
    assert names.resolve("model.layers.0.block_sparse_moe.gate.weight") == "model.layers.0.mlp.gate.weight"
    assert names.resolve("model.layers.0.block_sparse_moe.experts.0.w1.weight") is None
    assert related("gpt2")[0].resolve("h.0.attn.c_attn.weight") == "transformer.h.0.attn.c_attn.weight"


def test_a_parameter_without_a_source_is_missing_and_refused_by_name():
    """A file that lacks a tensor is merged all the same, and the model gets random numbers."""
    model = meta_model("llama")
    shapes = saved_shapes(model)
    del shapes["model.layers.1.mlp.down_proj.weight"]
    names = relate(model, shapes)
    assert names.missing == ("model.layers.1.mlp.down_proj.weight",)
    with pytest.raises(Refused, match="model.layers.1.mlp.down_proj.weight"):
        names.regions_of_parameter("model.layers.1.mlp.down_proj.weight")


def test_a_tensor_that_feeds_nothing_is_reported():
    """A tensor of another model is dropped without a word."""
    model = meta_model("llama")
    names = relate(model, saved_shapes(model) | {"model.layers.7.mlp.down_proj.weight": (32, 48)})
    assert names.unused == ("model.layers.7.mlp.down_proj.weight",)
    assert names.regions_of_disk("model.layers.7.mlp.down_proj.weight") == ()


def test_a_lost_expert_is_refused_by_name():
    """With one expert's tensor missing, all later ones move up by one."""
    model = meta_model("mixtral")
    shapes = saved_shapes(model)
    del shapes["model.layers.0.block_sparse_moe.experts.1.w3.weight"]
    names = relate(model, shapes)
    with pytest.raises(Refused, match=r"model\.layers\.0\.mlp\.experts\.gate_up_proj(.|\n)*experts\.3\.w3"):
        names.regions_of_parameter("model.layers.0.mlp.experts.gate_up_proj")
    assert len(names.regions_of_parameter("model.layers.1.mlp.experts.gate_up_proj")) == 8


def test_a_layer_of_another_shape_does_not_borrow_a_trace():
    """A damaged layer is answered with what was found for its sound neighbour."""
    model = meta_model("mixtral")
    name = "model.layers.1.block_sparse_moe.experts.1.w3.weight"
    names = relate(model, saved_shapes(model) | {name: (40, 32)})
    assert names.regions_of_disk(name.replace("layers.1", "layers.0"))
    with pytest.raises(Refused, match=r"layers\.1\.mlp\.experts\.gate_up_proj"):
        names.regions_of_disk(name)


def test_another_shape_on_disk_is_refused_by_name():
    """A resized vocabulary, or another size of the same family, is merged onto as if it fitted."""
    model = meta_model("llama")
    names = relate(model, saved_shapes(model) | {"lm_head.weight": (70, 32)})
    with pytest.raises(Refused, match="lm_head.weight"):
        names.regions_of_disk("lm_head.weight")


def test_a_conversion_that_computes_is_refused():
    """GGUF's norms are stored plus one: taken for a rearrangement, a delta would be added to the wrong rows."""
    from transformers.core_model_loading import WeightConverter
    from transformers.integrations.gguf.gguf_conversion_mapping import SubtractOne

    group = Group(WeightConverter("a.weight", "b.weight", operations=[SubtractOne()]), "b.weight", {"a.weight": ["a.weight"]})
    with pytest.raises(Refused, match="a.weight -> b.weight"):
        trace(group, ("b.weight",), {"b.weight": (4, 6)}, {"a.weight": (4, 6)}, meta_model("llama"))


def test_rearrangements_along_both_axes_are_followed():
    """Interleaved gate and up, or rotary halves, land in the wrong order: each half of them is another weight."""
    from transformers.core_model_loading import Chunk, Interleave, PermuteForRope, WeightConverter

    model = meta_model("llama")
    for operations, count in (([Interleave(dim=1)], 1), ([Interleave(dim=0), Chunk(dim=0)], 2), ([Chunk(dim=1)], 2), ([PermuteForRope()], 1)):
        disk = torch.randn(32, 12)
        names = ("p0", "p1")[:count]
        converter = WeightConverter("d", list(names), operations=operations)
        made = {"d": [disk]}
        for operation in operations:
            made = operation.convert(made, source_patterns=["d"], target_patterns=list(names), config=model.config, model=model, full_layer_name="d")
        found = trace(Group(converter, "p0", {"d": ["d"]}), names, {name: tuple(made[name].shape) for name in names}, {"d": (32, 12)}, model)
        assert len(found) == count
        rebuilt = torch.full(disk.shape, torch.nan)
        for _, number, where in found:
            Region("d", names[number], (32, 12), tuple(made[names[number]].shape), **where).write_disk(rebuilt, made[names[number]])
        assert torch.equal(rebuilt, disk), operations


def test_the_file_is_what_the_index_says(tiny):
    """The fixture writes something else than the names that the tests are about."""
    assert "model.layers.0.block_sparse_moe.experts.0.w1.weight" in disk_of(tiny("mixtral"))
    assert "h.0.attn.c_attn.weight" in disk_of(tiny("gpt2"))
    assert disk_of(tiny("gpt_oss"))["model.layers.0.mlp.experts.gate_up_proj"].shape == (4, 32, 48)
    assert any("gqkv_proj" in name for name in disk_of(tiny("hrm_text")))
    assert disk_of(tiny("qwen3_vl_moe"))["model.language_model.layers.0.mlp.experts.gate_up_proj"].shape == (4, 32, 48)
