"""Does the model card say what is known and nothing else, and does the checkpoint stay whole with it?"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from report_rich import hostile_rich_results, rich_results
from test_report_markdown import _tables
from test_report_results import HOSTILE, passing_results

from qmerge.report.card import Facts, Origin, licence_of, render_card
from qmerge.store.manifest import read_manifest, verify_files
from qmerge.store.renew import add_file

GPTQ = {"architectures": ["LlamaForCausalLM"], "quantization_config": {"quant_method": "gptq", "bits": 4}}
MANIFEST = {"tool": {"name": "qmerge", "version": "0.1.0"}, "recipe": {"format": "gptq", "bits": 4, "seed": 0}, "versions": {"torch": "2.11.0"}, "files": {"LICENSE": {}}}


def _facts(**changes: Any) -> Facts:
    base = Origin("unsloth/some-bnb-4bit", "unsloth/some-bnb-4bit", "a" * 40, {"license": "llama3.2", "license_link": "LICENSE"})
    return Facts(**{"name": "mine", "config": GPTQ, "manifest": MANIFEST, "base": base, "adapters": [Origin("me/lora", "me/lora")], "results": passing_results(), "arm": "nf4"} | changes)


def _front(card: str) -> dict[str, Any]:
    assert card.startswith("---\n")
    return yaml.safe_load(card.split("\n---\n")[0][4:])


def test_front_matter_names_both_base_models() -> None:
    """Catches a card that links to one of the two models it was made of, or with a relation that the hub does not know."""
    front = _front(render_card(_facts()))
    assert front["base_model"] == ["unsloth/some-bnb-4bit", "me/lora"] and front["base_model_relation"] == "merge"
    assert front["license"] == "llama3.2" and front["license_link"] == "LICENSE" and front["pipeline_tag"] == "text-generation"
    assert set(front["tags"]) >= {"qmerge", "gptq", "4-bit"} and front["library_name"] == "transformers"


def test_bits_where_the_config_says_them_group_by_group() -> None:
    """Catches 8 bits of compressed-tensors called 4-bit."""
    front = _front(render_card(_facts(config={"quantization_config": {"quant_method": "compressed-tensors"}}, manifest=MANIFEST | {"recipe": {"bits": 8}})))
    assert "8-bit" in front["tags"] and "4-bit" not in front["tags"]


def test_what_is_not_known_is_left_out() -> None:
    """Catches an invented licence or hub id, and figures for a checkpoint that was not measured."""
    card = render_card(_facts(base=Origin("base-nf4"), adapters=[Origin("adapter")], results=None, arm=None))
    assert not {"license", "base_model", "base_model_relation"} & set(_front(card))
    assert "Not measured for this card." in card and "state no licence" in card
    assert _front(render_card(_facts(adapters=[Origin("adapter")])))["base_model_relation"] == "finetune"


def test_the_table_is_this_checkpoint_s() -> None:
    """Catches the row of another candidate, and a failed verdict that the card does not tell."""
    card = render_card(_facts())
    assert "| this model | 12.35 (12.09 to 12.61) | 0.00011 (0.00010 to 0.00012) |" in card and "naive" not in card
    assert "It is inside the budget default." in card
    assert "outside the budget" in render_card(_facts(results=rich_results(), arm="naive"))


@pytest.mark.parametrize(("kind", "said"), [("gptq", "gptqmodel optimum"), ("bitsandbytes", "bitsandbytes"), ("none", "vllm serve mine")])
def test_loading_is_for_the_format_written(kind: str, said: str) -> None:
    """Catches the loader of another format."""
    config = {"quantization_config": {"quant_method": kind}} if kind != "none" else {}
    card = render_card(_facts(config=config))
    assert said in card and 'from_pretrained("mine"' in card and ("gptqmodel" in card) == (kind == "gptq")


@pytest.mark.parametrize(
    ("card", "config", "found"),
    [
        ("---\nlicense: Apache-2.0\n---\n# x", {}, {"license": "apache-2.0"}),
        ("---\nlicense: other\nlicense_name: acme\nlicense_link: https://a.example/x\n---\n", {}, {"license": "other", "license_name": "acme", "license_link": "https://a.example/x"}),
        ("# no front matter\nlicense: mit", {}, {}),
        ("---\nlicense: [mit, apache-2.0]\n---\n", {}, {}),
        ("---\nlicense: 'mit\\n---\\nevil: 1'\n---\n", {}, {}),
        ("---\nlicense: mit\nlicense_link: 'javascript:alert(1)'\n---\n", {}, {"license": "mit"}),
        ("---\n!!python/object/apply:os.system ['true']\n---\n", {}, {}),
        ("", {"license": "mit"}, {"license": "mit"}),
        ("---\nlicense: " + "a" * 5000 + "\n---\n", {}, {}),
    ],
)
def test_licence_is_read_not_guessed(card: str, config: dict[str, Any], found: dict[str, str]) -> None:
    """Catches a licence out of prose, one of two picked, text that breaks out of the front matter, and YAML that runs something."""
    assert licence_of(card, config) == found


@pytest.mark.parametrize("longer", [0, 10_000])
def test_hostile_names_stay_inert(longer: int) -> None:
    """Catches front matter that a name adds keys to, elements, links and columns in the text, and a code block that a name closes."""
    bad = HOSTILE + "\n---\nlicense: mit\n```\n" + "x" * longer
    results = hostile_rich_results(longer)
    arm = next(name for name in results["arms"] if name.startswith("nf4"))
    config = {"architectures": [bad], "quantization_config": {"quant_method": bad, "bits": 4}}
    manifest = {"tool": {"version": bad}, "recipe": {"format": bad, "seed": bad}, "versions": {bad: bad}, "files": {f"LICENSE{bad}": {}}}
    card = render_card(Facts(bad, config, manifest, Origin(bad, None, bad), [Origin(bad)], None, results, arm))
    assert set(_front(card)) == {"library_name", "tags"}
    text = card.split("\n---\n", 1)[1]
    code = [part for index, part in enumerate(text.split("```")) if index % 2]
    prose = "code".join(part for index, part in enumerate(text.split("```")) if not index % 2)
    assert len(code) == 1 and text.count("```") == 2 and 'from_pretrained("MODEL"' in code[0], "a name goes into code only where it is plain"
    assert "<" not in prose and "@" not in prose and "](" not in prose and "http:" not in prose and "\x1b" not in text and "\u202e" not in text
    assert all(len({row.count("|") for row in rows}) == 1 for rows in _tables(prose))
    card.encode("utf-8")


def test_the_checkpoint_stays_whole(cli, zoo, written, tmp_path: Path) -> None:
    """Catches a card that breaks `qmerge verify`, ids and licence that do not come from the inputs, and a second card refused because of the first."""
    made, _ = written("llama", "bf16")
    out, base = tmp_path / "mine", tmp_path / "base"
    shutil.copytree(made, out), shutil.copytree(zoo.nf4("llama"), base)
    (base / "README.md").write_text("---\nlicense: mit\n---\n")
    given = ("--base", base, "--adapter", zoo.adapter("llama"), "--base-id", "org/base-4bit", "--adapter-id", "me/lora", "--id", "me/merged")
    answer = cli("card", out, *given)
    assert answer.code == 0, answer.err
    front = _front((out / "README.md").read_text())
    assert front["base_model"] == ["org/base-4bit", "me/lora"] and front["license"] == "mit" and "vllm serve me/merged" in (out / "README.md").read_text()
    assert cli("verify", out).code == 0 and "README.md" in read_manifest(out)["files"]
    assert cli("card", out).code == 0 and "license" not in _front((out / "README.md").read_text()), "again, with less"
    assert verify_files(out) == [] and sorted(path.name for path in tmp_path.iterdir()) == ["base", "mine"]
    assert cli("card", out, "--base", zoo.nf4("gpt2")).code == 4, "another base's licence"
    assert cli("card", out, "--base-id", "not an id").code == 2 and cli("card", tmp_path).code == 4


def test_results_of_another_checkpoint_are_refused(cli, written, tmp_path: Path) -> None:
    """Catches a card with figures of what lay in OUT before."""
    made, _ = written("llama", "bf16")
    out = tmp_path / "nf4"
    shutil.copytree(made, out)
    results = passing_results()
    (tmp_path / "nf4.eval").mkdir()
    (tmp_path / "nf4.eval/results.json").write_text(json.dumps(results))
    answer = cli("card", out, "--print")
    assert answer.code == 4 and "another checkpoint" in answer.err and not (out / "README.md").exists()
    results["arms"]["nf4"]["bytes"] = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    (tmp_path / "nf4.eval/results.json").write_text(json.dumps(results))
    answer = cli("card", out, "--print")
    assert answer.code == 0 and "| this model |" in answer.out and not (out / "README.md").exists()


def test_a_file_of_the_user_and_a_changed_weight_are_not_covered_up(written, tmp_path: Path) -> None:
    """Catches a renewed manifest that makes a damaged weight whole, and a README of the user's own that is written over."""
    made, _ = written("llama", "bf16")
    out = tmp_path / "out"
    shutil.copytree(made, out)
    weights = next(out.glob("*.safetensors"))
    damaged = bytearray(weights.read_bytes())
    damaged[-1] ^= 1
    weights.write_bytes(damaged)
    add_file(out, "README.md", "card")
    assert verify_files(out) == [f"{weights.name}: changed since it was written"]
    (out / "NOTES.md").write_text("mine")
    with pytest.raises(Exception, match="did not write"):
        add_file(out, "README.md", "again")
    assert (out / "README.md").read_text() == "card" and (out / "NOTES.md").exists()


def test_a_failure_half_way_leaves_the_checkpoint_as_it_was(written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a README without its entry in the manifest after a crash: the old folder stays until the new one is whole."""
    made, _ = written("llama", "bf16")
    out = tmp_path / "out"
    shutil.copytree(made, out)
    before = read_manifest(out)
    with monkeypatch.context() as patch:
        patch.setattr("qmerge.store.renew.write_chunks", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            add_file(out, "README.md", "card")
    assert read_manifest(out) == before and verify_files(out) == [] and [path.name for path in tmp_path.iterdir()] == ["out"]
