"""Which calibration text, and how much of it? Writes docs/measurements/calibration.md and .json: the demo requantized on other text, on less of it, and on none.

    python scripts/bench_calibration.py [--formats gptq,nf4] [--out FILE.md]      about 20 minutes on two cores

Every checkpoint is written by `qmerge merge` and measured by one `qmerge eval` on both of the demo's evaluation texts.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "examples/demo"
INPUTS = ["--base", str(DEMO / "base-nf4"), "--adapter", str(DEMO / "adapter")]
PROSE, CODE = str(DEMO / "calibration.jsonl"), str(DEMO / "generic.jsonl")
CASES: dict[str, tuple[str, list[str]]] = {
    "both": ("prose, a quarter of code", ["--calibration", PROSE, "--generic", CODE]),
    "prose": ("prose alone", ["--calibration", PROSE]),
    "code": ("code alone: not what the adapter was trained on", ["--calibration", CODE]),
    "few": ("as the first, 32 windows", ["--calibration", PROSE, "--generic", CODE, "--samples", "32"]),
    "fewest": ("as the first, 8 windows", ["--calibration", PROSE, "--generic", CODE, "--samples", "8"]),
    "rows": ("as the first, `--curvature-tokens 0`", ["--calibration", PROSE, "--generic", CODE, "--curvature-tokens", "0"]),
    "none": ("none: `--rtn`", ["--rtn"]),
}
"""folder name -> what the page calls it, and its flags"""


def qmerge(*words: str) -> None:
    subprocess.run([sys.executable, "-m", "qmerge", *words], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)


def measured(formats: list[str], folder: Path) -> dict[str, object]:
    """results.json of one evaluation of every case in every format."""
    names = [f"{fmt}-{case}" for fmt in formats for case in CASES]
    for name in names:
        fmt, case = name.split("-", 1)
        qmerge("merge", *INPUTS, "--out", str(folder / name), "--format", fmt, "--tokens", "256", *CASES[case][1])
    texts = ["--text", f"prose={DEMO / 'eval-prose.jsonl'}", "--text", f"code={DEMO / 'eval-code.jsonl'}"]
    qmerge("eval", *INPUTS, *(word for name in names for word in ("--candidate", str(folder / name))), *texts, "--out", str(folder / "results.json"))
    return json.loads((folder / "results.json").read_text())


def page(results: dict, formats: list[str]) -> str:
    """The table, with the intervals of the results."""

    def cell(name: str, text: str, metric: str, form: str) -> str:
        found = results["arms"][name]["texts"][text]["metrics"].get(metric, {})
        if found.get("value") is None:
            return "undefined"
        return f"{found['value']:{form}} ({found['ci_low']:{form}} to {found['ci_high']:{form}})"

    rows = [f"| {fmt} | {words} | {cell(f'{fmt}-{case}', 'prose', 'kl_mean', '.2e')} | {cell(f'{fmt}-{case}', 'prose', 'retention', '.2%')} | {cell(f'{fmt}-{case}', 'code', 'kl_mean', '.2e')} |"
            for fmt in formats for case, (words, _) in CASES.items()]  # fmt: skip
    versions = ", ".join(f"{name} {version}" for name, version in results["fingerprint"]["versions"].items() if name in ("torch", "transformers", "peft", "bitsandbytes", "gptqmodel"))
    head = f"""# Which calibration text, and how much

`python scripts/bench_calibration.py --formats {','.join(formats)}` writes this file and the JSON beside it. The demo (5M parameters, adapter trained on prose, ‖ΔW‖/‖W‖ 1.3 %), windows of 256 tokens, 128 of them where
nothing else is said; KL in nats/token to base + adapter, 95 % by window. One adapter and one seed: the order is what carries over, not the sizes. Versions: {versions}.

| format | calibrated on | KL on prose (its own domain) | retention on prose | KL on code (other text) |
|---|---|---|---|---|
"""
    floors = ", ".join(f"{text} {floor['value']:.2e}" for text, floor in results["noise_floor"].items())
    return head + "\n".join(rows) + f"\n\nNoise floor: {floors}.\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", default="gptq,nf4")
    parser.add_argument("--out", type=Path, default=ROOT / "docs/measurements/calibration.md")
    args = parser.parse_args()
    formats = args.formats.split(",")
    with tempfile.TemporaryDirectory() as folder:
        results = measured(formats, Path(folder))
    args.out.write_text(page(results, formats), encoding="utf-8")
    kept = {name: {text: row["metrics"] for text, row in arm["texts"].items()} for name, arm in results["arms"].items()}
    args.out.with_suffix(".json").write_text(json.dumps({"versions": results["fingerprint"]["versions"], "noise_floor": results["noise_floor"], "arms": kept}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
