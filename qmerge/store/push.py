"""How does a verified folder reach the hub, whole, private, and nothing else with it?

By the hub's own client (`huggingface_hub`), which alone knows the token and the address. All files appear in one commit; what lies there afterwards is compared with what was
meant to. Left out: several commits, pull requests, branches.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub import errors as hub_errors

from qmerge import __version__
from qmerge.errors import CheckFailed, Interrupted, QmergeError, Refused
from qmerge.store.manifest import MANIFEST, SIGNATURE, digest_file
from qmerge.store.regular import open_plain

BY_THE_HUB = ".gitattributes"
NOTHING = "nothing"
_XET_STATUS = re.compile(r"HTTP status (?:client|server) error \((\d{3})")


@dataclass(frozen=True)
class Parcel:
    """What goes to ``repo``: name there -> file here, and the digests that the manifest names."""

    repo: str
    private: bool
    paths: Mapping[str, Path]
    digests: Mapping[str, dict[str, Any]]

    @property
    def total_bytes(self) -> int:
        return sum(digest["bytes"] for digest in self.digests.values())


@dataclass(frozen=True)
class Pushed:
    repo: str
    revision: str
    url: str
    private: bool
    deleted: tuple[str, ...]


def parcel(folder: Path, manifest: Mapping[str, Any], repo: str, private: bool, signature: Path | None = None) -> Parcel:
    """The manifest's files, the manifest, and a signature where there is one; nothing else that lies in ``folder``."""
    digests = dict(manifest["files"]) | {MANIFEST: digest_file(folder / MANIFEST)}
    paths = {name: folder / name for name in digests}
    if signature is not None:
        paths[SIGNATURE], digests[SIGNATURE] = signature, digest_file(signature)
    return Parcel(repo, private, dict(sorted(paths.items())), dict(sorted(digests.items())))


def push(sent: Parcel, replace: bool = False) -> Pushed:
    """Create the repository where there is none, send everything in one commit, compare what lies there. Raises `Refused` where the hub or its state forbids it, `Interrupted`
    where it could not be reached or failed (it can be run again), `CheckFailed` where the repository holds something else afterwards."""
    if get_token() is None:
        raise Refused("you are not logged in to the hub", where=sent.repo, expected="a token that may write", found="none", fix="hf auth login, or HF_TOKEN in the environment")
    api, progress = HfApi(library_name="qmerge", library_version=__version__), _Progress()
    with _talk(sent.repo, progress):
        before = _state(api, sent.repo)
        if before is None:
            api.create_repo(sent.repo, private=sent.private, repo_type="model")
            progress.written = "the repository, still empty"
            before = api.model_info(sent.repo, files_metadata=True)
        _check_visibility(sent, before)
        foreign = _others(sent, before, replace)
        operations = [CommitOperationAdd(name, str(path)) for name, path in sent.paths.items()]
        api.preupload_lfs_files(sent.repo, operations, repo_type="model", free_memory=False)
        progress.committing = True
        deletions = [CommitOperationDelete(name) for name in foreign if name not in sent.paths]
        done = api.create_commit(sent.repo, [*operations, *deletions], commit_message=_message(sent), repo_type="model", parent_commit=before.sha)
        progress.committing, progress.written = False, f"commit {done.oid}, which could not be compared with this folder"
        after = api.model_info(sent.repo, revision=done.oid, files_metadata=True)
    _compare(sent, after, done.oid)
    return Pushed(sent.repo, done.oid, f"{api.endpoint}/{sent.repo}", sent.private, tuple(operation.path_in_repo for operation in deletions))


def _message(sent: Parcel) -> str:
    return f"Checkpoint by qmerge {__version__}, {MANIFEST} {sent.digests[MANIFEST]['sha256'][:16]}"


def _state(api: HfApi, repo: str) -> Any | None:
    try:
        return api.model_info(repo, files_metadata=True)
    except hub_errors.GatedRepoError:
        raise
    except hub_errors.RepositoryNotFoundError:
        return None


def _check_visibility(sent: Parcel, there: Any) -> None:
    if bool(there.private) == sent.private:
        return
    if sent.private:
        raise Refused("the repository is public, and --public was not asked for", where=sent.repo, expected="a private repository", found="a public one", fix="--public where that is meant, or another --repo")
    raise Refused("the repository is private, and --public was asked for", where=sent.repo, fix="leave --public out, or make it public on its page")


def _others(sent: Parcel, there: Any, replace: bool) -> list[str]:
    """Files that the repository holds already. Refused unless they may be replaced."""
    found = sorted(sibling.rfilename for sibling in there.siblings or () if sibling.rfilename != BY_THE_HUB)
    if found and not replace:
        raise Refused("the repository is not empty", where=sent.repo, expected="a new or empty repository", found=f"{len(found)} files: {', '.join(found[:5])}",
                      fix="another --repo, or --replace: the repository then holds this checkpoint and nothing else (its history keeps the rest)")
    return found


def _compare(sent: Parcel, there: Any, revision: str) -> None:
    """The listing of the commit against the manifest: names, sizes, and SHA-256 (large files) or git's hash (small ones)."""
    held = {sibling.rfilename: sibling for sibling in there.siblings or () if sibling.rfilename != BY_THE_HUB}
    wrong = [f"{name}: missing" for name in sent.paths if name not in held] + [f"{name}: not ours" for name in held if name not in sent.paths]
    wrong += [f"{name}: other bytes" for name in sent.paths if name in held and not _same(held[name], sent, name)]
    if bool(there.private) != sent.private:
        wrong.append("the repository is not as private as it was asked to be")
    if wrong:
        raise CheckFailed("the repository does not hold what was sent", where=f"{sent.repo} at {revision}", expected=f"{len(sent.paths)} files of the manifest", found="; ".join(wrong[:5]),
                          fix="do not use this revision; delete it, or push again with --replace", written=f"commit {revision}")


def _same(sibling: Any, sent: Parcel, name: str) -> bool:
    digest = sent.digests[name]
    if sibling.lfs is not None:
        return bool(sibling.lfs.sha256 == digest["sha256"] and sibling.lfs.size == digest["bytes"])
    return bool(sibling.size == digest["bytes"]) and sibling.blob_id == git_blob(sent.paths[name])


def git_blob(path: Path) -> str:
    """The SHA-1 by which git names a file's content."""
    with open_plain(path) as file:
        size = file.seek(0, 2)
        file.seek(0)
        digest = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


@dataclass
class _Progress:
    written: str = NOTHING
    committing: bool = False

    def __str__(self) -> str:
        return "unknown, the answer was lost: look at the repository's history before pushing again" if self.committing else self.written


@contextlib.contextmanager
def _talk(repo: str, progress: _Progress) -> Iterator[None]:
    """What the hub or the line to it can do wrong, as errors of ours. No message holds a token or a header."""
    try:
        yield
    except QmergeError as problem:
        problem.written = str(progress) if progress.written != NOTHING else problem.written
        raise
    except KeyboardInterrupt:
        raise Interrupted("the push was interrupted", where=repo, fix="run the same command again", written=str(progress)) from None
    except hub_errors.OfflineModeIsEnabled:
        raise Refused("the hub's client is told to stay offline", where=repo, found="HF_HUB_OFFLINE", fix="unset it") from None
    except Exception as problem:  # noqa: BLE001  the client wraps network errors of several libraries
        raise _translated(problem, repo, progress) from problem


def _translated(problem: BaseException, repo: str, progress: _Progress) -> QmergeError:
    answer: BaseException | None = problem
    while answer is not None and not isinstance(answer, hub_errors.HfHubHTTPError):
        answer = answer.__cause__
    response = getattr(answer, "response", None)
    code = response.status_code if response is not None else _told_by_xet(problem)
    if code is None:
        return Interrupted("the hub could not be reached, or the connection broke", where=repo, found=type(problem.__cause__ or problem).__name__, fix="run the same command again", written=str(progress))
    said = " ".join(str(getattr(answer, "server_message", None) or "").split())[:200]
    progress.committing = False  # the hub answered, with a no
    found = f"{code}" + (f": {said}" if said else "")
    if code in (401, 403, 404):
        return Refused("the hub does not let this token do that", where=repo, found=found, fix="a token that may write to this namespace: hf auth login; check the spelling of --repo", written=str(progress))
    if code in (409, 412):
        return Refused("the repository was created or changed by somebody else meanwhile", where=repo, found=found, fix="look at it, then run the same command again", written=str(progress))
    if code == 429 or code >= 500:
        return Interrupted("the hub failed to do it", where=repo, found=found, fix="run the same command again, later", written=str(progress))
    return Refused("the hub refused it", where=repo, found=found, written=str(progress), fix="the hub's own words are above; hf auth whoami says who you are there")


def _told_by_xet(problem: BaseException) -> int | None:
    """The status in an error of `hf_xet`, which sends large files where it is installed and hands on words alone; None where there was no answer."""
    found = _XET_STATUS.search(str(problem))
    return int(found[1]) if found and isinstance(problem, (OSError, RuntimeError, ValueError)) else None
