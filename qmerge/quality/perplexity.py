"""Which perplexity has an arm under a named protocol, how sure is it, and how does it stand to the reference's on the same windows?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import log
from typing import Any

import numpy as np
import torch

from qmerge.errors import Refused
from qmerge.quality.heads import answer_losses
from qmerge.quality.measure import BATCH_TOKENS, CHUNK_BYTES, LOGIT_BYTES, cluster_labels
from qmerge.quality.metrics import json_metric
from qmerge.quality.protocols import Plan
from qmerge.quality.reference import Answers
from qmerge.quality.stats import cluster_ratio, safe_exp, transform
from qmerge.types import Metric

Progress = Callable[[int, int], None]


class Perplexities:
    """All protocols of one evaluation: ``add`` measures an arm, ``row`` says what came out. The arm ``separate`` comes first."""

    name = "perplexity"
    """its key in the results and in their fingerprint"""

    def __init__(self, plans: dict[str, Plan]) -> None:
        self.plans = plans
        self.sums: dict[str, dict[str, np.ndarray]] = {label: {} for label in plans}

    @property
    def fingerprint(self) -> dict[str, Any]:
        return {label: plan.settings for label, plan in self.plans.items()}

    @property
    def highest_id(self) -> int:
        return max((plan.highest_id for plan in self.plans.values()), default=0)

    def add(self, arm: str, answers: Answers, device: str, progress: Callable[[str], Progress | None]) -> None:
        """A model in eval mode on ``device``; ``progress`` gives a counter for a name."""
        for label, plan in self.plans.items():
            self.sums[label][arm] = window_losses(answers, plan, device, progress(label))

    def row(self, arm: str) -> dict[str, Any]:
        """``{label: {"protocol", "metrics"}}`` of results.json."""
        rows = {}
        for label, plan in self.plans.items():
            found = metrics(plan, self.sums[label][arm], self.sums[label]["separate"])
            rows[label] = {"protocol": plan.protocol, "metrics": {name: json_metric(metric) for name, metric in found.items()}}
        return rows


@torch.inference_mode()
def window_losses(answers: Answers, plan: Plan, device: str | torch.device, progress: Progress | None = None) -> np.ndarray:
    """Per window the sum of its scored tokens' losses, nats, float64 ``[windows]``: fp32 log-softmax over the whole vocabulary, fp64 sums."""
    sums, done, size = np.zeros(len(plan.ids)), 0, 1
    while done < len(plan.ids):
        length, first = len(plan.ids[done]), plan.first[done]
        end = done + 1
        while end < min(done + size, len(plan.ids)) and (len(plan.ids[end]), plan.first[end]) == (length, first):
            end += 1
        ids = torch.stack(plan.ids[done:end])
        states = answers.states(ids[:, :-1].to(device))[:, first - 1 :]  # the last token predicts nothing that is scored
        if int(ids.max()) >= answers.width:
            raise Refused("a token of the text lies outside a model's vocabulary", expected=f"ids below {answers.width}", found=int(ids.max()))
        losses = answer_losses(answers, states.flatten(0, 1), ids[:, first:].flatten(), CHUNK_BYTES)
        sums[done:end] = losses.reshape(end - done, -1).sum(1)
        done, size = end, max(1, LOGIT_BYTES // (4 * answers.width * length) if answers.whole else BATCH_TOKENS // length)
        if progress:
            progress(done, len(plan.ids))
    return sums


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
