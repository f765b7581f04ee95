"""Would the fuzzer see a fault? A reader with one in it, for the tests of the machinery.

An input is any bytes; it is accepted where it is ASCII, and the fault lies behind the letter q.
"""

from __future__ import annotations

from random import Random

from fuzz import bending
from fuzz.places import Seeds

WORDS = ("q",)
MAX_LEN = 64


def seeds() -> Seeds:
    return Seeds((b"a", b"b"), (b"\xff",))


def check(data: bytes) -> bool:
    if b"q" in data:
        raise KeyError("q")
    return data.isascii()


def mutate(data: bytes, random: Random) -> bytes:
    return bending.bend_bytes(data, random, WORDS)
