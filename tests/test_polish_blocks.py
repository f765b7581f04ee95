"""Codes of a block moved by one place at most, towards the teacher's output: what may move, that it gains, and that the bytes do not depend on the machine."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from support.polish import Case, solve
from torch import nn

from qmerge.formats import nf4 as nf4_format
from qmerge.numerics import nf4
from qmerge.numerics.grids import storable
from qmerge.numerics.offsets import offsets
from qmerge.numerics.stored_scales import stored_scales
from qmerge.pipeline.blocks import empty_copy, record_calls, run_block
from qmerge.pipeline.requantize import Linear, Solved
from qmerge.pipeline.skeleton import set_weight
from qmerge.pipeline.student import student_model
from qmerge.pipeline.tune_blocks import Passage, Tuned, TuneSettings, tune_block

SETTINGS = TuneSettings(scale_steps=6, code_steps=12, tokens=512, lr=0.04, check_every=3)
CASES = [("llama", "gptq"), ("llama", "nf4"), ("gpt2", "gptq")]
EVERY = pytest.mark.parametrize(("kind", "fmt"), CASES, ids=["-".join(case) for case in CASES])


class Setup(NamedTuple):
    case: Case
    block: nn.Module
    solved: dict[str, Solved]
    linears: dict[str, Linear]
    turned: dict[str, bool]
    passages: list[Passage]


def first_block(case: Case) -> Setup:
    """The first block, its codes rounded to nearest; both streams begin alike there."""
    skeleton = case.plan.skeleton
    with torch.no_grad():
        whole = student_model(case.plan, case.merged, {name: case.merged.weight(name) for name in case.solved}, torch.float32)
        teacher, prefix = whole.get_submodule(f"{skeleton.blocks_name}.0"), f"{skeleton.blocks_name}.0."
        parts = [(ids, False) for ids in case.calibration.train.split(6)] + [(case.calibration.held_out, True)]
        hidden, calls = record_calls(whole, skeleton.blocks_name, [ids for ids, _ in parts])
        passages = [
            Passage(x, run_block(teacher, x, call[0]), call[0], held) for x, call, (_, held) in zip(hidden, calls, parts, strict=True)
        ]
        block, names = empty_copy(teacher), [name for name in case.solved if name.startswith(prefix)]
        turned = {name[len(prefix) : -len(".weight")]: skeleton.linears[name] for name in names}
        for name, (module, flipped) in zip(names, turned.items(), strict=True):
            weight = case.solved[name].weight
            set_weight(block, f"{module}.weight", weight.T.contiguous() if flipped else weight)
        linears = {
            module: Linear(name, case.merged.weight(name), None, case.merged.delta(name))
            for name, module in zip(names, turned, strict=True)
        }
    return Setup(case, block, {module: case.solved[name] for name, module in zip(names, turned, strict=True)}, linears, turned, passages)


def tune(setup: Setup, settings: TuneSettings = SETTINGS) -> Tuned:
    return tune_block(setup.block, setup.solved, setup.linears, setup.turned, setup.passages, setup.case.dtype, settings)


@pytest.fixture(scope="module")
def setup(zoo):
    made: dict[tuple[str, str], Setup] = {}

    def get(kind: str, fmt: str) -> Setup:
        if (kind, fmt) not in made:
            made[kind, fmt] = first_block(solve(zoo.nf4(kind), zoo.adapter(kind, "strong", relative=0.2), zoo.calibration, fmt))
        return made[kind, fmt]

    return get


@pytest.fixture(scope="module")
def tuned(setup):
    made: dict[tuple[str, str], Tuned] = {}

    def get(kind: str, fmt: str) -> Tuned:
        if (kind, fmt) not in made:
            made[kind, fmt] = tune(setup(kind, fmt))
        return made[kind, fmt]

    return get


@EVERY
def test_held_out_error_falls_and_is_the_blocks(setup, tuned, kind, fmt):
    """A gain on paper: the error of the block with the weights that are handed back, by its own forward pass, must be the one that is told, and lower."""
    start, found = setup(kind, fmt), tuned(kind, fmt)
    block = empty_copy(start.block)
    for module, result in found.solved.items():
        set_weight(block, f"{module}.weight", result.weight.T.contiguous() if start.turned[module] else result.weight)
    held = [passage for passage in start.passages if passage.held_out]
    error = sum(float((run_block(block, part.runtime, part.call) - part.teacher).square().sum()) for part in held)
    assert error / sum(float(part.teacher.square().sum()) for part in held) == pytest.approx(found.error_after, rel=1e-4)
    assert 0 < found.error_after < found.error_before


@EVERY
def test_codes_move_by_one_place_at_most(setup, tuned, kind, fmt):
    """An offset out of its bounds, codes that wrap around, or levels taken in the order of the file instead of their size."""
    changed = 0
    for module, result in tuned(kind, fmt).solved.items():
        was, now = setup(kind, fmt).solved[module].quantized, result.quantized
        far = (now.codes.int() - was.codes.int()).abs()
        assert int(far.max()) <= 1 and int(now.codes.max()) <= 15
        changed += int((far > 0).sum())
    assert changed == tuned(kind, fmt).moved > 0


def test_int_results_are_storable(setup, tuned):
    """Scales that no file holds, or a weight that is not code by scale."""
    for result in tuned("llama", "gptq").solved.values():
        held = result.quantized
        wide, zeros = (part.repeat_interleave(held.codes.shape[1] // part.shape[1], dim=1) for part in (held.scales, held.zeros))
        assert torch.equal(storable(held.scales, setup("llama", "gptq").case.dtype), held.scales)
        assert torch.equal((held.codes.float() - zeros) * wide, result.weight)


def test_nf4_results_go_through_the_file(tuned):
    """Codes or maxima that packing changes."""
    for module, result in tuned("llama", "nf4").solved.items():
        stored = nf4_format.pack(f"{module}.weight", result.quantized)
        found = nf4_format.unpack(f"{module}.weight", stored.__getitem__, dict.fromkeys(stored))
        assert torch.equal(nf4.dequantize(found.codes, found.state), result.weight)


def test_a_harmful_tuning_gives_back_the_start(setup):
    """Never worse on held-out windows: steps that shake every code must leave the very objects that came in."""
    start = setup("llama", "gptq")
    found = tune(start, replace(SETTINGS, lr=1.0, scale_lr=0.3))
    assert found.error_after == found.error_before and found.moved == 0
    assert all(found.solved[module] is result for module, result in start.solved.items())


def test_any_number_of_threads_gives_the_same_bytes(setup, tuned):
    """Gradients summed in the order in which threads finish."""
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3 if threads == 1 else 1)
        other = tune(setup("llama", "gptq"))
    finally:
        torch.set_num_threads(threads)
    for module, result in tuned("llama", "gptq").solved.items():
        assert torch.equal(other.solved[module].quantized.codes, result.quantized.codes) and torch.equal(
            other.solved[module].weight, result.weight
        )


@pytest.mark.parametrize("fmt", ["gptq", "nf4", "fp4"])
def test_offsets_start_at_the_solvers_codes(zoo, fmt):
    """A start that is not the solver's point: never worse than it would then be luck. FP4's levels are not sorted in the file, and two of its codes are zero."""
    case = solve(zoo.nf4("llama"), zoo.adapter("llama"), zoo.calibration, fmt)
    for result in case.solved.values():
        part = offsets(stored_scales(result.quantized, case.dtype))
        assert torch.equal(part.weight(), result.weight)
        assert torch.equal(part.build().codes, result.quantized.codes)
