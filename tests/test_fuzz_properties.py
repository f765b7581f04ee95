"""Do readers give back what writers wrote, and is what a reader accepts accepted again once it is written? Hypothesis looks for what breaks it, and shrinks what it finds."""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from random import Random
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from fuzz import bending
from fuzz.places import folder
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from qmerge.adapters.adapter import open_adapter
from qmerge.errors import QmergeError
from qmerge.formats import BLOCK_SIZES
from qmerge.formats.nf4_recipe import Nf4Recipe
from qmerge.formats.training import DTYPES, recipe_from_file
from qmerge.pipeline.recipe import Recipe, build_recipe
from qmerge.quality.compare import DIRECTIONS, load_budget
from qmerge.quality.measure import TokenScores
from qmerge.quality.sidecar import OWN, SHARED, read_scores, write_results
from qmerge.report.load import load_results
from qmerge.report.write import write_json
from qmerge.store.checkpoint import open_checkpoint
from qmerge.store.headers import TORCH_DTYPES, read_header
from qmerge.store.manifest import MANIFEST, build_manifest, read_manifest, verify_files
from qmerge.store.texts import read_documents
from qmerge.store.writer import ShardWriter

EXAMPLES = 60
QUICK = ("header", "index", "recipe", "budget", "training", "results", "sidecar", "manifest")
"""readers that answer in about a millisecond; the others get their inputs from test_fuzz_readers.py"""
examples = settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None)
words = st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1, max_size=12)
shapes = st.lists(st.integers(0, 3), max_size=3)
random_sources = st.randoms(use_true_random=False)


@pytest.fixture(scope="module")
def place() -> Path:
    return folder("properties")


@st.composite
def tensors(draw: Callable[..., Any]) -> dict[str, torch.Tensor]:
    """Some tensors of any dtype that a file can hold, with any bytes in them."""
    found = {}
    for name in draw(st.lists(words.filter(lambda name: name != "__metadata__"), min_size=1, max_size=5, unique=True)):
        dtype, shape = draw(st.sampled_from(sorted(TORCH_DTYPES.values(), key=str))), draw(shapes)
        size = math.prod(shape) * dtype.itemsize
        raw = draw(st.binary(min_size=size, max_size=size))
        raw = bytes(byte & 1 for byte in raw) if dtype == torch.bool else raw
        found[name] = torch.frombuffer(bytearray(raw), dtype=dtype).reshape(shape) if size else torch.empty(shape, dtype=dtype)
    return found


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Equal in dtype, shape and bytes; NaN may be anywhere."""
    raw = [tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other)]
    return one.dtype == other.dtype and one.shape == other.shape and raw[0].equal(raw[1])


@examples
@given(found=tensors(), metadata=st.dictionaries(words, st.text(st.characters(exclude_categories=["Cs"]), max_size=20), max_size=3))
def test_a_written_file_is_read_back_by_us_and_by_safetensors(place: Path, found: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Catches a header that our own reader or the reference reader takes for another, and bytes that move."""
    home = place / "file"
    home.mkdir(exist_ok=True)
    writer = ShardWriter(home, metadata=metadata)
    for name, tensor in found.items():
        writer.add(name, tensor)
    writer.finish()
    specs, said = read_header(home / "model.safetensors")
    theirs = load_file(home / "model.safetensors")
    assert said == metadata and set(specs) == set(found) == set(theirs)
    assert all(specs[name].shape == tuple(tensor.shape) and TORCH_DTYPES[specs[name].dtype] == tensor.dtype and same(tensor, theirs[name]) for name, tensor in found.items())


@examples
@given(found=tensors(), most=st.integers(1, 64))
def test_written_shards_are_read_back_through_their_index(place: Path, found: dict[str, torch.Tensor], most: int) -> None:
    """Catches an index that disagrees with its headers, and a tensor that is lost between two shards."""
    home = folder("shards")
    (home / "config.json").write_text("{}")
    writer = ShardWriter(home, most)
    for name, tensor in found.items():
        writer.add(name, tensor)
    where = writer.finish()
    opened = open_checkpoint(home)
    assert {name: spec.file for name, spec in opened.specs.items()} == where
    assert all(same(opened.load(name), tensor) for name, tensor in found.items())


@pytest.mark.parametrize("reader", QUICK)
def test_bent_inputs_keep_the_contract(reader: str) -> None:
    """Catches what the harness of the reader looks for; Hypothesis makes the input small that shows it."""
    module: ModuleType = importlib.import_module(f"fuzz.{reader}")
    seeds = module.seeds()

    @examples
    @given(data=st.sampled_from((*seeds.accepted, *seeds.refused)), random=random_sources, times=st.integers(1, 3))
    def bent(data: bytes, random: Random, times: int) -> None:
        for _ in range(times):
            data = module.mutate(data, random)[: module.MAX_LEN]
        module.check(data)

    bent()


@settings(examples, max_examples=25)
@given(
    r=st.integers(1, 6), alpha=st.one_of(st.integers(0, 64), st.floats(-8, 8)), rslora=st.booleans(), own_rank=st.integers(1, 6), own_alpha=st.integers(1, 9),
    patterns=st.lists(st.sampled_from(["one", "two", "a.one", "^a.one", "b.two", r".*\.two", "three", "a"]), max_size=3, unique=True), where=st.sampled_from(["rank_pattern", "alpha_pattern", "both"]),
)  # fmt: skip
def test_an_adapter_config_means_what_it_means_to_peft(place: Path, r: int, alpha: float, rslora: bool, own_rank: int, own_alpha: int, patterns: list[str], where: str) -> None:
    """Catches a rank or scaling that PEFT computes otherwise: patterns, rsLoRA, an alpha of 0."""
    import warnings

    from peft import LoraConfig, get_peft_model

    class Part(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = torch.nn.Linear(3, 4), torch.nn.Linear(4, 2)

    model = torch.nn.ModuleDict({"a": Part(), "b": Part()})
    ranks = dict.fromkeys(patterns, own_rank) if where != "alpha_pattern" else {}
    alphas = dict.fromkeys(patterns, own_alpha) if where != "rank_pattern" else {}
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of patterns that match nothing
        wrapped = get_peft_model(model, LoraConfig(r=r, lora_alpha=alpha, use_rslora=rslora, rank_pattern=ranks, alpha_pattern=alphas, target_modules=["one", "two"]))
        wrapped.save_pretrained(place / "adapter")
    ours = open_adapter(place / "adapter").pairs
    theirs = {name: module for name, module in wrapped.base_model.model.named_modules() if hasattr(module, "lora_A")}
    assert set(ours) == set(theirs) and len(theirs) == 4
    for name, module in theirs.items():
        assert (ours[name].rank, ours[name].scaling) == (module.r["default"], pytest.approx(module.scaling["default"], rel=1e-12)), name


@st.composite
def recipes(draw: Callable[..., Any]) -> Recipe:
    """Recipes of one format, with settings that it takes (and some that it may not: those are refused)."""
    kinds: dict[str, st.SearchStrategy[Any]] = {
        "format": st.sampled_from(["gptq", "nf4", "fp4", "bf16", "fp16", "awq", "compressed-tensors"]), "bits": st.sampled_from([2, 3, 4, 8]), "group_size": st.sampled_from([32, 64, 128]),
        "symmetric": st.booleans(), "block_size": st.sampled_from([None, 64, 256]), "double_quant": st.sampled_from([None, True, False]), "bits_per_weight": st.none() | st.floats(4, 16), "samples": st.integers(2, 2**31),
        "tokens": st.integers(2, 2**31), "generic_share": st.floats(0, 0.99), "seed": st.integers(0, 2**63 - 1), "polish": st.sampled_from([(), ("blocks",), ("blocks", "distill")]), "rtn": st.booleans(),
        "combine": st.sampled_from(["sum", "ties", "svd"]), "density": st.none() | st.floats(0.1, 1), "residual_base": st.booleans(), "pad": st.booleans(), "shard_size": st.sampled_from(["5GB", "1 GB", "100MB"]),
    }  # fmt: skip
    chosen = {key: draw(kinds[key]) for key in draw(st.lists(st.sampled_from(sorted(kinds)), max_size=4, unique=True))}
    adapters = tuple(f"{name}={draw(st.floats(-2, 2))}" if draw(st.booleans()) else name for name in draw(st.lists(st.sampled_from(["a", "b", "c"]), min_size=1, max_size=3, unique=True)))
    return dataclasses.replace(Recipe(base="b", out="o", adapter=adapters), **chosen)


@examples
@given(recipe=recipes(), dashes=st.booleans(), block=st.booleans())
def test_a_recipe_that_is_read_is_the_one_that_was_written(place: Path, recipe: Recipe, dashes: bool, block: bool) -> None:
    """Catches a setting that YAML, dashes or flags change on their way, and a recipe in a manifest that is another one when it is used again."""
    rows = {key.replace("_", "-") if dashes else key: list(value) if isinstance(value, tuple) else value for key, value in dataclasses.asdict(recipe).items()}
    (place / "recipe.yaml").write_text(yaml.safe_dump(rows) if block else json.dumps(rows))
    try:
        read = build_recipe(str(place / "recipe.yaml"), (), {})
    except QmergeError:
        assume(False)
    assert read == recipe
    told = json.loads(json.dumps(read.to_json()))
    (place / "again.json").write_text(json.dumps({key: value for key, value in told.items() if key != "weights"} | {"base": "x", "adapter": list(recipe.adapter), "out": "y"}))
    assert build_recipe(str(place / "again.json"), (), {}).to_json() == read.to_json()


@examples
@given(which=st.sampled_from([0, 1]), random=random_sources, times=st.integers(0, 2))
def test_results_that_are_accepted_are_accepted_again(place: Path, which: int, random: Random, times: int) -> None:
    """Catches what can be read but not written: `bench --into` and `compare --save-baseline` would end in a traceback after the work."""
    harness = importlib.import_module("fuzz.results")
    data = harness.seeds().accepted[which]
    for _ in range(times):
        data = harness.mutate(data, random)
    (place / "results.json").write_bytes(data)
    try:
        results = load_results(place / "results.json")
    except QmergeError:
        assume(False)
    write_json(results, place / "again.json")
    assert load_results(place / "again.json") == results


@pytest.mark.parametrize("text", ["1e999", "-1e999", '"\\ud800"', '{"\\uDFFF":1}'])
def test_what_could_not_be_written_again_is_refused(text: str, place: Path) -> None:
    """Catches an infinity that is spelled as a number, and half a character: both were read, and broke what wrote them."""
    (place / "results.json").write_text(f'{{"schema_version":1,"arms":{text}}}')
    with pytest.raises(QmergeError, match="not JSON"):
        load_results(place / "results.json")


@examples
@given(limits=st.dictionaries(st.sampled_from(sorted(DIRECTIONS)), st.one_of(st.floats(-1e299, 1e299), st.integers(-(10**6), 10**6))), block=st.booleans())
def test_a_budget_is_read_as_it_was_written(place: Path, limits: dict[str, float], block: bool) -> None:
    """Catches a limit that YAML 1.1 reads as text (1e-05, which has no dot), or as another number."""
    content = {name: {DIRECTIONS[name]: value} for name, value in limits.items()}
    (place / "budget.yaml").write_text(yaml.safe_dump(content) if block else json.dumps(content))
    try:
        read = load_budget(place / "budget.yaml")
    except QmergeError as error:
        assert not limits, error
        return
    assert read["limits"] == content


@examples
@given(block=st.sampled_from(BLOCK_SIZES["nf4"]), double=st.booleans(), dtype=st.sampled_from(DTYPES), skip=st.lists(words, max_size=3), kind=st.sampled_from(["nf4", "fp4"]))
def test_a_training_recipe_is_a_fixed_point(place: Path, block: int, double: bool, dtype: str | None, skip: list[str], kind: str) -> None:
    """Catches a recipe that a manifest tells and --nf4-recipe reads otherwise; and a letter that JSON spells as two and YAML reads as two halves."""
    recipe = Nf4Recipe(block, double, dtype, tuple(skip), kind)
    (place / "nf4.json").write_text(json.dumps({key: value for key, value in recipe.to_json().items() if key != "skip" or value}))  # an empty list is refused: transformers would quantize the head
    try:
        read = recipe_from_file(place / "nf4.json")
    except QmergeError as error:
        assert skip, error  # a pattern that is none, or matches for ever
        return
    assert read == recipe


@examples
@given(files=st.dictionaries(words.filter(lambda name: not set(name) & set("/\\:") and name not in (".", "..", MANIFEST) and len(name.encode()) < 200), st.binary(max_size=50), max_size=4), broken=st.booleans())
def test_a_folder_verifies_against_its_own_manifest(files: dict[str, bytes], broken: bool) -> None:
    """Catches a name or a size that is written and then not recognised; and a change that is not seen."""
    home = folder("verified")
    for name, data in files.items():
        (home / name).write_bytes(data)
    manifest = build_manifest(home, inputs={}, recipe={}, versions={})
    (home / MANIFEST).write_text(json.dumps(manifest))
    assert read_manifest(home) == manifest and verify_files(home) == []
    if broken and files:
        name = sorted(files)[0]
        (home / name).write_bytes(files[name] + b"x")
        assert verify_files(home) != []


@examples
@given(names=st.lists(words.filter(lambda name: "/" not in name), min_size=1, max_size=2, unique=True), count=st.integers(0, 5), numbers=st.floats(width=32), cut=st.integers(0, 2**31))
def test_scores_come_back_from_their_archive(place: Path, names: list[str], count: int, numbers: float, cut: int) -> None:
    """Catches an array that a name, NaN or no tokens at all lose."""
    kinds = {"agree": np.bool_, "window": np.int32, "doc": np.int32}
    row = TokenScores(**{key: np.full(count, numbers if key not in kinds else 1).astype(kinds.get(key, np.float32)) for key in (*OWN, *SHARED)}, vocabulary_cut=cut)
    scores = {text: {"nf4": row} for text in names}
    write_results({"schema_version": 1}, scores, place / "scored.json")
    read = read_scores(place / "scored.npz")
    assert set(read) == set(names)
    for arms in read.values():
        assert arms["nf4"].vocabulary_cut == cut
        assert all(np.array_equal(getattr(arms["nf4"], key), getattr(row, key), equal_nan=key not in kinds) for key in (*OWN, *SHARED))


@examples
@given(texts=st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=30), min_size=1, max_size=4), suffix=st.sampled_from(["jsonl", "json"]), plain=st.booleans())
def test_rows_are_the_documents(place: Path, texts: list[str], suffix: str, plain: bool) -> None:
    """Catches a row that is split at a line separator of Unicode, and text that changes."""
    rows = [{"text": text} for text in texts]
    file = place / f"rows.{suffix}"
    file.write_text("\n".join(json.dumps(row, ensure_ascii=plain) for row in rows) if suffix == "jsonl" else json.dumps(rows, ensure_ascii=plain), encoding="utf-8", newline="")
    wanted = [text for text in texts if text]
    try:
        read = [document.text for document in read_documents(file)]
    except QmergeError as error:
        assert not wanted, error
        return
    assert read == wanted


@examples
@given(data=st.recursive(st.none() | st.booleans() | st.text(max_size=5) | st.integers(-9, 9), lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3), max_leaves=8), random=random_sources)
def test_bending_keeps_the_syntax(data: Any, random: Random) -> None:
    """Catches a mutator that makes nothing but noise: a document that is spelled again is the same, and bending one gives text."""
    assert json.loads(bending.spell(bending.tree(data))) == data
    assert isinstance(bending.bend_text(json.dumps(data), random, ("a",)), str)
