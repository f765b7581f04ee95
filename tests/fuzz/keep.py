"""Which of many inputs are worth committing: the fewest and smallest that together reach every step of the reader that any of them reaches.

``python tests/fuzz/keep.py READER [FOLDER] [--grow 3000] [--most 40]`` writes them into tests/fuzz/corpus/READER. Candidates are what lies there already, what libFuzzer left
in FOLDER, and what is found here by changing those that took a new step (--grow). A step is a line of qmerge and the one before it in the same call.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import sys
from pathlib import Path
from random import Random
from types import FrameType, ModuleType
from typing import Any

HERE = Path(__file__).resolve().parent
if __name__ == "__main__":
    sys.path[0] = str(HERE.parent)  # not this folder: its names are those of readers

from fuzz.run import READERS, Count, corpus, limit_memory, load, quiet  # noqa: E402

MAX_BYTES = 4096
PRIVATE = re.compile(rb"(?i)/(home|root|work|tmp|users)\b")
"""what looks like a folder of the machine that found it"""
Steps = set[tuple[str, int, int]]


def steps_of(module: ModuleType, data: bytes, package: str) -> Steps | None:
    """The steps that an input takes; None where it breaks the reader, which belongs into a test of its own."""
    found: Steps = set()

    def calls(frame: FrameType, event: str, argument: Any) -> Any:
        file = frame.f_code.co_filename
        if not file.startswith(package):
            return None
        last = frame.f_code.co_firstlineno

        def lines(frame: FrameType, event: str, argument: Any) -> Any:
            nonlocal last
            if event == "line":
                found.add((file, last, last := frame.f_lineno))
            return lines

        return lines

    sys.settrace(calls)
    try:
        module.check(data)
    except Exception:
        return None
    finally:
        sys.settrace(None)
    return found


def grow(module: ModuleType, pool: list[bytes], steps: dict[bytes, Steps], known: Steps, inputs: int, package: str, count: Count) -> None:
    """Change inputs of ``pool`` at random; those that take a step which none took before join it and ``steps``. What breaks the reader is reported through ``count``."""
    random, seen = Random(len(pool)), known.union(*steps.values())
    for _ in range(inputs):
        data = random.choice(pool)
        for _ in range(random.choice((1, 1, 2, 3))):
            data = module.mutate(data, random)[: module.MAX_LEN]
        if (found := steps_of(module, data, package)) is None:
            count.one(module, data)
        elif not found <= seen and fit(data):
            seen |= found
            pool.append(data)
            steps[data] = found - known


def fit(data: bytes) -> bool:
    return len(data) <= MAX_BYTES and not PRIVATE.search(data)


def fewest(steps: dict[bytes, Steps], most: int) -> list[bytes]:
    """Greedy: again and again the input that adds the most steps, the smaller of two; at most ``most``."""
    chosen, open_steps = [], set().union(*steps.values()) if steps else set()
    while open_steps and len(chosen) < most:
        best = max(steps, key=lambda data: (len(steps[data] & open_steps), -len(data), data))
        if not steps[best] & open_steps:
            break
        chosen.append(best)
        open_steps -= steps[best]
    return chosen


def shrunk(module: ModuleType, data: bytes, wanted: Steps, package: str, tries: int) -> bytes:
    """``data`` with parts cut out that its steps do not need."""
    random = Random(0)
    for _ in range(tries):
        size = random.choice((1, 4, 16, 64, 256))
        start = random.randrange(max(1, len(data) - size + 1))
        shorter = data[:start] + data[start + size :]
        if len(shorter) < len(data) and wanted <= (steps_of(module, shorter, package) or set()):
            data = shorter
    return data


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("reader", choices=READERS)
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--most", type=int, default=40)
    parser.add_argument("--grow", type=int, default=3000, help="inputs tried")
    parser.add_argument("--found", type=Path, default=Path(".fuzz"))
    parser.add_argument("--look-at", type=int, default=3000, help="candidates, the smallest of all")
    parser.add_argument("--tries", type=int, default=150, help="cuts tried at each input that is kept")
    given = parser.parse_args()
    quiet()
    module = load(given.reader)
    limit_memory()
    package = os.path.dirname(sys.modules["qmerge"].__file__)
    seeds = module.seeds()
    known: Steps = set()
    for data in (*seeds.accepted, *seeds.refused):
        module.check(data)  # imports within functions would count as steps
        known |= steps_of(module, data, package) or set()
    candidates = sorted(set(filter(fit, corpus(given.reader, given.folder))), key=len)[: given.look_at]
    steps = {data: found - known for data in candidates if (found := steps_of(module, data, package)) is not None}
    steps = {data: found for data, found in steps.items() if found}
    count = Count(given.reader, "plain", given.found)
    grow(module, candidates, steps, known, given.grow, package, count)
    home = HERE / "corpus" / given.reader
    home.mkdir(parents=True, exist_ok=True)
    for path in home.iterdir():
        path.unlink()
    covered: Steps = set()
    chosen = fewest(steps, given.most)
    for data in chosen:
        small = shrunk(module, data, steps[data] - covered, package, given.tries)
        covered |= steps[data]
        (home / hashlib.sha1(small).hexdigest()[:16]).write_bytes(small)
    print(f"{given.reader}: {len(candidates)} candidates, {len(chosen)} kept, {len(covered)} steps beyond the {len(known)} of its seeds, {sum(path.stat().st_size for path in home.iterdir())} bytes; {count.failed} inputs broke the reader", flush=True)


if __name__ == "__main__":
    main()
