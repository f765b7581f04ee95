"""Does the manifest reader answer for any bytes, and the check of a folder against it?

An input is manifest.json of a folder that holds one file more.
"""

from __future__ import annotations

import hashlib
import json
from random import Random

from fuzz import bending
from fuzz.places import Broken, Seeds, folder, refused
from qmerge.errors import QmergeError
from qmerge.store.manifest import MANIFEST, read_manifest, verify_files

WORDS = ("schema_version", "tool", "name", "qmerge", "version", "files", "sha256", "bytes", "model.safetensors", "config.json", "inputs", "base", "revision", "recipe", "versions", "../config.json", "/etc/passwd")
MAX_LEN = 2048
_FOLDER = folder("manifest")
_BYTES = b"{}\n"
(_FOLDER / "config.json").write_bytes(_BYTES)


def seeds() -> Seeds:
    row = {"sha256": hashlib.sha256(_BYTES).hexdigest(), "bytes": len(_BYTES)}
    inputs = {"base": {"name": "org/base", "revision": None, "files": {"model.safetensors": row}}}
    whole = {"schema_version": 1, "tool": {"name": "qmerge", "version": "0.1.0"}, "inputs": inputs, "recipe": {"format": "nf4"}, "versions": {"torch": "2"}, "files": {"config.json": row}}
    lying = whole | {"files": {"config.json": row | {"bytes": 4}}}
    return Seeds(tuple(json.dumps(value).encode() for value in (whole, lying, whole | {"files": {}})), (json.dumps(whole | {"files": {"../x": row, "config.json": row}}).encode(), b"{}", b""))


def check(data: bytes) -> bool:
    (_FOLDER / MANIFEST).write_bytes(data)
    problems = verify_files(_FOLDER)
    try:
        manifest = read_manifest(_FOLDER)
    except QmergeError as error:
        if not problems:
            raise Broken("no problem found in a folder without a manifest") from error
        return refused(error)
    said = {name for problem in problems for name in [problem.rpartition(": ")[0]]}
    listed = manifest["files"]
    if not problems and (set(listed) != {"config.json"} or listed["config.json"] != {"sha256": hashlib.sha256(_BYTES).hexdigest(), "bytes": len(_BYTES)}):
        raise Broken(f"verified with {listed}")
    if not set(listed) - {"config.json"} <= said:
        raise Broken(f"listed {sorted(listed)}, said {sorted(said)}")
    return True


def mutate(data: bytes, random: Random) -> bytes:
    text = bending.bend_text(data.decode("utf-8", "replace"), random, WORDS)
    return bending.bend_bytes(data, random, WORDS) if text is None or random.random() < 0.05 else text.encode("utf-8", "surrogatepass")
