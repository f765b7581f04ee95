"""One evaluation under way: the reference stays loaded, the other arms come and go, and ranks share the batches.

Every rank runs through the same arms in the same order, and waits for the others only to bring the numbers together; each loads what it has batches of.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from qmerge.adapters.choices import AdapterSet
from qmerge.adapters.edits import Edit
from qmerge.errors import Refused
from qmerge.quality import arms as loading
from qmerge.quality.gathering import Found, gathered
from qmerge.quality.measure import batch_tokens, measure_share, windows_by_batch
from qmerge.quality.merging import edited_weights, linear_rows
from qmerge.quality.metrics import json_metric, reference_scores, text_metrics
from qmerge.quality.plain import place
from qmerge.quality.reference import CACHE_BYTES, Answers
from qmerge.quality.served import as_served
from qmerge.quality.sharing import Share, share_of, share_of_all
from qmerge.quality.sidecar import Scores, text_rows
from qmerge.quality.tasks import Answers as ItemAnswers
from qmerge.quality.tasks import OpenSuite, run_suite
from qmerge.ranks import ALONE, Ranks
from qmerge.store.windows import Windows

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Work:
    """What every arm is asked. ``extras``: `Perplexities`, `Generations`; ``edits``: what the adapter does to which parameter of ``foundation``, weights before the merge."""

    windows: dict[str, Windows]
    device: str
    tokenizer: Any
    suite: OpenSuite | None = None
    extras: Sequence[Any] = ()
    foundation: Mapping[str, torch.Tensor] = field(default_factory=dict)
    edits: Mapping[str, Edit] = field(default_factory=dict)


class Run:
    """``add_reference``, then ``add`` for each arm and ``noise_floor``, then ``gather``; what it then holds is of all ranks."""

    def __init__(self, reference: loading.Arm, work: Work, results_dir: str | Path | None, progress: Progress | None, ranks: Ranks = ALONE) -> None:
        self.reference, self.work, self.results_dir, self.progress, self.ranks = reference, work, results_dir, progress, ranks
        self.answers = Answers(reference.model, CACHE_BYTES)
        self.names: list[str] = []
        self.found = Found(batches={text: {} for text in work.windows}, numbers={extra.name: extra.numbers for extra in work.extras})
        self.scores: Scores = {text: {} for text in work.windows}
        self.samples: dict[str, ItemAnswers] = {}
        batches = sum(len(windows_by_batch(windows, batch_tokens(work.device))) for windows in work.windows.values()) + sum(extra.batches(work.device) for extra in work.extras)
        # of a suite every rank answers a part
        self._batches = ranks.size if work.suite else batches

    def add_reference(self) -> None:
        """Its scores are zeros by definition and come with the first arm that is measured; its tasks are run."""
        self._describe(self.reference)
        self._measure_extras("separate", self.answers, share_of_all(self.ranks))
        if self.work.suite:
            self.samples["separate"] = run_suite(self.work.suite, self.reference.model, self.work.tokenizer, self.ranks)

    def add(self, name: str, load: Callable[[], loading.Arm], linears: bool = False) -> None:
        """Load an arm, measure it and let it go. With ``linears`` its linears are set against ΔW."""
        share = self._next(name)
        if share.empty:
            return
        arm = load()
        self._describe(arm)
        if linears:
            mine = {parameter: edit for number, (parameter, edit) in enumerate(self.work.edits.items()) if share.has(number)}
            self.found.about[name]["linears"] = linear_rows(self.work.foundation, edited_weights(arm.model, self.work.edits), mine)
        self._check_vocabulary(arm)
        answers = Answers(place(arm.model, self.work.device))
        self._measure(name, answers, share)
        self._measure_extras(name, answers, share)
        for each, model in ((name, answers), ("separate", self.answers)):
            if model.whole:
                self.found.about[each]["logits"] = "of whole windows: the model works on its logits in a way that is not known here"
        if self.work.suite:
            self.samples[name] = run_suite(self.work.suite, arm.model, self.work.tokenizer, self.ranks)
        del arm, answers
        gc.collect()

    def noise_floor(self, base: str, adapter: AdapterSet, how: dict[str, Any]) -> None:
        """Measure the reference as it is served."""
        share = self._next("served")
        if share.empty:
            return
        model, source = as_served(base, adapter, device=self.work.device, **how)
        self._measure("served", model, share)
        self.found = Found(self.found.about, self.found.batches, self.found.numbers, source)

    def gather(self) -> bool:
        """Bring all ranks' numbers together. True on the first, which then has them; the others have nothing more to do."""
        whole = gathered(self.found, self.ranks)
        if whole is None:
            return False
        self.found = whole
        order = [parameter.removesuffix(".weight") for parameter in self.work.edits]
        for row in whole.about.values():
            if "linears" in row:
                row["linears"] = {name: row["linears"][name] for name in order if name in row["linears"]}
        for extra in self.work.extras:
            extra.numbers = whole.numbers[extra.name]
        for text, measured in whole.batches.items():
            for name in self.names:
                self.scores[text][name] = measured[name].joined()
                self.scores[text].setdefault("separate", reference_scores(self.scores[text][name]))
        return True

    def floor(self) -> dict[str, Any]:
        """Per text, the mean KL of the reference as served to the reference in the evaluation's arithmetic; ``source``: how it was served."""
        return {text: json_metric(text_metrics(arms["served"])["kl_mean"]) | {"source": self.found.served} for text, arms in self.scores.items()}

    def rows(self) -> dict[str, Any]:
        """The ``arms`` of the results: separate after base, then in the order of loading."""
        measured = {text: text_rows(arms) for text, arms in self.scores.items()}
        names = ["base", "separate", *(name for name in self.names if name not in ("base", "served"))]
        return {name: self.found.about[name] | {"texts": {text: rows[name] for text, rows in measured.items()}} | {extra.name: extra.row(name) for extra in self.work.extras} for name in names}

    def _next(self, name: str) -> Share:
        self.names.append(name)
        return share_of(self.ranks, len(self.names) - 1, self._batches)

    def _check_vocabulary(self, arm: loading.Arm) -> None:
        """The adapter may bring tokens, and the text use them. The base knows nothing of them; a candidate must."""
        highest = max((*(int(ids.max()) for windows in self.work.windows.values() for ids in windows.ids), *(extra.highest_id for extra in self.work.extras)), default=0)
        rows = arm.model.get_input_embeddings().weight.shape[0]
        if highest < rows:
            return
        if arm.kind != "base":
            raise Refused("the candidate lacks tokens that the adapter's tokenizer makes of the text", where=arm.name, expected=f"more than {highest} rows in the embedding", found=rows, fix="merge again: the embedding has to be as long as that of base + adapter")
        loading.grow(arm.model, self.reference.model.get_input_embeddings().weight.shape[0])
        self.found.about[arm.name]["note"] = f"tokens from {rows} on are the adapter's; for the base they stand at the mean of the others"

    def _measure(self, arm: str, model: torch.nn.Module | Answers, share: Share) -> None:
        for turn, (text, windows) in enumerate(self.work.windows.items()):
            self.found.batches[text][arm] = measure_share(self.answers, model, windows, device=self.work.device, progress=self._counter(f"{arm} on {text}"), share=share.later(turn))

    def _measure_extras(self, arm: str, answers: Answers, share: Share) -> None:
        for extra in self.work.extras:  # begun by another rank for each arm: there may be one batch alone
            extra.add(arm, answers, self.work.device, lambda what: self._counter(f"{arm}, {what}"), share.later(len(self.names)))

    def _counter(self, label: str) -> Callable[[int, int], None]:
        def counted(done: int, total: int) -> None:
            self.ranks.check()
            if self.progress is not None:
                self.progress(label, done, total)

        return counted

    def _describe(self, arm: loading.Arm) -> None:
        row = {"kind": arm.kind, "path": public_path(arm.path, self.results_dir), "bytes": arm.nbytes}
        self.found.about[arm.name] = row | ({"bytes_note": arm.bytes_note} if arm.bytes_note else {}) | ({"loader": arm.loader} if arm.loader else {})


def public_path(path: str | None, results_dir: str | Path | None) -> str | None:
    """``path`` relative to the results where that stays inside their folder or its parent, else its last name: no output names local folders."""
    if path is None:
        return None
    if results_dir is not None and Path(path).exists():
        relative = os.path.relpath(Path(path).resolve(), Path(results_dir).resolve())
        if relative.split(os.sep).count("..") <= 1:
            return Path(relative).as_posix()
    return Path(path).resolve().name
