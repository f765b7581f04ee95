"""Does the strict header reader answer for any bytes, and accept nothing that safetensors would read otherwise or not at all?

An input is a whole file.
"""

from __future__ import annotations

import json
import math
from random import Random

from safetensors import SafetensorError, safe_open

from fuzz import bending
from fuzz.places import Broken, Seeds, folder, refused
from qmerge.errors import QmergeError
from qmerge.store.headers import TORCH_DTYPES, read_header

WORDS = ("dtype", "shape", "data_offsets", "__metadata__", "format", "pt", *TORCH_DTYPES, "F4", "F8_E8M0", "C64", '"dtype":"F32"', '"shape":[]', '"data_offsets":[0,0]', "model.layers.0.self_attn.q_proj.weight")
MAX_LEN = 4096
_FILE = folder("header") / "model.safetensors"


def file_of(header: str | bytes, data: int | bytes = 0) -> bytes:
    """A safetensors file with this header, as it is, and so many (or these) bytes of data."""
    raw = header.encode("utf-8", "surrogatepass") if isinstance(header, str) else header
    return len(raw).to_bytes(8, "little") + raw + (bytes(data) if isinstance(data, int) else data)


def seeds() -> Seeds:
    rows = {"a": ("F32", [2, 3], 0, 24), "b": ("U8", [3], 24, 27), "empty": ("BF16", [0, 4], 27, 27), "one": ("I64", [], 27, 35)}
    whole = {name: {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]} for name, (dtype, shape, begin, end) in rows.items()}
    small = {"w": {"dtype": "F8_E4M3", "shape": [1, 1, 4], "data_offsets": [0, 4]}}
    # every dtype that safetensors or its successors may write
    kinds, end, all_kinds = {name: dtype.itemsize for name, dtype in TORCH_DTYPES.items()}, 0, {}
    for name, size in kinds.items():
        all_kinds[f"t.{name}"] = {"dtype": name, "shape": [2], "data_offsets": [end, end + 2 * size]}
        end += 2 * size
    accepted = (file_of(json.dumps({"__metadata__": {"format": "pt"}, **whole}), 35), file_of(json.dumps(small) + "   ", 4), file_of("{}"), file_of(json.dumps(all_kinds), end))
    return Seeds(accepted, (b"", bytes(8), file_of(json.dumps(small), 3)))


def check(data: bytes) -> bool:
    """True where the file was accepted; raises `Broken` where that was wrong."""
    _FILE.write_bytes(data)
    try:
        specs, metadata = read_header(_FILE)
    except QmergeError as error:
        return refused(error)
    end = 8 + int.from_bytes(data[:8], "little")
    for name, spec in specs.items():
        if spec.name != name or spec.start != end or spec.nbytes != math.prod(spec.shape) * TORCH_DTYPES[spec.dtype].itemsize:
            raise Broken(f"{name!r}: {spec} after byte {end}")
        end += spec.nbytes
    if end != len(data) or not all(isinstance(text, str) for pair in metadata.items() for text in pair):
        raise Broken(f"the tensors end at {end} of {len(data)} bytes, metadata {metadata!r}")
    try:
        with safe_open(_FILE, "pt") as file:
            theirs = {name: (tuple(part.get_shape()), part.get_dtype()) for name in file.keys() for part in [file.get_slice(name)]}  # noqa: SIM118  not a dict
            said = file.metadata() or {}
    except SafetensorError as error:
        raise Broken(f"accepted here, and by safetensors: {error}") from error
    if theirs != {name: (spec.shape, spec.dtype) for name, spec in specs.items()} or said != metadata:
        raise Broken(f"safetensors reads {theirs} {said}, qmerge {specs} {metadata}")
    return True


def mutate(data: bytes, random: Random) -> bytes:
    """The header's JSON bent, its length right most of the time, the data as long as the header says most of the time."""
    length = int.from_bytes(data[:8], "little")
    text = bending.bend_text(data[8 : 8 + min(length, len(data))].decode("utf-8", "replace"), random, WORDS)
    if text is None or random.random() < 0.1:
        return bending.bend_bytes(data, random, WORDS)
    if random.random() < 0.5:
        text = laid_out(text)
    raw = text.encode("utf-8", "surrogatepass") + b" " * random.choice((0, 0, 0, 1, 7))
    size = len(data) - 8 - length
    if random.random() < 0.8:
        size = _claimed(text)
    head = len(raw) + (random.choice((-1, 1, 1 << 31, 1 << 63)) if random.random() < 0.05 else 0)
    return (head % (1 << 64)).to_bytes(8, "little") + raw + bytes(max(0, min(size, MAX_LEN)))


def laid_out(text: str) -> str:
    """The header with offsets that fit dtypes and shapes, one tensor after the other, where that can be done: what is wrong then lies elsewhere."""
    try:
        root, end = bending.parse(text), 0
        for name, row in root:
            if name == "__metadata__":
                continue
            fields = dict(row)
            size = math.prod(int(item) for item in fields["shape"]) * TORCH_DTYPES[fields["dtype"]].itemsize
            for pair in row:
                if pair[0] == "data_offsets":
                    pair[1] = [bending.Raw(str(end)), bending.Raw(str(end + size))]
            end += size
        return bending.spell(root)
    except (ValueError, TypeError, KeyError, RecursionError):
        return text


def _claimed(text: str) -> int:
    """Bytes of data that a header's rows ask for, 0 where they make no sense."""
    try:
        rows = json.loads(text)
        return max(int(row["data_offsets"][1]) for name, row in rows.items() if name != "__metadata__")
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError, OverflowError):
        return 0


