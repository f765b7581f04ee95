"""How much memory does `qmerge run` take while it measures its output, beside what it foresaw? Real runs in fresh processes; what a candidate's loader takes is the difference between formats.

    python scripts/measure_evaluation.py [CASE …]      prints one line of JSON for each case (minutes each); quality/estimate.py has its figures from here
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from measure_estimates import DEMO, made

CHILD = """
import json, sys
import qmerge.cli.run as command
from qmerge.cli import planning
from qmerge.device import PeakMemory
from qmerge.room import resident_bytes
from qmerge.quality import estimate
import torch
from qmerge.cli.main import main

seen = {}
inner, sizes = command.evaluate_to, estimate.evaluation_bytes

def foreseen(measured):
    seen["loader"] = estimate.LOADERS.get(measured.method, 0)
    return sizes(measured)

announced = command.announce

def announce(found, evaluating=0):
    seen["foreseen"], seen["process"] = found.base_bytes + evaluating, found.base_bytes
    return announced(found, evaluating)

def evaluate_to(*args, **options):
    peak = PeakMemory(torch.device("cpu"))
    seen["before"] = resident_bytes()
    try:
        return inner(*args, **options)
    finally:
        seen["taken"] = peak.peak()

estimate.evaluation_bytes, command.evaluate_to, command.announce = foreseen, evaluate_to, announce
note = sys.argv.pop()
try:
    main()
finally:
    open(note, "w").write(json.dumps(seen))
"""
MADE = {"layers": 3, "hidden": 768, "ffn": 2304, "heads": 12, "kv_heads": 4, "vocab": 16_000}
FLAGS = {"gptq": (), "nf4": (), "compressed-tensors": (), "awq": (), "bf16": ()}


def measured(model: dict[str, str], fmt: str, root: Path) -> dict[str, int]:
    """Bytes of the whole process while it measures: ``foreseen`` (of it ``process`` as it stood at the plan, and ``loader``) and ``taken`` at the fullest moment; ``before``: when measuring began."""
    text = root / "text.jsonl"
    text.write_text("".join((DEMO / "eval-prose.jsonl").read_text().splitlines(keepends=True)[:20]))
    words = ["run", "--base", model["base"], "--adapter", model["adapter"], "--format", fmt, "--device", "cpu", "--calibration", str(DEMO / "calibration.jsonl"), "--text", str(text), "--allow-overlap",
             "--out", str(root / "out"), "--samples", "8", "--tokens", "128", "--curvature-tokens", "0", "--overwrite"]  # fmt: skip
    found = subprocess.run([sys.executable, "-c", CHILD, *words, str(root / "note")], capture_output=True, text=True)
    if found.returncode not in (0, 3):
        raise RuntimeError(found.stderr[-2000:])
    return json.loads((root / "note").read_text())


def main() -> None:
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        models = {"demo": {"base": str(DEMO / "base-nf4"), "adapter": str(DEMO / "adapter")}}
        for fmt in sys.argv[1:] or [f"{model}:{fmt}" for model in ("demo", "34M") for fmt in FLAGS]:
            name, _, fmt = fmt.partition(":")
            if name == "34M" and name not in models:
                (root / "made").mkdir()
                models[name] = made(root / "made", **MADE)
            print(json.dumps({"case": f"{name}, {fmt}", **measured(models[name], fmt, root)}), flush=True)


if __name__ == "__main__":
    main()
