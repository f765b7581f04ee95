"""Do two sets of texts share runs of words, so that one was seen before it is measured on?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Overlap:
    """An n-gram that two sets of documents share, with the first document on each side that holds it."""

    ngram: str
    a_doc: int
    b_doc: int


def ngram_overlap(a_docs: Sequence[str], b_docs: Sequence[str], n: int = 13) -> list[Overlap]:
    """The n-grams of lower-case words (split at white space) that both sides hold, in the order of ``b_docs``, each once.

    Texts of fewer than ``n`` words have no n-gram; they are compared whole.
    """
    seen: dict[int, int] = {}
    for index, text in enumerate(a_docs):
        for gram in _ngrams(text, n):
            seen.setdefault(hash(gram), index)
    found: dict[int, Overlap] = {}
    for index, text in enumerate(b_docs):
        for gram in _ngrams(text, n):
            key = hash(gram)
            if key in seen and key not in found:
                found[key] = Overlap(" ".join(gram), seen[key], index)
    return list(found.values())


def overlapping(a_docs: Sequence[str], b_docs: Sequence[str], n: int = 13) -> list[int]:
    """Which of ``b_docs`` hold an n-gram of ``a_docs``: all of them, where `ngram_overlap` names the first for each n-gram."""
    seen = {hash(gram) for text in a_docs for gram in _ngrams(text, n)}
    return [index for index, text in enumerate(b_docs) if any(hash(gram) in seen for gram in _ngrams(text, n))]


def _ngrams(text: str, n: int) -> Iterator[tuple[str, ...]]:
    words = text.lower().split()
    if words and len(words) < n:
        yield tuple(words)
    for start in range(len(words) - n + 1):
        yield tuple(words[start : start + n])
