"""Is a merge's time held against the operations that it cannot do without, and nothing else?"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from test_estimate import sizes, words

from qmerge.pipeline import timing
from qmerge.pipeline.estimate import estimate
from qmerge.pipeline.floor import floor_seconds, operations
from qmerge.pipeline.plan import plan
from qmerge.pipeline.recipe import build_recipe
from qmerge.pipeline.skeleton import build_skeleton
from qmerge.pipeline.timing import Rates
from qmerge.ranks import Ranks
from qmerge.store.checkpoint import open_checkpoint

RATES = Rates(1e11, 1e9)


def counted(base: str, tokens: int, gradients: int, quick: bool) -> float:
    """Operations of a Llama, linear by linear and by their names."""
    skeleton = build_skeleton(open_checkpoint(base))
    shapes = {name: tuple(module.weight.shape) for name, module in skeleton.blocks[0].named_modules() if isinstance(module, torch.nn.Linear)}
    writers = {name for name in shapes if name.endswith(("o_proj", "down_proj"))}
    inputs = {name if name in writers else name.rpartition(".")[0]: width for name, (_, width) in shapes.items()}
    weights = sum(parameter.numel() for parameter in skeleton.blocks[0].parameters())
    work = tokens * (2 * (1 if quick else 2) * weights + sum((1 if quick else 3) * width**2 for width in inputs.values()))
    work += sum(width**3 for width in inputs.values()) + sum(width**2 * (out + (1 if quick else 10) * min(128, out)) for out, width in shapes.values())
    work += gradients * (6 * weights + sum(out**2 for out, _ in shapes.values()))
    if not quick:
        work += tokens * sum(2 * out * width for name, (out, width) in shapes.items() if name in writers)
    ends = 6 * gradients * skeleton.model.get_input_embeddings().weight.numel()
    return len(skeleton.blocks) * work + ends


def test_a_merge_says_what_its_products_alone_would_take(zoo: Any, cli: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A ratio to something else: other tokens than were passed, another machine's rate, one measured anew."""
    measured, inner = [], Rates.measured
    monkeypatch.setattr(timing.Rates, "measured", lambda *how: measured.append(inner(*how)) or measured[-1])
    answer = cli(*words(zoo, tmp_path / "out", compute="fp32"), "--json")
    assert answer.code == 0, answer.err
    found, (rates,) = json.loads(answer.out), measured
    assert found["floor_s"] == pytest.approx(counted(zoo.nf4("llama"), 8 * 64, 8 * 64, False) / rates.flops, rel=0.01)
    ratio, floor_s = re.search(r"merged in .*, ([\d.]+) times what its matrix products alone take at the rate that this machine showed at the start \(([\d.]+) s\); peak memory", answer.err).groups()
    assert float(floor_s) == pytest.approx(found["floor_s"], rel=0.06) and float(ratio) == pytest.approx(found["elapsed_s"] / found["floor_s"], rel=0.1)


def test_a_run_says_it_too(zoo: Any, cli: Any, tmp_path: Any) -> None:
    """What `merge` says, and `run` keeps to itself."""
    answer = cli("run", *words(zoo, tmp_path / "out")[1:], "--text", zoo.held_out, "--allow-overlap", "--budget", "lenient", "--json")
    assert answer.code in (0, 3), answer.err
    merge = json.loads(answer.out)["merge"]
    assert merge["elapsed_s"] > merge["floor_s"] > 0 and "times what its matrix products alone take" in answer.err


@pytest.mark.parametrize("quick", [False, True])
def test_the_formula_counts_each_linear(zoo: Any, quick: bool) -> None:
    """Products of two linears with one input counted twice, or those of a teacher where there is none."""
    recipe = build_recipe(None, (), {"base": zoo.nf4("llama"), "adapter": (zoo.adapter("llama"),), "out": "out", "calibration": zoo.calibration, "samples": 8, "tokens": 64, "device": "cpu", "quick": quick})
    work = estimate([plan(recipe, False)], base_bytes=0, rates=RATES).work
    assert operations(work).total == pytest.approx(counted(zoo.nf4("llama"), 8 * 64, 8 * 64, quick), rel=1e-6)


@pytest.mark.parametrize("fmt, more", [("bf16", {}), ("gptq", {"rtn": True})])
def test_a_merge_without_calibration_says_none(zoo: Any, cli: Any, tmp_path: Any, fmt: str, more: dict[str, bool]) -> None:
    """A ratio to no operations at all."""
    given = ["merge", "--base", zoo.nf4("llama"), "--adapter", zoo.adapter("llama"), "--out", tmp_path / "out", "--format", fmt, "--device", "cpu", "--json", *(f"--{name}" for name in more)]
    answer = cli(*given)
    assert answer.code == 0, answer.err
    assert json.loads(answer.out)["floor_s"] is None and re.search(r"merged in [^,]*, peak memory", answer.err)


def test_nothing_is_said_where_it_is_no_floor(zoo: Any) -> None:
    """A ratio of a resumed run, which timed a part, to the whole; or to the rate of what did not compute."""
    recipe = build_recipe(None, (), {"base": zoo.nf4("llama"), "adapter": (zoo.adapter("llama"),), "out": "out", "calibration": zoo.calibration, "samples": 8, "tokens": 64, "device": "cpu"})
    found = estimate([plan(recipe, False)], base_bytes=0, rates=RATES)
    assert floor_seconds(found, recipe) == operations(found.work).total / RATES.flops > 0
    assert floor_seconds(found, recipe, resumed=True) is floor_seconds(found, recipe, ranks=Ranks(0, 2)) is None
    assert floor_seconds(found, replace(recipe, polish=("distill",))) is floor_seconds(found, replace(recipe, bits_per_weight=4.5)) is None
    experts = replace(found.work, groups=tuple(replace(group, copies=4) for group in found.work.groups))
    for other in (replace(found, rates=replace(RATES, guessed=True)), replace(found, work=replace(found.work, accelerator=True)), replace(found, work=experts)):
        assert floor_seconds(other, recipe) is None


def test_products_in_bf16_are_held_against_its_rate(zoo: Any) -> None:
    """A floor that a machine beats which is quicker in bf16 than in fp32."""
    recipe = build_recipe(None, (), {"base": zoo.nf4("llama"), "adapter": (zoo.adapter("llama"),), "out": "out", "calibration": zoo.calibration, "samples": 8, "tokens": 64, "device": "cpu"})
    work = estimate([plan(recipe, False)], base_bytes=0, rates=RATES).work
    parts = operations(work)
    assert parts.seconds(replace(RATES, summing=4e11)) == pytest.approx((parts.passing + parts.summing / 4 + parts.solving) / 1e11)
    assert parts.seconds(replace(RATES, summing=4e11, passing=2e11)) == pytest.approx((parts.passing / 2 + parts.summing / 4 + parts.solving) / 1e11)


@given(sizes)
@settings(max_examples=200, deadline=None)
def test_a_floor_lies_below_what_is_expected(work: Any) -> None:
    """Operations that the run does not do."""
    assert 0 < operations(work).total <= timing.operations(work)
