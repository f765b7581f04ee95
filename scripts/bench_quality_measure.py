"""How does every arm of a case answer on its texts?

Each arm is loaded from disk by its public loader (`qmerge.quality`), runs in fp32 and is compared with base + adapter kept separate on the same windows. The per-token
numbers are kept beside the checkpoints, with a key of the checkpoint, the windows and the measuring code.
"""

from __future__ import annotations

import gc
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_quality_cases import WINDOW, Case, chosen_text
from bench_quality_make import code_digest

from qmerge.adapters.choices import AdapterSet
from qmerge.errors import QmergeError
from qmerge.quality import arms as loading
from qmerge.quality.attach import as_set
from qmerge.quality.evaluate import check_overlap, load_tokenizer
from qmerge.quality.fingerprint import text_protocol
from qmerge.quality.measure import TokenScores, measure
from qmerge.quality.metrics import json_metric, reference_scores, text_metrics
from qmerge.quality.plain import place
from qmerge.quality.reference import CACHE_BYTES, Answers
from qmerge.quality.served import as_served
from qmerge.store.texts import Document, read_documents
from qmerge.store.windows import Windows, pack_windows, tokenize_documents

METRICS = ("kl_mean", "kl_p99", "ppl", "ppl_ratio", "top1_agreement", "retention", "floor_factor", "nonfinite")
SERVED = "served"
Scores = dict[str, dict[str, TokenScores]]
"""text -> arm -> per-token numbers"""


@dataclass(frozen=True)
class Read:
    """A text as it is measured."""

    windows: Windows
    facts: dict[str, Any]

    @property
    def key(self) -> str:
        return hashlib.sha256(torch.cat(self.windows.ids).numpy().tobytes() + str(WINDOW).encode()).hexdigest()


def first(windows: Windows, count: int | None) -> Windows:
    """The first ``count`` windows; None: all."""
    return replace(windows, **{name: getattr(windows, name)[:count] for name in ("ids", "scored", "doc")})


def read_texts(case: Case, folder: Path, skip: int | None, docs: int, quick: bool) -> dict[str, Read]:
    """Every text of a case, cut as asked for, with its overlap with what the quantizers saw."""
    tokenizer = load_tokenizer(str(case.base), str(case.adapter))
    seen = [Document(text) for text in json.loads((folder / "prepared" / "calibration.json").read_text(encoding="utf-8"))]
    found = {}
    for text in case.texts:
        path = folder / f"text-{text.name}{text.file.suffix}"
        told = chosen_text(text, path, skip, docs)
        documents = read_documents(path)
        tokens = tokenize_documents(documents, tokenizer)
        windows = first(pack_windows(tokens, WINDOW), 8 if quick else text.windows)
        shared = len(check_overlap(seen, documents, allow=True))
        facts = text_protocol(documents, tokens, windows, tokenizer) | told | {"file": text.file.name, "shared_13_grams": shared}
        found[text.name] = Read(windows, facts)
    return found


class Measurer:
    """One case: the reference is loaded when the first arm is not known yet, and stays."""

    def __init__(self, case: Case, prepared: dict[str, Any], folder: Path, device: str, say: Callable[[str], None]) -> None:
        self.case, self.folder, self.device, self.say = case, folder / "scores", device, say
        self.adapter: AdapterSet = as_set(str(case.adapter))
        self.common = {"inputs": prepared["inputs"], "device": device, "code": code_digest(("quality",))}
        self._reference: Answers | None = None
        self.folder.mkdir(parents=True, exist_ok=True)

    def scores(self, name: str, key: str, load: Callable[[], torch.nn.Module], texts: dict[str, Read]) -> dict[str, TokenScores]:
        """Of one arm, per text. Raises what the loader raises."""
        model, found = None, {}
        for text, read in texts.items():
            file = self.folder / f"{name}.{text}.npz"
            whole = json.dumps(self.common | {"arm": key, "text": read.key}, sort_keys=True)
            found[text] = kept(file, whole)
            if found[text] is None:
                model = model if model is not None else load()
                found[text] = measure(self.reference(), model, read.windows, device=self.device)
                keep(file, whole, found[text])
        if model is not None:
            self.say(f"{self.case.name}: {name} measured")
            del model
            gc.collect()
        return found

    def reference(self) -> Answers:
        if self._reference is None:
            model = loading.load_separate(str(self.case.base), self.adapter).model
            self._reference = Answers(place(model, self.device), CACHE_BYTES)
        return self._reference

    def in_memory(self, texts: dict[str, Read]) -> tuple[Scores, str]:
        """The reference arms and the noise floor (`served`), and how that one was served."""
        base, found = str(self.case.base), {}
        loaders = {
            "base": lambda: loading.load_base(base),
            "merged": lambda: loading.load_merged(base, self.adapter),
            "rtn": lambda: loading.load_rtn(base, self.adapter),
        }

        def served() -> torch.nn.Module:
            model, words = as_served(base, self.adapter, device=self.device)
            (self.folder / "served.txt").write_text(words, encoding="utf-8")
            return model

        for name, load in loaders.items():
            found[name] = self.scores(name, "in memory", lambda load=load: self._placed(load()), texts)
        found[SERVED] = self.scores(SERVED, "in memory", served, texts)
        source = (self.folder / "served.txt").read_text(encoding="utf-8")
        found["separate"] = {text: reference_scores(scores) for text, scores in found["base"].items()}
        return {text: {name: found[name][text] for name in found} for text in texts}, source

    def from_disk(self, name: str, folder: str, key: str, texts: dict[str, Read]) -> tuple[dict[str, TokenScores], str | None]:
        """A finished checkpoint, or ({}, why it could not be loaded)."""
        try:
            return self.scores(name, key, lambda: self._placed(loading.load_candidate(name, folder)), texts), None
        except QmergeError as problem:
            return {}, f"not loaded: {' '.join(str(problem).split())}"
        except Exception as problem:  # other people's loaders raise anything; the arm is shown with the words
            return {}, f"not loaded: {type(problem).__name__}: {' '.join(str(problem).split())[:300]}"

    def _placed(self, arm: loading.Arm) -> torch.nn.Module:
        return place(arm.model, self.device)


def keep(file: Path, key: str, scores: TokenScores) -> None:
    arrays = {field.name: getattr(scores, field.name) for field in fields(TokenScores)}
    np.savez(file, key=np.array(key), **arrays)


def kept(file: Path, key: str) -> TokenScores | None:
    """The scores of this ``key``, where they are there."""
    if not file.is_file():
        return None
    with np.load(file) as found:
        if str(found["key"]) != key:
            return None
        arrays = {field.name: found[field.name] for field in fields(TokenScores)}
    return TokenScores(**arrays | {"vocabulary_cut": int(arrays["vocabulary_cut"])})


def rows(scores: dict[str, TokenScores]) -> dict[str, dict[str, Any]]:
    """Arm -> metrics on one text, as JSON."""
    found = {}
    for name, one in scores.items():
        metrics = text_metrics(one, scores["base"], scores[SERVED])
        found[name] = {metric: json_metric(metrics[metric]) for metric in METRICS}
    return found
