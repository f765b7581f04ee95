"""Does the reader of per-token arrays answer for any .npz, and can metrics be made of what it accepts?

An input that starts with ``{`` describes the archive (``{"name": ["dtype", [shape], value] or "raw .npy text"}``), so that mutations get past ZIP's checksums;
any other is the file itself.
"""

from __future__ import annotations

import io
import json
import zipfile
from random import Random
from typing import Any

import numpy as np

from fuzz import bending
from fuzz.places import Seeds, folder, refused
from qmerge.errors import QmergeError
from qmerge.quality.sidecar import OWN, SHARED, read_scores

KEYS = (*OWN, *SHARED, "vocabulary_cut", "js")
WORDS = (*(f"prose/nf4/{key}" for key in KEYS), *(f"prose/{key}" for key in SHARED), "prose/separate/kl", "<f4", "<i4", "|b1", "<f8", "<U3", "|O", ">f2", "<c8", "|V7", "<M8[s]", "<i8", "(4,)", "descr", "fortran_order", "shape")
MAX_LEN = 2048
MOST = 4096
"""elements of an array that the harness writes"""
_FILE = folder("sidecar") / "results.npz"


def seeds() -> Seeds:
    own = {f"prose/nf4/{key}": ["|b1" if key == "agree" else "<f4", [4], 1] for key in OWN}
    shared = {f"prose/{key}": ["<i4" if key in ("window", "doc") else "<f4", [4], 0] for key in SHARED}
    whole = own | shared | {"prose/nf4/vocabulary_cut": ["<i8", [], 0]}
    huge = whole | {"prose/nf4/kl": "{'descr': '<f4', 'fortran_order': False, 'shape': (1099511627776,)}"}
    nested = whole | {"prose/nf4/kl": "(" * 200 + ")" * 200, "x": "{'descr': [('a', '<f4', 9), ('b', '|O')], 'fortran_order': True, 'shape': (2, 2)}"}
    accepted, out = (whole, whole | {"prose/nf4/js": ["<f4", [4], 0.5]}), (huge, nested, {})
    raw = (written(json.dumps({"a": ["<f4", [2], 1]}).encode()), b"", b"PK\x05\x06" + bytes(18))
    return Seeds((*(json.dumps(value).encode() for value in accepted), written(json.dumps(whole).encode())), (*(json.dumps(value).encode() for value in out), *raw))


def written(data: bytes) -> bytes:
    """The file that an input stands for."""
    try:
        rows = json.loads(data) if data.startswith(b"{") else None
    except (ValueError, RecursionError):
        rows = None
    if not isinstance(rows, dict):
        return data
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, row in rows.items():
            try:
                archive.writestr((f"{name}.npy".partition("\0")[0] or "x"), _array(row))
            except (ValueError, TypeError, OverflowError, UnicodeEncodeError, MemoryError, SyntaxError, AttributeError):
                continue
    return out.getvalue()


def _array(row: Any) -> bytes:
    out = io.BytesIO()
    if isinstance(row, str):  # a header as it is, and a few bytes
        header = row.encode("latin-1", "replace") + b"\n"
        return b"\x93NUMPY\x01\x00" + (len(header) % 65536).to_bytes(2, "little") + header + bytes(16)
    kind, shape, value = row
    if np.prod([float(size) for size in shape]) > MOST:
        raise ValueError
    np.lib.format.write_array(out, np.full(shape, value).astype(kind), allow_pickle=True)
    return out.getvalue()


def check(data: bytes) -> bool:
    _FILE.write_bytes(written(data))
    try:
        scores = read_scores(_FILE)
    except QmergeError as error:
        return refused(error)
    for arms in scores.values():
        for row in arms.values():
            row.finite.sum(), row.clusters.shape, int(row.vocabulary_cut)  # noqa: B018  the first things that metrics do with them
    return bool(scores)


def mutate(data: bytes, random: Random) -> bytes:
    text = bending.bend_text(data.decode("utf-8", "replace"), random, WORDS) if data.startswith(b"{") else None
    if text is not None and random.random() < 0.05:
        return bending.bend_bytes(written(data), random, WORDS)
    return bending.bend_bytes(data, random, WORDS) if text is None else text.encode("utf-8", "surrogatepass")
