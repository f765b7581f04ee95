"""What is in an output folder, what was it made from, and is it still what was written?

``manifest.json`` names inputs, recipe, versions and a SHA-256 for every other file of the folder. It holds nothing about the
machine: inputs go by folder name or hub id, and absolute paths are cut to their last component.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any, Protocol

from qmerge import __version__
from qmerge.errors import Refused
from qmerge.store.jsonfiles import read_object

MANIFEST = "manifest.json"
SCHEMA_VERSION = 1


class Input(Protocol):
    """What a checkpoint and an adapter have in common."""

    @property
    def name(self) -> str: ...
    @property
    def revision(self) -> str | None: ...
    def files(self) -> list[Path]: ...
    def config_files(self) -> list[Path]: ...


def digest_file(path: Path) -> dict[str, Any]:
    """``{"sha256": hex, "bytes": count}`` of one file."""
    digest, count = hashlib.sha256(), 0
    with path.open("rb", buffering=0) as file:
        buffer = memoryview(bytearray(1 << 22))
        while size := file.readinto(buffer):
            digest.update(buffer[:size])
            count += size
    return {"sha256": digest.hexdigest(), "bytes": count}


def list_files(folder: Path) -> list[str]:
    """Every file and link under ``folder``, as sorted relative names with ``/``, without the manifest."""
    names = []
    for root, folders, files in os.walk(folder):
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
            raise Refused("An output folder may hold regular files only.", where=name, found="a link or a special file")
    return {name: known.get(name) or digest_file(folder / name) for name in list_files(folder)}


def input_digests(source: Input) -> dict[str, Any]:
    """``{"name", "revision", "files": {name: {"sha256", "bytes"}}}`` of a Checkpoint or LoraAdapter: weights, configs and index."""
    paths = sorted(source.files() + source.config_files(), key=lambda path: path.name)
    return {"name": source.name, "revision": source.revision, "files": {path.name: digest_file(path) for path in paths}}


def portable(value: Any) -> Any:
    """``value`` as JSON data without absolute paths: ``portable({"text": "/home/me/chat.jsonl"}) == {"text": "chat.jsonl"}``."""
    if isinstance(value, Mapping):
        return {str(key): portable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [portable(item) for item in value]
    if isinstance(value, PurePath):
        return value.name if value.is_absolute() or str(value).startswith("~") else value.as_posix()
    if isinstance(value, str) and "\n" not in value and (os.path.isabs(value) or value.startswith("~/")):
        return PurePath(value).name
    return value


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
    return {
        **portable(extra or {}),
        "schema_version": SCHEMA_VERSION,
        "tool": {"name": "qmerge", "version": __version__},
        "inputs": portable(inputs),
        "recipe": portable(recipe),
        "versions": portable(versions),
        "files": digest_files(folder, known),
    }


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of an output folder. Refused: missing, malformed, written by another tool or by a newer schema."""
    manifest = read_object(Path(folder) / MANIFEST, what="qmerge's manifest")
    tool, files = manifest.get("tool"), manifest.get("files")
    if not isinstance(tool, dict) or tool.get("name") != "qmerge" or not isinstance(files, dict):
        raise Refused("This manifest was not written by qmerge.", where=MANIFEST, expected='"tool": {"name": "qmerge"} and "files"')
    if manifest.get("schema_version") != SCHEMA_VERSION:
        raise Refused("This manifest has another schema.", where=MANIFEST, expected=SCHEMA_VERSION, found=manifest.get("schema_version"),
                      fix="use the version of qmerge that wrote it")
    return manifest


def verify_files(folder: Path) -> list[str]:
    """Sentences about what differs from the manifest: missing, extra, changed files; empty when all is as written. Hashes every file."""
    folder = Path(folder)
    try:
        listed = read_manifest(folder)["files"]
    except Refused as error:
        return [error.what]
    present = set(list_files(folder))
    problems = [f"{name}: missing" for name in sorted(set(listed) - present)]
    problems += [f"{name}: not in the manifest" for name in sorted(present - set(listed))]
    for name in sorted(present & set(listed)):
        path = folder / name
        if path.is_symlink() or not path.is_file():
            problems.append(f"{name}: not a regular file")
        elif digest_file(path) != listed[name]:
            problems.append(f"{name}: changed since it was written")
    return problems
