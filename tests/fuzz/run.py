"""Give one reader N inputs: libFuzzer's, guided by coverage (atheris), or without it the corpus changed at random.

``python tests/fuzz/run.py READER [--runs N] [--seed S] [--engine auto|atheris|plain] [--found FOLDER] [--into CORPUS]``; ``make fuzz`` does this for every reader.
Ends with one line of JSON on stdout; the exit code is 1 where an input broke the reader's contract. Such inputs lie in --found, one per place in the code.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib
import importlib.util
import json
import logging
import os
import resource
import signal
import sys
import time
import traceback
import warnings
from pathlib import Path
from random import Random
from types import ModuleType
from typing import Any

HERE = Path(__file__).resolve().parent
READERS = ("report", "names", "samples", "adapter", "index", "texts", "results", "sidecar", "suite", "training", "manifest", "recipe", "header", "licence", "budget")
"""the slowest first: of processes side by side the last to end is a short one"""
SLOW_S = 2.0
"""CPU time of one input (a few kB) that counts as a hang"""
HANG_S = 600
"""a process may be stopped for minutes on a machine that others use"""
ROOM = 2 << 30
"""address space that inputs may take beyond what the imports take"""
UNGUIDED = ("qmerge.numerics.",)
"""compiled by numba, which cannot read instrumented code; no reader is there"""


class Count:
    """What became of the inputs so far."""

    def __init__(self, reader: str, engine: str, found: Path) -> None:
        self.reader, self.engine, self.found, self.began = reader, engine, found, time.time()
        self.inputs = self.accepted = self.refused = self.failed = 0
        self.slowest_s = 0.0
        self.places: dict[str, str] = {}

    def row(self) -> dict[str, Any]:
        seconds = time.time() - self.began
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return {
            "reader": self.reader, "engine": self.engine, "inputs": self.inputs, "accepted": self.accepted, "refused": self.refused, "failed": self.failed,
            "seconds": round(seconds, 1), "per_s": round(self.inputs / max(seconds, 1e-9)), "slowest_s": round(self.slowest_s, 3), "peak_bytes": memory, "places": self.places,
        }  # fmt: skip

    def one(self, module: ModuleType, data: bytes) -> bool:
        """Run one input: was it accepted? A failure is kept once per place in the code, and the run goes on."""
        accepted = False
        began = time.monotonic()
        try:
            accepted = module.check(data)
            self.accepted, self.refused = self.accepted + accepted, self.refused + (not accepted)
        except (Exception, MemoryError, RecursionError) as error:  # noqa: BLE001  whatever it is, it is the finding
            self._keep(data, error)
        if (took := time.monotonic() - began) > SLOW_S:  # the machine may have been busy, or the process stopped: only then its own time is asked for, which costs more than a small input
            took = self._again(module, data)
        self.slowest_s = max(self.slowest_s, took)
        self.inputs += 1
        return accepted

    def _again(self, module: ModuleType, data: bytes) -> float:
        """CPU time of an input, s; more than `SLOW_S` is a failure."""
        began = time.process_time()
        with contextlib.suppress(Exception):
            module.check(data)
        if (took := time.process_time() - began) > SLOW_S:
            self._keep(data, TimeoutError(f"{took:.1f} s of CPU time"))
        return took

    def start(self, module: ModuleType) -> None:
        """A harness that refuses all, or accepts all, cannot fail: every seed has to end as its harness says. Not counted as inputs."""
        seeds = module.seeds()
        for data in (*seeds.accepted, *seeds.refused):
            try:
                if module.check(data) is not (data in seeds.accepted):
                    self._keep(data, AssertionError("a seed to be accepted was refused, or the other way round"))
            except (Exception, MemoryError, RecursionError) as error:  # noqa: BLE001  as below
                self._keep(data, error)

    def _keep(self, data: bytes, error: BaseException) -> None:
        self.failed += 1
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "qmerge" in frame.filename or "fuzz" in frame.filename]
        place = f"{type(error).__name__} at " + (f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "the reader")
        if place in self.places:
            return
        name = f"{self.reader}-{hashlib.sha256(data).hexdigest()[:12]}"
        self.places[place] = name
        self.found.mkdir(parents=True, exist_ok=True)
        (self.found / name).write_bytes(data)
        (self.found / f"{name}.txt").write_text(f"{place}\n{''.join(traceback.format_exception(error)[-12:])[-6000:]}", encoding="utf-8", errors="backslashreplace")
        print(f"{self.reader}: {place}: {str(error)[:200]!r} ({name})", file=sys.stderr, flush=True)


def load(reader: str) -> ModuleType:
    """The harness of a reader: ``check(data) -> bool``, ``mutate(data, random) -> data``, ``seeds() -> Seeds``, ``WORDS``, ``MAX_LEN``."""
    return importlib.import_module(f"fuzz.{reader}")


def corpus(reader: str, more: Path | None = None) -> list[bytes]:
    """The committed inputs of a reader, its seeds, and those of a folder more."""
    files = [path for folder in (HERE / "corpus" / reader, more) if folder and folder.is_dir() for path in sorted(folder.iterdir()) if path.is_file()]
    seeds = load(reader).seeds()
    return [*seeds.accepted, *seeds.refused, *(path.read_bytes() for path in files)]


def quiet() -> None:
    """Libraries warn about what they are given; a million times that is too often."""
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)


def limit_memory() -> None:
    """So that an input which asks for too much memory fails instead of taking the machine along."""
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (taken + ROOM, resource.RLIM_INFINITY))


def run_plain(module: ModuleType, count: Count, runs: int, seed: int, more: Path | None) -> None:
    """The same inputs for the same seed and corpus: all of the corpus, then its inputs changed by the reader's mutator or as bytes. Half of these were accepted: most of
    what a reader does lies behind its first refusals."""
    from fuzz.bending import bend_bytes

    random, pool, good = Random(seed), corpus(count.reader, more), []
    signal.signal(signal.SIGALRM, lambda *_: (_ for _ in ()).throw(TimeoutError(f"no answer in {HANG_S} s")))
    for index in range(runs):
        data = pool[index] if index < len(pool) else random.choice(good if good and random.random() < 0.5 else pool)
        if index >= len(pool):
            for _ in range(random.choice((1, 1, 2, 3))):
                data = (module.mutate(data, random) if random.random() < 0.8 else bend_bytes(data, random, module.WORDS))[: module.MAX_LEN]
        signal.alarm(HANG_S)
        accepted = count.one(module, data)
        signal.alarm(0)
        if accepted and index < len(pool):
            good.append(data)


def run_atheris(module: ModuleType, count: Count, runs: int, seed: int, into: Path | None, more: Path | None) -> None:
    """libFuzzer, with the reader's mutator for half of the inputs. Does not return: libFuzzer ends the process; the summary is printed with the last input."""
    import atheris

    def one(data: bytes) -> None:
        count.one(module, data)
        if count.inputs == runs:
            finish(count)

    def mutate(data: bytes, size: int, number: int) -> bytes:
        random = Random(number)
        return (module.mutate(bytes(data), random) if random.random() < 0.6 else atheris.Mutate(data, size))[:size]

    given = into or count.found / f"corpus-{count.reader}"
    given.mkdir(parents=True, exist_ok=True)
    for data in corpus(count.reader):
        (given / hashlib.sha1(data).hexdigest()).write_bytes(data)
    words = count.found / f"{count.reader}.dict"
    words.write_text("".join('"' + "".join(f"\\x{byte:02x}" for byte in word.encode("utf-8", "surrogatepass")) + '"\n' for word in dict.fromkeys(module.WORDS) if word), encoding="ascii")
    options = [f"-max_len={module.MAX_LEN}", f"-timeout={HANG_S}", "-rss_limit_mb=6000", f"-seed={seed}", f"-artifact_prefix={count.found}/", f"-dict={words}", "-len_control=20"]
    # one run more than asked for: libFuzzer counts the first, empty one
    atheris.Setup([f"fuzz-{count.reader}", *options, f"-runs={runs + 1}", str(given), *([str(more)] if more else [])], one, custom_mutator=mutate)
    atheris.Fuzz()


def finish(count: Count) -> None:
    """The summary, then the end: libFuzzer's own would lose the exit code."""
    print(json.dumps(count.row()), flush=True)
    sys.stderr.flush()
    importlib.import_module("fuzz.places").clean()
    os._exit(1 if count.failed else 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("reader", choices=(*READERS, "planted"))
    parser.add_argument("--runs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--engine", choices=("auto", "atheris", "plain"), default="auto")
    parser.add_argument("--found", type=Path, default=Path(".fuzz"))
    parser.add_argument("--into", type=Path, help="folder that libFuzzer's own finds are added to")
    given = parser.parse_args()
    sys.path[0] = str(HERE.parent)  # not this folder: its names are those of readers
    given.found.mkdir(parents=True, exist_ok=True)
    guided = given.engine == "atheris" or (given.engine == "auto" and importlib.util.find_spec("atheris") is not None)
    quiet()
    if guided:
        import atheris

        talk, sys.stderr = sys.stderr, open(os.devnull, "w")  # one line for each module
        package = Path(importlib.util.find_spec("qmerge").submodule_search_locations[0])
        names = [".".join(("qmerge", *path.relative_to(package).with_suffix("").parts)) for path in package.rglob("*.py")]
        with atheris.instrument_imports(include=["qmerge"], exclude=[name for name in names if name.startswith(UNGUIDED)]):
            module = load(given.reader)
        sys.stderr = talk
    else:
        module = load(given.reader)
    limit_memory()
    count = Count(given.reader, "atheris" if guided else "plain", given.found)
    count.start(module)
    if guided:
        run_atheris(module, count, given.runs, given.seed, given.into, None)
    else:
        run_plain(module, count, given.runs, given.seed, given.into)
    finish(count)


if __name__ == "__main__":
    main()
