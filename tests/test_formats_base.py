"""Every kind of base gives the weights that its public library gives, whole and in ranges of rows."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes import functional
from conftest import build_config, save_float
from safetensors.torch import load_file, save_file
from support.packed import BNB, GPTQ

from qmerge.errors import Refused
from qmerge.formats.base import Base, open_base
from qmerge.formats.nf4_recipe import Nf4Recipe
from qmerge.numerics import nf4
from qmerge.numerics.packing import unpack_rows
from qmerge.pipeline.skeleton import build_skeleton
from qmerge.quality.arms import load_base
from qmerge.quality.plain import dense_weights
from qmerge.store.checkpoint import open_checkpoint


def opened(folder: str, on: str = "dequantized", recipe: Nf4Recipe | None = None) -> Base:
    checkpoint = open_checkpoint(folder)
    skeleton = build_skeleton(checkpoint)
    return open_base(checkpoint, on=on, recipe=recipe, linears=skeleton.linears, head=None if skeleton.tied else skeleton.output_embedding)


ALL = pytest.mark.parametrize("name", [*BNB, *GPTQ])


@ALL
def test_weights_are_the_public_loaders(packed, name):
    """Wrong nibble or bit order, zeros off by one, groups in another order, scales rounded on the way, a Conv1D or a skipped module read the wrong way
    round."""
    base, theirs = opened(packed(name)), load_base(packed(name))
    weights, parameters = dense_weights(theirs.model), dict(theirs.model.named_parameters())
    assert base.quantized
    for weight in base.names:
        ours, module = base.weight(weight), weight.removesuffix(".weight")
        wanted = weights[module] if module in weights and weight != "lm_head.weight" else parameters.get(weight)
        if wanted is None:  # a tied head or a part of another name
            continue
        assert ours.dtype == torch.float32 and torch.equal(ours, wanted), weight
        assert base.shape(weight) == tuple(wanted.shape)
    assert {f"{module}.weight" for module in weights} <= set(base.names) | {"lm_head.weight"}


@ALL
def test_each_stored_tensor_belongs_to_one_name(packed, name):
    """An accounting that cannot come out even: a part (g_idx, SCB, weight_format, nested maxima) that is counted twice or by nobody."""
    base = opened(packed(name))
    parts = [part for weight in base.names for part in base.parts(weight)]
    assert sorted(parts) == sorted(base.checkpoint.specs)


@ALL
def test_rows_are_rows_of_the_weight(packed, name):
    """Ranges that begin in the middle of a byte, a block of maxima or a nested block."""
    base = opened(packed(name))
    for weight in [*list(base.quantized)[:8], "model.norm.weight" if "gpt2" not in name else "transformer.h.0.ln_1.bias"]:
        whole, step, reader = base.weight(weight), base.row_step(weight), base.reader(weight)
        assert reader.row_step == step and reader.shape == base.shape(weight)
        size = step * max(1, whole.shape[0] // (3 * step))
        pieces = [reader.rows(start, min(start + size, whole.shape[0])) for start in range(0, whole.shape[0], size)]
        assert torch.equal(torch.cat(pieces), whole), weight
        assert torch.equal(base.rows(weight, step * (whole.shape[0] // step - 1), whole.shape[0]), whole[step * (whole.shape[0] // step - 1) :])
        pieces[0].zero_()  # fresh: writing to it changes nothing that is read later
        assert torch.equal(reader.rows(0, size), whole[:size])


@pytest.mark.parametrize(("name", "dtype"), [("fp4", torch.bfloat16), ("int8", torch.bfloat16), ("gptq-4", torch.float32), ("awq", torch.float16)])
def test_dtype_is_what_the_file_says(packed, name, dtype):
    """A merged bf16 model that comes out in fp32, or in the dtype of its scales."""
    base = opened(packed(name))
    weight = "model.layers.0.mlp.down_proj.weight"
    assert base.dtype(weight) == dtype and base.encoded(weight) and not base.encoded("model.norm.weight")
    assert base.is_4bit(weight) == (name == "fp4")


def written_by_hand(folder: Path, shape: tuple[int, int], block_size: int, nested: bool, kind: str, storage: torch.dtype = torch.uint8) -> tuple[Base, torch.Tensor]:
    """One weight in bitsandbytes' own serialization, and what bitsandbytes makes of it as one row."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(block_size)).mul_(0.05)
    codes, state = functional.quantize_4bit(weight, blocksize=block_size, compress_statistics=nested, quant_type=kind, quant_storage=storage)
    save_file({"w.weight": codes, **{f"w.weight.{key}": value for key, value in state.as_dict(packed=True).items()}}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}))
    state.shape = torch.Size((1, weight.numel()))
    theirs = functional.dequantize_4bit(codes, state).reshape(shape)
    return open_base(open_checkpoint(folder), on="dequantized", recipe=None, linears=None), theirs


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [True, False], ids=["double", "single"])
@pytest.mark.parametrize("block_size", [32, 64, 128, 256, 512, 1024, 2048, 4096])
def test_every_block_size(tmp_path, block_size, nested, kind):
    """A block size for which the quick kernel differs from the plain one, or rows that share a block."""
    base, theirs = written_by_hand(tmp_path, (96, 86), block_size, nested, kind)
    step = base.row_step("w.weight")
    assert torch.equal(base.weight("w.weight"), theirs) and step * 86 % block_size == 0
    reader = base.reader("w.weight")
    assert torch.equal(torch.cat([reader.rows(start, min(start + step, 96)) for start in range(0, 96, step)]), theirs)


@pytest.mark.parametrize("shape", [(33, 65), (1, 7), (5, 64)])
def test_odd_counts(tmp_path, shape):
    """The half-filled last byte."""
    base, theirs = written_by_hand(tmp_path, shape, 64, True, "nf4")
    assert torch.equal(base.weight("w.weight"), theirs)


def test_plain_and_library_decoding_agree(tmp_path, monkeypatch):
    """A base that is read otherwise on a machine without bitsandbytes."""
    import sys

    base, theirs = written_by_hand(tmp_path, (64, 128), 64, True, "nf4")
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    assert torch.equal(base.weight("w.weight"), theirs)


def test_ranges_read_only_their_bytes(packed, monkeypatch):
    """A whole tensor read for every few rows: a merge that reads the base hundreds of times."""
    base = opened(packed("fp4"))
    reader, seen, inner = base.reader("model.layers.0.mlp.up_proj.weight"), [], os.preadv

    def spy(handle: int, views: list[memoryview], offset: int) -> int:
        seen.append(sum(len(view) for view in views))
        return inner(handle, views, offset)

    monkeypatch.setattr(os, "preadv", spy)
    reader.rows(8, 16)
    assert seen == [8 * 128 // 2]


@pytest.mark.parametrize("name", ["nf4-odd", "int8", "gptq-4"])
def test_threads_share_a_reader(packed, name):
    """A buffer or file position that two threads share."""
    base = opened(packed(name))
    reader = base.reader("model.layers.0.mlp.up_proj.weight")
    whole, step = reader.all(), reader.row_step
    starts = list(range(0, whole.shape[0] // step * step, step)) * (1 if step > 8 else 4)
    with ThreadPoolExecutor(4) as pool:
        for start, rows in zip(starts, pool.map(lambda start: reader.rows(start, start + step), starts), strict=True):
            assert torch.equal(rows, whole[start : start + step])


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("quant", ["nf4", "fp4"])
def test_float_base_on_the_fly(packed, kind, quant):
    """Rows of a weight quantized now that differ from the whole, most of all through the offset of double quantization."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    base = opened(packed.float(kind), recipe=Nf4Recipe(quant_type=quant))
    wish = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=quant, bnb_4bit_use_double_quant=True)
    model = AutoModelForCausalLM.from_pretrained(packed.float(kind), quantization_config=wish, device_map={"": "cpu"})
    for weight in base.fly:
        module = model.get_submodule(weight.removesuffix(".weight"))
        module.weight.quant_state.dtype = torch.float32
        theirs = functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
        step, reader = base.row_step(weight), base.reader(weight)
        assert torch.equal(base.weight(weight), theirs) and torch.equal(reader.rows(step, 2 * step), theirs[step : 2 * step]), weight


@pytest.mark.parametrize("skip", [("lm_head", "layers.1.mlp", "o_proj"), ("model.layers.0",), ("model.layers.*.self_attn",), (r"model\.layers\.\d+\.mlp", "proj")])
def test_skipped_modules_are_transformers(packed, skip):
    """A pattern that skips too much (``layers.1`` for ``layers.11``) or nothing: linears float that were trained over in 4 bits. A list also puts the head
    up for rounding."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    base = opened(packed.float("llama"), recipe=Nf4Recipe(skip=skip))
    wish = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=list(skip))
    model = AutoModelForCausalLM.from_pretrained(packed.float("llama"), quantization_config=wish, device_map={"": "cpu"})
    assert base.fly == {f"{name}.weight" for name, module in model.named_modules() if type(module).__name__ == "Linear4bit"}


def with_settings(folder: str, changes: Callable[[dict[str, Any]], dict[str, Any]]) -> Any:
    checkpoint = open_checkpoint(folder)
    object.__setattr__(checkpoint, "config", changes(dict(checkpoint.config)))
    return checkpoint


@pytest.mark.parametrize("method", ["fp8", "compressed-tensors", "hqq", "mxfp4", "quanto", "aqlm", "bitnet"])
def test_other_methods_are_refused_by_name(packed, method):
    """Packed weights of another library read as if they were floats."""
    checkpoint = with_settings(packed.float("llama"), lambda config: config | {"quantization_config": {"quant_method": method}})
    with pytest.raises(Refused, match=f"quant_method {method}"):
        open_base(checkpoint, on="dequantized", recipe=None, linears={})


@pytest.mark.parametrize(("name", "setting", "value"), [("gptq-4", "checkpoint_format", "marlin"), ("gptq-4", "checkpoint_format", "gptq_p"), ("gptq-4", "pack_dtype", "int16"),
                                                        ("awq", "version", "gemv"), ("awq", "version", "gemv_fast"), ("awq", "bits", 3)])
def test_other_layouts_are_refused_by_name(packed, name, setting, value):
    """Codes taken in an order that they are not in."""
    checkpoint = with_settings(packed(name), lambda config: config | {"quantization_config": config["quantization_config"] | {setting: value}})
    with pytest.raises(Refused, match=str(value)):
        open_base(checkpoint, on="dequantized", recipe=None, linears={})


@pytest.mark.parametrize("name", ["fp4", "int8", "gptq-4", "awq"])
def test_packed_weights_need_their_config(packed, name):
    """Weights taken for what the config says, or, without one, for floats."""
    for settings in ({}, {"quant_method": "awq" if name in ("fp4", "int8") else "bitsandbytes", "load_in_4bit": True}):
        checkpoint = with_settings(packed(name), lambda config, settings=settings: {**config, "quantization_config": settings})
        with pytest.raises(Refused, match="config"):
            open_base(checkpoint, on="dequantized", recipe=None, linears={})


@pytest.mark.parametrize("name", ["int8", "gptq-4", "awq"])
@pytest.mark.parametrize("options", [{"on": "original"}, {"recipe": Nf4Recipe()}])
def test_packed_bases_refuse_flags_for_float_ones(packed, name, options):
    """A recipe that is silently ignored, or an original that is in fact quantized."""
    with pytest.raises(Refused):
        opened(packed(name), **options)


@pytest.mark.parametrize(("name", "part"), [("fp4", "weight.absmax"), ("int8", "weight"), ("gptq-4", "qzeros"), ("awq", "scales")])
def test_missing_parts_are_refused(packed, tmp_path, name, part):
    """A weight decoded from what happens to be there."""
    tensors = load_file(f"{packed(name)}/model.safetensors")
    weight = "model.layers.0.mlp.up_proj.weight"
    del tensors[weight.removesuffix("weight") + part]
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(Path(packed(name), "config.json").read_text())
    with pytest.raises(Refused, match="up_proj"):
        opened(str(tmp_path)).weight(weight)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_codes_by_hand(bits):
    """Values that lie across two words, and the sign bit that a right shift drags along."""
    values = torch.randint(0, 2**bits, (64, 3), generator=torch.Generator().manual_seed(bits))
    stream = [int("".join(f"{int(value):0{bits}b}"[::-1] for value in column)[::-1], 2) for column in values.T]
    words = [[(number >> 32 * i) & 0xFFFFFFFF for number in stream] for i in range(64 * bits // 32)]
    packed = torch.tensor(words, dtype=torch.int64).to(torch.int32)
    assert torch.equal(unpack_rows(packed, bits, 64), values.to(torch.uint8)) and torch.equal(unpack_rows(packed, bits, 61), values[:61].to(torch.uint8))


def test_group_index_may_be_left_out(packed, tmp_path):
    """Files of loaders that drop a ``g_idx`` that counts up."""
    tensors = {name: tensor for name, tensor in load_file(f"{packed('gptq-4')}/model.safetensors").items() if not name.endswith("g_idx")}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(Path(packed("gptq-4"), "config.json").read_text())
    one, two = opened(str(tmp_path)), opened(packed("gptq-4"))
    assert one.names == two.names and all(torch.equal(one.weight(name), two.weight(name)) for name in one.names)


def test_mixed_bits(packed, tmp_path):
    """``dynamic`` gives a module other bits than the config's."""
    four, eight = (load_file(f"{packed(name)}/model.safetensors") for name in ("gptq-4", "gptq-8"))
    module = "model.layers.0.mlp.up_proj."
    save_file({name: eight[name] if name.startswith(module) else tensor for name, tensor in four.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(Path(packed("gptq-4"), "config.json").read_text())
    assert torch.equal(opened(str(tmp_path)).weight(module + "weight"), opened(packed("gptq-8")).weight(module + "weight"))


def test_float_base_in_rows(tmp_path):
    """A Conv1D that comes out transposed, or a tensor that stays in its stored dtype."""
    folder = save_float(tmp_path / "gpt2", build_config("gpt2"))
    base, stored = opened(folder, on="original"), load_file(f"{folder}/model.safetensors")
    linear = next(name for name in base.names if name.endswith("h.0.attn.c_attn.weight"))
    assert base.shape(linear) == (384, 128) and base.row_step(linear) == 384 and torch.equal(base.rows(linear, 0, 384), stored[linear].float().T)
    table = next(name for name in base.names if name.endswith("wte.weight"))
    assert base.row_step(table) == 1 and base.dtype(table) == torch.bfloat16 and torch.equal(base.rows(table, 3, 7), stored[table][3:7].float())


def test_rows_out_of_step_are_an_error(packed):
    """A wrong range read as another one."""
    base = opened(packed("nf4-odd"))
    name = "model.layers.0.mlp.down_proj.weight"
    assert base.shape(name) == (128, 150) and base.row_step(name) == 32
    with pytest.raises(ValueError, match="multiples of 32"):
        base.rows(name, 1, 3)
    with pytest.raises(ValueError, match="rows"):
        base.rows(name, 0, 129)


def test_levels_are_bitsandbytes():
    """An FP4 magnitude off by one unit in the last place, or in another order."""
    for kind in ("nf4", "fp4"):
        assert torch.equal(nf4.code_book(kind), functional.get_4bit_type(kind, device="cpu").float())


@pytest.mark.parametrize("recipe", [Nf4Recipe(quant_type="fp4", double_quant=False), Nf4Recipe(skip=("lm_head", "layers.1.mlp")), Nf4Recipe(128, skip=("model.layers.0",)), Nf4Recipe(128, dtype="float16")],
                         ids=["fp4", "skip", "skip-128", "fp16-128"])
def test_evaluation_and_merge_mean_the_same_base(packed, recipe):
    """A reference that is measured on another base than the one that was merged."""
    base, theirs = opened(packed.float("llama"), recipe=recipe), load_base(packed.float("llama"), nf4_recipe=recipe.to_json())
    for module, weight in dense_weights(theirs.model).items():
        assert torch.equal(base.weight(f"{module}.weight"), weight), module
