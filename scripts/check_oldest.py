"""Does qmerge work on the oldest versions that pyproject.toml admits?

    python scripts/check_oldest.py [--env DIR] [--where-it-installs] [PYTEST-ARGUMENT …]

Makes an environment with the lowest version of everything that qmerge names (what those name themselves may be newer), prints the versions, merges the demo to nf4, verifies and
measures it there, and runs the tests of merging, of 4-bit formats and of requantizing. Without extras: the peers that they bring are skipped. Some 7 GB in DIR (``.bench/env-oldest``),
which is used again while pyproject.toml stays the same.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "examples" / "demo"
TESTS = ("merge_identity", "formats_nf4", "pipeline_requantize", "several_adapters")
SHOWN = ("torch", "transformers", "peft", "bitsandbytes", "numpy", "scipy", "numba", "datasets", "accelerate", "safetensors", "huggingface-hub")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--env", type=Path, default=ROOT / ".bench" / "env-oldest")
    parser.add_argument("--where-it-installs", action="store_true", help="say so and end well where these versions cannot be installed (another Python or platform, no registry)")
    options, arguments = parser.parse_known_args()
    try:
        python = made(options.env.resolve())
    except subprocess.CalledProcessError as problem:
        if not options.where_it_installs:
            raise
        print(f"skipped: the oldest versions cannot be installed here: {' '.join(map(str, problem.cmd[:4]))} … ended with {problem.returncode}")
        return
    found = {one.metadata["Name"].lower().replace("_", "-"): one.version for one in importlib.metadata.distributions(path=[str(next(options.env.resolve().glob("lib/python*/site-packages")))])}
    print("oldest: " + ", ".join(f"{name} {found[name]}" for name in SHOWN), flush=True)
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    with tempfile.TemporaryDirectory(prefix="qmerge-oldest-") as place:
        inputs = ("--base", str(DEMO / "base-nf4"), "--adapter", str(DEMO / "adapter"))
        out = f"{place}/out"
        for command in (
            ("merge", *inputs, "--out", out, "--format", "nf4", "--calibration", str(DEMO / "calibration.jsonl"), "--tokens", "128", "--samples", "8", "--curvature-tokens", "512"),
            ("verify", out, *inputs),
            ("eval", *inputs, "--candidate", out, "--text", str(DEMO / "eval-prose.jsonl"), "--out", f"{place}/results.json"),
        ):
            subprocess.run([python, "-m", "qmerge", *command], cwd=place, env=env, check=True)
    tests = [f"tests/test_{name}.py" for name in TESTS]
    sys.exit(subprocess.run([python, "-m", "pytest", "-p", "no:cacheprovider", "-rs", *tests, *arguments], cwd=ROOT, env=env).returncode)


def made(env: Path) -> str:
    """The environment's Python. uv is the installer that can choose lowest versions."""
    stamp, wanted = env / "made-of", hashlib.sha256((ROOT / "pyproject.toml").read_bytes()).hexdigest()
    python = str(env / "bin" / "python")
    if not stamp.exists() or stamp.read_text() != wanted:
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(env)], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", "uv"], check=True)
        uv = (str(env / "bin" / "uv"), "pip", "install", "--quiet", "--python", python)
        subprocess.run([*uv, "--resolution", "lowest-direct", "-r", str(ROOT / "pyproject.toml")], check=True)
        subprocess.run([*uv, "pytest", "hypothesis"], check=True)
        stamp.write_text(wanted)
    return python


if __name__ == "__main__":
    main()
