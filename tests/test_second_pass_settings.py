"""Settings of a stranger's config and of the files beside it: what is known goes into the output, what leads elsewhere or says where somebody worked does not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from qmerge.store.settings import known_settings, names_of

STRANGE = {
    "evil_key": "http://evil/x.py", "use_evil": True, "save_pretrained": "boom", "distributed_config": {"tp": 8}, "fusion_config": {"a": True}, "extra_files": ["../victim.safetensors"],
    "name_or_path": "/home/canary/models", "unsloth_fixed": True, "model_name": "/home/canary/x", "text_config": {"hidden_size": 1, "evil_inside": "x"},
}  # fmt: skip


def change(file: Path, **keys: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | keys))


def merged(cli, zoo, root: Path, base: Path, *flags: object):
    return cli("merge", "--base", base, "--adapter", zoo.adapter("llama"), "--out", root / "out", "--device", "cpu", "--format", "bf16", *flags)


def test_what_nobody_knows_is_left_out_and_named(cli, zoo, tmp_path):
    """A key that does nothing today and loads code tomorrow, published under our name; or one that is lost without a word."""
    base = shutil.copytree(zoo.nf4("llama"), tmp_path / "base")
    before = json.loads((base / "config.json").read_text())
    change(base / "config.json", **{key: value for key, value in STRANGE.items() if key != "text_config"}, rope_theta=500000.0)
    answer = merged(cli, zoo, tmp_path, base)
    after = json.loads((tmp_path / "out" / "config.json").read_text())
    assert answer.code == 0 and "evil_key, model_name, save_pretrained, unsloth_fixed, use_evil" in answer.err, answer.err
    assert not after.keys() & STRANGE.keys() and after["rope_theta"] == 500000.0
    assert {key: value for key, value in before.items() if key not in ("quantization_config", "dtype", "_name_or_path")} == {key: after[key] for key in before if key not in ("quantization_config", "dtype", "_name_or_path")}
    assert cli("verify", tmp_path / "out", "--base", base, "--adapter", zoo.adapter("llama")).code == 0


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2", "gemma2"])
def test_nothing_of_a_usual_config_is_lost(zoo, kind):
    """A rope setting that is dropped: another model."""
    config = json.loads((Path(zoo.float(kind)) / "config.json").read_text())
    kept, left_out = known_settings(config)
    assert left_out == [] and kept == {key: value for key, value in config.items() if not key.startswith("_")}


@pytest.mark.parametrize("kind", ["gemma3_text", "qwen3_moe", "deepseek_v3", "mixtral", "phi3", "gpt_neox", "falcon", "olmo2", "granite", "cohere2", "mistral3", "gpt_oss"])
def test_all_fields_of_a_class_are_known(kind):
    """An architecture whose own settings are taken for a stranger's."""
    from transformers import CONFIG_MAPPING

    default = {key: value for key, value in CONFIG_MAPPING[kind]().to_dict().items() if not key.startswith("_")}
    assert known_settings(default | {"model_type": kind})[1] == []


@pytest.mark.parametrize(("kind", "legacy"), [("gemma3_text", "rope_local_base_freq"), ("llama", "rope_theta"), ("gpt_neox", "rotary_pct"), ("phi3", "original_max_position_embeddings")])
def test_what_only_older_files_say_is_known(kind, legacy):
    """Names that a class takes and turns into others: left out, the model is another one."""
    assert known_settings({"model_type": kind, legacy: 0.5}) == ({"model_type": kind, legacy: 0.5}, [])


def test_an_architecture_that_transformers_has_not():
    """Everything lost, or everything let through."""
    found = known_settings({"model_type": "novel", "hidden_size": 8, "novel_width": 3, "novel_flag": True, "novel_act": "relu", "novel_list": [1, 2], "novel_code": "evil.Model", "novel_place": "a/b", "auto_map": {"a": "b"}})
    assert names_of("novel") is None and names_of("../llama") is None
    assert found == ({"model_type": "novel", "hidden_size": 8, "novel_width": 3, "novel_flag": True, "novel_act": "relu", "novel_list": [1, 2]}, ["novel_code", "novel_place"])


def test_files_beside_the_weights(cli, zoo, tmp_path):
    """`auto_map` one level down, in a processor's config; the folders of whoever saved the tokenizer, published with it."""
    base = shutil.copytree(zoo.nf4("llama"), tmp_path / "base")
    (base / "processor_config.json").write_text(json.dumps({"image_processor": {"auto_map": {"AutoImageProcessor": "evil.Evil"}, "size": 3}}))
    change(base / "tokenizer_config.json", name_or_path="/home/canary/base", tokenizer_file="/home/canary/.cache/tokenizer.json", special_tokens_map_file="C:\\canary\\s.json", vocab_file="vocab.json")
    answer = merged(cli, zoo, tmp_path, base)
    assert answer.code == 0, answer.err
    written = {path.name: path.read_text(errors="replace") for path in (tmp_path / "out").iterdir()}
    assert not [name for name, text in written.items() if "canary" in text or "auto_map" in text]
    assert json.loads(written["processor_config.json"]) == {"image_processor": {"size": 3}} and json.loads(written["tokenizer_config.json"])["vocab_file"] == "vocab.json"
    assert cli("verify", tmp_path / "out", "--base", base, "--adapter", zoo.adapter("llama")).code == 0


@pytest.mark.parametrize(("keys", "says"), [
    ({"num_hidden_layers": 10**9}, "more layers"), ({"hidden_size": 10**30}, "cannot build"), ({"vocab_size": -5}, "cannot build"), ({"num_attention_heads": 0}, "cannot build"),
    ({"vocab_size": 2**62}, ""), ({"head_dim": 10**12}, ""), ({"num_key_value_heads": 10**9}, ""), ({"layer_types": ["x"]}, ""), ({"rope_parameters": {"rope_type": "evil"}}, ""), ({"hidden_act": "evil"}, ""),
    ({"max_position_embeddings": 10**15}, None),
], ids=str)  # fmt: skip
def test_numbers_that_no_model_has(cli, zoo, tmp_path, keys, says):
    """A config of ten lines that is built for ever, takes all memory, or ends in a traceback."""
    base = shutil.copytree(zoo.nf4("llama"), tmp_path / "base")
    change(base / "config.json", **keys)
    answer = merged(cli, zoo, tmp_path, base, "--format", "nf4", "--rtn", "--dry-run")
    assert "Traceback" not in answer.err and answer.code in (4,) if says is not None else (0, 4), answer.err
    assert says is None or says in answer.err, answer.err


@pytest.mark.parametrize("named", [["Trainer"], ["pipeline"], ["models"], ["__loader__"], ["os.system"], [7], [], "LlamaForCausalLM", None])
def test_a_class_that_is_no_model(named):
    """Any name of transformers' package, taken from a stranger's file and called."""
    from qmerge.quality.loaders import _class_named

    assert _class_named(["LlamaForCausalLM"]).__name__ == "LlamaForCausalLM"
    with pytest.raises(ValueError, match="no model class"):
        _class_named(named)


def test_a_readme_of_a_terabyte(cli, zoo, tmp_path):
    """A base's card is read for its licence: whole, whatever its size."""
    import os

    base = shutil.copytree(zoo.nf4("llama"), tmp_path / "base")
    (base / "README.md").write_text("---\nlicense: mit\n---\n")
    assert merged(cli, zoo, tmp_path, base).code == 0
    os.truncate(base / "README.md", 2**40)
    answer = cli("card", tmp_path / "out", "--base", base)
    assert answer.code == 0 and "license: mit" in (tmp_path / "out" / "README.md").read_text(), answer.err
