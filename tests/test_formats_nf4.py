"""NF4 files: ours and bitsandbytes' are the same bytes; and which bases are read, or refused."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from bitsandbytes import functional
from oracles.dequantized import nf4_weights
from safetensors.torch import load_file, save_file
from support.blocks import block_maxima

from qmerge.errors import Refused
from qmerge.formats import BLOCK_SIZES
from qmerge.formats import nf4 as nf4_format
from qmerge.formats.base import decode_with_bitsandbytes, open_base, quantize_as_bitsandbytes
from qmerge.formats.integers import Layout
from qmerge.formats.nf4_recipe import Nf4Recipe
from qmerge.numerics import nf4
from qmerge.pipeline.recipe import read_nf4_recipe
from qmerge.pipeline.skeleton import build_skeleton
from qmerge.store.checkpoint import open_checkpoint
from qmerge.types import Grid, QuantizedWeight

DOUBLE = pytest.mark.parametrize("double", [True, False], ids=["double", "single"])


def opened(folder: str, on: str = "dequantized", recipe: Nf4Recipe | None = None):
    checkpoint = open_checkpoint(folder)
    return open_base(checkpoint, on=on, recipe=recipe, linears=build_skeleton(checkpoint).linears)


@DOUBLE
@pytest.mark.parametrize("shape, block_size", [((64, 64), 64), ((33, 66), 64), ((96, 172), 128)])
def test_round_trip(shape, block_size, double):
    """A part of the quant state that is not written or read: the offset, the nested block size, the last short block."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.05
    wanted = quantize_as_bitsandbytes(weight, Nf4Recipe(block_size, double))
    stored = nf4_format.pack("w", wanted)
    found = nf4_format.unpack("w", stored.__getitem__, stored)
    assert torch.equal(found.codes, wanted.codes)
    for part in ("absmax", "code", "nested_absmax", "nested_code"):
        one, two = getattr(found.state, part), getattr(wanted.state, part)
        assert (one is None and two is None) or torch.equal(one, two), part
    for part in ("block_size", "shape", "dtype", "nested_block_size", "offset", "nested"):
        assert getattr(found.state, part) == getattr(wanted.state, part), part
    assert abs(sum(tensor.nbytes for tensor in stored.values()) - nf4_format.stored_bytes(shape, block_size, double)) < 128


@DOUBLE
def test_bitsandbytes_reads_what_we_pack(double):
    """JSON keys or dtypes that bitsandbytes' own loader does not take, or takes for something else."""
    weight = torch.randn(96, 128, generator=torch.Generator().manual_seed(0)).bfloat16() * 0.05
    wanted = quantize_as_bitsandbytes(weight, Nf4Recipe(64, double))
    stored = nf4_format.pack("w", wanted)
    state = functional.QuantState.from_dict({name.removeprefix("w."): tensor for name, tensor in stored.items() if name != "w"}, device=torch.device("cpu"))
    assert state.dtype == torch.bfloat16 and tuple(state.shape) == (96, 128) and state.nested == double
    state.dtype = torch.float32
    assert torch.equal(functional.dequantize_4bit(stored["w"], state), nf4.dequantize(wanted.codes, wanted.state))


@DOUBLE
@pytest.mark.parametrize("block_size", BLOCK_SIZES["nf4"])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_every_block_size_that_bitsandbytes_takes(kind, block_size, double):
    """A block size that the recipe takes and the library refuses or reads otherwise; FP4's codes written in the order of their levels."""
    weight = torch.randn(96, 172, generator=torch.Generator().manual_seed(0)) * 0.05
    template = quantize_as_bitsandbytes(torch.zeros(64, block_size), Nf4Recipe(block_size, double, "float32", quant_type=kind)).state
    state = nf4.with_absmax(replace(template, shape=(96, 172)), block_maxima(weight, block_size))
    ours = QuantizedWeight(nf4.nearest(weight, nf4.effective_absmax(state), state.code, block_size), Grid(kind, 4, block_size, True, double), state=state)
    stored = nf4_format.pack("w", ours)
    theirs = functional.QuantState.from_dict({name.removeprefix("w."): tensor for name, tensor in stored.items() if name != "w"}, device=torch.device("cpu"))
    theirs.dtype, theirs.shape = torch.float32, torch.Size((1, weight.numel()))  # as one row: its AVX512 kernel misreads widths that the block size does not divide
    found = functional.dequantize_4bit(stored["w"], theirs).reshape(96, 172)
    assert theirs.quant_type == kind and theirs.nested == double and torch.equal(found, nf4.dequantize(ours.codes, state))
    again = nf4_format.unpack("w", stored.__getitem__, stored, kind)
    assert torch.equal(again.codes, ours.codes) and again.grid == ours.grid
    if not double:  # their own quantizer takes the same levels; -0 and +0 are two codes of FP4
        packed, _ = functional.quantize_4bit(weight, blocksize=block_size, compress_statistics=False, quant_type=kind)
        assert torch.equal(state.code[nf4.unpack_nibbles(packed, weight.numel()).long()], state.code[ours.codes.reshape(-1).long()])


def test_only_these_block_sizes():
    """A size of tomorrow's bitsandbytes refused, or one that it no longer takes."""
    taken = []
    for size in (16, 32, 48, *BLOCK_SIZES["nf4"][1:], 8192):
        try:
            functional.quantize_4bit(torch.zeros(64, 64), blocksize=size, quant_type="nf4")
            taken.append(size)
        except ValueError:
            pass
    assert tuple(taken) == BLOCK_SIZES["nf4"] == BLOCK_SIZES["fp4"]


@pytest.mark.parametrize("floats, grids_, told, says", [
    (("lm_head",), ("a",), None, None),
    (("lm_head", "b"), ("a",), None, ["b", "lm_head"]),
    (("lm_head", "b"), ("a",), ["lm_head", "b"], ["lm_head", "b"]),
    (("lm_head",), ("a", "b"), ["b"], ["lm_head"]),
    ((), ("a", "lm_head"), None, [nf4_format.NOTHING]),
])  # fmt: skip
def test_modules_to_skip(floats, grids_, told, says):
    """A float linear that a loader would round on its own, or a packed one that it would leave at random."""
    grid = Grid("nf4", 4, 64)
    found = nf4_format.config(Layout(dict.fromkeys(grids_, grid), floats, "model.layers", "lm_head", "bfloat16", "1.0", (), {"llm_int8_skip_modules": told}))
    assert found["llm_int8_skip_modules"] == says


@DOUBLE
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_saved_checkpoint_packs_to_its_own_bytes(zoo, kind, double):
    """Names, dtypes or bytes that differ from what ``save_pretrained`` writes: reading and writing a weight again must change nothing."""
    checkpoint = open_checkpoint(zoo.nf4(kind, double))
    weights = nf4_format.find_quantized(checkpoint.specs)
    assert len(weights) == {"llama": 14, "gpt2": 8}[kind]
    for weight in weights:
        stored = nf4_format.pack(weight, nf4_format.unpack(weight, checkpoint.load, checkpoint.specs))
        assert set(stored) == set(nf4_format.components(weight)) & set(checkpoint.specs)
        for name, tensor in stored.items():
            there = checkpoint.load(name)
            if name.endswith("__nf4"):
                one, two = (json.loads(bytes(raw.tolist())) for raw in (tensor, there))
                assert {k: v for k, v in one.items() if k != "nested_offset"} == {k: v for k, v in two.items() if k != "nested_offset"}
                assert torch.tensor(one.get("nested_offset", 0.0), dtype=torch.float32) == torch.tensor(two.get("nested_offset", 0.0), dtype=torch.float32)
            else:
                assert tensor.dtype == there.dtype and torch.equal(tensor, there), name


@DOUBLE
@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2", "gemma2"])
def test_base_weights_are_bitsandbytes(zoo, kind, double):
    """A Conv1D left transposed, or nesting undone wrongly, in the reading of a whole base."""
    folder = zoo.nf4(kind, double)
    base, theirs = opened(folder), nf4_weights(folder)
    assert {f"{name}.weight" for name in theirs} == set(base.quantized)
    for name, weight in theirs.items():
        assert torch.equal(base.weight(f"{name}.weight"), weight), name
        assert base.shape(f"{name}.weight") == tuple(weight.shape)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_base_weights_by_the_compiled_loop(zoo, monkeypatch, kind):
    """Rows handed to the loop with the maxima of other rows, in stretches as a large merge reads them."""
    nf4.load_kernel()
    monkeypatch.setattr(nf4, "_WORTH", 0)
    folder = zoo.nf4(kind, True)
    base = opened(folder)
    for name, weight in nf4_weights(folder).items():
        reader = base.reader(f"{name}.weight")
        starts = range(0, weight.shape[0], 3 * reader.row_step)
        assert torch.equal(torch.cat([reader.rows(start, min(start + 3 * reader.row_step, weight.shape[0])) for start in starts]), weight), name


@DOUBLE
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_recipe_gives_the_codes_of_the_saved_model(zoo, kind, double):
    """A float base quantized on the fly otherwise than ``load_in_4bit`` did while the adapter was trained: another base."""
    fly, saved = opened(zoo.float(kind), recipe=read_nf4_recipe("double" if double else "single")), opened(zoo.nf4(kind, double))
    assert set(fly.fly) == set(saved.quantized) and saved.names == fly.names
    for name in saved.quantized:
        one, two = fly.four_bit(name), saved.four_bit(name)
        assert torch.equal(one.codes, two.codes) and torch.equal(one.state.absmax, two.state.absmax) and one.state.offset == two.state.offset, name
        assert torch.equal(fly.weight(name), saved.weight(name)) and fly.shape(name) == saved.shape(name)


def test_float_base_is_not_guessed(zoo):
    """A float base taken for the one that the adapter was trained on: rounding errors that the adapter learnt to live with would be gone, unsaid."""
    with pytest.raises(Refused) as caught:
        opened(zoo.float("llama"))
    assert caught.value.exit_code == 4 and all(word in str(caught.value) for word in ("must not be guessed", "--nf4-recipe", "--on original"))


def test_original_base_is_read_as_it_is(zoo):
    """``--on original`` quantizing anyway."""
    base = opened(zoo.float("llama"), on="original")
    name = "model.layers.0.self_attn.q_proj.weight"
    assert not base.is_4bit(name) and torch.equal(base.weight(name), load_file(f"{zoo.float('llama')}/model.safetensors")[name].float())


@pytest.mark.parametrize("options, says", [({"recipe": Nf4Recipe()}, "leave --nf4-recipe out"), ({"on": "original"}, "--original")])
def test_serialized_base_refuses_flags_for_float_ones(zoo, options, says):
    """A recipe that is silently ignored, or an original that is in fact 4-bit."""
    with pytest.raises(Refused, match=says) as caught:
        opened(zoo.nf4("llama"), **options)
    assert caught.value.exit_code == 4


def test_types_are_not_mixed_up(zoo):
    """An fp4 base read as NF4, or a type of tomorrow as one of today's."""
    for kind, says in (("fp4", "not FP4"), ("af4", "af4")):
        checkpoint = open_checkpoint(zoo.nf4("llama"))
        object.__setattr__(checkpoint, "specs", {name.replace("__nf4", f"__{kind}"): spec for name, spec in checkpoint.specs.items()})
        for name in [name for name in checkpoint.specs if name.endswith(kind)]:
            object.__setattr__(checkpoint.specs[name], "name", name)
        with pytest.raises(Refused, match=says):
            open_base(checkpoint, on="dequantized", recipe=None, linears={}).weight("model.layers.0.mlp.up_proj.weight")


@pytest.mark.parametrize("damage, says", [("absmax", "incomplete"), ("quant_map", "incomplete"), ("state", "cannot be read"), ("shape", "does not fit"), ("code", "code book")])
def test_damaged_states_are_refused(damage, says):
    """A weight decoded from half a state."""
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    stored = nf4_format.pack("w", quantize_as_bitsandbytes(weight, Nf4Recipe()))
    key = "w.quant_state.bitsandbytes__nf4"
    if damage in ("absmax", "quant_map"):
        del stored[f"w.{damage}"]
    elif damage == "state":
        stored[key] = stored[key][:-3]
    elif damage == "shape":
        meta = json.loads(bytes(stored[key].tolist())) | {"shape": [64, 128]}
        stored[key] = torch.tensor(list(json.dumps(meta).encode()), dtype=torch.uint8)
    else:
        stored["w.quant_map"] = stored["w.quant_map"].flip(0)
    with pytest.raises(Refused, match=says):
        nf4_format.unpack("w", stored.__getitem__, stored)


@DOUBLE
@pytest.mark.parametrize("shape", [(64, 64), (48, 172)])
def test_bitsandbytes_decodes_what_our_plain_torch_decodes(shape, double):
    """The path that CUDA takes handing bitsandbytes a wrong state (offset, nested block size): other weights on a GPU than on a CPU."""
    stored = quantize_as_bitsandbytes(torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.02, Nf4Recipe(64, double))
    assert torch.equal(decode_with_bitsandbytes(stored, "cpu"), nf4.dequantize(stored.codes, stored.state))


def test_shards_read_as_one_file(zoo, tmp_path):
    """A base in shards whose quant states lie in another file than their weights."""
    whole = load_file(f"{zoo.nf4('llama')}/model.safetensors")
    names = sorted(whole)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, held in parts.items():
        save_file({name: whole[name] for name in held}, tmp_path / file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {name: file for file, held in parts.items() for name in held}}))
    (tmp_path / "config.json").write_text((open_checkpoint(zoo.nf4("llama")).path / "config.json").read_text())
    one, two = opened(str(tmp_path)), opened(zoo.nf4("llama"))
    assert one.names == two.names
    assert all(torch.equal(one.weight(name), two.weight(name)) for name in one.names)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_sorted_levels(kind):
    """A solver that searches levels in the file's order: FP4's are not sorted, and two of its codes are zero."""
    code = nf4.code_book(kind)
    levels, stored = nf4.sorted_levels(code)
    assert bool((levels[1:] > levels[:-1]).all()) and levels.numel() == {"nf4": 16, "fp4": 15}[kind] and torch.equal(code[stored.long()], levels)
    codes = torch.arange(16, dtype=torch.uint8).reshape(2, 8)
    positions = nf4.sorted_positions(codes, code)
    assert positions.shape == codes.shape and torch.equal(levels[positions.long()], code[codes.long()])
