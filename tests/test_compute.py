"""``--compute``: products of the calibration text in bf16 must cost nothing that can be measured, and be said."""

from __future__ import annotations

import pytest
import torch
from oracles.dequantized import divergence, load_public, logits, separate_model

from qmerge.device import exact_products, leaves_vectors_unused, pick_compute, quick_at_bf16
from qmerge.numerics.curvature import Curvature
from qmerge.numerics.hessian import Statistics
from qmerge.numerics.products import add_in_pieces, add_product
from qmerge.pipeline.blocks import record_calls
from qmerge.pipeline.skeleton import build_skeleton
from qmerge.store.checkpoint import open_checkpoint
from qmerge.store.manifest import read_manifest

CPU = torch.device("cpu")


def factors() -> tuple[torch.Tensor, torch.Tensor]:
    """bf16 ``[k, m]``, ``[k, n]``; some columns a hundred times as large as others, as activations are."""
    draw = torch.Generator().manual_seed(0)
    return tuple((torch.randn(700, width, generator=draw) * torch.exp(1.5 * torch.randn(width, generator=draw))).bfloat16() for width in (96, 130))


def error(found: torch.Tensor, wanted: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> float:
    """The largest error of an element, in units of the lengths of the two columns that make it."""
    return float(((found.double() - wanted) / (left.double().norm(dim=0)[:, None] * right.double().norm(dim=0))).abs().max())


def test_a_sum_of_bf16_products_is_an_fp32_sum():
    """A product that is rounded to bf16 before it is added: H is then not the sum of any inputs, and may not be positive."""
    left, right = factors()
    wanted, start = left.double().T @ right.double(), torch.zeros(96, 130)
    exact, rounded = start.clone(), start.clone()
    add_product(exact, left.T, right)
    add_product(rounded, left.T, right, exact=False)
    assert error(exact, wanted, left, right) < 2**-16
    assert 2**-14 < error(rounded, wanted, left, right) < 2**-8


def test_pieces_average_their_rounding_out():
    """Pieces that are left out or rounded together: H of a quick run, from one product, would be as rough as its roughest."""
    draw = torch.Generator().manual_seed(3)
    left, right = (torch.randn(512 * 32 + 100, width, generator=draw).add_(0.3).bfloat16() for width in (64, 80))
    wanted, at_once, pieces = left.double().T @ right.double(), torch.zeros(64, 80), torch.zeros(64, 80)
    add_product(at_once, left.T, right, exact=False)
    add_in_pieces(pieces, left.T, right)
    rough, fine = (float((found.double() - wanted).norm() / wanted.norm()) for found in (at_once, pieces))
    assert fine < rough / 3 and fine < 2**-11, (fine, rough)
    whole = [torch.zeros(64, 80), torch.zeros(64, 80)]
    add_in_pieces(whole[0], left.float().T, right.float())
    add_product(whole[1], left.float().T, right.float())
    assert torch.equal(*whole), "fp32 needs no pieces"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_difference_is_rounded_once(dtype):
    """x̃ - x of bf16 activations, or of a few rows at a time, to other bits than taken in fp32 and rounded."""
    draw = torch.Generator().manual_seed(4)
    x = torch.randn(1300, 24, generator=draw).to(dtype)
    teacher = (x.float() * (1 + 0.01 * torch.randn(1300, 24, generator=draw))).to(dtype)
    _, moved, _ = Statistics(24, compute=torch.bfloat16).factors(x, teacher, None)
    assert torch.equal(moved, (teacher.float() - x.float()).bfloat16())


def test_positions_are_turned_in_what_passes_are_in(zoo):
    """Cosines that stay in fp32 beside heads in bf16: each is then turned in fp32 and rounded back, which takes longer. And masks or positions that are rounded with them."""
    skeleton = build_skeleton(open_checkpoint(zoo.nf4("llama")))
    with torch.no_grad():
        skeleton.model.to_empty(device="cpu") if any(part.is_meta for part in skeleton.model.parameters()) else None
        calls = {compute: record_calls(skeleton.model, skeleton.blocks_name, [torch.ones(2, 8, dtype=torch.long)], compute)[1][0][0] for compute in (torch.float32, torch.bfloat16)}
    full, low = (calls[compute].kwargs for compute in (torch.float32, torch.bfloat16))
    assert {part.dtype for part in full["position_embeddings"]} == {torch.float32} and {part.dtype for part in low["position_embeddings"]} == {torch.bfloat16}
    kept = [name for name in full if name != "position_embeddings" and isinstance(full[name], torch.Tensor)]
    assert "position_ids" in kept and all(torch.equal(full[name], low[name]) for name in kept)


def test_statistics_hold_differences_of_what_was_not_rounded_yet():
    """x̃ - x taken between rounded values: at one part in five hundred, half of it would be rounding."""
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(4000, 40, generator=draw)
    teacher = x + 0.002 * x.roll(1, dims=1)
    found = Statistics(40, compute=torch.bfloat16)
    found.add(x, teacher)
    wanted = (teacher - x).double().T @ x.double() / len(x)
    assert float((found.drift - wanted).norm() / wanted.norm()) < 0.01
    wanted = x.double().T @ x.double() / len(x)
    assert float((found.hessian - wanted).norm() / wanted.norm()) < 0.002


def test_curvatures_take_both_kinds_of_gradients():
    """A hook that gets bf16 gradients and multiplies them in bf16 sums."""
    gradient = factors()[0]
    sums = [Curvature(96, 64), Curvature(96, 64)]
    for curvature, given in zip(sums, (gradient, gradient.float()), strict=True):
        for part in given.split(100):
            curvature.add(part)
    for low, full in zip(*(curvature.blocks for curvature in sums), strict=True):
        assert low.dtype == torch.float32
        assert float((low - full).norm() / full.norm()) < 0.005


@pytest.mark.parametrize("kind", ["llama", pytest.param("qwen2", marks=pytest.mark.slow)])
def test_a_checkpoint_made_in_bf16_is_about_as_good(zoo, written, kind):
    """Rounding of activations that gets into scales, shifts or codes: the checkpoint would be further from base + adapter than one made in fp32."""
    reference = separate_model(zoo.float(kind), zoo.nf4(kind), zoo.adapter(kind))
    ids = torch.randint(3, 200, (16, 64), generator=torch.Generator().manual_seed(5))
    told, wanted = {}, logits(reference, ids)
    for compute in ("fp32", "mixed", "bf16"):
        out, _ = written(kind, "gptq", "--compute", compute)
        assert read_manifest(out)["recipe"]["compute"] == compute
        told[compute] = divergence(wanted, logits(load_public(str(out)), ids))
    assert told["mixed"] < 1.03 * told["fp32"] and told["bf16"] < 1.1 * told["fp32"], told


def test_bits_do_not_depend_on_threads_in_bf16(written):
    """A library that splits a bf16 sum over its threads."""
    files = []
    before = torch.get_num_threads()
    for threads in (1, 3):
        torch.set_num_threads(threads)
        try:
            out, _ = written("llama", "gptq", "--compute", "bf16", fresh=True)
        finally:
            torch.set_num_threads(before)
        files.append((out / "model.safetensors").read_bytes())
    assert files[0] == files[1]


def test_auto_is_settled_and_said(written):
    """A manifest that says auto: nobody could make the file again on another machine."""
    assert pick_compute("fp32", CPU) == "fp32" and pick_compute("bf16", CPU) == "bf16"
    assert (pick_compute("auto", torch.device("cuda")), pick_compute("auto", torch.device("cuda"), coarse=True)) == ("mixed", "bf16")
    assert (pick_compute("auto", CPU), pick_compute("auto", CPU, coarse=True)) in (("fp32", "fp32"), ("mixed", "bf16"))


@pytest.mark.parametrize(("fmt", "flags", "coarse"), [
    ("gptq", (), True), ("nf4", (), False), ("compressed-tensors", ("--bits", "8"), False), ("nf4", ("--quick",), True), ("gptq", ("--compute", "mixed"), False),
])  # fmt: skip
def test_passes_are_rounded_where_that_does_not_show(written, fmt, flags, coarse):
    """bf16 in a file so fine that its rounding shows, or a slow merge of a coarse one."""
    out, _ = written("llama", fmt, *flags)
    quick = pick_compute("auto", CPU) != "fp32" or "--compute" in flags
    assert read_manifest(out)["recipe"]["compute"] == ("fp32" if not quick else "bf16" if coarse else "mixed")


@pytest.mark.parametrize(("vendor", "flags", "quick"), [
    ("AuthenticAMD", "avx2 avx512f avx512_bf16", True), ("AuthenticAMD", "avx2 avx512f", False), ("GenuineIntel", "avx512f avx512_bf16", False), ("GenuineIntel", "avx512_bf16 amx_bf16 amx_tile", True), ("", "", False),
])  # fmt: skip
def test_a_processor_is_known_by_what_it_says(vendor, flags, quick):
    """A choice that is timed: a busy moment would change the bytes, and --resume would refuse to go on."""
    assert quick_at_bf16(f"vendor_id\t: {vendor}\nflags\t\t: fpu {flags}\n") is quick


def test_another_word_is_refused(zoo, cli, tmp_path):
    """fp16, say, taken for fp32."""
    answer = cli("merge", "--base", zoo.nf4("llama"), "--adapter", zoo.adapter("llama"), "--out", tmp_path / "out", "--calibration", zoo.calibration, "--compute", "fp16")
    assert answer.code == 2 and "--compute fp16: expected one of auto, fp32, mixed, bf16" in answer.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("vendor", "flags", "unused"), [("AuthenticAMD", "avx2 avx512bw", True), ("AuthenticAMD", "avx2", False), ("GenuineIntel", "avx512bw amx_bf16", False), ("", "", False)])
def test_mkl_is_left_only_where_it_is_slow(vendor, flags, unused):
    """oneDNN asked on a processor where it may round factors to bf16."""
    assert leaves_vectors_unused(f"vendor_id\t: {vendor}\nflags\t\t: fpu {flags}\n") is unused


def test_products_stay_fp32_and_the_setting_goes_back():
    """Products of a merge in bf16 or TF32; or a user's own process that multiplies in another way after a merge than before it, even one that failed."""
    left, right = torch.randn(64, 512, generator=torch.Generator().manual_seed(0)), torch.randn(512, 64, generator=torch.Generator().manual_seed(1))
    before = torch.backends.mkldnn.matmul.fp32_precision, torch.backends.cuda.matmul.allow_tf32, torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
    with pytest.raises(KeyError), exact_products():
        error = (left @ right).double() - left.double() @ right.double()
        assert float(error.abs().max()) < 2e-4  # bf16 gives some 0.1, TF32 0.01
        raise KeyError
    assert (torch.backends.mkldnn.matmul.fp32_precision, torch.backends.cuda.matmul.allow_tf32, torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction) == before
    assert torch.get_float32_matmul_precision() == "highest"


def test_verify_multiplies_as_the_merge_did(zoo, cli, tmp_path):
    """An adapter of rank 256, merged by one library and derived again by the other: floats that are right and said to be wrong."""
    adapter = zoo.adapter("llama", "wide", r=256, lora_alpha=256)
    inputs = ("--base", zoo.nf4("llama"), "--adapter", adapter)
    assert cli("merge", *inputs, "--format", "fp32", "--out", tmp_path / "out").code == 0
    answer = cli("verify", tmp_path / "out", *inputs)
    assert answer.code == 0, answer.out
