"""How does a candidate answer, token by token, where the reference answers too?

Both models see the same windows. Their last hidden states live for one batch, logits and distributions for one chunk of positions, so that memory
does not grow with window length times vocabulary; what stays is a handful of numbers per scored token. The first position of a window has no context
and is never scored.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields

import numpy as np
import torch

from qmerge.errors import Refused
from qmerge.quality.divergence import compare_logits, divergence, support_divergence
from qmerge.quality.heads import compare_answers
from qmerge.quality.reference import Answers
from qmerge.quality.sharing import WHOLE, Share
from qmerge.store.windows import Windows

BATCH_TOKENS, DEVICE_BATCH_TOKENS = 1024, 8192
"""tokens that run together on a CPU (more do not fit its caches: measured), and on an accelerator; one window is always allowed"""
LOGIT_BYTES = 64 * 2**20
"""fp32 logits of one model that a batch may hold instead, where a model's head is not its last step"""
CHUNK_BYTES = 16 * 2**20
"""fp32 logits of one model that are turned into numbers at a time"""
__all__ = ["Batches", "TokenScores", "batch_tokens", "cluster_labels", "compare_logits", "divergence", "measure", "measure_share", "support_divergence", "windows_by_batch"]


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
        found: np.ndarray = np.isfinite(self.nll_ref) & np.isfinite(self.nll_cand) & np.isfinite(self.kl)
        return found

    @property
    def clusters(self) -> np.ndarray:
        return cluster_labels(self.window, self.doc)


FIELDS = tuple(one.name for one in fields(TokenScores) if one.name != "vocabulary_cut")
"""what a token has"""


def cluster_labels(window: np.ndarray, doc: np.ndarray) -> np.ndarray:
    """Documents where every window holds scored tokens of one document only (one document may fill many windows), else windows."""
    pairs = np.unique(np.stack([window, doc]), axis=1)
    one_document_each = pairs.shape[1] == len(np.unique(window))
    # One long document would be one cluster, and no error could be estimated: its windows are the next best thing.
    return doc if one_document_each and len(np.unique(doc)) > 1 else window


@dataclass(frozen=True)
class Batches:
    """What some batches of a text gave: number of the batch -> name of a field of `TokenScores` -> one element per scored token."""

    rows: Mapping[int, Mapping[str, np.ndarray]]
    vocabulary_cut: int = 0

    def joined(self) -> TokenScores:
        """One text's scores; here must be all of its batches."""
        arrays = {name: np.concatenate([self.rows[number][name] for number in sorted(self.rows)]) for name in FIELDS}
        js = arrays.pop("js")
        return TokenScores(**arrays, vocabulary_cut=self.vocabulary_cut, js=js[:0] if np.isnan(js).all() else js)


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
    return measure_share(reference, candidate, windows, device=device, progress=progress).joined()


@torch.inference_mode()
def measure_share(
    reference: torch.nn.Module | Answers,
    candidate: torch.nn.Module | Answers,
    windows: Windows,
    *,
    device: str | torch.device = "cpu",
    progress: Callable[[int, int], None] | None = None,
    share: Share = WHOLE,
) -> Batches:
    """`measure` on the batches of one rank's ``share``. ``progress`` counts windows of these."""
    ref, cand = (model if isinstance(model, Answers) else Answers(model) for model in (reference, candidate))
    for model in (ref, cand):
        model.prepare(windows.ids[0][None].to(device))
    width, done, rows = min(ref.width, cand.width), 0, dict[int, dict[str, np.ndarray]]()
    room = LOGIT_BYTES // (4 * width) if ref.whole or cand.whole else batch_tokens(device)
    mine = {number: batch for number, batch in enumerate(windows_by_batch(windows, room)) if share.has(number)}
    for number, batch in mine.items():
        ids = torch.stack([windows.ids[i] for i in batch])
        on_device, key = ids.to(device, non_blocking=True), (id(windows), batch.start, len(batch))
        states = ref.states(on_device, key), cand.states(on_device, key)
        rows[number] = _numbers((ref, cand), states, ids, [windows.scored[i] for i in batch], [windows.doc[i] for i in batch], batch.start)
        done += len(batch)
        if progress:
            progress(done, sum(map(len, mine.values())))
    return Batches(rows, width if ref.width != cand.width else 0)


def windows_by_batch(windows: Windows, tokens: int) -> list[range]:
    """Windows of one length that run together: as many as ``tokens`` allow, and at least one."""
    found, done = list[range](), 0
    while done < len(windows):
        length = len(windows.ids[done])
        stop = min(done + max(1, tokens // length), len(windows))
        stop = next((i for i in range(done, stop) if len(windows.ids[i]) != length), stop)
        found.append(range(done, stop))
        done = stop
    return found


def batch_tokens(device: str | torch.device) -> int:
    return BATCH_TOKENS if torch.device(device).type == "cpu" else DEVICE_BATCH_TOKENS


def _numbers(models: tuple[Answers, Answers], states: tuple[torch.Tensor, torch.Tensor], ids: torch.Tensor, scored: list[torch.Tensor], doc: list[torch.Tensor], first: int) -> dict[str, np.ndarray]:
    """Of one batch's tokens: states ``[B, T, …]`` of reference and candidate, ids ``[B, T]`` on the CPU, masks and document indices B times ``[T]``."""
    mask = torch.stack(scored)[:, 1:]
    window = torch.arange(first, first + len(ids)).unsqueeze(1).expand_as(mask)[mask]
    places = {"window": window.numpy().astype(np.int32), "doc": torch.stack(doc)[:, 1:][mask].numpy().astype(np.int32)}
    targets = ids[:, 1:][mask]
    width = min(model.width for model in models)
    if len(targets) and int(targets.max()) >= width:
        raise Refused("a token of the text lies outside a model's vocabulary", expected=f"ids below {width}", found=int(targets.max()), fix="the tokenizer belongs to another model: copy the files of its own into the folder")
    at_batch, at_position = mask.nonzero(as_tuple=True)
    return compare_answers(models, states, at_batch * ids.shape[1] + at_position, targets, CHUNK_BYTES) | places
