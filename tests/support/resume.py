"""A tiny model of three blocks to interrupt, its merges in three formats, and what they give undisturbed."""

from __future__ import annotations

import hashlib
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from conftest import TARGETS, run_cli, save_adapter, save_nf4
from support.forked import ended, fork

from qmerge.pipeline import kept
from qmerge.pipeline.plan import plan
from qmerge.pipeline.recipe import Recipe
from qmerge.pipeline.resume import Resume
from qmerge.pipeline.run import calibration_for, run

FORMATS = ("bf16", "nf4", "gptq")
SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 1}


class Jobs:
    def __init__(self, zoo: Any, root: Path) -> None:
        self.zoo, self.root, self.count = zoo, root, 0
        self.log = root / "log"
        source = zoo.float("llama", "halted", **SMALL)
        self.base = zoo._once("halted-nf4", lambda folder: save_nf4(source, folder, True))
        self.adapter = zoo._once("halted-adapter", lambda folder: self._adapter(source, folder))
        self._files: dict[str, dict[str, str]] = {}
        self._seconds: dict[str, float] = {}
        self._prepared: dict[str, tuple[Any, Any]] = {}

    def _adapter(self, source: str, folder: Path) -> str:
        return save_adapter(source, folder, self.base, 0.05, 1, target_modules=TARGETS["llama"])

    def place(self) -> Path:
        """A new folder, to hold an OUT."""
        self.count += 1
        (self.root / str(self.count)).mkdir()
        return self.root / str(self.count)

    def words(self, out: Path, fmt: str, *flags: object) -> list[object]:
        text = [] if fmt == "bf16" else ["--calibration", self.zoo.calibration, "--samples", 4, "--tokens", 32]
        group = ["--group-size", 32] if fmt == "gptq" else []
        return ["merge", "--base", self.base, "--adapter", self.adapter, "--out", out, "--format", fmt, "--device", "cpu", "--shard-size", "40kB", *text, *group, *flags]

    def run(self, out: Path, fmt: str, *flags: object) -> int:
        """In a child of `fork`: the exit code, what was said being in the log. Activations are kept after every block, or that would not be seen in a run of a second."""
        kept.SHARE = 1e9
        answer = run_cli(*self.words(out, fmt, *flags))
        os.write(2, answer.err.encode())
        return answer.code

    def leave(self, out: Path, fmt: str, *flags: object) -> None:
        raise SystemExit(self.run(out, fmt, *flags))

    def prepare(self, fmt: str) -> None:
        """Make the plan and draw the text here, so that children of `fork` have them."""
        if fmt not in self._prepared:
            recipe = Recipe(base=self.base, adapter=(self.adapter,), out=str(self.root / "unused"), format=fmt, device="cpu", shard_size="40kB", samples=4, tokens=32,
                            **({"group_size": 32} if fmt == "gptq" else {}), **({} if fmt == "bf16" else {"calibration": self.zoo.calibration}))  # fmt: skip
            found = plan(recipe)
            self._prepared[fmt] = (found, calibration_for(found))

    def work(self, out: Path, fmt: str, resume: bool = False) -> None:
        """The merge of `words`, without the command line around it: a child does nothing else."""
        kept.SHARE = 1e9
        found, calibration = self._prepared[fmt]
        run(replace(found, recipe=replace(found.recipe, out=str(out))), calibration=calibration, resume=Resume(False) if resume else None)

    def files(self, out: Path) -> dict[str, str]:
        return {path.relative_to(out).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(out.rglob("*")) if path.is_file()}

    def reference(self, fmt: str) -> dict[str, str]:
        """The files of an undisturbed run, which `qmerge verify` found whole."""
        if fmt not in self._files:
            out = self.place() / "out"
            assert run_cli(*self.words(out, fmt)).code == 0, "in this process, so that its children need not import and compile"
            assert run_cli("verify", out).code == 0
            self._files[fmt] = self.files(out)
            self.prepare(fmt)
            again, began = self.place() / "out", time.monotonic()
            assert ended(fork(lambda: self.work(again, fmt), self.log)) == 0
            self._seconds[fmt] = time.monotonic() - began
            assert self.files(again) == self._files[fmt]
        return self._files[fmt]

    def seconds(self, fmt: str) -> float:
        """Of an undisturbed run in a child."""
        self.reference(fmt)
        return self._seconds[fmt]

    def last_words(self, most: int = 3000) -> str:
        return self.log.read_text(errors="replace")[-most:] if self.log.exists() else ""
