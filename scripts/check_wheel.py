"""Does what `pip install qmerge` gives a person work, with nothing but what it depends on?

    python scripts/check_wheel.py [PIP-REQUIREMENT …] [--out DIR]

Builds an sdist, and the wheel from it; looks for every file of the package, the licence and no test in the wheel; installs it into a new environment without extras, then the sdist in
its place, which has to give the same files, and there runs
``--help``, a bf16 merge of the demo, a 4-bit one, and ``verify`` of both. Measuring the 4-bit one has to name the extra that it takes. Takes one to two minutes and 2 to 7 GB below the
folder for temporary files, removed at the end. Requirements are for pip beside the wheel, as in ``torch==2.13.0``. ``--out``: keep sdist and wheel there.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "examples" / "demo"
SHOWN = ("torch", "transformers", "peft", "bitsandbytes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("requirements", nargs="*")
    parser.add_argument("--out", type=Path)
    options, began = parser.parse_args(), time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="qmerge-wheel-") as folder:
        place = Path(folder)
        wheel = built(options.out.resolve() if options.out else place / "dist")
        faults = faults_of(wheel)
        if not faults:
            programs = installed(wheel, options.requirements, place / "env")
            faults = faults_of_sdist(wheel, programs) + faults_in_use(programs, place)
    for fault in faults:
        print(f"FAILED {fault}")
    print(f"{wheel.name}: {len(faults)} faults, {time.perf_counter() - began:.0f} s")
    sys.exit(bool(faults))


def built(folder: Path) -> Path:
    """The wheel, made from the sdist as an installer of the sdist would. Of a copy of the tree: building leaves folders behind."""
    with tempfile.TemporaryDirectory(prefix="qmerge-source-") as copied:
        source = Path(copied) / "source"
        shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".git", ".venv", "out", "build", "dist", ".bench", ".fuzz", "__pycache__", "*.egg-info", ".hypothesis"))
        run(sys.executable, "-m", "build", "--outdir", str(folder), str(source))
    return max(folder.glob("*.whl"), key=lambda path: path.stat().st_mtime)


def faults_of(wheel: Path) -> list[str]:
    """What is missing in the wheel, or too much."""
    with zipfile.ZipFile(wheel) as opened:
        inside = set(opened.namelist())
    wanted = {path.relative_to(ROOT).as_posix() for path in (ROOT / "qmerge").rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    info = {name for name in inside if ".dist-info/" in name}
    faults = [f"the wheel lacks {name}" for name in sorted(wanted - inside)]
    faults += [f"the wheel has {name}, which is no part of the package" for name in sorted(inside - info - wanted)]
    return faults + ([] if any(name.endswith("licenses/LICENSE") for name in info) else ["the wheel lacks the licence"])


def installed(wheel: Path, requirements: list[str], env: Path) -> Path:
    """The folder of programs of a new environment that has the wheel and what it depends on."""
    run(sys.executable, "-m", "venv", str(env))
    run(str(env / "bin" / "python"), "-m", "pip", "install", "--quiet", str(wheel), *requirements)
    found = {one.metadata["Name"]: one.version for one in importlib.metadata.distributions(path=[str(next(env.glob("lib/python*/site-packages")))])}
    print(f"installed {len(found)} packages: " + ", ".join(f"{name} {found[name]}" for name in SHOWN), flush=True)
    return env / "bin"


def faults_of_sdist(wheel: Path, programs: Path) -> list[str]:
    """What differs where the sdist is installed over the wheel, by pip and with nothing but what pip fetches to build it."""
    before = files_of(programs)
    sdist = next(wheel.parent.glob("-".join(wheel.name.split("-")[:2]) + ".tar.gz"))
    began = time.perf_counter()
    run(str(programs / "python"), "-m", "pip", "install", "--quiet", "--no-deps", "--force-reinstall", str(sdist))
    print(f"installed {sdist.name} in its place, {time.perf_counter() - began:.1f} s", flush=True)
    after = files_of(programs)
    words = {(True, True): "another file", (True, False): "missing", (False, True): "there too"}
    names = sorted({name for name, _ in before.items() ^ after.items()})
    return [f"installed from the sdist, {name} is {words[name in before, name in after]}" for name in names]


def files_of(programs: Path) -> dict[str, str]:
    """Installed file of qmerge -> its digest, but for what says how it was installed."""
    (place,) = programs.parent.glob("lib/python*/site-packages")
    (found,) = importlib.metadata.distributions(name="qmerge", path=[str(place)])
    return {str(file): file.hash.value for file in found.files or () if file.hash and ".dist-info" not in str(file)}


def faults_in_use(programs: Path, place: Path) -> list[str]:
    inputs = ("--base", str(DEMO / "base-nf4"), "--adapter", str(DEMO / "adapter"))
    text, results = str(DEMO / "eval-prose.jsonl"), str(place / "results.json")
    steps = (
        (0, "", ("--help",)),
        (0, "", ("merge", "--format", "bf16", *inputs, "--out", str(place / "bf16"))),
        (0, "", ("verify", str(place / "bf16"), *inputs)),
        (0, "", ("merge", "--format", "gptq", *inputs, "--out", str(place / "gptq"), "--calibration", str(DEMO / "calibration.jsonl"), "--tokens", "128", "--samples", "8", "--curvature-tokens", "0")),
        (0, "", ("verify", str(place / "gptq"))),
        (2, "pip install 'qmerge[gptq]'", ("eval", *inputs, "--candidate", str(place / "gptq"), "--text", text, "--out", results)),
        (2, "pip install 'qmerge[eval]'", ("eval", *inputs, "--candidate", str(place / "bf16"), "--text", text, "--tasks", "piqa", "--out", results)),
        (2, "pip install 'qmerge[sign]'", ("verify", str(place / "bf16"), "--signature", text, "--public-key", text)),
    )
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    faults = []
    for code, said, arguments in steps:
        began = time.perf_counter()
        done = subprocess.run([str(programs / "qmerge"), *arguments], cwd=place, env=env, capture_output=True, text=True)
        print(f"qmerge {arguments[0]}: exit {done.returncode}, {time.perf_counter() - began:.1f} s", flush=True)
        if done.returncode != code or said not in done.stderr or "Traceback" in done.stderr:
            faults.append(f"qmerge {' '.join(arguments)}: exit {done.returncode} instead of {code}\n{done.stderr[-2000:]}")
    return faults


def run(*command: str) -> None:
    """Raises SystemExit with the command's last words where it fails."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}: exit {done.returncode}\n{(done.stdout + done.stderr)[-3000:]}")


if __name__ == "__main__":
    main()
