"""What a store for xet uploads does with what `hf_xet` sends it: unpack the blocks of chunks, and put files together from them as the shards say.

The layouts are those of the Xet protocol as huggingface.co/docs/xet describes it, read from what the client sends. Enough for whole uploads: chunks plain, in LZ4, or with their bytes grouped by four before it.
"""

from __future__ import annotations

import struct
from typing import Any

EXPIRES = 4_000_000_000
"""seconds since 1970"""
ENTRY = 48
"""bytes of each record of a shard"""
WITH_CHECKS, WITH_SHA = 1 << 31, 1 << 30


class Store:
    """``blocks``: hash -> chunks. `files` come from a shard, whose blocks must be there."""

    def __init__(self) -> None:
        self.blocks: dict[str, list[bytes]] = {}

    def block(self, name: str, body: bytes) -> None:
        self.blocks[name] = list(chunks(body))

    def files(self, shard: bytes) -> dict[str, bytes]:
        """SHA-256, as the client states it -> content."""
        at, found = ENTRY, {}
        while (head := shard[at : at + ENTRY])[:32] != b"\xff" * 32:
            flags, count = struct.unpack_from("<II", head, 32)
            at += ENTRY
            parts = []
            for place in range(at, at + count * ENTRY, ENTRY):
                first, last = struct.unpack_from("<II", shard, place + 40)
                parts += self.blocks[hexed(shard[place : place + 32])][first:last]
            at += count * ENTRY * (2 if flags & WITH_CHECKS else 1)
            if flags & WITH_SHA:
                found[hexed(shard[at : at + 32])] = b"".join(parts)
                at += ENTRY
        return found


def hexed(raw: bytes) -> str:
    """A hash is four numbers of 64 bits, low byte first."""
    return "".join(f"{number:016x}" for number in struct.unpack("<4Q", raw))


def chunks(body: bytes) -> Any:
    """Those of a block, unpacked; what follows the last one is a directory that is not needed."""
    at = 0
    while at + 8 <= len(body) and body[at] == 0 and not body[at:].startswith(b"XETBLOB"):
        packed, way, size = int.from_bytes(body[at + 1 : at + 4], "little"), body[at + 4], int.from_bytes(body[at + 5 : at + 8], "little")
        raw = body[at + 8 : at + 8 + packed]
        plain = raw if way == 0 else lz4(raw)
        plain = ungrouped(plain) if way == 2 else plain
        assert len(plain) == size, (way, len(plain), size)
        yield plain
        at += 8 + packed


def ungrouped(grouped: bytes) -> bytes:
    """Every first of four bytes, then every second, …, back in order."""
    plain, at = bytearray(len(grouped)), 0
    for place in range(4):
        count = len(range(place, len(grouped), 4))
        plain[place::4] = grouped[at : at + count]
        at += count
    return bytes(plain)


def lz4(frame: bytes) -> bytes:
    """An LZ4 frame, its checksums not looked at."""
    assert frame[:4] == b"\x04\x22\x4d\x18", frame[:8]
    flags, at = frame[4], 7 + (8 if frame[4] & 8 else 0)
    out = bytearray()
    while size := int.from_bytes(frame[at : at + 4], "little"):
        block = frame[at + 4 : at + 4 + (size & 0x7FFFFFFF)]
        out += block if size >> 31 else b""
        if not size >> 31:
            _unpack(block, out)
        at += 4 + len(block) + (4 if flags & 16 else 0)
    return bytes(out)


def _unpack(block: bytes, out: bytearray) -> None:
    at = 0

    def length(start: int) -> int:
        nonlocal at
        if start == 15:
            while True:
                more = block[at]
                at += 1
                start += more
                if more != 255:
                    break
        return start

    while at < len(block):
        token = block[at]
        at += 1
        count = length(token >> 4)
        out += block[at : at + count]
        at += count
        if at >= len(block):
            return
        back = int.from_bytes(block[at : at + 2], "little")
        at += 2
        count = length(token & 15) + 4
        for _ in range(count):
            out.append(out[-back])
