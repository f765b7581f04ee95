"""Which perplexity has an arm under a named protocol, how sure is it, and how does it stand to the reference's on the same windows?"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from math import log
from typing import Any

import numpy as np
import torch

from qmerge.errors import Refused
from qmerge.quality.heads import answer_losses
from qmerge.quality.measure import CHUNK_BYTES, LOGIT_BYTES, batch_tokens, cluster_labels
from qmerge.quality.metrics import json_metric
from qmerge.quality.protocols import Plan
from qmerge.quality.reference import Answers
from qmerge.quality.sharing import WHOLE, Share
from qmerge.quality.stats import cluster_ratio, safe_exp, transform
from qmerge.types import Metric

Progress = Callable[[int, int], None]


class Perplexities:
    """All protocols of one evaluation: ``add`` measures an arm, ``row`` says what came out. The arm ``separate`` comes first."""

    name = "perplexity"
    """its key in the results and in their fingerprint"""

    def __init__(self, plans: dict[str, Plan]) -> None:
        self.plans = plans
        self.numbers: dict[str, dict[str, np.ndarray]] = {label: {} for label in plans}
        """label -> arm -> what `window_losses` gives"""

    @property
    def fingerprint(self) -> dict[str, Any]:
        return {label: plan.settings for label, plan in self.plans.items()}

    @property
    def highest_id(self) -> int:
        return max((plan.highest_id for plan in self.plans.values()), default=0)

    def batches(self, device: str) -> int:
        """That a model runs, about."""
        return sum(len(list(_batches([len(ids) for ids in plan.ids], batch_tokens(device)))) for plan in self.plans.values())

    def add(self, arm: str, answers: Answers, device: str, progress: Callable[[str], Progress | None], share: Share = WHOLE) -> None:
        """A model in eval mode on ``device``; ``progress`` gives a counter for a name."""
        for turn, (label, plan) in enumerate(self.plans.items()):
            self.numbers[label][arm] = window_losses(answers, plan, device, progress(label), share.later(turn))

    def row(self, arm: str) -> dict[str, Any]:
        """``{label: {"protocol", "metrics"}}`` of results.json."""
        rows = {}
        for label, plan in self.plans.items():
            found = metrics(plan, self.numbers[label][arm], self.numbers[label]["separate"])
            rows[label] = {"protocol": plan.protocol, "metrics": {name: json_metric(metric) for name, metric in found.items()}}
        return rows


@torch.inference_mode()
def window_losses(answers: Answers, plan: Plan, device: str | torch.device, progress: Progress | None = None, share: Share = WHOLE) -> np.ndarray:
    """Per window the sum of its scored tokens' losses, nats, float64 ``[windows]``: fp32 log-softmax over the whole vocabulary, fp64 sums. 0 for windows of batches that are not ``share``'s."""
    sums, done = np.zeros(len(plan.ids)), 0
    if plan.ids:
        answers.prepare(plan.ids[0][None].to(device))
    room = LOGIT_BYTES // (4 * answers.width) if answers.whole else batch_tokens(device)
    mine = [batch for number, batch in enumerate(_batches([len(ids) for ids in plan.ids], room)) if share.has(number)]
    for batch in mine:
        # shorter ones are filled up behind their end, which nothing before it sees
        ids = torch.nn.utils.rnn.pad_sequence([plan.ids[i] for i in batch], batch_first=True)
        if int(ids.max()) >= answers.width:
            raise Refused("a token of the text lies outside a model's vocabulary", expected=f"ids below {answers.width}", found=int(ids.max()), fix="the tokenizer belongs to another model: copy the files of its own into the folder")
        states = answers.states(ids[:, :-1].to(device))  # the last token predicts nothing that is scored
        place = torch.arange(1, ids.shape[1])
        scored = torch.stack([(place >= plan.first[i]) & (place < len(plan.ids[i])) for i in batch])
        row, at = scored.nonzero(as_tuple=True)
        losses = answer_losses(answers, states.flatten(0, 1)[(row * scored.shape[1] + at).to(states.device)], ids[:, 1:][scored], CHUNK_BYTES)
        sums[batch] = np.bincount(row.numpy(), losses, len(batch))
        done += len(batch)
        if progress:
            progress(done, sum(map(len, mine)))
    return sums


def _batches(lengths: Sequence[int], tokens: int) -> Iterator[list[int]]:
    """Windows of like length together (a quarter of the longest may be filling), as many as ``tokens`` allow and at least one."""
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batch and ((len(batch) + 1) * lengths[index] > tokens or lengths[batch[0]] < 0.75 * lengths[index]):
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def metrics(plan: Plan, sums: np.ndarray, reference: np.ndarray) -> dict[str, Metric]:
    """The protocol's own numbers from the window sums of an arm and of the reference; ``ratio`` is paired (of words, for lm-eval).

    Intervals are clustered by window (lm-eval: by document, where there are several and none shares a window); ``n`` counts scored tokens.
    A sum that is not finite leaves the number undefined: without some of its tokens it would be another protocol's.
    """
    counts = np.array(plan.counts)
    weight = np.array(plan.weight)
    clusters = cluster_labels(np.arange(len(counts)), np.array(plan.doc))

    def mean(losses: np.ndarray, over: np.ndarray, unit: str) -> Metric:
        bad = int((~np.isfinite(losses)).sum())
        if bad:
            return Metric(None, None, None, int(counts.sum()), unit, f"{bad} of {len(losses)} windows hold numbers that are not finite")
        return replace(cluster_ratio(losses * weight / counts, over, clusters, unit), n=int(counts.sum()))

    over = {"ppl": weight} if plan.protocol != "lm-eval" else {"word_ppl": np.array(plan.words), "byte_ppl": np.array(plan.bytes)}
    found = {name: transform(mean(sums, share, "nats"), safe_exp, "perplexity") for name, share in over.items()}
    if plan.protocol == "lm-eval":
        found["bits_per_byte"] = transform(mean(sums, over["byte_ppl"], "nats"), lambda nats: nats / log(2), "bits/byte")
    found["ratio"] = transform(mean(sums - reference, next(iter(over.values())), "nats"), safe_exp, "ratio")
    return found
