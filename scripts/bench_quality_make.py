"""Who makes which checkpoint, and which of them are there already?

Everything is made in other processes: ours by bench_quality_ours.py, peers by bench_quality_peers.py. A checkpoint is kept with a key of its inputs, settings and, for
ours, of the code; a peer's key holds the peer's version instead. What a tool refuses, or fails at, is kept too, with its words.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import distributions
from pathlib import Path
from queue import Queue
from typing import Any

from bench_quality_arms import Arm
from bench_quality_cases import GENERIC_SHARE, ROOT, SAMPLES, SEED, WINDOW, Case
from bench_quality_ours import stored_bits
from bench_quality_peers import PACKAGES

HERE = Path(__file__).resolve().parent
LAYERS = ("numerics", "store", "adapters", "formats", "pipeline")
AFTERWARDS = ("verify.py", "inspection.py", "renew.py")
"""files of these layers that read what was written and decide none of its bytes"""
PEER_LIMIT_S = 3600
"""after which a peer is stopped and shown as too slow"""
ENVIRONMENTS = {"llmcompressor": "env-llmcompressor", "autoround": "env-autoround"}
"""peers that cannot share ours: their pins contradict gptqmodel's (`make bench-peers` installs them)"""


def code_digest(layers: tuple[str, ...] = LAYERS) -> str:
    """sha256 of the sources that decide a checkpoint's bytes."""
    files = sorted(file for layer in layers for file in (ROOT / "qmerge" / layer).glob("*.py") if file.name not in AFTERWARDS)
    return hashlib.sha256(b"".join(file.name.encode() + file.read_bytes() for file in files)).hexdigest()


def digest(path: Path) -> str:
    """sha256 of a file, or of every file in a folder with its name."""
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    return hashlib.sha256(b"".join(file.name.encode() + hashlib.sha256(file.read_bytes()).digest() for file in files)).hexdigest()


class Maker:
    """The checkpoints of one run of the bench, below ``work``. ``say`` gets a line for each that is made."""

    def __init__(self, work: Path, cache: Path, threads: int, device: str, retry: bool, say: Callable[[str], None]) -> None:
        self.work, self.cache, self.threads, self.device, self.retry, self.say = work, cache, threads, device, retry, say
        self.code, self.prepared, self._servers = code_digest(), {}, {}

    def __enter__(self) -> Maker:
        return self

    def __exit__(self, *_: object) -> None:
        for server in self._servers.values():
            server.communicate()

    def prepare(self, case: Case) -> dict[str, Any]:
        """Windows and merged model of a case, and what identifies its inputs (``inputs``)."""
        folder = self.work / case.name / "prepared"
        inputs = {name: digest(getattr(case, name)) for name in ("base", "adapter", "calibration", "generic")}
        key = {"code": self.code, "inputs": inputs, "recipe": sampling(), "threads": self.threads}
        job = {"kind": "prepare", "recipe": self._recipe(case, {"format": "nf4"}, folder / "never")}
        row = self._once(folder, key, lambda: self._fork(job, folder))
        if row["state"] != "made":
            raise SystemExit(f"{case.name}: cannot be prepared: {row['reason']}")
        windows = digest(folder / "windows.npy")
        self.prepared[case.name] = row | {"inputs": inputs, "windows_sha256": windows, "folder": folder}
        return self.prepared[case.name]

    def side_by_side(self, case: Case, arms: list[Arm]) -> list[dict[str, Any]]:
        """Arms of ours, each with one thread and as many at a time as there are threads: quicker for all, and their seconds compare among themselves only."""
        lanes: Queue[int] = Queue()
        for lane in range(1, self.threads + 1):
            lanes.put(lane)

        def work(arm: Arm) -> dict[str, Any]:
            lane = lanes.get()
            try:
                return self.make(case, arm, lane=lane)
            finally:
                lanes.put(lane)

        with ThreadPoolExecutor(self.threads) as pool:
            return list(pool.map(work, arms))

    def make(self, case: Case, arm: Arm, again: bool = False, lane: int = 0) -> dict[str, Any]:
        """How the arm was made, or why not: ``state``, ``seconds``, ``peak_rss_bytes``, ``others_share``, ``bits_per_weight``. ``again``: into another folder, for its time."""
        prepared = self.prepared[case.name]
        folder = self.work / case.name / (f"{arm.name}-again" if again else arm.name)
        call = self._ours if arm.tool == "ours" else self._peer
        key, work = call(case, arm, folder, prepared) if lane == 0 else self._ours(case, arm, folder, prepared, lane)
        if key.get("version", "") is None:
            return {"state": "absent", "reason": f"{PACKAGES[arm.tool]} is not installed (`make bench-peers`)"}
        if again:
            folder.with_name(f"{folder.name}.made.json").unlink(missing_ok=True)
        row = self._once(folder, key, work)
        if row["state"] == "made":
            row = row | {"bits_per_weight": stored_bits(folder, prepared["linears"], prepared["weights"])}
        return row | {"folder": str(folder), "key": hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()}

    def _recipe(self, case: Case, options: dict[str, Any], out: Path) -> dict[str, Any]:
        paths = {
            "base": str(case.base),
            "adapter": (str(case.adapter),),
            "calibration": str(case.calibration),
            "generic": str(case.generic),
        }
        return paths | sampling() | {"device": self.device, "overwrite": True, "out": str(out)} | options

    def _ours(
        self, case: Case, arm: Arm, folder: Path, prepared: dict[str, Any], lane: int = 0
    ) -> tuple[dict[str, Any], Callable[[], dict[str, Any]]]:
        job = {"kind": "make", "recipe": self._recipe(case, arm.options, folder), "without": arm.without}
        key = {"code": self.code, "options": arm.options, "without": arm.without, "inputs": prepared["inputs"], "recipe": sampling()}
        key |= {"device": self.device, "threads": 1 if lane else self.threads, "beside_others": bool(lane)}
        return json.loads(json.dumps(key)), lambda: self._fork(job, folder, lane)

    def _fork(self, job: dict[str, Any], folder: Path, lane: int = 0) -> dict[str, Any]:
        """One job for the process that forks; each lane has its own, and lane 0 works alone with all threads."""
        threads = 1 if lane else self.threads
        if job["kind"] == "prepare":
            folder.mkdir(parents=True)
        if lane not in self._servers:
            env = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(threads)}
            command = [sys.executable, str(HERE / "bench_quality_ours.py")]
            self._servers[lane] = subprocess.Popen(
                command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
            )
        server = self._servers[lane]
        job |= {
            "out": str(folder),
            "log": str(folder.with_name(f"{folder.name}.log")),
            "done": str(folder.with_name(f"{folder.name}.done")),
            "threads": threads,
        }
        server.stdin.write(json.dumps(job) + "\n")
        server.stdin.flush()
        answer = server.stdout.readline()
        if not answer:
            raise SystemExit(f"bench_quality_ours.py ended with exit code {server.wait()}")
        return json.loads(answer)

    def _peer(self, case: Case, arm: Arm, folder: Path, prepared: dict[str, Any]) -> tuple[dict[str, Any], Callable[[], dict[str, Any]]]:
        python = Path(sys.executable) if arm.tool not in ENVIRONMENTS else self.cache / ENVIRONMENTS[arm.tool] / "bin" / "python"
        inputs = {name: prepared["inputs"][name] for name in ("base", "adapter")} | (
            {"windows": prepared["windows_sha256"]} if arm.calibrated else {}
        )
        key = {"tool": arm.tool, "version": installed(python, PACKAGES[arm.tool]), "options": arm.options, "inputs": inputs}
        job = {
            "tool": arm.tool,
            "model": str(prepared["folder"] / "merged"),
            "ids": str(prepared["folder"] / "windows.npy"),
            "options": arm.options,
            "out": str(folder),
        }
        job |= {"base": str(case.base), "adapter": str(case.adapter), "device": self.device, "threads": self.threads}
        key |= {"device": self.device, "threads": self.threads}
        return key, lambda: self._run_peer(python, job, folder)

    def _run_peer(self, python: Path, job: dict[str, Any], folder: Path) -> dict[str, Any]:
        log, done = (folder.with_name(f"{folder.name}.{kind}") for kind in ("log", "done"))
        done.unlink(missing_ok=True)
        env = os.environ | {
            "GPTQMODEL_CPU_WORKERS": "2",
            "OMP_NUM_THREADS": str(self.threads),
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": str(HERE),
        }
        command = [str(python), str(HERE / "bench_quality_peers.py"), json.dumps(job | {"done": str(done)})]
        with open(log, "wb") as stream:
            try:
                code = subprocess.run(
                    command, env=env, cwd=folder.parent, stdin=subprocess.DEVNULL, stdout=stream, stderr=stream, timeout=PEER_LIMIT_S
                ).returncode
            except subprocess.TimeoutExpired:
                return {"state": "failed", "reason": f"stopped after {PEER_LIMIT_S} s"}
        if code == 0:
            return {"state": "made"} | json.loads(done.read_text(encoding="utf-8"))
        return {"state": "failed", "reason": last_error(log.read_text(encoding="utf-8", errors="replace"), code)}

    def _once(self, folder: Path, key: dict[str, Any], work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What ``work`` answers after filling ``folder``, or answered before for the same ``key``."""
        record = folder.with_name(f"{folder.name}.made.json")
        found = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}
        if (
            found.get("key") == key
            and (folder.is_dir() or found["row"]["state"] != "made")
            and not (self.retry and found["row"]["state"] != "made")
        ):
            return found["row"]
        self.say(f"{folder.parent.name}: making {folder.name}")
        record.unlink(missing_ok=True)  # written last, so that it never stands beside half a checkpoint
        shutil.rmtree(folder, ignore_errors=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        row = work()
        if row["state"] != "made":
            self.say(f"{folder.parent.name}: {folder.name} {row['state']}: {row['reason'][:200]}")
        record.write_text(json.dumps({"key": key, "row": row}), encoding="utf-8")
        return row


def sampling() -> dict[str, Any]:
    """Of the recipe: which windows."""
    return {"samples": SAMPLES, "tokens": WINDOW, "generic_share": GENERIC_SHARE, "seed": SEED}


def installed(python: Path, package: str) -> str | None:
    """The version of a package in the environment of ``python``, without starting it; None where it is not there."""
    folders = [str(folder) for folder in python.parent.parent.glob("lib/python3*/site-packages")]
    names = {package, package.replace("-", "_")}
    return next((one.version for one in distributions(path=folders) if str(one.metadata["Name"]).lower() in names), None)


def last_error(log: str, code: int) -> str:
    """The line that a traceback ends with."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [line for line in lines if line.split(":")[0].endswith(("Error", "Exception", "Refused"))]
    return (errors[-1] if errors else lines[-1] if lines else f"exit code {code}")[:300]
