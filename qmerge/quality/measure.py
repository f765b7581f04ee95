"""How does a candidate answer, token by token, where the reference answers too?

Both models see the same windows. Their last hidden states live for one batch, logits and distributions for one chunk of positions, so that memory
does not grow with window length times vocabulary; what stays is a handful of numbers per scored token. The first position of a window has no context
and is never scored.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields

import numpy as np
import torch

from qmerge.errors import Refused
from qmerge.quality.reference import Answers
from qmerge.store.texts import Windows

LOGIT_BYTES = 64 * 2**20
"""fp32 logits of one model that a batch stands for, and holds where a model's head is not its last step; one window is always allowed"""
CHUNK_BYTES = 16 * 2**20
"""fp32 logits of one model that are turned into distributions at a time"""


@dataclass(frozen=True)
class TokenScores:
    """One element per scored token, in text order; nats. ``kl`` is KL(reference ‖ candidate) over the whole vocabulary, ``delta_p`` the
    candidate's probability of the target minus the reference's, ``confidence`` the reference's highest probability.
    ``window`` and ``doc`` say where a token comes from. NaN marks a token on which either model answered with a non-finite number."""

    nll_ref: np.ndarray  # float32
    nll_cand: np.ndarray  # float32
    kl: np.ndarray  # float32
    agree: np.ndarray  # bool: both rank the same token first
    delta_p: np.ndarray  # float32
    confidence: np.ndarray  # float32
    window: np.ndarray  # int32
    doc: np.ndarray  # int32
    vocabulary_cut: int = 0
    """size to which both vocabularies were cut, where they differ; 0 where they do not"""
    js: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float32))
    """float32, Jensen-Shannon divergence over both whole vocabularies where the models exclude different tokens, else NaN; empty where they never do"""

    @property
    def finite(self) -> np.ndarray:
        return np.isfinite(self.nll_ref) & np.isfinite(self.nll_cand) & np.isfinite(self.kl)

    @property
    def clusters(self) -> np.ndarray:
        return cluster_labels(self.window, self.doc)


def cluster_labels(window: np.ndarray, doc: np.ndarray) -> np.ndarray:
    """Documents where every window holds scored tokens of one document only (one document may fill many windows), else windows."""
    pairs = np.unique(np.stack([window, doc]), axis=1)
    one_document_each = pairs.shape[1] == len(np.unique(window))
    # One long document would be one cluster, and no error could be estimated: its windows are the next best thing.
    return doc if one_document_each and len(np.unique(doc)) > 1 else window


@torch.inference_mode()
def measure(
    reference: torch.nn.Module | Answers,
    candidate: torch.nn.Module | Answers,
    windows: Windows,
    *,
    device: str | torch.device = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> TokenScores:
    """Run both models over the windows. Both must be in eval mode on ``device`` and take ``input_ids`` int64 ``[B, T]``.

    Where the vocabularies differ in size (an adapter that added tokens, a padded head) both are cut to the smaller and renormalized;
    a target outside it is ``Refused``. `Answers` with room remember theirs to these very ``windows`` for the next call.
    """
    ref, cand = (model if isinstance(model, Answers) else Answers(model) for model in (reference, candidate))
    rows: dict[str, list[np.ndarray]] = {f.name: [] for f in fields(TokenScores) if f.name != "vocabulary_cut"}
    cut, done, size = 0, 0, 1
    while done < len(windows):
        length = len(windows.ids[done])
        batch = [i for i in range(done, min(done + size, len(windows))) if len(windows.ids[i]) == length]
        ids = torch.stack([windows.ids[i] for i in batch]).to(device)
        states = ref.states(ids, (id(windows), done, len(batch))), cand.states(ids, (id(windows), done, len(batch)))
        width = min(ref.width, cand.width)
        cut = width if ref.width != cand.width else cut
        _append(rows, (ref, cand), states, ids, [windows.scored[i] for i in batch], [windows.doc[i] for i in batch], done)
        # The vocabulary is only known after a first forward: one window first, then as many as fit.
        done, size = done + len(batch), max(1, LOGIT_BYTES // (4 * width * length))
        if progress:
            progress(done, len(windows))
    arrays = {name: np.concatenate(parts) for name, parts in rows.items()}
    js = arrays.pop("js")
    return TokenScores(**arrays, vocabulary_cut=cut, js=js[:0] if np.isnan(js).all() else js)


def _append(rows: dict[str, list[np.ndarray]], models: tuple[Answers, Answers], states: tuple[torch.Tensor, torch.Tensor], ids: torch.Tensor, scored: list, doc: list, first: int) -> None:
    """Add one batch's tokens: states ``[B, T, …]`` of reference and candidate, ids ``[B, T]``, masks and document indices B times ``[T]``."""
    mask = torch.stack(scored)[:, 1:]
    window = torch.arange(first, first + len(ids)).unsqueeze(1).expand_as(mask)[mask]
    rows["window"].append(window.numpy().astype(np.int32))
    rows["doc"].append(torch.stack(doc)[:, 1:][mask].numpy().astype(np.int32))
    keep = mask.to(ids.device)
    targets = ids[:, 1:][keep]
    width = min(model.width for model in models)
    if len(targets) and int(targets.max()) >= width:
        raise Refused("a token of the text lies outside a model's vocabulary", expected=f"ids below {width}", found=int(targets.max()))
    at_batch, at_position = keep.nonzero(as_tuple=True)
    step = max(1, CHUNK_BYTES // (4 * width))
    parts = []
    for i in range(0, len(targets), step):
        here = at_batch[i : i + step], at_position[i : i + step]
        ref, cand = (model.logits(rows_of[here]) for model, rows_of in zip(models, states, strict=True))
        parts.append(compare_logits(ref[..., :width], cand[..., :width], targets[i : i + step]) | {"js": support_divergence(ref, cand)})
    for name in ("nll_ref", "nll_cand", "kl", "agree", "delta_p", "confidence", "js"):
        dtype = bool if name == "agree" else np.float32
        rows[name].append(np.concatenate([p[name].cpu().numpy() for p in parts]) if parts else np.zeros(0, dtype))


def compare_logits(ref: torch.Tensor, cand: torch.Tensor, targets: torch.Tensor) -> dict[str, torch.Tensor]:
    """The per-token numbers from logits ``[n, V]`` of both models and targets ``[n]``: log-softmax in fp32, the sum of KL in fp64.

    KL is summed as ``p·(log p - log q) - p + q``: the same number, as both sum to 1, but no term is below 0, and an error ε in a
    normalization costs ε² instead of ε. In the plain form fp32 leaves 1e-7, which is more than some noise floors.

    >>> r = compare_logits(torch.zeros(1, 2), torch.zeros(1, 2), torch.tensor([0]))
    >>> float(r["kl"]), round(float(r["nll_ref"]), 4)
    (0.0, 0.6931)
    """
    log_p, log_q = ref.float().log_softmax(-1), cand.float().log_softmax(-1)
    p = log_p.exp()
    top, first = p.max(-1)
    target_p, target_q = (x.gather(-1, targets[:, None]).squeeze(-1) for x in (log_p, log_q))
    return {
        "nll_ref": -target_p,
        "nll_cand": -target_q,
        "kl": divergence(log_p, log_q).float(),
        "agree": first == log_q.argmax(-1),
        "delta_p": target_q.exp() - target_p.exp(),
        "confidence": top,
    }


def divergence(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """KL(p ‖ q) float64 ``[n]`` from log-probabilities ``[n, V]``, in the form that `compare_logits` tells of."""
    p, q, difference = log_p.exp(), log_q.exp(), log_p - log_q
    terms = torch.where(difference.abs() < 1.0, p * (torch.expm1(-difference) + difference), p * difference - p + q)
    # What p excludes (log p = -inf) adds only q; 0 * inf would be NaN. NaN itself stays, to be counted.
    terms = torch.where(p == 0, q, terms)
    return terms.sum(-1, dtype=torch.float64).clamp_min(0.0)  # rounding can leave -1e-9


def support_divergence(ref: torch.Tensor, cand: torch.Tensor) -> torch.Tensor:
    """Jensen-Shannon divergence float32 ``[n]``, nats, from logits ``[n, V]`` and ``[n, V']``, where one model gives a token no probability at all and the
    other does (it lacks it, or its logit is -inf); NaN elsewhere. KL is infinite there, or blind to what was cut; this is at most log 2.

    >>> support_divergence(torch.zeros(1, 1), torch.tensor([[-torch.inf, 0.0]])).item() == torch.tensor(2.0).log().item()
    True
    """
    width = max(ref.shape[-1], cand.shape[-1])
    excluded = [torch.nn.functional.pad(logits.isneginf(), (0, width - logits.shape[-1]), value=True) for logits in (ref, cand)]
    differ = (excluded[0] != excluded[1]).any(-1)
    found = torch.full(differ.shape, torch.nan, device=ref.device)
    if differ.any():
        log_p, log_q = (torch.nn.functional.pad(x[differ].float().log_softmax(-1), (0, width - x.shape[-1]), value=-torch.inf) for x in (ref, cand))
        middle = torch.logaddexp(log_p, log_q) - math.log(2)
        found[differ] = (0.5 * (divergence(log_p, middle) + divergence(log_q, middle))).float()
    return found
