"""Does opening a model folder answer for any index and any shards, without a look at a file outside of it?

An input is the index, a zero byte, and the headers of up to two shards behind zero bytes.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from random import Random

from fuzz import bending
from fuzz.header import file_of, laid_out
from fuzz.places import Broken, Opened, Seeds, folder, refused
from qmerge.errors import QmergeError
from qmerge.store.checkpoint import INDEX, open_checkpoint

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
BAIT = "bait.safetensors"
WORDS = (*SHARDS, f"../{BAIT}", f"./{SHARDS[0]}", f"sub/../../{BAIT}", f"/dev/shm/{BAIT}", "weight_map", "metadata", "total_size", "a", "b", "c", "dtype", "shape", "data_offsets", "F32", "U8", "config.json", INDEX)
MAX_LEN = 2048
_ROOT = folder("index")
_FOLDER = _ROOT / "model"
_FOLDER.mkdir()
(_FOLDER / "config.json").write_text('{"model_type": "llama"}')
(_ROOT / BAIT).write_bytes(file_of(json.dumps({"a": {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}}), 2))


def _row(begin: int, end: int) -> dict[str, object]:
    return {"dtype": "U8", "shape": [end - begin], "data_offsets": [begin, end]}


def seeds() -> Seeds:
    index = {"metadata": {"total_size": 9}, "weight_map": {"a": SHARDS[0], "b": SHARDS[0], "c": SHARDS[1]}}
    shards = ({"a": _row(0, 2), "b": _row(2, 4)}, {"__metadata__": {"format": "pt"}, "c": _row(0, 5)})
    whole = joined(json.dumps(index), *map(json.dumps, shards))
    bait = joined(json.dumps({"weight_map": {"a": f"../{BAIT}"}}), "{}", "{}")
    one = joined(json.dumps({"weight_map": {"a": SHARDS[0]}}), json.dumps({"a": _row(0, 1)}))
    return Seeds((whole, one), (bait, b"{}", joined('{"weight_map":{}}', "{}", "{}"), joined(json.dumps(index), "{}", json.dumps(shards[1]))))


def joined(*parts: str) -> bytes:
    return b"\0".join(part.replace("\0", "").encode("utf-8", "surrogatepass") for part in parts)


def check(data: bytes) -> bool:
    index, *headers = data.split(b"\0")[:3]
    (_FOLDER / INDEX).write_bytes(index)
    for name, header in zip(SHARDS, (*headers, None, None), strict=False):
        if header is None:
            (_FOLDER / name).unlink(missing_ok=True)
        else:
            (_FOLDER / name).write_bytes(file_of(header, _claimed(header)))
    with Opened() as opened:
        try:
            checkpoint = open_checkpoint(_FOLDER)
        except QmergeError as error:
            accepted = refused(error)
        else:
            accepted = True
    for path in opened.paths:
        if isinstance(path, (str, os.PathLike)) and Path(path).resolve().parent != _FOLDER:
            raise Broken(f"opened {path}")
    if not accepted:
        return False
    inside = {path.name for path in _FOLDER.iterdir()}
    if not {spec.file for spec in checkpoint.specs.values()} <= inside or any(path.parent != _FOLDER for path in checkpoint.files()):
        raise Broken(f"files {checkpoint.files()}")
    named = json.loads(index)["weight_map"]
    if {name: spec.file for name, spec in checkpoint.specs.items()} != named:
        raise Broken(f"index {named}, specs {checkpoint.specs}")
    for spec in checkpoint.specs.values():
        if len(checkpoint.load(spec.name).flatten()) != spec.nbytes // checkpoint.load(spec.name).element_size():
            raise Broken(f"{spec} loads as {checkpoint.load(spec.name).shape}")
    return True


def _claimed(header: bytes) -> int:
    """Bytes that the shard's tensors say they take, as far as this harness goes along."""
    found = [int(part.split(b"]")[0]) for part in header.split(b",")[1:] if part.split(b"]")[0].strip().isdigit()]
    return min(max(found, default=0), 512)


def mutate(data: bytes, random: Random) -> bytes:
    parts = data.split(b"\0")[:3]
    which = random.choice((0, 0, *range(len(parts))))
    text = bending.bend_text(parts[which].decode("utf-8", "replace"), random, WORDS)
    if text is None or random.random() < 0.1:
        parts[which] = bending.bend_bytes(parts[which], random, WORDS)
    else:
        text = laid_out(text) if which and random.random() < 0.6 else text
        parts[which] = text.encode("utf-8", "surrogatepass")
    if random.random() < 0.03:
        parts = parts[: random.randrange(1, 4)] if random.random() < 0.5 else [*parts, b"{}"]
    return b"\0".join(parts)
