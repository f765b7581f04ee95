"""Where do greedy continuations of held-out prompts leave those of the separate model, and how many never do?

Per-token measures show every model the same text. A user's text is the model's own: one token chosen otherwise, and all that follows has another
context. Left out: sampling (two draws differ for reasons that are nobody's loss) and any judgement of which continuation is better.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from qmerge.errors import UsageProblem
from qmerge.quality.metrics import json_metric
from qmerge.quality.reference import Answers
from qmerge.quality.sharing import WHOLE, Share
from qmerge.quality.stats import cluster_quantiles, wilson
from qmerge.store.windows import TokenDoc, Windows
from qmerge.types import Metric

PROMPT_TOKENS = 32
"""the first tokens of a document, where no row says what its prompt is"""
BATCH = 16
"""prompts that are continued together"""
DECILES = tuple(tenth / 10 for tenth in range(11))
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Prompts:
    """``ids``: int64 ``[n]`` each; ``source`` says what of the text they are."""

    ids: tuple[torch.Tensor, ...]
    source: str


class Generations:
    """Continuations of one evaluation: ``add`` lets an arm write them, ``row`` sets them against those of ``separate``, which comes first."""

    name = "generation"

    def __init__(self, prompts: dict[str, Prompts], new_tokens: int, eos: Sequence[int]) -> None:
        self.prompts, self.new_tokens, self.eos = prompts, new_tokens, tuple(eos)
        self.numbers: dict[str, dict[str, np.ndarray]] = {text: {} for text in prompts}
        """text -> arm -> what `continuations` gives"""

    @property
    def fingerprint(self) -> dict[str, Any]:
        about = {"decoding": "greedy", "new_tokens": self.new_tokens, "prompt_tokens": PROMPT_TOKENS, "ends_at": list(self.eos)}
        return about | {"texts": {text: {"prompts": len(found.ids), "source": found.source, "prompt_ids_sha256": _digest(found.ids)} for text, found in self.prompts.items()}}

    @property
    def highest_id(self) -> int:
        return max(int(ids.max()) for found in self.prompts.values() for ids in found.ids)

    def batches(self, device: str) -> int:
        """That a model runs."""
        return sum(-(-len(found.ids) // BATCH) for found in self.prompts.values())

    def add(self, arm: str, answers: Answers, device: str, progress: Callable[[str], Progress | None], share: Share = WHOLE) -> None:
        for turn, (text, found) in enumerate(self.prompts.items()):
            self.numbers[text][arm] = continuations(answers.model, found.ids, self.new_tokens, self.eos, device, progress(f"continuations on {text}"), share.later(turn))

    def row(self, arm: str) -> dict[str, Any]:
        """``{text: {"prompts", "new_tokens", "exact_match", "first_divergence", "divergence_quantiles"}}`` of results.json."""
        rows = {}
        for text, written in self.numbers.items():
            exact, median, quantiles = divergence(written[arm], written["separate"])
            rows[text] = {"prompts": len(written[arm]), "new_tokens": self.new_tokens, "exact_match": json_metric(exact), "first_divergence": json_metric(median), "divergence_quantiles": quantiles}
        return rows


def check_room(new_tokens: int, context: int) -> int:
    """Tokens that are left for a prompt; ``UsageProblem`` where there are none."""
    if new_tokens >= context:
        raise UsageProblem("the continuations do not fit the model's context", where="--new-tokens", expected=f"less than {context}", found=new_tokens)
    return context - new_tokens


def choose_prompts(token_docs: Sequence[TokenDoc], windows: Windows, count: int, room: int) -> Prompts:
    """Up to ``count`` prompts, spread evenly over the text: what the rows call their prompt, else the first 32 tokens of documents, or of windows where
    there are fewer documents than ``count`` (one long file, say). A prompt keeps its last ``room`` tokens."""
    parts = [ids for doc in token_docs if (ids := _prompt_part(doc)) is not None]
    if parts:
        source = "what the rows call their prompt"
    elif len(token_docs) >= min(count, len(windows)):
        source, parts = "the first tokens of documents", [doc.ids[: min(PROMPT_TOKENS, len(doc.ids) - 1)] for doc in token_docs]  # the last one may be an EOS
    else:
        source, parts = "the first tokens of windows", [ids[:PROMPT_TOKENS] for ids in windows.ids]
    parts = [ids[-room:] for ids in parts if len(ids)]
    picked = np.unique(np.linspace(0, len(parts) - 1, min(count, len(parts))).round().astype(int))
    return Prompts(tuple(parts[i] for i in picked), source)


def end_tokens(model: torch.nn.Module, tokenizer: Any) -> list[int]:
    """Ids at which a continuation ends: the tokenizer's EOS and those of the model's generation settings (a chat model has several)."""
    told = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    return sorted({int(one) for one in (*(told if isinstance(told, list) else [told]), tokenizer.eos_token_id) if one is not None})


@torch.inference_mode()
def continuations(model: torch.nn.Module, prompts: Sequence[torch.Tensor], new_tokens: int, eos: Sequence[int], device: str, progress: Progress | None = None, share: Share = WHOLE) -> np.ndarray:
    """The most probable next token, ``new_tokens`` times: int64 ``[prompts, new_tokens]``; after an end token -1. 0 for prompts of batches that are not ``share``'s.

    Prompts of like length go together, shorter ones padded on the left and masked; nothing of the model's own generation settings is used.
    """
    written = np.zeros((len(prompts), new_tokens), np.int64)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    mine = [order[start : start + BATCH] for start in range(0, len(order), BATCH) if share.has(start // BATCH)]
    for done, rows in enumerate(mine, 1):
        written[rows] = _continued(model, [prompts[i].to(device) for i in rows], new_tokens, eos).cpu().numpy()
        if progress:
            progress(sum(map(len, mine[:done])), sum(map(len, mine)))
    return written


def divergence(ours: np.ndarray, theirs: np.ndarray) -> tuple[Metric, Metric, list[float]]:
    """Share of equal continuations (Wilson), median position of the first other token (bootstrap over prompts), and its deciles, from ``[prompts, tokens]``.

    A continuation that never differs is counted at the full length, which it exceeds: the note says how many there are, and a median among them is a lower bound.
    """
    length = ours.shape[1]
    differs = ours != theirs
    never = ~differs.any(1)
    position = np.where(never, length, differs.argmax(1))
    exact = wilson(int(never.sum()), len(ours))
    [median] = cluster_quantiles(position, np.arange(len(position)), [0.5], "tokens")
    if never.any():
        bound = "; the median is a lower bound" if median.value == length else ""
        median = replace(median, note=f"{int(never.sum())} of {len(never)} continuations do not differ in {length} tokens and count as {length}{bound}")
    return exact, median, [float(q) for q in np.quantile(position, DECILES, method="inverted_cdf")]


def _continued(model: torch.nn.Module, prompts: list[torch.Tensor], new_tokens: int, eos: Sequence[int]) -> torch.Tensor:
    longest = max(len(ids) for ids in prompts)
    ids = torch.stack([torch.nn.functional.pad(row, (longest - len(row), 0)) for row in prompts])
    mask = torch.stack([torch.nn.functional.pad(torch.ones_like(row), (longest - len(row), 0)) for row in prompts])
    takes = inspect.signature(getattr(model, "get_base_model", lambda: model)().forward).parameters
    last_only = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}
    ends = torch.tensor(list(eos), device=ids.device)
    written, cache, ended = [], None, torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
    for _ in range(new_tokens):
        place = {"position_ids": (mask.cumsum(1) - 1).clamp_min(0)[:, -ids.shape[1] :]} if "position_ids" in takes else {}
        answer = model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, **place, **last_only)
        cache, chosen = answer.past_key_values, answer.logits[:, -1].float().argmax(-1)
        written.append(chosen.masked_fill(ended, -1))
        ended |= torch.isin(chosen, ends)
        if bool(ended.all()):
            break
        ids, mask = chosen[:, None], torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
    found = torch.stack(written, 1)
    return torch.nn.functional.pad(found, (0, new_tokens - found.shape[1]), value=-1)


def _prompt_part(doc: TokenDoc) -> torch.Tensor | None:
    """What comes before the first scored token, where that is more than a BOS."""
    scored = doc.scored.nonzero()
    return doc.ids[: int(scored[0])] if len(scored) and int(scored[0]) > 1 else None


def _digest(prompts: Sequence[torch.Tensor]) -> str:
    found = hashlib.sha256()
    for ids in prompts:
        found.update(len(ids).to_bytes(8, "little") + ids.numpy().tobytes())
    return found.hexdigest()
