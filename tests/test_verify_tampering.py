"""A requantized linear that was changed after it was solved, with every hash of the manifest renewed: what does `qmerge verify` with the inputs see?"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from support.tamper import CHANGES, tampered

from qmerge.numerics.distances import band_rows, fit, pack_bands, unpack_bands
from qmerge.pipeline.rederive import SAME, SAME_BAND
from qmerge.store.manifest import portable

FORMATS = {"gptq": ("gptq",), "gptq, asymmetric": ("gptq", "--asym"), "nf4": ("nf4",), "nf4, single": ("nf4", "--single-quant"), "compressed-tensors": ("compressed-tensors",), "compressed-tensors, asymmetric": ("compressed-tensors", "--asym"), "awq": ("awq",)}
LINEAR = "model.layers.1.mlp.gate_proj"


def whole(found: torch.Tensor, wanted: torch.Tensor) -> tuple[float, float]:
    """(distance, slope) of two matrices, whatever their bands."""
    both = fit(found, wanted)
    return both.distance, both.slope


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("fmt", ["gptq", "nf4", "compressed-tensors", "awq"])
def test_one_change_of_a_linear_is_seen_and_named(zoo, written, cli, tmp_path, fmt, change):
    """One step of one code, one block's scale, two rows in each other's place: nothing that a file's own checks can see, and hashes that were renewed."""
    bad = tampered(written("llama", fmt)[0], tmp_path / "bad", CHANGES[change], LINEAR)
    assert cli("verify", bad).code == 0  # honest: without inputs and without a signature nothing can tell
    answer = cli("verify", bad, "--base", zoo.nf4("llama"), "--adapter", zoo.adapter("llama"))
    assert answer.code == 1 and f"{LINEAR}.weight: " in answer.out and answer.out.count("FAILED") == 1


def test_every_band_has_its_own_figures():
    """A change that drowns in the average of a large matrix: in the figures of the whole it is below what is compared, in its band it is not; and the band is the right one."""
    torch.manual_seed(3)
    wanted = torch.randn(4096, 1024) * 0.02
    found = wanted + torch.randn_like(wanted) * 0.002
    changed = found.clone()
    changed[1234, 64:128] *= 1.02
    assert max(abs(a - b) for a, b in zip(whole(found, wanted), whole(changed, wanted), strict=True)) < SAME
    before, after = unpack_bands(fit(found, wanted).bands), unpack_bands(fit(changed, wanted).bands)
    moved = ((before - after).abs() > SAME_BAND).any(1).nonzero().reshape(-1).tolist()
    assert band_rows((4096, 1024)) == 64 and len(before) == 64 and moved == [1234 // 64]


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (128, 256), (130, 512), (4097, 64), (257, 70000)])
def test_bands_are_the_fits_of_their_rows(shape):
    """Rows that belong to no band, or to two; a last band that is short."""
    torch.manual_seed(1)
    wanted, height = torch.randn(shape), band_rows(shape)
    found = wanted + 0.1 * torch.randn(shape)
    wanted_bands = [whole(found[start : start + height], wanted[start : start + height]) for start in range(0, shape[0], height)]
    got = unpack_bands(fit(found, wanted).bands)
    assert len(got) == len(wanted_bands) <= 1024
    for row, (distance, slope) in zip(got.tolist(), wanted_bands, strict=True):
        assert row == pytest.approx([distance, slope - 1.0], rel=1e-5, abs=1e-9)


def test_bands_are_no_path():
    """Bands that begin with a slash: the manifest cuts absolute paths to their last name, and one linear in 64 would not verify any more."""
    ratios = torch.frombuffer(bytearray(b"\xff" * 3 + b"\x7e" + b"\xff\xff\xff\x3e"), dtype=torch.float32).reshape(1, 2).double()
    text = pack_bands(ratios)
    assert portable({"bands": text}) == {"bands": text} and torch.equal(unpack_bands(text), ratios.float()) and set("-_") & set(text)


def test_another_order_of_summation_does_not_matter():
    """A verification on another machine that fails because its products round differently: W + ΔW with noise of fp32's last bit everywhere is still the same."""
    torch.manual_seed(2)
    wanted = torch.randn(2048, 2048) * 0.02
    found = wanted + torch.randn_like(wanted) * 0.002
    noisy = wanted * (1 + 6e-8 * torch.randint(-1, 2, wanted.shape))
    lean = wanted * (1 + 6e-8)  # the worst: every product rounded up
    for other in (noisy, lean):
        assert not torch.equal(other, wanted)
        off = (unpack_bands(fit(found, wanted).bands) - unpack_bands(fit(found, other).bands)).abs().max()
        assert off < SAME_BAND


@pytest.mark.slow
@pytest.mark.parametrize("fmt", FORMATS)
def test_detection_at_a_real_size(zoo, written, cli, tmp_path, fmt, capsys):
    """The same at 2048 columns and 5632 rows, where one block is one of 180,000: measured for docs/verify.md (run with -s)."""
    base = zoo.float("llama", "verify-real-size", hidden_size=2048, intermediate_size=5632, num_hidden_layers=1, num_attention_heads=16, num_key_value_heads=4)
    from conftest import save_adapter, save_nf4

    nf4, adapter = zoo.root / "verify-real-size-nf4", zoo.root / "verify-real-size-adapter"
    if not nf4.exists():
        save_nf4(base, nf4, True)
        save_adapter(base, adapter, str(nf4), 0.02, 1, target_modules=["q_proj", "down_proj"])
    out, _ = written("llama", *FORMATS[fmt], "--rtn", base=str(nf4), adapter=str(adapter))
    inputs = ("--base", nf4, "--adapter", adapter)
    assert cli("verify", out, *inputs).code == 0
    linear = "model.layers.0.mlp.gate_proj"
    recorded = json.loads((out / "manifest.json").read_text())["linears"][linear]
    for change in CHANGES:
        bad = tampered(out, tmp_path / change.replace(" ", "-").replace("%", ""), CHANGES[change], linear)
        alone, with_inputs = cli("verify", bad).code, cli("verify", bad, *inputs)
        with capsys.disabled():
            print(f"\n{fmt} | {change} | alone {alone} | whole linear {_whole(bad, linear, recorded, nf4, adapter):.1e} (seen from {SAME:.0e}) | with the inputs {with_inputs.code}: {with_inputs.out[with_inputs.out.find('FAILED'):].strip()[:230]}")
        assert with_inputs.code == 1 and linear in with_inputs.out


def _whole(bad: Path, linear: str, recorded: dict, base: Path, adapter: Path) -> float:
    """How far the change moves distance or slope of the whole linear: what was compared before there were bands."""
    from qmerge.pipeline.merge import Merged
    from qmerge.pipeline.rederive import plan_again
    from qmerge.pipeline.written import Written
    from qmerge.store.checkpoint import open_checkpoint
    from qmerge.store.manifest import read_manifest

    again = plan_again(read_manifest(bad), str(base), [str(adapter)], False)
    merged = Merged(again.base, again.pieces, again.adapters, torch.device("cpu"))
    found = whole(Written(open_checkpoint(bad)).linear(f"{linear}.weight"), merged.weight(f"{linear}.weight"))
    return max(abs(found[0] - recorded["distance"]), abs(found[1] - recorded["slope"]))
