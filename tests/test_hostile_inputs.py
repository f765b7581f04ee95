"""A zoo of files from strangers: each is refused with a message and an exit code, or does nothing. Nothing is written, run, followed or waited for.

`qmerge merge` and its neighbours as a person calls them, in this process. What other libraries are kept from is in test_foreign_folders.py, every byte in test_byte_flips.py.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_merge_refusals import digests

Q = "model.layers.0.self_attn.q_proj"
WAIT_S = 60
"""far more than any of them takes on a busy machine; a pipe without a writer waits for ever"""
ESCAPES = "\x1b]0;owned\x07\x1b[2J\u202etxt.exe\u2066\u200b\x9b31m"
HTML = "<script>alert(1)</script>"


class Case:
    """A float base of two linears and an adapter on one, handmade, which merge; and a place where nothing may appear but by a merge."""

    def __init__(self, root: Path, cli: Callable) -> None:
        self.root, self.cli = root, cli
        self.base, self.adapter, self.place, self.marker = root / "base", root / "adapter", root / "place", root / "marker"
        for folder in (self.base, self.adapter, self.place, root / "victim"):
            folder.mkdir()
        torch.manual_seed(0)
        self.tensors = {f"{Q}.weight": torch.randn(8, 8), "model.norm.weight": torch.ones(8)}
        save_file(self.tensors, self.base / "model.safetensors", {"format": "pt"})
        save_file(self.tensors, root / "victim" / "model.safetensors", {"format": "pt"})
        (root / "victim" / "secret.json").write_text('{"model_type": "toy", "secret": "canary"}')
        self.factors = {f"base_model.model.{Q}.lora_{side}.weight": torch.randn(shape) for side, shape in (("A", (2, 8)), ("B", (8, 2)))}
        save_file(self.factors, self.adapter / "adapter_model.safetensors", {"format": "pt"})
        self.json("base/config.json", {"model_type": "toy", "hidden_size": 8})
        self.json("adapter/adapter_config.json", {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]})

    def json(self, name: str, value: Any) -> None:
        self.text(name, json.dumps(value))

    def text(self, name: str, value: str | bytes) -> None:
        path = self.root / name
        path.unlink(missing_ok=True)
        path.write_bytes(value.encode("utf-8", "surrogatepass") if isinstance(value, str) else value)

    def change(self, name: str, **keys: Any) -> None:
        self.json(name, json.loads((self.root / name).read_text()) | keys)

    def shards(self, weight_map: dict[str, Any]) -> None:
        (self.base / "model.safetensors").rename(self.base / "model-00001-of-00001.safetensors")
        self.json("base/model.safetensors.index.json", {"weight_map": weight_map})

    def link(self, name: str, target: str) -> None:
        (self.root / name).unlink(missing_ok=True)
        (self.root / name).symlink_to(target)

    def pipe(self, name: str) -> None:
        (self.root / name).unlink(missing_ok=True)
        os.mkfifo(self.root / name)

    def header(self, name: str, raw: bytes, length: int | None = None, data: bytes = b"") -> None:
        self.text(name, struct.pack("<Q", len(raw) if length is None else length) + raw + data)

    def pickled(self, value: bytes | object) -> None:
        (self.adapter / "adapter_model.safetensors").unlink()
        if isinstance(value, bytes):
            self.text("adapter/adapter_model.bin", value)
        else:
            torch.save(value, self.adapter / "adapter_model.bin")

    def merge(self, *flags: object) -> Any:
        return self.cli("merge", "--base", self.base, "--adapter", self.adapter, "--out", self.place / "out", "--format", "bf16", "--on", "original", "--device", "cpu", *flags)

    def ended(self, answer: Any, code: int, *words: str) -> None:
        assert answer.code == code, (answer.code, answer.out, answer.err)
        for word in words:
            assert word in answer.err + answer.out, f"{word!r} not in:\n{answer.err}"
        assert "Traceback" not in answer.err and not self.marker.exists() and len(answer.err) < 10_000
        for text in (answer.out, answer.err.replace("\x1b[31m", "").replace("\x1b[33m", "").replace("\x1b[0m", "")):
            assert not any(char in text for char in "\x1b\x07\x9b\u202e\u2066\u200b\x00\r"), "a terminal would act on this"


class Trap:
    """Unpickles by making a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self) -> tuple:
        return Path.touch, (Path(self.marker),)


def deep(text: str, count: int) -> str:
    return text[0] * count + text[1] * count


def laughs(rows: int = 12) -> str:
    """Ten lines for ten to the power of ``rows`` values."""
    lines = ["x0: &x0 [lol, lol, lol, lol, lol, lol, lol, lol, lol, lol]"]
    return "\n".join(lines + [f"x{n}: &x{n} [{', '.join([f'*x{n - 1}'] * 10)}]" for n in range(1, rows)]) + "\n"


def one_shard(case: Case, file: Any) -> None:
    case.shards({name: "model-00001-of-00001.safetensors" for name in case.tensors} | {"model.norm.weight": file})


def many_tensors(case: Case) -> None:
    """100,000 empty tensors beside the adapter's own."""
    raw = {f"base_model.model.t{n}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for n in range(100_000)}
    case.header("adapter/adapter_model.safetensors", json.dumps(raw).encode())


def endless(case: Case) -> None:
    """A pickle that memoizes a list into itself, doubling, until something ends."""
    case.pickled(b"\x80\x02]q\x00" + b"(" + b"h\x00" * 10 + b"e" * 1 + (b"h\x002" * 200_000) + b".")


MERGES: dict[str, tuple[Callable[[Case], None], tuple[str, ...]]] = {
    # paths
    "index that goes up": (lambda c: one_shard(c, "../victim/model.safetensors"), ("not a plain file name",)),
    "index with an absolute path": (lambda c: one_shard(c, str(c.root / "victim/model.safetensors")), ("not a plain file name",)),
    "index with a Windows path": (lambda c: one_shard(c, "C:\\victim.safetensors"), ("not a plain file name",)),
    "index with a NUL": (lambda c: one_shard(c, "model\0.safetensors"), ("not a plain file name",)),
    "index with a very long name": (lambda c: one_shard(c, "m" * 5000 + ".safetensors"), ("not a plain file name",)),
    "index that names a number": (lambda c: one_shard(c, 7), ("not a plain file name",)),
    "index that names a pickle": (lambda c: one_shard(c, "pytorch_model.bin"), ("not a safetensors file",)),
    "a layer copied 10^12 times": (lambda c: c.json("adapter/adapter_config.json", {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "layer_replication": [[0, 10**12]]}), ("layer_replication",)),
    # links
    "weights that link out of the folder": (lambda c: c.link("base/model.safetensors", "../victim/model.safetensors"), ("leads out", "model.safetensors in base")),
    "a shard that links out of the folder": (lambda c: (one_shard(c, "model-00001-of-00001.safetensors"), c.link("base/model-00001-of-00001.safetensors", "../victim/model.safetensors")), ("leads out",)),
    "a config that links to a secret": (lambda c: c.link("base/config.json", "../victim/secret.json"), ("leads out",)),
    "an index that links out": (lambda c: (one_shard(c, "model-00001-of-00001.safetensors"), c.link("base/model.safetensors.index.json", "../victim/secret.json")), ("leads out",)),
    "adapter weights that link out": (lambda c: c.link("adapter/adapter_model.safetensors", "../victim/model.safetensors"), ("leads out",)),
    "an adapter's config that links out": (lambda c: c.link("adapter/adapter_config.json", "../victim/secret.json"), ("leads out",)),
    "a licence that links to a secret": (lambda c: c.link("adapter/LICENSE", "../victim/secret.json"), ("leads out", "LICENSE")),
    "a template that links to a secret": (lambda c: (c.text("base/tokenizer.json", "{}"), c.link("base/chat_template.jinja", "../victim/secret.json")), ("leads out",)),
    "a config that links to itself": (lambda c: c.link("base/config.json", "config.json"), ("config.json",)),
    "weights that link to themselves": (lambda c: c.link("base/model.safetensors", "model.safetensors"), ("no safetensors weights",)),
    "a config that links to /dev/zero": (lambda c: c.link("base/config.json", "/dev/zero"), ("leads out",)),
    # what is no file
    "a pipe as config": (lambda c: c.pipe("base/config.json"), ("a pipe",)),
    "a pipe as weights": (lambda c: c.pipe("base/model.safetensors"), ("no safetensors weights",)),
    "a pipe as the adapter's config": (lambda c: c.pipe("adapter/adapter_config.json"), ("adapter_config.json",)),
    "a pipe as the adapter's weights": (lambda c: c.pipe("adapter/adapter_model.safetensors"), ("weights are missing",)),
    "a folder as config": (lambda c: ((c.base / "config.json").unlink(), (c.base / "config.json").mkdir()), ("config.json cannot be read",)),
    # headers
    "a header of 2^60 bytes": (lambda c: c.header("base/model.safetensors", b"{}", 2**60), ("header larger",)),
    "a header length with all bits": (lambda c: c.header("base/model.safetensors", b"{}", 2**64 - 1), ("header larger",)),
    "a header one byte over the cap": (lambda c: c.header("adapter/adapter_model.safetensors", b"{}", 100_000_001), ("header larger",)),
    "a header longer than the file": (lambda c: c.header("adapter/adapter_model.safetensors", b"{}", 3000), ("ends inside its header",)),
    "a header nested 100,000 deep": (lambda c: c.header("base/model.safetensors", b'{"a":' + b"[" * 100_000), ("JSON",)),
    "a key twice in a header": (lambda c: c.header("base/model.safetensors", b'{"w":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"w":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}', None, b"ab"), ("appears twice",)),
    "two tensors on the same bytes": (lambda c: c.header("base/model.safetensors", b'{"v":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"w":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', None, b"a"), ("overlaps",)),
    "a shape whose product overflows": (lambda c: c.header("base/model.safetensors", b'{"w":{"dtype":"F32","shape":[4294967296,4294967296,4294967296],"data_offsets":[0,4]}}', None, b"abcd"), ("byte count disagree",)),
    "100,000 tensors": (many_tensors, ("adapter",)),
    "a number of 5000 digits": (lambda c: c.header("base/model.safetensors", b'{"w":{"dtype":"U8","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,1]}}', None, b"a"), ("JSON",)),
    # JSON
    "a config nested 100,000 deep": (lambda c: c.text("base/config.json", '{"a":' + deep("[]", 100_000) + "}"), ("nested too deeply",)),
    "a key twice in a config": (lambda c: c.text("adapter/adapter_config.json", '{"peft_type":"LORA","r":2,"lora_alpha":4,"r":1}'), ("'r' appears twice",)),
    "NaN as alpha": (lambda c: c.change("adapter/adapter_config.json", lora_alpha=float("nan")), ("alpha is malformed",)),
    "infinity as alpha": (lambda c: c.change("adapter/adapter_config.json", lora_alpha=float("inf")), ("alpha is malformed",)),
    "an alpha of 10^400": (lambda c: c.text("adapter/adapter_config.json", '{"peft_type":"LORA","r":2,"lora_alpha":1' + "0" * 400 + "}"), ("alpha is malformed",)),
    "a rank of true": (lambda c: c.change("adapter/adapter_config.json", r=True), ("rank is malformed",)),
    "a pattern that is no regex": (lambda c: c.change("adapter/adapter_config.json", rank_pattern={"(" * 200: 2}), ("no regular expression",)),
    "a config in another encoding": (lambda c: c.text("base/config.json", '{"a": "é"}'.encode("utf-16")), ("JSON",)),
    "a config of 101 MB": (lambda c: os.truncate(c.base / "config.json", 101_000_000), ("too large",)),
    "a tokenizer's config with a key twice": (lambda c: (c.text("base/tokenizer.json", "{}"), c.text("base/tokenizer_config.json", '{"auto_map": 1, "auto_map": {"AutoTokenizer": ["x.Y", null]}}')), ("appears twice",)),
    # words that a terminal would act on
    "escapes in a tensor's name": (lambda c: save_file({f"{ESCAPES}.weight": torch.ones(2)}, c.base / "model.safetensors"), ("no usable name",)),
    "a line end in a tensor's name": (lambda c: save_file({"a\nerror: no\n.weight": torch.ones(2)}, c.base / "model.safetensors"), ("no usable name",)),
    "escapes in an adapter's tensor": (lambda c: save_file(c.factors | {f"base_model.model.{ESCAPES}": torch.ones(2)}, c.adapter / "adapter_model.safetensors"), ("no usable name",)),
    "markup in an adapter's tensor": (lambda c: save_file(c.factors | {f"base_model.model.{HTML}.lora_A.weight": torch.ones(2, 2)}, c.adapter / "adapter_model.safetensors"), ("script",)),
    "escapes as a type": (lambda c: c.change("adapter/adapter_config.json", peft_type=f"LORA{ESCAPES}"), ("of a type that",)),
    "escapes as a setting": (lambda c: c.change("adapter/adapter_config.json", **{f"new{ESCAPES}": 1}), ("does not know",)),
    "escapes as an initialisation": (lambda c: c.change("adapter/adapter_config.json", init_lora_weights=f"pissa{ESCAPES}"), ("initialisation",)),
    "escapes in an index": (lambda c: one_shard(c, f"{ESCAPES}.safetensors"), ("not a plain file name",)),
    "escapes as a module to save": (lambda c: c.change("adapter/adapter_config.json", modules_to_save=[f"{ESCAPES}\nerror: x"]), ("error",)),
    "a half of a surrogate pair": (lambda c: c.text("base/config.json", '{"quantization_config": {"quant_method": "\\ud800"}}'), ("quantized in a way",)),
    # patterns
    "a pattern that would be matched for ever": (lambda c: c.change("adapter/adapter_config.json", alpha_pattern={r"(\w+\.?)+!": 8}), ("for ever",)),
    "a choice of modules that PEFT would match for ever": (lambda c: c.change("adapter/adapter_config.json", target_modules=r"(.*\.)*(a|a?)+!"), ("for ever",)),
    "as many copies of all layers": (lambda c: c.change("adapter/adapter_config.json", layer_replication=[[0, 9000]] * 9000), ("layer_replication",)),
    # pickles
    "a pickle, unasked": (lambda c: c.pickled({"x": torch.ones(2)}), ("--allow-pickle",)),
}


@pytest.fixture
def case(tmp_path, cli):
    return Case(tmp_path, cli)


def test_the_untouched_case_merges(case):
    """Refusals below that have another reason than the one that they test."""
    answer = case.merge()
    case.ended(answer, 0)
    assert (case.place / "out" / "manifest.json").is_file()


@pytest.mark.parametrize("name", MERGES)
def test_refused(case, name):
    """What the name says: followed, allocated, waited for, shown raw, or ended by a traceback."""
    harm, words = MERGES[name]
    harm(case)
    before, began = digests(*(folder for folder in (case.base, case.adapter) if name != "a config of 101 MB")), time.monotonic()
    case.ended(case.merge(), 4, *words, "written:    nothing")
    assert time.monotonic() - began < WAIT_S and list(case.place.iterdir()) == []
    assert digests(*(folder for folder in (case.base, case.adapter) if name != "a config of 101 MB")) == before, "an input was written to"


PICKLES: dict[str, Callable[[Case], None]] = {
    "that runs code": lambda c: c.pickled({"x": Trap(c.marker)}),
    "of the old kind that runs code": lambda c: c.pickled(pickle.dumps({"x": Trap(c.marker)}, protocol=2)),
    "that asks for 40 TB": lambda c: c.pickled({"x": torch.zeros(1).expand(10**6, 10**7)}),
    "nested 100,000 deep": lambda c: c.pickled(b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b"."),
    "of a million nothings": endless,
    "that is cut": lambda c: (c.pickled(c.factors), os.truncate(c.adapter / "adapter_model.bin", 300)),
    "of text": lambda c: c.pickled(b"hello"),
    "of nothing": lambda c: c.pickled(b""),
    "of a list": lambda c: c.pickled([torch.ones(2)]),
    "of a model": lambda c: c.pickled(torch.nn.Linear(2, 2)),
    "of sparse tensors": lambda c: c.pickled({"x": torch.eye(3).to_sparse()}),
    "that is a pipe": lambda c: ((c.adapter / "adapter_model.safetensors").unlink(), c.pipe("adapter/adapter_model.bin")),
    "that links out": lambda c: (c.pickled(c.factors), (c.adapter / "adapter_model.bin").rename(c.root / "victim/x.bin"), c.link("adapter/adapter_model.bin", "../victim/x.bin")),
}


SLOW = ("of text", "of nothing", "of a list", "of sparse tensors", "of the old kind that runs code")
"""each starts a process that imports torch"""


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in PICKLES])
def test_a_pickle_that_was_asked_for(case, name):
    """--allow-pickle as a way to run code, to fill memory, or to hang; a fall-back to a weaker loader."""
    PICKLES[name](case)
    case.ended(case.merge("--allow-pickle"), 4, "written:    nothing")
    assert list(case.place.iterdir()) == []


RECIPES: dict[str, tuple[str | bytes, str]] = {
    "a billion laughs": (laughs() + "base: b\n", "stands for more than"),
    "an alias in itself": ("base: &a [*a]\n", "contains itself"),
    "an alias far inside itself": ("base: &a {x: [{y: *a}]}\n", "contains itself"),
    "a Python object": ("base: !!python/object/apply:os.system ['touch MARKER']\n", "could not determine a constructor"),
    "a Python name": ("base: !!python/name:os.system\n", "could not determine a constructor"),
    "lm-eval's function": ("base: !function os.system\n", "could not determine a constructor"),
    "100,000 brackets": ("base: " + deep("[]", 100_000), "nested too deeply"),
    "ten megabytes": (b"base: " + b"x" * 10_000_000, "too large"),
    "a key twice": ("base: a\nbits: 4\nbits: 8\n", "'bits' appears twice"),
    "a key twice, once with a hyphen": ("group-size: 64\ngroup_size: 128\n", "set twice"),
    "the 99th month": ("base: 2001-99-99\n", "month"),
    "a number of 5000 digits": ("bits: " + "9" * 5000 + "\n", "not YAML"),
    "a list as a key": ("? [a, b]\n: 1\n", "unhashable"),
    "another encoding": ("base: é".encode("utf-16"), "not YAML"),
    "a NUL": (b"base: a\0b", "not YAML"),
    "escapes as a key": (f'"{ESCAPES.encode("unicode_escape").decode()}": 1\n'.replace("\\u", "\\u"), "unknown setting"),
    "a huge unknown value": ("bits: [" + "1," * 90_000 + "1]\n", "bits: expected a whole number"),
    "no mapping": ("[1, 2]\n", "expected a mapping"),
    "a seed of 2^70": (f"seed: {2**70}\n", "--seed"),
    "a seed below 0": ("seed: -1\n", "--seed"),
    "samples without end": (f"samples: {10**40}\n", "--samples"),
    "a share that is no number": ("generic_share: .nan\n", "--generic-share"),
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe(case, name):
    """Code, memory, a hang or a traceback from a file of settings; the wrong one of two values."""
    content, word = RECIPES[name]
    case.text("recipe.yaml", content.replace("MARKER", str(case.marker)) if isinstance(content, str) else content)
    began = time.monotonic()
    case.ended(case.cli("merge", "--recipe", case.root / "recipe.yaml", "--base", case.base, "--adapter", case.adapter, "--out", case.place / "out"), 2, word)
    assert time.monotonic() - began < WAIT_S and list(case.place.iterdir()) == []


def test_all_faults_of_a_recipe_in_one_message(case):
    """A person who mends one fault after the other, one run each."""
    case.text("recipe.yaml", "bitz: 4\nformat: gpt\nseed: -1\nsamples: 1\nbits: four\n")
    answer = case.cli("merge", "--recipe", case.root / "recipe.yaml")
    case.ended(answer, 2, "'bitz'", "--format gpt", "--seed -1", "--samples 1", "bits: expected a whole number", "--base is missing", "--adapter is missing", "--out is missing", "8 things are wrong")


@pytest.mark.parametrize("content, word", [
    (laughs(), "stands for more than"), ("kl_mean: &a {max: *a}\n", "contains itself"), ("kl_mean: !!python/name:os.system\n", "constructor"), ("kl_mean: {max: .nan}\n", "not a number"),
    ("kl_mean: {max: 1}\nkl_mean: {max: 9}\n", "appears twice"), ("kl_maen: {max: 1}\ntop1_agreement: {max: 1}\n", "top1_agreement wants"), (b"\xff\xfe", "UTF-8"),
])  # fmt: skip
def test_a_budget(case, content, word):
    """A bomb in a budget, or a limit that a second line replaces unseen."""
    case.text("budget.yaml", content)
    case.json("results.json", {"schema_version": 1})
    case.ended(case.cli("compare", case.root / "results.json", "--budget", case.root / "budget.yaml"), 2, word)


def test_pipes_in_the_place_of_settings(case):
    """A budget, a recipe, results, calibration or a training file that is read for ever."""
    for name in ("pipe.yaml", "pipe.json", "pipe.jsonl", "adapter/training_args.yaml"):
        case.pipe(name)
    case.json("results.json", {"schema_version": 1})
    case.ended(case.cli("compare", case.root / "results.json", "--budget", case.root / "pipe.yaml"), 2, "a pipe")
    case.ended(case.cli("compare", case.root / "pipe.json"), 2, "no such results file")
    case.ended(case.merge("--recipe", case.root / "pipe.yaml"), 2, "no such file")
    case.ended(case.merge("--nf4-recipe", case.root / "pipe.yaml"), 2, "a pipe")
    case.ended(case.cli("merge", "--base", case.base, "--adapter", case.adapter, "--out", case.place / "out", "--calibration", case.root / "pipe.jsonl"), 4)
    case.ended(case.merge(), 0)  # the folder's training_args.yaml is no file, so it says nothing


def test_code_in_configs_is_neither_run_nor_passed_on(case):
    """remote code: run on opening; or handed on in the output, to run on its users' machines."""
    code = f"from pathlib import Path\nPath({str(case.marker)!r}).touch()\nclass Evil: pass\n"
    for folder in ("base", "adapter"):
        for name in ("modeling_evil.py", "tokenization_evil.py", "__init__.py", "tokenizer.py", "conftest.py"):
            case.text(f"{folder}/{name}", code)
    names = {"auto_map": {kind: "modeling_evil.Evil" for kind in ("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer")}, "trust_remote_code": True}
    case.change("base/config.json", **names, transformers_weights="pytorch_model.bin", _attn_implementation_internal="evil/kernel", attn_implementation="evil/kernel", text_config=names | {"hidden_size": 8}, custom_pipelines={"x": "y"})
    case.text("base/tokenizer.json", "{}")
    case.json("base/tokenizer_config.json", names | {"model_max_length": 8})
    case.json("base/generation_config.json", {"custom_generate": "evil/repo", "eos_token_id": 1})
    case.ended(case.merge(), 0)
    out = case.place / "out"
    for name in ("config.json", "tokenizer_config.json", "generation_config.json"):
        assert not any(word in (out / name).read_text() for word in ("evil", "auto_map", "trust_remote", "transformers_weights")), name
    assert json.loads((out / "config.json").read_text())["text_config"] == {"hidden_size": 8} and json.loads((out / "tokenizer_config.json").read_text()) == {"model_max_length": 8}
    assert not list(out.glob("*.py"))


def test_templates_are_copied_as_text(case):
    """A template that is rendered, or rewritten, on its way."""
    code = f"{{{{ cycler.__init__.__globals__.os.popen('touch {case.marker}').read() }}}}"
    template = (code + "\r\n{% for i in range(10**9) %}x{% endfor %}\t\x00\xff").encode("latin-1")
    case.text("base/tokenizer.json", "{}")
    case.text("base/chat_template.jinja", template)
    case.ended(case.merge(), 0)
    assert (case.place / "out" / "chat_template.jinja").read_bytes() == template


class Spoken:
    """As much of a tokenizer as chats need, its template rendered by transformers' own sandbox."""

    def __init__(self, template: str) -> None:
        self.chat_template = template

    def apply_chat_template(self, messages: Any, tokenize: bool) -> str:
        from transformers.utils.chat_template_utils import render_jinja_template

        return render_jinja_template([messages], chat_template=self.chat_template)[0][0]


TEMPLATES = {
    "two loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "a number of 40 million digits": "{{ (9 ** (9 ** 8)) % 10 }}",
    "a text of 100 GB": "{{ 'a' * 10 ** 11 }}",
    "a text that doubles": "{% set x = namespace(t='a' * 1000) %}{% for a in range(60) %}{% set x.t = x.t ~ x.t %}{% endfor %}{{ x.t }}",
    "code": "{{ cycler.__init__.__globals__.os.popen('touch MARKER').read() }}",
    "code by another way": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "an exception": "{{ raise_exception('\x1b[2Jowned') }}",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_chat_template(case, name, monkeypatch):
    """A template, which is a program, that hangs the command, takes its memory or leaves jinja's sandbox."""
    from qmerge.errors import Refused
    from qmerge.store import templates, texts

    monkeypatch.setattr(templates, "LIMIT_S", 2.0)
    case.text("chats.jsonl", '{"messages": [{"role": "user", "content": "hello"}]}\n' * 3)
    began = time.monotonic()
    with pytest.raises(Refused, match="cannot write this row") as caught:
        texts.read_documents(case.root / "chats.jsonl", tokenizer=Spoken(TEMPLATES[name].replace("MARKER", str(case.marker))))
    assert time.monotonic() - began < WAIT_S and not case.marker.exists() and "line 1" in str(caught.value) and "\x1b" not in str(caught.value)


def test_chats_are_written_as_the_template_says(case):
    """Chats that come out of the child in another order, or under another one's text; a child that is left behind."""
    import multiprocessing

    from qmerge.store import texts

    case.text("chats.jsonl", "".join(json.dumps({"messages": [{"role": "user", "content": f"number {n} é\u2028"}]}) + "\n" for n in range(50)))
    found = texts.read_documents(case.root / "chats.jsonl", tokenizer=Spoken("{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"))
    assert [document.text for document in found] == [f"<user>number {n} é\u2028" for n in range(50)] and not multiprocessing.active_children()


def test_names_that_reach_a_warning_are_inert(case):
    """A base's name out of the adapter's config, printed and kept in the manifest."""
    case.change("adapter/adapter_config.json", base_model_name_or_path=f"/home/someone/models/{HTML}{ESCAPES}\nerror: all is lost")
    answer = case.merge()
    case.ended(answer, 0, "says it was trained on")
    assert "\nerror: all" not in answer.err
    manifest = (case.place / "out" / "manifest.json").read_text()
    assert "/home/someone" not in manifest and not any(char in manifest for char in "\x1b\u202e\u2066\u200b\x9b")


@pytest.mark.parametrize("name", ["training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "optimizer.bin", "scaler.pt", "pytorch_model.bin", "trainer_state.json"])
def test_training_leftovers_are_never_opened(case, name, opened):
    """CVE-2026-1839 and its like: a Trainer's side file that is unpickled on the way."""
    for folder in (case.base, case.adapter):
        torch.save({"x": Trap(case.marker)}, folder / name)
    with opened() as names:
        case.ended(case.merge(), 0)
        case.cli("inspect", case.adapter), case.cli("inspect", case.base), case.cli("verify", case.place / "out", "--base", case.base, "--adapter", case.adapter)
    assert "model.safetensors" in names and name not in names
    assert name not in os.listdir(case.place / "out")


@pytest.fixture(scope="session")
def opened():
    """Base names of the files that this process opens inside the block, by Python's own audit events (a hook cannot be taken away again, so it is told when to listen)."""
    import contextlib
    import sys

    listening: list[set[str]] = []

    def hook(event: str, arguments: tuple) -> None:
        if listening and event == "open" and isinstance(arguments[0], (str, bytes, os.PathLike)):
            listening[-1].add(os.path.basename(os.fsdecode(arguments[0])))

    sys.addaudithook(hook)

    @contextlib.contextmanager
    def listen():
        listening.append(set())
        try:
            yield listening[-1]
        finally:
            listening.pop()

    return listen


def test_links_of_a_hub_snapshot_are_read_and_not_written_through(case):
    """A snapshot's links to its blobs refused as strangers' links; or a blob that changes under its digest's name."""
    repository = case.root / "hub" / "models--org--tiny"
    snapshot = repository / "snapshots" / ("0123456789" * 4)
    snapshot.mkdir(parents=True), (repository / "blobs").mkdir()
    for number, path in enumerate(sorted(case.base.iterdir())):
        blob = repository / "blobs" / f"{number:064d}"
        shutil.copy(path, blob)
        (snapshot / path.name).symlink_to(os.path.relpath(blob, snapshot))
    before = digests(repository / "blobs")
    case.base = snapshot
    case.ended(case.merge(), 0)
    assert digests(repository / "blobs") == before and not any(path.is_symlink() for path in (case.place / "out").iterdir())
    assert load_file(case.place / "out" / "model.safetensors")


def test_a_snapshot_does_not_reach_another_repository(case):
    """A downloaded snapshot whose link leads into the blobs of a private model in the same cache."""
    private, public = (case.root / "hub" / f"models--org--{name}" for name in ("private", "public"))
    snapshot = public / "snapshots" / ("0123456789" * 4)
    snapshot.mkdir(parents=True), (private / "blobs").mkdir(parents=True)
    shutil.copy(case.base / "config.json", snapshot)
    shutil.copy(case.base / "model.safetensors", private / "blobs" / "secret")
    (snapshot / "model.safetensors").symlink_to(os.path.relpath(private / "blobs" / "secret", snapshot))
    case.base = snapshot
    case.ended(case.merge(), 4, "leads out")
