"""How far is what a run foresees from what it then takes? Real runs in fresh processes, on the demo and on a model of some hundred megabytes that is made here.

    python scripts/measure_estimates.py            writes docs/measurements/estimates.md and .json (minutes)
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
DEMO, PAGE = ROOT / "examples" / "demo", ROOT / "docs" / "measurements" / "estimates.md"
CHILD = """
import pathlib, re, sys
from qmerge.cli.main import main
try:
    main()
finally:
    pathlib.Path(sys.argv.pop()).write_text(re.search(r"VmHWM:\\s+(\\d+)", pathlib.Path("/proc/self/status").read_text())[1])
"""
MADE = {"layers": 3, "hidden": 768, "ffn": 2304, "heads": 12, "kv_heads": 4, "vocab": 16_000}


@dataclass(frozen=True)
class Taken:
    """What one run took, beside what it had foreseen. Bytes; ``disk`` is the most that lay in the folder around OUT."""

    foreseen: dict[str, Any]
    ram: int
    disk: int
    written: int
    elapsed_s: float


def taken(words: list[str], place: Path) -> Taken:
    """Run ``qmerge merge`` with ``words`` into ``place / "out"``, a folder that exists and is empty. RuntimeError where it fails."""
    note = place.with_name(place.name + ".hwm")
    code = CHILD.replace("main()\nfinally", "words = sys.argv[:]; sys.argv = words[:-1]; main()\nfinally").replace("sys.argv.pop()", "words[-1]")
    began = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-c", code, "merge", *words, "--out", str(place / "out"), "--json", str(note)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ)
    watch = _Watch(place)
    out, err = process.communicate()
    elapsed = time.perf_counter() - began
    most = watch.stop()
    if process.returncode:
        raise RuntimeError(err[-2000:])
    return Taken(json.loads(out)["estimate"], int(note.read_text()) * 1024, most, folder_bytes(place / "out"), elapsed)


def folder_bytes(folder: Path) -> int:
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(root, name)).st_size
            except OSError:  # gone meanwhile
                continue
    return total


class _Watch:
    """The most bytes that a folder held, looked at every 20 ms."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.most, self._end = folder, 0, threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def _look(self) -> None:
        while not self._end.wait(0.02):
            self.most = max(self.most, folder_bytes(self.folder))

    def stop(self) -> int:
        self._end.set()
        self._thread.join()
        return self.most


def made(root: Path, **shape: Any) -> dict[str, str]:
    """A random model of ``shape`` with the demo's tokenizer, and an adapter on it."""
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        import synthetic_llama
    finally:
        sys.path.remove(str(ROOT / "scripts"))
    synthetic_llama.write_base(root / "base", synthetic_llama.Shape(**shape))
    synthetic_llama.write_adapter(root / "adapter", synthetic_llama.Shape(**shape), "base")
    for path in (DEMO / "base-nf4").glob("*token*"):
        shutil.copy(path, root / "base")
    return {"base": str(root / "base"), "adapter": str(root / "adapter")}


def words(model: dict[str, str], fmt: str, *more: str) -> list[str]:
    text = [] if fmt == "bf16" else ["--calibration", str(DEMO / "calibration.jsonl")]
    return ["--base", model["base"], "--adapter", model["adapter"], "--format", fmt, "--device", "cpu", *text, *more]


def main() -> None:
    demo = {"base": str(DEMO / "base-nf4"), "adapter": str(DEMO / "adapter")}
    with tempfile.TemporaryDirectory() as text:
        root = Path(text)
        large = made(root, **MADE)
        cases = {
            "demo, bf16": words(demo, "bf16"), "demo, gptq, 28 × 256": words(demo, "gptq", "--samples", "28", "--tokens", "256"), "demo, nf4, 28 × 256": words(demo, "nf4", "--samples", "28", "--tokens", "256"),
            "34M, bf16": words(large, "bf16"), "34M, gptq, 16 × 512": words(large, "gptq", "--samples", "16", "--tokens", "512"),
        }  # fmt: skip
        rows = {}
        for number, (name, asked) in enumerate(cases.items()):
            (root / f"run{number}").mkdir()
            rows[name] = taken(asked, root / f"run{number}")
            print(name, round(rows[name].ram / rows[name].foreseen["peak_ram_bytes"], 3), flush=True)
    PAGE.write_text(page(rows))
    PAGE.with_suffix(".json").write_text(json.dumps({name: asdict(row) for name, row in rows.items()}, indent=1) + "\n")


def page(rows: dict[str, Taken]) -> str:
    head = f"""# What a run foresees, and what it then takes

`python scripts/measure_estimates.py` writes this file and the JSON beside it. Each run is a process of its own; the estimate is the one that it prints at its start. Memory is the process's peak
(VmHWM), disk the most that lay in the folder around OUT (looked at every 20 ms), time from start to exit. {os.cpu_count()} cores, {platform.system()}, `OMP_NUM_THREADS={os.environ.get("OMP_NUM_THREADS", "not set")}`; other
processes may have run beside it, which the times show. In a small model's run most of the memory is the process with its libraries: the third column leaves that out. Accelerators were not measured.

| run | memory, MB: foreseen → taken | the model's part: foreseen → taken | written, MB: foreseen → taken | disk, MB: needed, most → taken | time, s: foreseen → taken |
|---|---|---|---|---|---|
"""
    lines = []
    for name, row in rows.items():
        told, base = row.foreseen, row.foreseen["process_bytes"]
        lines.append(
            f"| {name} | {told['peak_ram_bytes'] / 1e6:.0f} → {row.ram / 1e6:.0f} | {(told['peak_ram_bytes'] - base) / 1e6:.0f} → {(row.ram - base) / 1e6:.0f} | {told['bytes_written'] / 1e6:.2f} → {row.written / 1e6:.2f} "
            f"| {told['disk_bytes'] / 1e6:.1f}, {told['disk_most_bytes'] / 1e6:.1f} → {row.disk / 1e6:.1f} | {told['elapsed_s']:.0f} → {row.elapsed_s:.0f} |"
        )
    return head + "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
