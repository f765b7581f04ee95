"""How do documents become windows of tokens?

Documents get BOS and EOS where the tokenizer defines them, and the stream of all documents is cut into windows of equal length. No window is ever padded: a window is all
tokens, or it is the tail.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from qmerge.errors import Refused, UsageProblem
from qmerge.store.texts import Document


@dataclass(frozen=True)
class TokenDoc:
    """``ids`` int64 ``[n]`` and ``scored`` bool ``[n]`` (True: this token counts as a target; BOS never does)."""

    ids: torch.Tensor
    scored: torch.Tensor


@dataclass(frozen=True)
class Windows:
    """Consecutive windows of one token stream. Per window: ``ids`` int64 ``[T]``, ``scored`` bool ``[T]``, ``doc`` int64 ``[T]``
    (index of the document that the token came from). All windows hold ``tokens`` tokens; only the last may be shorter."""

    ids: tuple[torch.Tensor, ...]
    scored: tuple[torch.Tensor, ...]
    doc: tuple[torch.Tensor, ...]
    tokens: int
    dropped_tokens: int = 0

    def __len__(self) -> int:
        return len(self.ids)


def tokenize_documents(docs: Iterable[Document], tokenizer: Any) -> list[TokenDoc]:
    """Each document's tokens, with BOS before and EOS after when the tokenizer defines them, and never twice.

    A text that already brings its BOS or EOS (a chat template's, say, also with white space behind it) keeps its own.
    """
    return [_tokenize(doc, tokenizer) for doc in docs]


def pack_windows(token_docs: Sequence[TokenDoc], tokens: int, keep_tail: bool = False) -> Windows:
    """Concatenate the documents in order and cut windows of ``tokens``. The rest at the end stays if ``keep_tail``, or if it is all
    there is, and has at least 2 tokens (one to predict from, one to predict); otherwise ``dropped_tokens`` counts it.

    Where BOS and EOS are one token (GPT-2), a document's BOS after the previous one's EOS is not packed a second time.
    """
    if tokens < 2:
        raise UsageProblem("a window needs at least 2 tokens", expected=">= 2", found=tokens)
    ids, scored, doc, last = [], [], [], None
    for index, item in enumerate(token_docs):
        skip = int(len(item.ids) > 1 and last is not None and int(item.ids[0]) == last and not bool(item.scored[0]))
        ids.append(item.ids[skip:])
        scored.append(item.scored[skip:])
        doc.append(torch.full((len(item.ids) - skip,), index, dtype=torch.int64))
        last = int(item.ids[-1]) if len(item.ids) else last
    total = sum(len(part) for part in ids)
    if total < 2:
        raise Refused("the text is too short to predict anything", expected="at least 2 tokens", found=total, fix="give more text")
    cuts = [(start, min(start + tokens, total)) for start in range(0, total, tokens)]
    kept = [c for c in cuts if c[1] - c[0] == tokens or (c[1] - c[0] >= 2 and (keep_tail or len(cuts) == 1))]
    flat = [torch.cat(part) for part in (ids, scored, doc)]
    rows = [tuple(part[start:stop].clone() for start, stop in kept) for part in flat]
    return Windows(rows[0], rows[1], rows[2], tokens=tokens, dropped_tokens=total - sum(stop - start for start, stop in kept))


def text_fingerprint(docs: Sequence[Document], token_docs: Sequence[TokenDoc], tokenizer: Any) -> dict[str, Any]:
    """What must be equal for two measurements to be on the same text: sha256 of the documents (texts and scored spans) and of
    their token ids and masks, the counts, and whether BOS and EOS are added."""
    text, ids = hashlib.sha256(), hashlib.sha256()
    for doc in docs:
        text.update(json.dumps(doc.parts, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n")
    for item in token_docs:
        ids.update(len(item.ids).to_bytes(8, "little"))
        ids.update(item.ids.to(torch.int64).numpy().tobytes())
        ids.update(item.scored.to(torch.uint8).numpy().tobytes())
    return {
        "text_sha256": text.hexdigest(),
        "token_ids_sha256": ids.hexdigest(),
        "documents": len(docs),
        "tokens": sum(len(item.ids) for item in token_docs),
        "bos": "per document" if tokenizer.bos_token_id is not None else "none (the tokenizer defines none)",
        "eos": "per document" if tokenizer.eos_token_id is not None else "none (the tokenizer defines none)",
    }


def _tokenize(doc: Document, tokenizer: Any) -> TokenDoc:
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    ids, scored = _encode(doc, tokenizer)
    if bos is not None:
        own = bool(ids) and ids[0] == bos
        ids, scored = [bos] + (ids[1:] if own else ids), [False] + (scored[1:] if own else scored)
    # "<|im_end|>\n": a template's own end of turn with white space behind it is an EOS too.
    if eos is not None and not (len(ids) > 1 and ids[-1] == eos) and not doc.text.rstrip().endswith(tokenizer.eos_token):
        ids, scored = ids + [eos], scored + [doc.parts[-1][1]]
    return TokenDoc(torch.tensor(ids, dtype=torch.int64), torch.tensor(scored, dtype=torch.bool))


def _encode(doc: Document, tokenizer: Any) -> tuple[list[int], list[bool]]:
    """Token ids and mask without special tokens. A token that reaches into a scored part is scored: the joined text is tokenized as
    one, as in training, so a token may straddle the border."""
    options = {"add_special_tokens": False, "verbose": False}
    if len(doc.parts) == 1:
        ids = list(tokenizer(doc.text, **options)["input_ids"])
        return ids, [doc.parts[0][1]] * len(ids)
    if not getattr(tokenizer, "is_fast", False):  # no offsets: the parts are tokenized one by one
        pieces = [(list(tokenizer(text, **options)["input_ids"]), flag) for text, flag in doc.parts]
        return [i for ids, _ in pieces for i in ids], [flag for ids, flag in pieces for _ in ids]
    encoded = tokenizer(doc.text, return_offsets_mapping=True, **options)
    borders, end = [], 0
    for text, flag in doc.parts:
        borders.append((end, end + len(text), flag))
        end += len(text)
    masks = [any(flag and start < stop and b > start and a < stop for start, stop, flag in borders) for a, b in encoded["offset_mapping"]]
    return list(encoded["input_ids"]), masks
