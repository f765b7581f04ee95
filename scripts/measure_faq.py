"""What comes back when a merge is undone, and what does a wrong adapter that fits look like? The figures of docs/faq.md, made on the demo.

    python scripts/measure_faq.py --page docs/measurements/faq.md      ; minutes
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "examples" / "demo"
BASE, ADAPTER = str(DEMO / "base-nf4"), str(DEMO / "adapter")
FORMATS = {"fp32": (), "bf16": (), "gptq": ("--calibration", str(DEMO / "calibration.jsonl"), "--generic", str(DEMO / "generic.jsonl"), "--tokens", "256")}


def command(*words: object) -> None:
    subprocess.run([sys.executable, "-m", "qmerge", *map(str, words)], cwd=ROOT, check=True, stdout=sys.stderr)


def undone(place: Path, fmt: str) -> tuple[float, float]:
    """(``‖back - base‖ / ‖base‖``, share of weights that are equal) over all linears, after merging into ``fmt`` and merging with weight -1."""
    command("merge", "--base", BASE, "--adapter", ADAPTER, "--out", place / fmt, "--format", fmt, *FORMATS[fmt])
    original = () if fmt == "gptq" else ("--on", "original")
    command("merge", "--base", place / fmt, "--adapter", f"{ADAPTER}=-1", *original, "--out", place / f"{fmt}-back", "--format", "fp32")
    base, back = (load_file(folder / "model.safetensors") for folder in (place / "base", place / f"{fmt}-back"))
    names = [name for name in base if name.endswith("_proj.weight")]
    error = sum(float((back[name] - base[name]).double().square().sum()) for name in names)
    same = sum(int((back[name] == base[name]).sum()) for name in names) / sum(base[name].numel() for name in names)
    return (error / sum(float(base[name].double().square().sum()) for name in names)) ** 0.5, same


def change(place: Path) -> float:
    """``‖ΔW‖ / ‖base‖`` over all linears."""
    base, merged = (load_file(place / name / "model.safetensors") for name in ("base", "fp32"))
    names = [name for name in base if name.endswith("_proj.weight")]
    moved = sum(float((merged[name] - base[name]).double().square().sum()) for name in names)
    return (moved / sum(float(base[name].double().square().sum()) for name in names)) ** 0.5


def reversed_layers(place: Path) -> Path:
    """The demo's adapter with its layers in reverse order: every shape fits."""
    shutil.copytree(ADAPTER, place)
    held = load_file(place / "adapter_model.safetensors")
    count = 1 + max(int(found[1]) for name in held if (found := re.search(r"layers\.(\d+)\.", name)))
    save_file({re.sub(r"layers\.(\d+)\.", lambda found: f"layers.{count - 1 - int(found[1])}.", name): tensor for name, tensor in held.items()}, place / "adapter_model.safetensors")
    return place


def perplexities(place: Path, adapter: Path | str) -> dict[str, dict[str, float]]:
    """Of base and separate on the demo's prose, each with its interval."""
    out = place / f"{Path(adapter).name}.bf16"
    command("merge", "--base", BASE, "--adapter", adapter, "--out", out, "--format", "bf16")
    command("eval", "--base", BASE, "--adapter", adapter, "--candidate", out, "--text", f"prose={DEMO / 'eval-prose.jsonl'}", "--out", place / "results.json")
    arms = json.loads((place / "results.json").read_text())["arms"]
    return {arm: arms[arm]["texts"]["prose"]["metrics"]["ppl"] for arm in ("base", "separate")}


def page(back: dict[str, tuple[float, float]], moved: float, right: dict[str, dict[str, float]], wrong: dict[str, dict[str, float]]) -> str:
    rows = [f"| {fmt} | {error:.2g} | {100 * same:.1f} % |" for fmt, (error, same) in back.items()]
    told = [f"| {name} | " + " | ".join(f"{one['value']:.1f} ({one['ci_low']:.1f} to {one['ci_high']:.1f})" for one in arms.values()) + " |" for name, arms in (("the demo's", right), ("its layers reversed", wrong))]
    return "\n".join([
        "# Undoing a merge, and a wrong adapter that fits", "", f"Written by `python scripts/measure_faq.py`, on the demo; torch {torch.__version__}. The adapter's change: ‖ΔW‖/‖base‖ = {moved:.2g} over all linears.", "",
        "Merged, then merged again with weight -1, against the dequantized base:", "", "| merged as | ‖back - base‖/‖base‖ | weights that are equal |", "| --- | --- | --- |", *rows, "",
        "Perplexity on the demo's prose, 95 % over documents:", "", "| adapter | base | separate |", "| --- | --- | --- |", *told, "",
    ])  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--page", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        command("merge", "--base", BASE, "--adapter", f"{ADAPTER}=0", "--out", place / "base", "--format", "fp32")
        back = {fmt: undone(place, fmt) for fmt in FORMATS}
        found = page(back, change(place), perplexities(place, ADAPTER), perplexities(place, reversed_layers(place / "reversed")))
    print(found)
    if args.page:
        args.page.write_text(found, encoding="utf-8")


if __name__ == "__main__":
    main()
