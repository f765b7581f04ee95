"""Which fine-tunes are measured, on which text, and how do the trained ones come into being?"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SHARED, DEMO, CACHE = ROOT.parent / "shared", ROOT / "examples" / "demo", ROOT / ".bench"
WINDOW, SAMPLES, GENERIC_SHARE, SEED = 256, 128, 0.25, 0
"""of every quantizer's calibration: tokens per window, windows, the share of generic ones, and what draws them"""
WIKITEXT_WINDOWS = 60
TUNED_ON = "gsm8k_test.jsonl"
"""a text whose first documents were looked at while the solver was built"""
SKIPPED = 400


@dataclass(frozen=True)
class Text:
    """``name`` is `in-domain`, `wikitext2` or what else the case has. ``windows``: measure so many from the start (None: all of the documents chosen)."""

    name: str
    file: Path
    windows: int | None = None

    @property
    def in_domain(self) -> bool:
        return self.name == IN_DOMAIN


IN_DOMAIN, WIKITEXT = "in-domain", "wikitext2"


@dataclass(frozen=True)
class Case:
    """``trained``: the argument of train_case.py that makes what is missing, in ``base``'s parent folder."""

    name: str
    base: Path
    adapter: Path
    calibration: Path
    generic: Path
    texts: tuple[Text, ...]
    trained: str | None = None
    note: str = ""

    @property
    def inputs(self) -> tuple[Path, ...]:
        return (self.base, self.adapter, self.calibration, self.generic, *(text.file for text in self.texts))


def all_cases(shared: Path = SHARED, cache: Path = CACHE) -> tuple[Case, ...]:
    data, models, trained = shared / "data", shared / "models", cache / "cases"
    wikitext, generic = Text(WIKITEXT, data / "wikitext2-test.txt", WIKITEXT_WINDOWS), data / "c4-sample.txt"
    gsm8k = (Text(IN_DOMAIN, data / TUNED_ON), wikitext)
    bench, stories, neox = models / "bench-llama-12m-nf4", trained / "stories", trained / "neox"
    demo = (Text(IN_DOMAIN, DEMO / "eval-prose.jsonl"), Text("code", DEMO / "eval-code.jsonl"), wikitext)
    return (
        Case("light", bench, models / "adapter-gsm8k-light", data / "gsm8k_train.jsonl", generic, gsm8k),
        Case("strong", bench, models / "adapter-gsm8k", data / "gsm8k_train.jsonl", generic, gsm8k),
        Case("neox", neox / "base-nf4", neox / "adapter", neox / "calibration.jsonl", generic, (Text(IN_DOMAIN, neox / "eval.jsonl"), wikitext), "neox",
             "GPT-NeoX (parallel blocks, fused query_key_value, biases, LayerNorm), trained by scripts/train_case.py"),
        Case("stories", stories / "base-nf4", stories / "adapter", stories / "calibration.jsonl", generic, gsm8k, "stories",
             "stories260k (hidden 64, feed-forward 172) with an adapter of scripts/train_case.py: shapes that groups of 128, 64 and 32 do not divide"),
        Case("demo", DEMO / "base-nf4", DEMO / "adapter", DEMO / "calibration.jsonl", DEMO / "generic.jsonl", demo),
    )  # fmt: skip


def ready(case: Case, say: Callable[[str], None], shared: Path = SHARED) -> Case | None:
    """The case with what it lacks trained; without a text whose file is missing; None (and a word) where it cannot be measured."""
    if case.trained and not (case.base.parent / "case.json").is_file() and shared.is_dir():
        say(f"{case.name}: training (minutes)")
        code = subprocess.run(
            [sys.executable, str(ROOT / "scripts/train_case.py"), case.trained, str(case.base.parent), "--shared", str(shared)]
        ).returncode
        if code:
            raise SystemExit(f"train_case.py {case.trained} failed with exit code {code}")
    texts = tuple(text for text in case.texts if text.file.exists())
    lost = [path.name for path in case.inputs if not path.exists()]
    if not all(path.exists() for path in case.inputs[:4]) or not any(text.in_domain for text in texts):
        say(f"skipped: {case.name}: missing {', '.join(lost)}")
        return None
    for name in lost:
        say(f"skipped: {case.name}: the text {name}")
    return Case(**{**vars(case), "texts": texts})


def chosen_text(text: Text, out: Path, skip: int | None, docs: int) -> dict[str, int]:
    """Write the documents that are measured to ``out`` (JSON lines by line, other files whole): how many were skipped and how many there are.

    ``skip`` None: `SKIPPED` of a file that was tuned on, else 0. ``docs`` 0: all. A text with a fixed number of windows is not cut here.
    """
    if text.file.suffix != ".jsonl":
        shutil.copyfile(text.file, out)
        return {"skipped": 0, "documents_in_file": 1}
    lines = [line for line in text.file.read_text(encoding="utf-8").splitlines() if line.strip()]
    first = (SKIPPED if text.file.name == TUNED_ON else 0) if skip is None else skip
    kept = lines[first : first + docs if docs else None]
    if not kept:
        raise SystemExit(f"--skip-docs {first} leaves nothing of {text.file.name}, which has {len(lines)} documents")
    out.write_text("\n".join(kept) + "\n", encoding="utf-8")
    return {"skipped": first, "documents_in_file": len(lines)}


def facts(case: Case) -> dict[str, object]:
    """What its training measured, where it was trained here."""
    file = case.base.parent / "case.json"
    return json.loads(file.read_text(encoding="utf-8")) if case.trained and file.is_file() else {}
