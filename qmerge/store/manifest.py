"""What is in an output folder, what was it made from, and is it still what was written?

``manifest.json`` names inputs, recipe, versions and a SHA-256 for every other file of the folder. It holds nothing about the
machine: inputs go by folder name or hub id, and absolute paths are cut to their last component. A manifest may come from a stranger:
its names lead nowhere but into the folder, and of what lies there only regular files are opened.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any, Protocol

from qmerge import __version__
from qmerge.errors import Refused
from qmerge.store.durable import json_bytes
from qmerge.store.jsonfiles import read_object
from qmerge.store.regular import open_plain

MANIFEST = "manifest.json"
SCHEMA_VERSION = 1
SEAL = "manifest_sha256"
"""the manifest's own digest, over all its other fields: against a lost bit, not against somebody who computes it anew (docs/signing.md)"""
SIGNATURE = "model.sig"
"""the name that model-transparency's tools look for in a published folder"""
_BY_THE_HUB = (".gitattributes", SIGNATURE)
_BY_THE_HUBS_CLIENT = ".cache/huggingface/"
_SHA256 = re.compile(r"[0-9a-f]{64}")


class Input(Protocol):
    """What a checkpoint and an adapter have in common."""

    @property
    def name(self) -> str: ...
    @property
    def revision(self) -> str | None: ...
    def files(self) -> list[Path]: ...
    def config_files(self) -> list[Path]: ...


def digest_file(path: Path, most_bytes: int | None = None) -> dict[str, Any]:
    """``{"sha256": hex, "bytes": count}`` of one regular file; of its first ``most_bytes`` and one more where it is longer. Raises OSError for what is no regular file."""
    digest, count = hashlib.sha256(), 0
    with open_plain(path) as file:
        buffer = memoryview(bytearray(1 << 22))
        while size := file.readinto(buffer if most_bytes is None else buffer[: most_bytes + 1 - count]):
            digest.update(buffer[:size])
            count += size
    return {"sha256": digest.hexdigest(), "bytes": count}


def list_files(folder: Path) -> list[str]:
    """Every file and link under ``folder``, as sorted relative names with ``/``, without the manifest. Refused where a folder in it cannot be listed."""

    def unreadable(error: OSError) -> None:
        raise Refused("A folder cannot be listed.", where=Path(error.filename or folder).name, found=error.strerror, fix="see that the folder may be read and listed (ls -la), then run the same command again")

    names = []
    for root, folders, files in os.walk(folder, onerror=unreadable):
        links = [name for name in folders if os.path.islink(os.path.join(root, name))]
        names += [(Path(root) / name).relative_to(folder).as_posix() for name in files + links]
    return sorted(name for name in names if name != MANIFEST)


def digest_files(folder: Path, known: Mapping[str, dict[str, Any]] | None = None) -> dict[str, dict[str, Any]]:
    """Relative name -> ``{"sha256", "bytes"}`` for every file under ``folder`` but the manifest, sorted. Refused if one is no regular file.

    ``known``: digests of files that were hashed while they were written.
    """
    known = known or {}
    for name in list_files(folder):
        if not (folder / name).is_file() or (folder / name).is_symlink():
            raise Refused("An output folder may hold regular files only.", where=name, found="a link or a special file", fix="put a copy of the file in its place")
    return {name: known.get(name) or digest_file(folder / name) for name in list_files(folder)}


def input_digests(source: Input) -> dict[str, Any]:
    """``{"name", "revision", "files": {name: {"sha256", "bytes"}}}`` of a Checkpoint or LoraAdapter: weights, configs and index."""
    paths = sorted(source.files() + source.config_files(), key=lambda path: path.name)
    return {"name": source.name, "revision": source.revision, "files": {path.name: digest_file(path) for path in paths}}


def portable(value: Any) -> Any:
    """``value`` as JSON data without absolute paths: ``portable({"text": "/home/me/chat.jsonl"}) == {"text": "chat.jsonl"}``. Bytes of a name that are no UTF-8 are spelt ``\\udcff``: a file
    of JSON could not hold them."""
    if isinstance(value, Mapping):
        return {_utf8(str(key)): portable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [portable(item) for item in value]
    if isinstance(value, PurePath):
        return _utf8(value.name if value.is_absolute() or str(value).startswith("~") else value.as_posix())
    if isinstance(value, str) and "\n" not in value and (os.path.isabs(value) or value.startswith("~/")):
        return _utf8(PurePath(value).name)
    return _utf8(value) if isinstance(value, str) else value


def _utf8(text: str) -> str:
    return text if text.isprintable() else text.encode("utf-8", "backslashreplace").decode("utf-8")


def build_manifest(
    folder: Path,
    *,
    inputs: Mapping[str, Any],
    recipe: Mapping[str, Any],
    versions: Mapping[str, str],
    extra: Mapping[str, Any] | None = None,
    known: Mapping[str, dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """The manifest of the finished files in ``folder``. ``inputs`` maps a role ("base", "adapter") to :func:`input_digests`' result.

    ``extra`` adds fields of the caller beside these; one that has the name of a field above is overruled by it.
    """
    return sealed({
        **portable(extra or {}),
        "schema_version": SCHEMA_VERSION,
        "tool": {"name": "qmerge", "version": __version__},
        "inputs": portable(inputs),
        "recipe": portable(recipe),
        "versions": portable(versions),
        "files": digest_files(folder, known),
    })  # fmt: skip


def sealed(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """``manifest`` with its own digest, in place of one that it may have had."""
    rest = {key: value for key, value in manifest.items() if key != SEAL}
    return rest | {SEAL: hashlib.sha256(json_bytes(rest)).hexdigest()}


def seal_fault(folder: Path) -> str | None:
    """What is wrong with the manifest as a file, judged by its own digest and by the one way in which qmerge writes it; None where it is as it was written."""
    manifest = read_manifest(folder)
    if SEAL not in manifest:
        return f"{MANIFEST} has no digest of its own"
    if sealed(manifest)[SEAL] != manifest[SEAL]:
        return f"{MANIFEST} is not what its own digest says"
    return None if digest_file(folder / MANIFEST)["sha256"] == hashlib.sha256(json_bytes(manifest)).hexdigest() else f"{MANIFEST} was written anew, or a byte between its fields has changed"


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of an output folder. Refused: missing, malformed, written by another tool or by a newer schema."""
    manifest = read_object(Path(folder) / MANIFEST, what="qmerge's manifest")
    tool, files = manifest.get("tool"), manifest.get("files")
    if not isinstance(tool, dict) or tool.get("name") != "qmerge" or not isinstance(files, dict):
        raise Refused("This manifest was not written by qmerge.", where=MANIFEST, expected='"tool": {"name": "qmerge"} and "files"')
    if manifest.get("schema_version") != SCHEMA_VERSION:
        raise Refused("This manifest has another schema.", where=MANIFEST, expected=SCHEMA_VERSION, found=manifest.get("schema_version"),
                      fix="use the version of qmerge that wrote it")
    if fault := _fault(manifest):
        raise Refused(f"This manifest is malformed: {fault}.", where=MANIFEST, fix="do not use this checkpoint: qmerge writes no such manifest")
    return manifest


def _fault(manifest: Mapping[str, Any]) -> str | None:
    """What in a manifest could lead a reader astray: names that leave the folder, digests that are none."""
    for name, row in manifest["files"].items():
        if not is_inside(name):
            return f"{ascii(name)[:200]} is no name of a file inside the folder"
        if not is_digest(row):
            return f"{name} has no SHA-256 and size"
    for key in ("inputs", "recipe", "versions", "linears"):
        if not isinstance(manifest.get(key, {}), dict):
            return f"{key} is no object"
    for role, row in manifest.get("inputs", {}).items():
        if not isinstance(row, dict) or not isinstance(row.get("files", {}), dict) or not all(is_digest(digest) for digest in row.get("files", {}).values()):
            return f"the input {ascii(role)[:80]} has files without SHA-256 and size"
    return None


def is_inside(name: str) -> bool:
    """Is it a relative name, with ``/``, that stays in its folder, and not the manifest's own?"""
    parts = name.split("/")
    return bool(name) and name.isprintable() and name != MANIFEST and len(name) <= 1024 and not any(part in ("", ".", "..") for part in parts) and not set(name) & set("\\:")


def is_digest(row: Any) -> bool:
    """Is it ``{"sha256": 64 hex digits, "bytes": a count}``?"""
    if not isinstance(row, dict) or row.keys() != {"sha256", "bytes"} or not isinstance(row["sha256"], str) or not _SHA256.fullmatch(row["sha256"]):
        return False
    return isinstance(row["bytes"], int) and not isinstance(row["bytes"], bool) and 0 <= row["bytes"] < 2**63


def special_files(folder: Path) -> list[str]:
    """Names of what is neither a regular file nor a folder, the manifest's too: links, pipes, sockets, devices. Opens nothing."""
    names = [*list_files(folder), *([MANIFEST] if os.path.lexists(folder / MANIFEST) else [])]
    return [name for name in names if not stat.S_ISREG(os.lstat(folder / name).st_mode)]


def left_by_the_hub(name: str) -> bool:
    """Is it a file that the hub or its client adds to a downloaded folder, and that no loader reads? Also a signature under its usual name."""
    return name in _BY_THE_HUB or name.startswith(_BY_THE_HUBS_CLIENT)


def verify_files(folder: Path) -> list[str]:
    """Sentences about what differs from the manifest: missing, extra, changed files; empty when all is as written. Hashes every file."""
    folder = Path(folder)
    try:
        listed = read_manifest(folder)["files"]
    except Refused as error:
        return [error.what]
    present = set(list_files(folder))
    problems = [f"{name}: missing" for name in sorted(set(listed) - present)]
    problems += [f"{name}: not in the manifest" for name in sorted(present - set(listed)) if not left_by_the_hub(name)]
    problems += [f"{name}: not a regular file" for name in special_files(folder) if name not in listed]
    for name in sorted(present & set(listed)):
        if problem := _differs(folder / name, listed[name]):
            problems.append(f"{name}: {problem}")
    return problems


def _differs(path: Path, wanted: Mapping[str, Any]) -> str | None:
    try:
        found = os.lstat(path)
        if not stat.S_ISREG(found.st_mode):
            return "not a regular file"
        if found.st_size != wanted["bytes"]:
            return f"changed since it was written ({found.st_size} bytes, the manifest says {wanted['bytes']})"
        return None if digest_file(path, wanted["bytes"]) == wanted else "changed since it was written"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
