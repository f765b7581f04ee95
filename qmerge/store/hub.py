"""Which folder on this machine is meant by a path or a Hugging Face model id?"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import constants, snapshot_download
from huggingface_hub import errors as hub_errors

from qmerge.errors import Refused

ALLOW_PATTERNS = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.tiktoken", "LICENSE*", "NOTICE*", "USE_POLICY*"]
IGNORE_PATTERNS = ["original/*", "consolidated*", "onnx/*", "checkpoint-*", "runs/*", "*.py"]
_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_FINAL = (hub_errors.RepositoryNotFoundError, hub_errors.RevisionNotFoundError, hub_errors.HFValidationError)


def resolve(path_or_id: str | Path, revision: str | None = None, also: Sequence[str] = ()) -> tuple[Path, str, str | None]:
    """``(folder, name for people, commit hash or None)``. A local folder comes first; anything else is a model id of the hub.

    ``also``: further files to download (a pickle that the user allowed).

    A folder that is itself a snapshot of the hub's cache is named by its id and commit. The hub's cache is filled with the files
    that a merge needs (never pickle, never code); without a network the cache alone is asked.
    Raises Refused: no such folder, a file instead of a folder, an id or revision that the hub does not know, no access, no network
    and nothing cached. No message contains a token or an address.
    """
    text = str(path_or_id)
    if (local := local_folder(path_or_id)) is not None:
        return _local(local, text, revision)
    folder = Path(_download(text, revision, also))
    commit = folder.name if _COMMIT.fullmatch(folder.name) else None
    return folder, text, commit


def local_folder(path_or_id: str | Path) -> Path | None:
    """The folder that is meant, or None for what can only be an id of the hub; nobody is asked. Raises Refused for what can be neither."""
    text = str(path_or_id)
    local = Path(text).expanduser() if text.startswith("~") else Path(text)
    if text and local.is_dir():
        return local
    if local.is_file():
        raise Refused("A folder was expected, not a file.", where=text, expected="a folder with config and weights", found="a file",
                      fix=f"name the folder: {local.parent}")
    if isinstance(path_or_id, Path) or text.startswith((".", "/", "~")) or text.count("/") > 1 or "\\" in text:
        raise Refused("There is no such folder.", where=text, expected="an existing folder or a model id such as org/name",
                      fix="check the spelling")
    if not _ID.fullmatch(text):
        raise Refused("This is neither a folder nor a model id.", where=text, expected="an existing folder or a model id such as org/name", fix="check the spelling: qmerge inspect PATH")
    return None


def split_name(text: str) -> tuple[str, str | None]:
    """``folder#name``, one of several adapters in a folder: (folder or id, name). A folder whose own name holds ``#`` is taken as it is, with None."""
    if "#" not in text or Path(text).exists():
        return text, None
    place, _, name = text.rpartition("#")
    return place, name


def is_hub_id(text: str) -> bool:
    """ORG/NAME, and no folder here."""
    return "/" in text and _ID.fullmatch(text) is not None and not Path(text).exists()


def in_hub_cache(path: Path) -> bool:
    """Does ``path`` (resolved, may not exist yet) lie inside a cache of the hub: the configured one, or any that has its layout?"""
    cache = Path(constants.HF_HUB_CACHE).expanduser().resolve()
    if path.is_relative_to(cache):
        return True
    return any(part.startswith(("models--", "datasets--", "spaces--")) for part in path.parts)


def _local(folder: Path, text: str, revision: str | None) -> tuple[Path, str, str | None]:
    resolved = folder.resolve()
    repo = resolved.parent.parent.name
    if _COMMIT.fullmatch(resolved.name) and resolved.parent.name == "snapshots" and repo.startswith("models--"):
        name, commit = repo.removeprefix("models--").replace("--", "/"), resolved.name
    else:
        name, commit = resolved.name, None
    if revision is not None and revision != commit:
        raise Refused("A revision was asked for, but this is a local folder.", where=text, expected="a model id of the hub",
                      found=f"revision {revision}", fix="leave the revision out, or move the folder if the hub's model is meant")
    return folder, name, commit


def _download(repo: str, revision: str | None, also: Sequence[str]) -> str:
    wanted = f"{repo}, revision {revision}" if revision else repo
    wished = [*ALLOW_PATTERNS, *also]
    try:
        return snapshot_download(repo, revision=revision, allow_patterns=wished, ignore_patterns=IGNORE_PATTERNS)
    except hub_errors.GatedRepoError:
        raise Refused("Access to this model has to be granted first.", where=wanted, fix="accept its terms on the hub, then: hf auth login") from None
    except _FINAL as error:
        kind = "revision" if isinstance(error, hub_errors.RevisionNotFoundError) else "model"
        raise Refused(f"There is no such folder, and the hub knows no such {kind} (or it is private).", where=wanted,
                      fix="check the spelling; for a private model: hf auth login") from None
    except Exception as error:  # noqa: BLE001  the network has many ways to fail; the cache is the answer to all of them
        reason = type(error).__name__
    try:
        return snapshot_download(repo, revision=revision, local_files_only=True, allow_patterns=wished, ignore_patterns=IGNORE_PATTERNS)
    except Exception:  # noqa: BLE001
        raise Refused("There is no such folder, and the hub cannot be reached.", where=wanted, expected="a folder, or a network",
                      found=f"{reason}, and nothing of this model in the local cache",
                      fix="check the spelling; if it is a hub id, download the model on a machine with a network and name its folder") from None
