"""Training scales and norms with the codes fixed: what it may change, that it gains, and that it comes to the same bytes on any machine and after any kill."""

from __future__ import annotations

import os
import signal
from dataclasses import replace

import pytest
import torch
from support.forked import ended_within, fork
from support.polish import SETTINGS, Case, digest, distilled, solve

from qmerge.formats import nf4 as nf4_format
from qmerge.numerics import nf4
from qmerge.numerics.divergence import divergence
from qmerge.numerics.grids import storable
from qmerge.pipeline.distill import Distilled, distill
from qmerge.pipeline.student import Teacher, student_model

CASES = [("llama", "gptq"), ("llama", "nf4"), ("qwen2", "gptq"), ("gpt2", "gptq"), ("gemma2", "nf4")]
EVERY = pytest.mark.parametrize(("kind", "fmt"), CASES, ids=["-".join(case) for case in CASES])


@pytest.fixture(scope="module")
def case(zoo):
    made: dict[tuple[str, str], Case] = {}

    def get(kind: str, fmt: str) -> Case:
        if (kind, fmt) not in made:
            made[kind, fmt] = solve(zoo.nf4(kind), zoo.adapter(kind), zoo.calibration, fmt)
        return made[kind, fmt]

    return get


@pytest.fixture(scope="module")
def trained(case):
    made: dict[tuple[str, str], Distilled] = {}

    def get(kind: str, fmt: str) -> Distilled:
        if (kind, fmt) not in made:
            made[kind, fmt] = distill(*case(kind, fmt), SETTINGS)
        return made[kind, fmt]

    return get


def held_out_kl(case: Case, found: Distilled) -> float:
    """By another route than the training's: the whole teacher in memory, one window at a time, KL as torch computes it."""
    with torch.no_grad():
        teacher = student_model(case.plan, case.merged, {name: case.merged.weight(name) for name in case.solved}, torch.float32)
        for name, parameter in teacher.named_parameters():
            if name in case.merged.pieces.table and name not in case.solved:
                parameter.copy_(case.merged.in_file_order(name, case.merged.weight(name)))
        student = student_model(case.plan, case.merged, {name: result.weight for name, result in found.solved.items()}, case.dtype)
        for name, value in found.floats.items():
            student.get_parameter(name).copy_(value.to(case.dtype).float())
        rows = [
            (teacher(input_ids=ids).logits.double().log_softmax(-1), student(input_ids=ids).logits.double().log_softmax(-1))
            for ids in case.calibration.held_out.split(1)
        ]
        return float(torch.stack([(p.exp() * (p - q)).sum(-1).mean() for p, q in rows]).mean())


@EVERY
def test_held_out_kl_falls_and_is_what_the_record_says(case, trained, kind, fmt):
    """A loss that falls in the trainer and not in the model that is written: norms lost on the way out, weights that are not those of the scales, a teacher that
    is not the merged model."""
    found = trained(kind, fmt)
    before, after = found.record["held_out_kl_before"], found.record["held_out_kl_after"]
    assert 0 < after < before
    assert held_out_kl(case(kind, fmt), found) == pytest.approx(after, rel=1e-3)
    assert held_out_kl(case(kind, fmt), replace(found, solved=case(kind, fmt).solved, floats={})) == pytest.approx(before, rel=1e-3)


@EVERY
def test_codes_are_frozen_and_scales_move(case, trained, kind, fmt):
    """A step that touches codes or zeros: then a file's other half no longer fits; or one that trains nothing."""
    before, after = case(kind, fmt).solved, trained(kind, fmt).solved
    assert list(before) == list(after)
    for name, result in after.items():
        held, was = result.quantized, before[name].quantized
        assert torch.equal(held.codes, was.codes) and held.grid == was.grid
        assert held.zeros is None or torch.equal(held.zeros, was.zeros) and torch.equal(held.g_idx, was.g_idx)
    assert any(not torch.equal(result.weight, before[name].weight) for name, result in after.items())


def test_int_scales_are_ones_that_the_file_and_the_model_hold(case, trained):
    """fp32 scales that fp16 or bf16 rounds on loading: the model that was trained is then not the one that runs. The weight must be code by scale, bit for bit."""
    dtype = case("llama", "gptq").dtype
    for result in trained("llama", "gptq").solved.values():
        held = result.quantized
        assert torch.equal(storable(held.scales, dtype), held.scales) and torch.equal(held.scales.half().to(dtype).float(), held.scales)
        wide, zeros = (part.repeat_interleave(held.codes.shape[1] // part.shape[1], dim=1) for part in (held.scales, held.zeros))
        assert torch.equal((held.codes.float() - zeros) * wide, result.weight)


def test_nf4_states_go_through_the_file(trained):
    """Maxima that double quantization rounds to others when the file is packed."""
    for name, result in trained("llama", "nf4").solved.items():
        stored = nf4_format.pack(name, result.quantized)
        specs = {key: None for key in stored}
        found = nf4_format.unpack(name, stored.__getitem__, specs)
        assert result.quantized.state.nested and found.state.absmax.dtype == torch.uint8
        assert torch.equal(nf4.dequantize(found.codes, found.state), result.weight)


def test_floats_are_as_stored(case, trained):
    """Norms in fp32, which a bf16 file rounds; or ones reported that did not change."""
    held = case("qwen2", "gptq")
    floats = trained("qwen2", "gptq").floats
    assert any(name.endswith("bias") for name in floats) and any("norm" in name for name in floats)
    for name, value in floats.items():
        assert value.dtype == held.merged.out_dtype(name) and not torch.equal(value, held.merged.float_tensor(name)), name


def test_a_harmful_training_gives_back_the_start(case):
    """Never worse on held-out text: with rates far too high the start must come back, untouched, and the record must say so."""
    held = case("llama", "gptq")
    found = distill(*held, replace(SETTINGS, lr=0.5, norm_lr=0.5))
    assert found.record["kept_step"] == 0 and found.record["held_out_kl_after"] == found.record["held_out_kl_before"]
    assert found.floats == {} and all(found.solved[name] is result for name, result in held.solved.items())


def test_manifest_figures_follow_the_new_weights(case, trained):
    """`verify` derives distance and slope from the file: those of the solver's weights would not fit any more."""
    from qmerge.numerics.distances import fit

    held = case("llama", "gptq")
    for name, result in trained("llama", "gptq").solved.items():
        whole = fit(result.weight, held.merged.weight(name))
        assert (result.distance, result.slope) == (whole.distance, whole.slope), name


@pytest.mark.parametrize("fmt", ["gptq", "nf4"])
def test_any_number_of_threads_gives_the_same_bytes(case, trained, fmt):
    """Sums whose order depends on the machine: the same recipe would give another checkpoint on each."""
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3 if threads == 1 else 1)
        other = distill(*case("llama", fmt), SETTINGS)
    finally:
        torch.set_num_threads(threads)
    assert digest(other) == digest(trained("llama", fmt))


def test_killed_and_run_again_gives_the_same_bytes(zoo, trained, tmp_path):
    """A state that forgets an optimizer's moment, the batch order or the best so far; or one that a kill leaves half-written. A real process, SIGKILL."""
    work, out, log, wanted = tmp_path / "work", tmp_path / "digest", tmp_path / "log", digest(trained("llama", "gptq"))
    words = (zoo.nf4("llama"), zoo.adapter("llama"), zoo.calibration, "gptq", str(work), str(out))

    def killed_at_step_8() -> None:
        distilled(*words, lambda line: os.kill(os.getpid(), signal.SIGKILL) if "step 8/" in line else None)

    assert ended_within(fork(killed_at_step_8, log), 120) == -signal.SIGKILL, log.read_text()
    assert not out.exists() and (work / "distill.safetensors").exists()
    assert ended_within(fork(lambda: distilled(*words, lambda line: os.write(1, f"{line}\n".encode())), log), 120) == 0, log.read_text()
    assert "goes on after step" in log.read_text()
    assert out.read_text() == wanted


def test_a_state_of_other_settings_is_not_taken(case, tmp_path):
    """A state left by another recipe, taken for this one's: silently a mixture of both."""
    said: list[str] = []
    held = case("llama", "gptq")
    distill(*held, replace(SETTINGS, steps=4), tmp_path)
    fresh = distill(*held, replace(SETTINGS, steps=6), None)
    assert digest(distill(*held, replace(SETTINGS, steps=6), tmp_path, said.append)) == digest(fresh)
    assert any("other inputs or settings" in line for line in said)


def test_teacher_is_the_merged_model(case):
    """Hidden states of the wrong layer, a head without the model's soft cap (Gemma 2), tensors rounded to bf16: the aim itself would be off."""
    held = case("gemma2", "nf4")
    ids = held.calibration.held_out[:2]
    with torch.no_grad():
        teacher = Teacher(held.plan, held.merged, [ids])
        whole = student_model(held.plan, held.merged, {name: held.merged.weight(name) for name in held.solved}, torch.float32)
        wanted = whole(input_ids=ids).logits
    assert torch.allclose(teacher.logits(0), wanted, rtol=1e-4, atol=1e-4)


def test_divergence_is_kl_and_its_gradient():
    """A gradient of another loss than the one that is reported."""
    dice = torch.Generator().manual_seed(0)
    aim, logits = (torch.randn(3, 7, generator=dice) for _ in range(2))
    logits.requires_grad_(True)
    wanted = torch.nn.functional.kl_div(logits.log_softmax(-1), aim.softmax(-1), reduction="none").sum(-1)
    kl, slope = divergence(aim, logits.detach())
    assert torch.allclose(kl.float(), wanted.detach(), rtol=1e-5)
    assert torch.allclose(torch.autograd.grad(wanted.sum(), logits)[0], slope, atol=1e-6)
