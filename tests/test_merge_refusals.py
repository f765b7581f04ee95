"""What is wrong with an adapter or a base is refused by the tensor's name, with exit code 4, and nothing is written or touched."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

P = "base_model.model."
Q0, Q1, DOWN = (f"{P}model.layers.{name}" for name in ("0.self_attn.q_proj", "1.self_attn.q_proj", "1.mlp.down_proj"))
Tensors = dict[str, torch.Tensor]

ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", {"target_modules": ["q_proj", "down_proj"]}),
    "dora": ("llama", {"target_modules": ["q_proj", "down_proj"], "use_dora": True}),
    "saved": ("llama", {"target_modules": ["q_proj", "down_proj"], "modules_to_save": ["lm_head", "norm"]}),
    "lora bias": ("qwen2", {"target_modules": ["q_proj"], "lora_bias": True}),
    "biases": ("qwen2", {"target_modules": ["q_proj"], "bias": "lora_only"}),
    "tokens": ("llama", {"target_modules": ["q_proj", "down_proj"], "trainable_token_indices": [3, 5]}),
}


def digests(*folders: str | Path) -> dict[str, str]:
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for folder in folders for path in sorted(Path(folder).rglob("*")) if path.is_file()}


class Merge:
    """One merge on a float base that would work; `refused` breaks it and looks at what is left."""

    def __init__(self, zoo: Any, cli: Callable, folder: Path) -> None:
        self.zoo, self.cli, self.folder = zoo, cli, folder
        self.place = folder / "place"
        self.place.mkdir()

    def adapter(self, name: str) -> tuple[str, Path]:
        """``(kind of base, copy of the adapter that may be broken)``."""
        kind, lora = ADAPTERS[name]
        copy = self.folder / "adapter"
        shutil.copytree(self.zoo.adapter(kind, f"refusals {name}", **lora), copy)
        return kind, copy

    def base(self, kind: str = "llama") -> Path:
        copy = self.folder / "base"
        shutil.copytree(self.zoo.float(kind), copy)
        return copy

    def __call__(self, base: str | Path, adapter: str | Path, *flags: object, fmt: str = "bf16") -> Any:
        return self.cli("merge", "--base", base, "--adapter", adapter, "--out", self.place / "sub" / "out", "--format", fmt, "--on", "original", "--device", "cpu", *flags)

    def refused(self, base: str | Path, adapter: str | Path, *words: str, code: int = 4, fmt: str = "bf16", flags: tuple[object, ...] = ()) -> str:
        before = digests(base, adapter)
        answer = self(base, adapter, *flags, fmt=fmt)
        assert answer.code == code, answer.err
        for word in words:
            assert word in answer.err, f"{word!r} not in:\n{answer.err}"
        assert "Traceback" not in answer.err and answer.err.count("error:") == 1 and answer.out == ""
        assert list(self.place.iterdir()) == [], "something was left behind"
        assert digests(base, adapter) == before, "an input was written to"
        return answer.err


@pytest.fixture
def merge(zoo, cli, tmp_path):
    return Merge(zoo, cli, tmp_path)


def change(folder: Path, harm: Callable[[Tensors], None]) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    harm(tensors)
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, path, {"format": "pt"})


def rename(old: str, new: str) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({new: tensors.pop(old)})


def put(name: str, value: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({name: value(tensors[name])})


def spoil(name: str, value: float) -> Callable[[Tensors], None]:
    def harm(tensors: Tensors) -> None:
        tensors[name].view(-1)[7] = value

    return harm


@pytest.mark.parametrize("name", ADAPTERS)
def test_unbroken_adapters_are_merged(merge, name):
    """Refusals below that have another reason than the one that they test."""
    kind, adapter = merge.adapter(name)
    answer = merge(merge.zoo.float(kind), adapter)
    assert answer.code == 0, answer.err


EXTRA = {
    "a module that the base lacks": ("plain", f"{P}model.layers.7.self_attn.q_proj.lora_A.weight", f"{P}model.layers.7.self_attn.q_proj.lora_B.weight"),
    "an A alone": ("plain", f"{P}model.layers.0.self_attn.k_proj.lora_A.weight"),
    "a B alone": ("plain", f"{P}model.layers.0.self_attn.k_proj.lora_B.weight"),
    "a magnitude": ("plain", f"{Q0}.lora_magnitude_vector"),
    "a lora bias": ("plain", f"{Q0}.lora_B.bias"),
    "a trained bias": ("plain", f"{Q0}.base_layer.bias"),
    "a saved module": ("plain", f"{P}model.norm.weight"),
    "single tokens": ("plain", f"{P}model.embed_tokens.token_adapter.trainable_tokens_delta"),
    "a name that is nobody's": ("plain", f"{P}something"),
    "a base weight": ("plain", f"{Q0}.base_layer.weight"),
}


@pytest.mark.parametrize("case", EXTRA)
def test_one_tensor_too_many(merge, case):
    """A tensor that goes into nothing is left out without a word."""
    name, *extra = EXTRA[case]
    kind, adapter = merge.adapter(name)
    shapes = {"lora_A.weight": (4, 128), "lora_B.weight": (128, 4), "trainable_tokens_delta": (2, 128), "base_layer.weight": (128, 128)}
    change(adapter, lambda tensors: tensors.update({key: torch.ones(next((shape for end, shape in shapes.items() if key.endswith(end)), (128,))) for key in extra}))
    merge.refused(merge.zoo.float(kind), adapter, extra[0].removesuffix(".lora_A.weight"))


MISSING = {
    "A": ("plain", f"{Q0}.lora_A.weight", f"{Q0}.lora_B.weight"),
    "B": ("plain", f"{Q0}.lora_B.weight", f"{Q0}.lora_A.weight"),
    "magnitude": ("dora", f"{Q0}.lora_magnitude_vector", "layers.0.self_attn.q_proj"),
    "lora bias": ("lora bias", f"{Q0}.lora_B.bias", "layers.0.self_attn.q_proj"),
    "saved head": ("saved", f"{P}lm_head.weight", "lm_head"),
    "saved norm": ("saved", f"{P}model.norm.weight", "norm"),
}


@pytest.mark.parametrize("case", MISSING)
def test_one_tensor_too_few(merge, case):
    """Half a pair, or DoRA without its magnitude, merged as far as it goes."""
    name, gone, said = MISSING[case]
    kind, adapter = merge.adapter(name)
    change(adapter, lambda tensors: tensors.pop(gone))
    merge.refused(merge.zoo.float(kind), adapter, said)


@pytest.mark.parametrize("name, gone", [("biases", f"{Q0}.base_layer.bias"), ("tokens", f"{P}model.embed_tokens.token_adapter.trainable_tokens_delta")])
def test_a_trained_tensor_that_the_config_promises_is_missing(merge, name, gone):
    """bias="lora_only" trains every adapted linear's bias, trainable_token_indices its rows: where one is not in the file, the base's would stay in its place, unsaid."""
    kind, adapter = merge.adapter(name)
    assert gone in load_file(adapter / "adapter_model.safetensors")
    change(adapter, lambda tensors: tensors.pop(gone))
    merge.refused(merge.zoo.float(kind), adapter, gone.removeprefix(P).split(".base_layer")[0].split(".token_adapter")[0])


NAMES = {
    "no prefix": (f"{Q0}.lora_A.weight", f"{Q0}.lora_A.weight".removeprefix(P)),
    "half a prefix": (f"{Q0}.lora_A.weight", "base_model." + f"{Q0}.lora_A.weight".removeprefix(P)),
    "another letter in the kind": (f"{Q0}.lora_A.weight", f"{Q0}.lora_a.weight"),
    "another letter in the leaf": (f"{Q0}.lora_A.weight", f"{Q0}.lora_A.weights"),
    "another letter in the module": (f"{Q0}.lora_A.weight", f"{Q0}x.lora_A.weight"),
}


@pytest.mark.parametrize("case", NAMES)
def test_misnamed_tensors(merge, case):
    """A key with a typo, which most loaders report as "missing" and initialise to nothing."""
    old, new = NAMES[case]
    kind, adapter = merge.adapter("plain")
    change(adapter, rename(old, new))
    merge.refused(merge.zoo.float(kind), adapter, Q0 if new.startswith(f"{Q0}x") else new)  # of two halves without their others, the first by name is told


def test_a_whole_module_under_another_name(merge):
    """Both halves of a pair for a module that this base does not have."""
    kind, adapter = merge.adapter("plain")
    change(adapter, lambda tensors: [tensors.update({name.replace("q_proj", "q_prof"): tensors.pop(name)}) for name in list(tensors) if "q_proj" in name])
    merge.refused(merge.zoo.float(kind), adapter, "another base", "layers.0.self_attn.q_prof", "lora_A")


SHAPES = {
    "A transposed": (f"{DOWN}.lora_A.weight", lambda tensor: tensor.T),
    "B transposed": (f"{DOWN}.lora_B.weight", lambda tensor: tensor.T),
    "A of rank 5": (f"{DOWN}.lora_A.weight", lambda tensor: torch.cat([tensor, tensor[:1]])),
    "B of rank 3": (f"{DOWN}.lora_B.weight", lambda tensor: tensor[:, :3]),
    "A with three dimensions": (f"{DOWN}.lora_A.weight", lambda tensor: tensor[None]),
    "A one input too wide": (f"{DOWN}.lora_A.weight", lambda tensor: torch.cat([tensor, tensor[:, :1]], dim=1)),
    "B one output too short": (f"{DOWN}.lora_B.weight", lambda tensor: tensor[:-1]),
    "A empty": (f"{DOWN}.lora_A.weight", lambda tensor: tensor[:, :0]),
    "A a scalar": (f"{DOWN}.lora_A.weight", lambda tensor: tensor[0, 0]),
}


@pytest.mark.parametrize("case", SHAPES)
def test_wrong_shapes(merge, case):
    """A shape that broadcasts, or that fails in the middle of the run with torch's own words."""
    name, value = SHAPES[case]
    kind, adapter = merge.adapter("plain")
    change(adapter, put(name, value))
    merge.refused(merge.zoo.float(kind), adapter, name)


MORE_SHAPES = {
    "magnitude": ("dora", f"{Q0}.lora_magnitude_vector", lambda tensor: tensor[:-1]),
    "magnitude of one value": ("dora", f"{Q0}.lora_magnitude_vector", lambda tensor: tensor[:1]),
    "lora bias": ("lora bias", f"{Q0}.lora_B.bias", lambda tensor: tensor[:-1]),
    "lora bias of one value": ("lora bias", f"{Q0}.lora_B.bias", lambda tensor: tensor[:1]),
    "trained bias": ("biases", f"{Q0}.base_layer.bias", lambda tensor: tensor[:-1]),
    "saved norm": ("saved", f"{P}model.norm.weight", lambda tensor: tensor[:-1]),
    "saved head": ("saved", f"{P}lm_head.weight", lambda tensor: tensor[:, :-1]),
    "tokens too many": ("tokens", f"{P}model.embed_tokens.token_adapter.trainable_tokens_delta", lambda tensor: torch.cat([tensor, tensor])),
    "tokens too narrow": ("tokens", f"{P}model.embed_tokens.token_adapter.trainable_tokens_delta", lambda tensor: tensor[:, :-1]),
}


@pytest.mark.parametrize("case", MORE_SHAPES)
def test_wrong_shapes_of_what_is_not_a_pair(merge, case):
    """A magnitude or a bias of one value that broadcasts over all outputs."""
    name, tensor, value = MORE_SHAPES[case]
    kind, adapter = merge.adapter(name)
    change(adapter, put(tensor, value))
    merge.refused(merge.zoo.float(kind), adapter, tensor)


SPOILED = {
    "A": ("plain", f"{DOWN}.lora_A.weight"),
    "B": ("plain", f"{DOWN}.lora_B.weight"),
    "magnitude": ("dora", f"{DOWN}.lora_magnitude_vector"),
    "saved": ("saved", f"{P}model.norm.weight"),
    "lora bias": ("lora bias", f"{Q1}.lora_B.bias"),
    "trained bias": ("biases", f"{Q1}.base_layer.bias"),
    "tokens": ("tokens", f"{P}model.embed_tokens.token_adapter.trainable_tokens_delta"),
}


@pytest.mark.parametrize("value, said", [(float("nan"), "1 NaN"), (float("inf"), "1 +Inf"), (float("-inf"), "1 -Inf")])
@pytest.mark.parametrize("case", SPOILED)
def test_values_that_are_not_finite(merge, monkeypatch, case, value, said):
    """A diverged fine-tune found when half of the output is on the disk, or spread over it. Refused before the first file is opened for writing."""
    from qmerge.store.runs import RunFolder

    def never(self: RunFolder) -> RunFolder:
        raise AssertionError("the output was begun")

    monkeypatch.setattr(RunFolder, "__enter__", never)
    name, tensor = SPOILED[case]
    kind, adapter = merge.adapter(name)
    change(adapter, spoil(tensor, value))
    merge.refused(merge.zoo.float(kind), adapter, tensor, said)


def test_values_too_large_for_fp16(merge):
    """Inf in the file where a merged weight is above 65504; bf16 holds the same weight."""
    kind, adapter = merge.adapter("saved")
    change(adapter, spoil(f"{P}model.norm.weight", 1e6))
    merge.refused(merge.zoo.float(kind), adapter, "does not fit fp16", "model.norm.weight", "1e+06", "--format bf16", fmt="fp16")
    assert merge(merge.zoo.float(kind), adapter).code == 0


def test_products_too_large_for_fp32(merge):
    """Finite factors whose product is not."""
    kind, adapter = merge.adapter("plain")
    change(adapter, lambda tensors: [tensors[f"{DOWN}.lora_{side}.weight"].mul_(1e25) for side in "AB"])
    merge.refused(merge.zoo.float(kind), adapter, "model.layers.1.mlp.down_proj.weight", "not finite")


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.int64, torch.bool])
def test_integer_dtypes(merge, dtype):
    """A quantized adapter read as numbers."""
    kind, adapter = merge.adapter("plain")
    change(adapter, put(f"{Q0}.lora_A.weight", lambda tensor: tensor.to(dtype)))
    merge.refused(merge.zoo.float(kind), adapter, f"{Q0}.lora_A.weight", "not floating point")


@pytest.mark.parametrize("mark", ["_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module."])
def test_twins_after_unwrapping(merge, mark):
    """A file that holds a tensor under two spellings: which of the two counts must not depend on their order."""
    kind, adapter = merge.adapter("plain")
    twin = f"{Q0}.lora_A.weight".replace("layers.0.", f"layers.0.{mark}")
    change(adapter, lambda tensors: tensors.update({twin: tensors[f"{Q0}.lora_A.weight"] * 2}))
    merge.refused(merge.zoo.float(kind), adapter, f"{Q0}.lora_A.weight", twin)


def test_a_truncated_adapter(merge):
    """A download that stopped."""
    kind, adapter = merge.adapter("plain")
    path = adapter / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    merge.refused(merge.zoo.float(kind), adapter, "adapter_model.safetensors")


# ---- the base


def sharded(folder: Path) -> list[Path]:
    """Cut a float base into shards as transformers does."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="200KB")
    return sorted(folder.glob("model-*.safetensors"))


@pytest.mark.parametrize("value, said", [(float("nan"), "NaN"), (float("inf"), "+Inf")])
@pytest.mark.parametrize("name", ["model.layers.1.mlp.down_proj.weight", "model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
def test_a_base_that_is_not_finite(merge, name, value, said):
    """NaN carried from the base into the output, be the tensor merged or only copied."""
    _, adapter = merge.adapter("plain")
    base = merge.base()
    tensors = load_file(base / "model.safetensors")
    tensors[name].view(-1)[3] = value
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    for fmt in ("bf16", "fp32"):
        merge.refused(base, adapter, name, said, fmt=fmt)


def test_a_truncated_shard(merge):
    """A shard whose header promises more than the file holds."""
    _, adapter = merge.adapter("plain")
    base = merge.base()
    shard = sharded(base)[1]
    shard.write_bytes(shard.read_bytes()[:-64])
    merge.refused(base, adapter, shard.name)


def test_a_missing_shard(merge):
    """Tensors of a shard that is not there left out of the output."""
    _, adapter = merge.adapter("plain")
    base = merge.base()
    shard = sharded(base)[1]
    shard.unlink()
    merge.refused(base, adapter, shard.name, "missing")


def test_a_tensor_that_the_index_does_not_name(merge):
    """Index and headers that disagree."""
    _, adapter = merge.adapter("plain")
    base = merge.base()
    sharded(base)
    index = json.loads((base / "model.safetensors.index.json").read_text())
    index["weight_map"].pop("model.norm.weight")
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    merge.refused(base, adapter, "model.norm.weight")


def test_a_base_that_shrinks_while_it_is_read(merge, monkeypatch):
    """A file that is replaced during the run: zeros, or a crash of the process."""
    from qmerge.pipeline import run

    _, adapter = merge.adapter("plain")
    base = merge.base()
    whole, inner = (base / "model.safetensors").read_bytes(), run.write_dense

    def shrink(*arguments: Any) -> None:
        with open(base / "model.safetensors", "r+b") as file:
            file.truncate(len(whole) - 1000)
        inner(*arguments)

    monkeypatch.setattr(run, "write_dense", shrink)
    answer = merge(base, adapter)
    assert answer.code == 4 and "became shorter" in answer.err and "Traceback" not in answer.err and list(merge.place.iterdir()) == []


def test_an_adapter_for_another_width(merge):
    """Shapes that differ, found out in the middle of the run."""
    _, adapter = merge.adapter("plain")
    wide = merge.zoo.float("llama", "wide for refusals", intermediate_size=512)
    merge.refused(wide, adapter, "another base", "down_proj", "[128, 256]", "[128, 512]")


def test_an_adapter_for_more_layers(merge):
    """Pairs of a layer that this base lacks."""
    _, adapter = merge.adapter("plain")
    shallow = merge.zoo.float("llama", "shallow for refusals", num_hidden_layers=1)
    merge.refused(shallow, adapter, "another base", "layers.1.")


@pytest.mark.parametrize("more", [1, -1])
def test_a_head_with_a_vocabulary_off_by_one(merge, more):
    """A saved head of another height than the embedding beside it."""
    kind, adapter = merge.adapter("saved")
    change(adapter, put(f"{P}lm_head.weight", lambda tensor: torch.cat([tensor, tensor[:1]]) if more > 0 else tensor[:-1]))
    merge.refused(merge.zoo.float(kind), adapter, "lm_head.weight", str(320 + more))


def test_a_token_number_outside_of_the_vocabulary(merge):
    """A trained token that this base does not have."""
    kind, adapter = merge.adapter("tokens")
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["trainable_token_indices"] = [3, 320]
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    merge.refused(merge.zoo.float(kind), adapter, "trainable_tokens_delta", "320")


def test_room_is_checked_before_the_work(merge, monkeypatch):
    """Hours of merging, and then a full disk that anybody could have foreseen."""
    import shutil as tools

    from qmerge.pipeline import plan

    usage = tools.disk_usage(merge.place)
    monkeypatch.setattr(plan.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    kind, adapter = merge.adapter("plain")
    merge.refused(merge.zoo.float(kind), adapter, "does not fit on the disk")
