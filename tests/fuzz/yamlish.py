"""What do the harnesses of YAML readers share: one file in memory, a mutator for it, and documents that several of them should see?"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

from fuzz import bending
from fuzz.places import Seeds

BLOCK = b"a: 1\nb:\n  - x\n  - {c: d}\ne: >\n  folded\n  text\nf: &anchor [1, 2]\ng: *anchor\n? h\n: i\n# comment\n"


def documents(*values: Any) -> Seeds:
    """Each value as JSON, which is YAML, to be accepted; and what every reader of YAML has to survive."""
    return Seeds(tuple(json.dumps(value).encode() for value in values), (BLOCK, b"", b'{"a": "\\ud800"}', b"%YAML 1.1\n---\n{}\n", b"--- {}\n--- {}\n", "\ufeff{}".encode("utf-16"), *(text.encode() for text in bending.YAML_ONLY)))


def mutator(words: Sequence[str]) -> Callable[[bytes, Random], bytes]:
    """A document with its tree bent; as bytes where it is no JSON, and one time in ten."""

    def mutate(data: bytes, random: Random) -> bytes:
        text = bending.bend_text(data.decode("utf-8", "replace"), random, words, yaml=True)
        if text is None or random.random() < 0.1:
            return bending.bend_bytes(data, random, (*words, *bending.YAML_ONLY))
        return text.encode("utf-8", "surrogatepass")

    return mutate


