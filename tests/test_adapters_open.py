"""Opening adapter folders: what PEFT writes is understood exactly, and everything else is refused by its name."""

import dataclasses
import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from qmerge.adapters.adapter import open_adapter
from qmerge.adapters.config import HARMLESS, REFUSED, USED, matching_key, rank_and_scaling
from qmerge.errors import Refused
from qmerge.store.adapter import check_finite

PLAIN = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "bias": "none", "task_type": "CAUSAL_LM", "modules_to_save": None}
Q = "model.layers.0.self_attn.q_proj"


def pair(module, rank=4, middle=""):
    return {
        f"base_model.model.{module}.lora_A{middle}.weight": torch.randn(rank, 6, dtype=torch.bfloat16),
        f"base_model.model.{module}.lora_B{middle}.weight": torch.randn(5, rank, dtype=torch.bfloat16),
    }


@pytest.fixture
def make(tmp_path):
    def build(tensors=None, **config):
        folder = tmp_path / "adapter"
        folder.mkdir(exist_ok=True)
        (folder / "adapter_config.json").write_text(json.dumps(PLAIN | config))
        save_file(pair(Q) if tensors is None else tensors, folder / "adapter_model.safetensors")
        return folder

    return build


def refusal(folder):
    with pytest.raises(Refused) as caught:
        open_adapter(folder)
    return str(caught.value)


def test_plain_pair(make):
    """A and B swapped, or a wrong scaling, is a wrong delta everywhere."""
    tensors = pair(Q)
    adapter = open_adapter(make(tensors))
    found = adapter.pairs[Q]
    assert (found.rank, found.scaling) == (4, 2.0) and not adapter.saved and adapter.name == "adapter"
    a, b = adapter.load_pair(Q)
    assert a.dtype == b.dtype == torch.float32 and a.shape == (4, 6) and b.shape == (5, 4)
    assert a.equal(tensors[found.a].float()) and b.equal(tensors[found.b].float())


def test_rslora(make):
    """alpha / r instead of alpha / sqrt(r) halves the delta of rank 4."""
    assert open_adapter(make(use_rslora=True)).pairs[Q].scaling == 8 / math.sqrt(4)


def test_rank_and_alpha_patterns(make):
    """A pattern that is not applied scales one module wrongly, and only that one."""
    other = "model.layers.1.self_attn.q_proj"
    folder = make(pair(Q) | pair(other, rank=2), rank_pattern={"layers.1.self_attn.q_proj": 2}, alpha_pattern={r"layers\.1\..*": 3})
    adapter = open_adapter(folder)
    assert (adapter.pairs[Q].rank, adapter.pairs[Q].scaling) == (4, 2.0)
    assert (adapter.pairs[other].rank, adapter.pairs[other].scaling) == (2, 1.5)


@pytest.mark.parametrize("middle", ["", ".default", ".my-adapter_2"])
def test_adapter_name_in_keys(make, middle):
    """Tools other than PEFT leave the adapter's name in the keys."""
    assert list(open_adapter(make(pair(Q, middle=middle))).pairs) == [Q]


@pytest.mark.parametrize("key", ["lm_head.weight", "lm_head.modules_to_save.weight", "lm_head.modules_to_save.default.weight"])
def test_modules_to_save(make, key):
    """A saved head that is overlooked leaves the base's head under the fine-tune's layers."""
    folder = make(pair(Q) | {f"base_model.model.{key}": torch.ones(7, 6)}, modules_to_save=["lm_head"])
    adapter = open_adapter(folder)
    assert adapter.saved == {"lm_head.weight": f"base_model.model.{key}"}
    assert adapter.load(adapter.saved["lm_head.weight"]).sum() == 42


def test_resized_embeddings_are_saved_modules(make):
    """PEFT saves resized embeddings without listing them in modules_to_save."""
    folder = make(pair(Q) | {"base_model.model.model.embed_tokens.weight": torch.ones(7, 6)})
    assert list(open_adapter(folder).saved) == ["model.embed_tokens.weight"]


def test_saved_container_and_bias(make):
    """A listed module may have children and biases; they belong to it."""
    tensors = {f"base_model.model.{name}": torch.ones(2) for name in ("score.dense.weight", "score.dense.bias", "score.bias")}
    assert len(open_adapter(make(pair(Q) | tensors, modules_to_save=["score"])).saved) == 3


def test_promised_module_is_missing(make):
    """modules_to_save without its tensors is an incomplete save; the base's module would be merged in its place."""
    assert "'lm_head'" in refusal(make(modules_to_save=["lm_head"]))


def test_heads_that_peft_lists_unasked(make):
    """For SEQ_CLS PEFT lists classifier and score, and a model has one of them."""
    folder = make(pair(Q) | {"base_model.model.score.weight": torch.ones(2, 6)}, task_type="SEQ_CLS", modules_to_save=["classifier", "score"])
    assert list(open_adapter(folder).saved) == ["score.weight"]


UNSUPPORTED = {"alora_invocation_tokens": [1], "arrow_config": {"top_k": 3}, "kasa_config": {"beta": 1}}


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_unsupported_fields_are_refused_by_name(make, name):
    """A field that is dropped gives a merge that looks fine and is not the adapter."""
    assert f"{name} unset" in refusal(make(**{name: UNSUPPORTED[name]}))


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_16", "olora", "OLoRA", "corda", "loftq", "lora_ga", "kasa", "something_new", 1.5, ["x"]])
def test_initialisations_that_change_the_base(make, init):
    """A PiSSA delta on the unchanged base counts the principal components twice."""
    assert "init_lora_weights" in refusal(make(init_lora_weights=init))


@pytest.mark.parametrize("init", [True, False, None, "gaussian", "eva", "orthogonal", "mica"])
def test_initialisations_that_keep_the_base(make, init):
    """Refusing these would turn away adapters that merge exactly."""
    assert open_adapter(make(init_lora_weights=init)).pairs


@pytest.mark.parametrize(("bias", "key"), [("all", "model.layers.0.mlp.up_proj.bias"), ("all", f"{Q}.base_layer.bias"), ("lora_only", f"{Q}.base_layer.bias")])
def test_trained_biases(make, bias, key):
    """Trained biases of the base live under plain names and are easily lost."""
    tensors = pair(Q) | {f"base_model.model.{key}": torch.ones(5)}
    edits = open_adapter(make(tensors, bias=bias)).edits({f"{Q}.weight": (5, 6)})
    assert set(edits) == {f"{Q}.weight", key.replace(".base_layer", "")}
    assert key in refusal(make(tensors))


def test_malformed_bias(make):
    """A setting that PEFT does not have says nothing about what was trained."""
    assert "bias" in refusal(make(bias=1))


@pytest.mark.parametrize(("flag", "key", "size"), [("use_dora", "lora_magnitude_vector", 5), ("lora_bias", "lora_B.bias", 5)])
def test_config_and_tensors_disagree(make, flag, key, size):
    """A magnitude that is promised and missing merges as plain LoRA; one that is there and not promised is left out."""
    tensors = pair(Q) | {f"base_model.model.{Q}.{key}": torch.ones(size)}
    assert flag in refusal(make(tensors)) and flag in refusal(make(pair(Q), **{flag: True}))
    assert open_adapter(make(tensors, **{flag: True})).pairs


@pytest.mark.parametrize("mark", ["_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module."])
def test_marks_of_wrappers(make, mark):
    """torch.compile, FSDP and activation checkpointing leave marks in names; Axolotl and others save them so."""
    inside = {key.replace("self_attn", f"{mark}self_attn"): tensor for key, tensor in pair(Q).items()}
    assert list(open_adapter(make(inside)).pairs) == [Q]
    assert list(open_adapter(make({mark + key: tensor for key, tensor in pair(Q).items()})).pairs) == [Q]


def test_initial_adapter_beside_it(make, tmp_path):
    """LLaMA-Factory keeps the adapter before training: the delta on the unchanged base is the difference of the two."""
    trained, started = pair(Q), pair(Q)
    folder = make(trained, init_lora_weights="pissa")
    (folder / "pissa_init").mkdir()
    (folder / "pissa_init" / "adapter_config.json").write_text(json.dumps(PLAIN))
    save_file(started, folder / "pissa_init" / "adapter_model.safetensors")
    change = open_adapter(folder).edits({f"{Q}.weight": (5, 6)})[f"{Q}.weight"].load(torch.device("cpu"))
    product = [tensors[f"base_model.model.{Q}.lora_B.weight"].float() @ tensors[f"base_model.model.{Q}.lora_A.weight"].float() for tensors in (trained, started)]
    torch.testing.assert_close(change.apply(torch.zeros(5, 6), 0), 2.0 * (product[0] - product[1]))
    save_file({name: tensor[:2] if "lora_A" in name else tensor for name, tensor in started.items()}, folder / "pissa_init" / "adapter_model.safetensors")
    assert "rank" in refusal(folder) or "before training" in refusal(folder)


def test_residual_base(make):
    """The user may have the base that PiSSA left behind; then the adapter belongs on it as it is."""
    assert open_adapter(make(init_lora_weights="pissa"), residual_base=True).pairs


@pytest.mark.parametrize("kind", [None, 3, "NO_SUCH_TYPE", "PROMPT_TUNING"])
def test_other_adapter_kinds(make, kind):
    """A type without a weight delta, or one that nobody knows."""
    assert "peft_type" in refusal(make(peft_type=kind)) or str(kind) in refusal(make(peft_type=kind))


def test_unknown_field(make):
    """A field of a newer PEFT may change the formula; only its being unset is safe."""
    assert "'use_quantum'" in refusal(make(use_quantum={"qubits": 4}))
    assert open_adapter(make(use_quantum=None, another=False, third={})).pairs


@pytest.mark.parametrize(
    "config",
    [
        {"r": 0}, {"r": -1}, {"r": 2.0}, {"r": True}, {"r": None}, {"r": "8"}, {"lora_alpha": None}, {"lora_alpha": "16"}, {"lora_alpha": math.nan},
        {"lora_alpha": 10**400}, {"r": 10**400}, {"rank_pattern": {"q_proj": 0}}, {"rank_pattern": {"q_proj": "4"}}, {"rank_pattern": [1]}, {"alpha_pattern": {"q_proj": None}},
        {"alpha_pattern": {"(": 4}}, {"use_rslora": "yes"}, {"fan_in_fan_out": 2}, {"modules_to_save": "lm_head"}, {"modules_to_save": [3]},
    ],
    ids=lambda config: str(config)[:40],
)  # fmt: skip
def test_malformed_config(make, config):
    """A malformed number must be a refusal, not a TypeError or a division by zero."""
    assert refusal(make(**config))


def test_half_a_pair(make):
    """An A without a B is a truncated save; skipping it drops a module."""
    tensors = pair(Q)
    for name, tensor in tensors.items():
        text = refusal(make({name: tensor}))
        assert "other half" in text and name in text


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("base_model.model.model.embed_tokens.lora_embedding_A", (4, 9)),
        (f"base_model.model.{Q}.lora_magnitude_vector", (5,)),
        (f"base_model.model.{Q}.lora_magnitude_vector.weight", (5,)),
        (f"base_model.model.{Q}.lora_B.bias", (5,)),
        (f"base_model.model.{Q}.base_layer.weight", (5, 6)),
        ("base_model.model.lm_head.base_layer.weight", (5, 6)),
        (f"base_model.model.{Q}.bias", (5,)),
        (f"base_model.model.{Q}.weight", (5, 6)),
        ("base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta", (2, 6)),
        ("base_model.model.embed_tokens.bias", (2,)),
        (f"{Q}.lora_A.weight", (4, 6)),
        (f"base_model.{Q}.lora_C.weight", (4, 6)),
        ("prompt_embeddings", (4, 6)),
    ],
)
def test_tensor_that_belongs_to_nothing(make, name, shape):
    """A tensor that no formula uses is a part of the fine-tune that is lost."""
    assert name in refusal(make(pair(Q) | {name: torch.ones(shape)}))


def test_two_adapters_in_one_file(make):
    """The second of two adapters in a file would replace the first."""
    assert "several adapters" in refusal(make(pair(Q, middle=".one") | pair(Q, middle=".two")))


def test_rank_differs_from_the_config(make):
    """The scaling alpha / r is wrong when r is not the rank of the tensors."""
    text = refusal(make(pair(Q, rank=2)))
    assert "rank" in text and "lora_A" in text
    tensors = pair(Q)
    tensors[f"base_model.model.{Q}.lora_B.weight"] = torch.ones(5, 3)
    assert "lora_B" in refusal(make(tensors))


def test_convolution(make):
    """A convolution's A has four dimensions; B @ A is not its delta."""
    tensors = pair(Q) | {f"base_model.model.{Q}.lora_A.weight": torch.ones(4, 3, 2, 2)}
    assert "linear" in refusal(make(tensors))


def test_quantized_adapter_tensor(make):
    """Integer codes read as numbers are a delta of noise."""
    tensors = pair(Q) | {f"base_model.model.{Q}.lora_A.weight": torch.ones(4, 6, dtype=torch.uint8)}
    assert "floating point" in refusal(make(tensors))


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors"])
def test_missing_file(make, file):
    """The message names the file, so people know what to copy."""
    folder = make()
    (folder / file).unlink()
    assert file in refusal(folder)


def test_pickle_only(make):
    """Pickle adapters can run code."""
    folder = make()
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    assert "pickle" in refusal(folder) and "--allow-pickle" in refusal(folder)


def test_pickle_when_asked_for(make):
    """A pickle of tensors is read, bit for bit; the file that the manifest names is the user's."""
    tensors = pair(Q)
    folder = make(tensors)
    (folder / "adapter_model.safetensors").unlink()
    torch.save(tensors, folder / "adapter_model.bin")
    adapter = open_adapter(folder, allow_pickle=True)
    assert all(torch.equal(adapter.load(name), tensor) for name, tensor in tensors.items()) and adapter.files() == [folder / "adapter_model.bin"]


def test_pickle_that_runs_code(make, tmp_path):
    """A loader that falls back to the unsafe unpickler runs what the file says."""
    canary = tmp_path / "canary"
    folder = make()
    (folder / "adapter_model.safetensors").unlink()
    torch.save({"x": _Trap(canary)}, folder / "adapter_model.bin")
    with pytest.raises(Refused, match="safely"):
        open_adapter(folder, allow_pickle=True)
    assert not canary.exists()


class _Trap:
    """Unpickles by touching a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_one_of_several_in_a_folder(make, tmp_path):
    """PEFT saves further adapters in subfolders; the wrong one, or none, is taken."""
    folder = make()
    for name, rank in (("first", 4), ("second", 2)):
        (folder / name).mkdir()
        (folder / name / "adapter_config.json").write_text(json.dumps(PLAIN | {"r": rank}))
        save_file(pair(Q, rank=rank), folder / name / "adapter_model.safetensors")
    assert open_adapter(f"{folder}#second").pairs[Q].rank == 2 and open_adapter(folder).pairs[Q].rank == 4
    (folder / "adapter_config.json").unlink()
    assert "#first" in refusal(folder) and "second" in refusal(folder)
    assert "third" in refusal(f"{folder}#third")


def test_one_of_several_in_a_file(make):
    """Two adapters in one file: the named one, and no mixture."""
    tensors = pair(Q, middle=".one") | pair(Q, middle=".two")
    adapter = open_adapter(f"{make(tensors)}#two")
    assert ".two." in adapter.pairs[Q].a and "three" in refusal(f"{make(tensors)}#three")


def test_empty_file(make):
    """An adapter without tensors would merge to the base and report success."""
    assert "no tensors" in refusal(make({}))


def test_not_finite(make):
    """One NaN in A poisons a whole weight; the message counts each kind and names the tensor."""
    tensors = pair(Q)
    name = f"base_model.model.{Q}.lora_A.weight"
    tensors[name][0, :4] = torch.tensor([math.nan, math.inf, -math.inf, math.inf])
    with pytest.raises(Refused, match="not finite") as caught:
        open_adapter(make(tensors)).load_pair(Q)
    assert name in str(caught.value) and "1 NaN, 2 +Inf, 1 -Inf" in str(caught.value)
    check_finite("codes", torch.ones(2, dtype=torch.uint8))
    check_finite("f8", torch.ones(2).to(torch.float8_e4m3fn))
    with pytest.raises(Refused):
        check_finite("f8", torch.full((2,), math.nan).to(torch.float8_e4m3fn))


def test_unknown_names(make):
    """A KeyError would reach people as a traceback."""
    adapter = open_adapter(make())
    with pytest.raises(Refused):
        adapter.load("nothing")
    with pytest.raises(Refused):
        adapter.load_pair("nothing")


def test_every_field_of_peft_is_judged_once():
    """A field that PEFT adds must be put into a table by a person, not slip through."""
    peft = pytest.importorskip("peft")
    tables = [HARMLESS, USED, frozenset(REFUSED)]
    assert sum(map(len, tables)) == len(frozenset().union(*tables))
    assert {item.name for item in dataclasses.fields(peft.LoraConfig)} - frozenset().union(*tables) == set()


def test_pattern_rule_is_peft_s():
    """A rule of our own (endswith, or search) gives other ranks than the ones that were trained."""
    other = pytest.importorskip("peft.utils.other")
    modules = ["q_proj", "model.layers.0.q_proj", "model.layers.10.q_proj", "xq_proj", "model.layers.0.mlp.down_proj", "a+b", "model.layers.0", ""]
    keys = ["q_proj", "0.q_proj", ".q_proj", "^q_proj", "^model.layers.0.q_proj", "layers.0", r"layers\.\d+\.q_proj", "q_proj|down_proj",
            "q_proj$", "model", "a+b", "", ".*", "layers.0.*", "(q|v)_proj", "proj"]  # fmt: skip
    for module in modules:
        for key in keys:
            assert matching_key([key], module) == other.get_pattern_key([key], module), (key, module)
        for order in (keys, keys[::-1], []):
            assert matching_key(order, module) == other.get_pattern_key(order, module), module
    assert rank_and_scaling({"r": 4, "lora_alpha": 8, "rank_pattern": {"a+b": 2}}, "a+b") == (2, 4.0)


@pytest.mark.parametrize("rslora", [False, True])
def test_a_real_peft_adapter(tmp_path, rslora):
    """What PEFT saves must give the delta that PEFT computes, module by module, with patterns and saved modules."""
    peft = pytest.importorskip("peft")

    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.q_proj, self.up_proj = torch.nn.Linear(6, 5, bias=False), torch.nn.Linear(5, 6)

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers, self.lm_head = torch.nn.ModuleList([Layer(), Layer()]), torch.nn.Linear(6, 7)

    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "up_proj"], modules_to_save=["lm_head"], use_rslora=rslora,
                             init_lora_weights=False, rank_pattern={r"1\.q_proj": 3, "up_proj": 2}, alpha_pattern={"layers.0.q_proj": 10})  # fmt: skip
    model = peft.get_peft_model(Model(), config, adapter_name="tuned")
    model.save_pretrained(tmp_path)
    adapter = open_adapter(tmp_path / "tuned")
    targets = {name: module for name, module in model.base_model.model.named_modules() if hasattr(module, "get_delta_weight")}
    assert set(adapter.pairs) == set(targets) and set(adapter.saved) == {"lm_head.weight", "lm_head.bias"}
    for name, module in targets.items():
        a, b = adapter.load_pair(name)
        torch.testing.assert_close(adapter.pairs[name].scaling * (b @ a), module.get_delta_weight("tuned"))
    used = {name for found in adapter.pairs.values() for name in (found.a, found.b)} | set(adapter.saved.values())
    assert used == set(load_file(tmp_path / "tuned" / "adapter_model.safetensors"))
