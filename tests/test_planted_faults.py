"""Candidates that are bad in a way somebody really made: does the part that should catch it, catch it, through the real commands?"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import OWN, sentences, write_rows
from safetensors.torch import load_file, save_file

from qmerge.store.durable import json_bytes
from qmerge.store.manifest import digest_file, sealed

DEMO = Path(__file__).parents[1] / "examples" / "demo"
OFF = 1.02


# --- (a) the fine-tune rounded away ---


def test_round_to_nearest_ends_in_3_by_retention(cli, tmp_path):
    """The product's own reason: a merge that loads, reads well, and has lost the fine-tune, let through by `run` or by `compare`."""
    text, out, budget = tmp_path / "prose.jsonl", tmp_path / "out", tmp_path / "retention.yaml"
    text.write_text("".join((DEMO / "eval-prose.jsonl").read_text().splitlines(keepends=True)[:3]))
    budget.write_text("retention: {min: 0.9}\n")  # alone: nothing else may be what fails
    ran = cli("run", "--base", DEMO / "base-nf4", "--adapter", DEMO / "adapter", "--format", "nf4", "--rtn", "--text", text, "--eval-tokens", 128, "--budget", budget, "--out", out, "--device", "cpu")
    assert ran.code == 3 and "out on prose: retention" in ran.out
    judged = cli("compare", f"{out}.eval/results.json")
    assert judged.code == 3 and re.search(r"out on prose: retention 0\.[012]\d* .*< 0\.9", judged.out)


# --- (b) scales off by 2 %, behind renewed hashes ---


def planted(source: Path, target: Path, change) -> Path:
    """A copy of a checkpoint whose tensors ``change`` edits in place, with a manifest that vouches for the result."""
    shutil.copytree(source, target)
    tensors = load_file(target / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    manifest = json.loads((target / "manifest.json").read_text())
    manifest["files"]["model.safetensors"] = digest_file(target / "model.safetensors")
    (target / "manifest.json").write_bytes(json_bytes(sealed(manifest)))
    return target


def off_in_gptq(tensors: dict[str, torch.Tensor], where: str) -> None:
    for name in tensors:
        if name.startswith(where) and name.endswith(".scales"):
            tensors[name] = (tensors[name].float() * OFF).half()


def off_in_nf4(tensors: dict[str, torch.Tensor], where: str) -> None:
    """Every absmax of the block by 2 %: of double quantization that is the second level's maxima and the offset, which lies in a JSON of bytes."""
    for name in tensors:
        if name.startswith(where) and name.endswith(".nested_absmax"):
            tensors[name] = tensors[name] * OFF
        if name.startswith(where) and ".quant_state." in name:
            state = json.loads(bytes(tensors[name].tolist()))
            state["nested_offset"] = float(torch.tensor(state["nested_offset"] * OFF))  # as exact as every packer writes it: else packing it again would tell
            tensors[name] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)


@pytest.mark.parametrize(("fmt", "change"), [("gptq", off_in_gptq), ("nf4", off_in_nf4)])
@pytest.mark.parametrize("where", ["model.layers.1.", "model.layers.0.mlp.up_proj."], ids=["one block", "one linear"])
def test_scales_off_by_two_percent_are_named_by_verify(zoo, written, cli, tmp_path, fmt, change, where):
    """Scales of one block that a tool rewrote: all files whole, all numbers finite, hashes right. Only deriving it again can tell, and it must say where."""
    out, weights = written("llama", fmt)
    inputs = ("--base", zoo.nf4("llama"), "--adapter", zoo.adapter("llama"))
    bad = planted(out, tmp_path / "bad", lambda tensors: change(tensors, where))
    assert cli("verify", bad).code == 0  # its own files cannot tell
    answer = cli("verify", bad, *inputs)
    named = set(re.findall(r"model\.layers\.\S+?\.weight", answer.out))
    assert answer.code == 1 and named == {name for name in weights if name.startswith(where)}
    assert all(name in answer.err for name in named)


# --- (c) and (d): what the candidate's users tokenize with ---


@pytest.fixture
def bad(written, tmp_path) -> Path:
    """A good candidate, to be spoilt."""
    return Path(shutil.copytree(written("llama", "bf16")[0], tmp_path / "spoilt"))


@pytest.fixture(scope="module")
def chat(tmp_path_factory) -> str:
    file = tmp_path_factory.mktemp("chat") / "chat.jsonl"
    file.write_text("".join(json.dumps({"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "yes"}]}) + "\n" for text in sentences(OWN, 8, 5)))
    return str(file)


@pytest.fixture
def measured(zoo, cli, tmp_path):
    def evaluate(candidate: Path, text: str):
        answer = cli("eval", "--base", zoo.nf4("llama"), "--adapter", zoo.adapter("llama"), "--candidate", candidate, "--text", f"held={text}", "--tokens", 64, "--out", tmp_path / "results.json", "--device", "cpu")
        assert (answer.code == 0) == (tmp_path / "results.json").exists()
        return answer

    return evaluate


def edit(file: Path, change) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def swap_two(content: dict) -> None:
    vocabulary = content["model"]["vocab"]
    a, b = sorted(vocabulary, key=vocabulary.get)[300:302]
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]


def test_two_swapped_tokens_are_refused_by_eval(bad, measured, zoo):
    """A renumbered vocabulary: measured with the reference's ids the candidate looks perfect, and its users get other words."""
    edit(bad / "tokenizer.json", swap_two)
    answer = measured(bad, zoo.held_out)
    assert answer.code == 4 and "spoilt: its tokenizer's vocabulary" in answer.err and "= 300" in answer.err and "= 301" in answer.err


def test_lost_merges_are_refused_by_eval(bad, measured, zoo):
    """The same tokens with the same numbers, and a tokenizer that puts text together from other ones."""
    edit(bad / "tokenizer.json", lambda content: content["model"].update(merges=content["model"]["merges"][:5]))
    answer = measured(bad, zoo.held_out)
    assert answer.code == 4 and "other tokens of the text" in answer.err and "spoilt on held, document 1" in answer.err


def test_another_end_token_is_refused_by_eval(bad, measured, zoo):
    """A candidate that never stops, because a tool renamed the end of text."""
    edit(bad / "tokenizer_config.json", lambda content: content.update(eos_token="<s>"))
    answer = measured(bad, zoo.held_out)
    assert answer.code == 4 and "another eos_token" in answer.err


@pytest.mark.parametrize("harm", ["lost", "changed", "silent"])
def test_a_chat_template_that_is_lost_or_changed_is_refused_by_eval(bad, measured, chat, harm):
    """A chat model that is served with no template, or another one than it was trained and measured with."""
    template = bad / "chat_template.jinja"
    if harm == "lost":
        template.unlink()
    else:  # one that writes other marks, and one that drops whole conversations
        template.write_text("{% for m in messages %}[{{ m['content'] }}]{% endfor %}" if harm == "changed" else template.read_text().replace("{% for", "{% if 'rain' in messages[0]['content'] %}{% for") + "{% endif %}")
    answer = measured(bad, chat)
    assert answer.code == 4 and "chat template" in answer.err and "spoilt on held" in answer.err


def test_what_the_text_does_not_use_is_said_and_measured(bad, measured, zoo, tmp_path):
    """A refusal of what cannot touch the figures (a padding token that a tool added, a template that no row uses): or silence about it."""
    (bad / "chat_template.jinja").unlink()
    edit(bad / "tokenizer_config.json", lambda content: content.update(pad_token="<pad>"))
    text = write_rows(tmp_path / "short.jsonl", sentences(OWN, 4, 2))
    answer = measured(bad, text)
    note = json.loads((tmp_path / "results.json").read_text())["arms"]["spoilt"]["tokenizer_note"]
    assert answer.code == 0 and note in answer.err and all(word in note for word in ("1 more tokens", "pad_token", "no chat template"))


def test_a_candidate_without_tokenizer_is_said_and_measured(bad, measured, zoo, chat, tmp_path):
    """Peers write weights alone: refused, or taken silently for a folder that one can serve. And text with the template, which the reference has, is measured."""
    for file in (*bad.glob("*token*"), bad / "chat_template.jinja"):
        file.unlink()
    answer = measured(bad, chat)
    assert answer.code == 0 and "spoilt: its folder has no tokenizer" in answer.err
    assert "no tokenizer" in json.loads((tmp_path / "results.json").read_text())["arms"]["spoilt"]["tokenizer_note"]


def test_an_untouched_tokenizer_needs_no_note(written, measured, chat, tmp_path):
    """A check that cries wolf, or that refuses everything."""
    assert measured(written("llama", "bf16")[0], chat).code == 0
    arms = json.loads((tmp_path / "results.json").read_text())["arms"]
    assert not any("tokenizer_note" in arm for arm in arms.values())
