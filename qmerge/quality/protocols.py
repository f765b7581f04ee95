"""Which windows does a named perplexity protocol cut from a text, and which of their tokens does it score?

A perplexity says little without its protocol: on one model and one text they differ by more than a good 4-bit file costs.

========== =============================================================== =======================================================
name       windows                                                         scored, and how it is averaged
========== =============================================================== =======================================================
gptq       the text tokenized once, cut into windows of ``tokens`` that do all but a window's first token; the mean of the windows' means.
           not overlap, the rest at the end dropped (the papers' code:     The code multiplies a mean over tokens-1 losses by tokens and
           GPTQ, SparseGPT, AWQ)                                           divides by windows x tokens: the factor cancels, each window
                                                                           weighs the same, and the tokens at its borders never count
strided    windows of ``tokens`` that start every ``stride``; transformers' the tokens that no earlier window held. The page's code weighs a
           page on perplexity                                              window by new tokens - 1, though behind the first window all
                                                                           new tokens are in its mean: kept as it is
llama.cpp  windows of ``tokens`` that do not overlap; BOS in place of each  the second half: positions tokens/2+1 and on; the mean over tokens
           window's first token where the tokenizer adds one by itself
lm-eval    each document on its own, behind BOS (or EOS where there is     every token, once; the sum over words, over bytes, and in bits
           none); the last window is filled up with context from before it over bytes of the text (lm-eval 0.4.13, loglikelihood_rolling)
========== =============================================================== =======================================================

Rows of a table (JSONL, Parquet) are the documents of ``lm-eval``; the others join them with an empty line between, as the GPTQ papers join WikiText-2.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from qmerge.errors import Refused, UsageProblem
from qmerge.quality.asked import DEFAULTS, Request
from qmerge.store.texts import read_documents

NO_CONTEXT = 2048
"""where neither config nor tokenizer name a context length, as lm-eval assumes"""


@dataclass(frozen=True)
class Plan:
    """Windows of one protocol over one text. Window w scores ``ids[w][first[w]:]``, and the mean of these losses weighs ``weight[w]``.
    ``words`` and ``bytes`` (lm-eval only): the window's part of its document's, by its share of the document's tokens."""

    protocol: str
    ids: tuple[torch.Tensor, ...]
    first: tuple[int, ...]
    weight: tuple[float, ...]
    doc: tuple[int, ...]
    words: tuple[float, ...]
    bytes: tuple[float, ...]
    settings: dict[str, Any]
    """for the fingerprint: what decides the number"""

    @property
    def counts(self) -> list[int]:
        return [len(ids) - first for ids, first in zip(self.ids, self.first, strict=True)]

    @property
    def highest_id(self) -> int:
        return max(int(ids.max()) for ids in self.ids)


Window = tuple[list[int], int, float, int]
"""ids, index of the first scored token, weight, document"""


def read_request(request: Request) -> list[str]:
    """The documents' texts; ``Refused`` where there are none. Empty rows stay where rows are joined, and are no documents of ``lm-eval``."""
    return [document.text for document in read_documents(request.source, keep_empty=request.protocol != "lm-eval")]


def plan(request: Request, documents: Sequence[str], tokenizer: Any, context: int) -> Plan:
    """Cut ``documents`` for a model that takes ``context`` tokens, which caps the default of ``tokens``. ``Refused`` where the text fills no window."""
    settings = _settled(request, context)
    if request.protocol == "lm-eval":
        windows = _rolling(documents, tokenizer, settings["tokens"])
    else:
        ids = list(tokenizer("\n\n".join(documents), verbose=False)["input_ids"])
        cut = {"gptq": _gptq, "strided": _strided, "llama.cpp": _half}[request.protocol]
        windows = cut(ids, settings, tokenizer)[: settings["windows"]]
    if not windows:
        least = {"gptq": settings["tokens"], "llama.cpp": 2 * settings["tokens"]}.get(request.protocol, 2)
        raise Refused("the text is too short for this protocol", where=request.label, expected=f"at least {least} tokens", found="fewer",
                      fix="give more text, or a smaller window: tokens=N")
    return _planned(request, settings, documents, windows, tokenizer)


def context_length(config: Any, tokenizer: Any = None) -> int:
    """Tokens that a model takes: its config's word, else its tokenizer's, else 2048."""
    inner = getattr(config, "text_config", None) or config
    told = [getattr(inner, name, None) for name in ("n_positions", "max_position_embeddings", "n_ctx")] + [getattr(tokenizer, "model_max_length", None)]
    return next((int(number) for number in told if number is not None and number < 10**12), NO_CONTEXT)  # a tokenizer without a limit says 10**30


def adds_bos(tokenizer: Any) -> bool:
    """Does the tokenizer put BOS first by itself?"""
    return tokenizer.bos_token_id is not None and list(tokenizer("a", verbose=False)["input_ids"])[:1] == [tokenizer.bos_token_id]


def _settled(request: Request, context: int) -> dict[str, Any]:
    """The settings with their defaults, inside the model's context."""
    given, usual = request.settings, DEFAULTS[request.protocol]
    if given.get("tokens", 0) > context:
        raise UsageProblem("the windows are longer than the model's context", where=request.label, expected=f"tokens={context} at most", found=given["tokens"])
    settled: dict[str, Any] = usual | {"tokens": min(usual["tokens"] or context, context)} | given
    if "stride" in usual:
        settled["stride"] = settled["stride"] or max(1, settled["tokens"] // 2)
        if settled["stride"] > settled["tokens"]:
            raise UsageProblem("a stride beyond the window leaves tokens out", where=request.label, expected=f"stride={settled['tokens']} at most", found=settled["stride"])
    return settled


def _gptq(ids: list[int], settings: dict[str, Any], tokenizer: Any) -> list[Window]:
    size = settings["tokens"]
    return [(ids[start : start + size], 1, 1.0, 0) for start in range(0, len(ids) - size + 1, size)]


def _strided(ids: list[int], settings: dict[str, Any], tokenizer: Any) -> list[Window]:
    windows, seen = [], 0
    for start in range(0, len(ids), settings["stride"]):
        end = min(start + settings["tokens"], len(ids))
        new = end - seen
        first = max(1, end - start - new)
        if new > 1:  # one new token weighs 0
            windows.append((ids[start:end], first, float(new - 1), 0))
        seen = end
        if end == len(ids):
            break
    return windows


def _half(ids: list[int], settings: dict[str, Any], tokenizer: Any) -> list[Window]:
    size = settings["tokens"]
    if len(ids) < 2 * size:
        return []  # the tool refuses such a text
    bos, first = adds_bos(tokenizer), size // 2 + 1
    cut = [ids[start : start + size] for start in range(0, len(ids) - size + 1, size)]
    return [([tokenizer.bos_token_id, *window[1:]] if bos else window, first, float(size - first), 0) for window in cut]


def _rolling(documents: Sequence[str], tokenizer: Any, size: int) -> list[Window]:
    prefix = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if prefix is None:
        raise Refused("lm-eval puts BOS or EOS before a text, and the tokenizer defines neither", expected="a BOS or EOS token", found="none")
    windows: list[Window] = []
    for index, text in enumerate(documents):
        own = {"add_special_tokens": False} if text.startswith(tokenizer.decode(prefix)) else {}
        ids = [prefix, *tokenizer(text, verbose=False, **own)["input_ids"]]
        for start in range(1, len(ids), size):
            end = min(start + size, len(ids))
            begin = max(0, end - size - 1)
            windows.append((ids[begin:end], start - begin, float(end - start), index))
    return windows


def _planned(request: Request, settings: dict[str, Any], documents: Sequence[str], windows: list[Window], tokenizer: Any) -> Plan:
    ids, first, weight, doc = zip(*windows, strict=True)
    texts, tokens = hashlib.sha256(), hashlib.sha256()
    for text in documents:
        texts.update(len(text).to_bytes(8, "little") + text.encode("utf-8", "surrogatepass"))
    for row, at, *_ in windows:
        tokens.update(torch.tensor([len(row), at, *row]).numpy().tobytes())
    counts = [len(row) - at for row, at, *_ in windows]
    told = {key: number for key, number in settings.items() if number is not None} | {
        "protocol": request.protocol,
        "windows": len(windows),
        "scored_tokens": sum(counts),
        "documents": len(documents),
        "bos": "the tokenizer adds it" if adds_bos(tokenizer) else "the tokenizer adds none",
        "text_sha256": texts.hexdigest(),
        "token_ids_sha256": tokens.hexdigest(),
    }
    rows = tuple(torch.tensor(row) for row in ids)
    if request.protocol != "lm-eval":
        return Plan(request.protocol, rows, first, weight, doc, (), (), told)
    total = [0] * len(documents)
    for index, count in zip(doc, counts, strict=True):
        total[index] += count
    words, size = [len(re.split(r"\s+", text)) for text in documents], [len(text.encode("utf-8", "surrogatepass")) for text in documents]
    parts = [tuple(per_document[index] * count / total[index] for index, count in zip(doc, counts, strict=True)) for per_document in (words, size)]
    return Plan(request.protocol, rows, first, weight, doc, parts[0], parts[1], told | {"words": sum(words), "bytes": sum(size)})
