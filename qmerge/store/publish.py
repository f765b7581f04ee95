"""How does an output folder appear all at once, or not at all?

Everything grows in a sibling temporary folder; the last step is a rename. Who is killed leaves the temporary folder and
never a half-written OUT. `runs.RunFolder` is the one whose work can be gone on with.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import os
import shutil
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from qmerge.errors import Refused
from qmerge.store.durable import room_needed, sync, sync_tree, write_json
from qmerge.store.hub import in_hub_cache
from qmerge.store.manifest import MANIFEST, digest_file, list_files, read_manifest

_LONGEST_NAME = 220  # bytes; the temporary name is longer, and file systems stop at 255


def put_aside(out: Path) -> str | None:
    """A word where ``out`` is not there and an old one of its name lies beside it: a swap was killed between its two renames."""
    if os.path.lexists(out):
        return None
    found = sorted(path.name for path in Path(out).absolute().parent.glob(f".{glob.escape(Path(out).name)}.qmerge-old-????????") if (path / MANIFEST).is_file())
    return f"{found[-1]} beside it is the old one, which a swap that was killed had put aside: rename it to {Path(out).name}" if found else None


def written_folder(out: str) -> Path:
    """``out``, a folder. Refused where there is none."""
    folder = Path(out)
    if not folder.is_dir():
        raise Refused("there is no such folder", where=out, expected="a checkpoint that qmerge wrote", found="nothing" if not folder.exists() else "a file", fix=put_aside(folder))
    return folder


def check_output(out: Path, inputs: Iterable[Path], overwrite: bool) -> None:
    """Refused, with nothing touched, if ``out`` cannot or must not be written.

    That is: it exists (with ``overwrite``: and is not a folder that holds qmerge's output and nothing else), is a symlink, lies inside
    an input or a hub cache or around an input, or its parent is no folder that can be written to.
    """
    out = Path(out)
    if out.name in ("", ".."):
        raise Refused("The output needs a name of its own.", where=str(out), expected="a folder that does not exist yet", fix="--out PATH of a folder that is not there yet")
    if len(os.fsencode(out.name)) > _LONGEST_NAME:
        raise Refused("The name of the output is too long.", where=out.name, expected=f"at most {_LONGEST_NAME} bytes")
    if _utf8_fault(out.name):
        raise Refused("The name of the output is not UTF-8, and libraries that load tokenizers and weights open no such folder.", where=ascii(out.name), expected="a name in UTF-8")
    if out.is_symlink():
        raise Refused("The output is a symbolic link; qmerge does not write through links.", where=str(out), fix="name the folder itself")
    _check_places(out.parent.resolve() / out.name, inputs)
    if os.path.lexists(out):
        _check_replaceable(out, overwrite)
    nearest = next(parent for parent in out.absolute().parents if os.path.lexists(parent))
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise Refused("The output cannot be created there.", where=str(nearest), expected="a folder that can be written to",
                      found="no write permission" if nearest.is_dir() else "not a folder", fix="choose a place where you may write")


def _utf8_fault(name: str) -> bool:
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return True
    return False


def _check_places(target: Path, inputs: Iterable[Path]) -> None:
    for source in inputs:
        place = Path(source).resolve()
        if target == place or target.is_relative_to(place):
            raise Refused("The output lies inside an input; inputs are never written to.", where=str(target), found=f"input {place.name}",
                          fix="choose a folder elsewhere")
        if place.is_relative_to(target):
            raise Refused("An input lies inside the output.", where=str(target), found=f"input {place.name}", fix="choose a folder elsewhere")
    if in_hub_cache(target):
        raise Refused("The output lies inside the hub's cache, which other tools rewrite.", where=str(target), fix="choose a folder elsewhere")


def _check_replaceable(out: Path, overwrite: bool) -> None:
    if not out.is_dir():
        raise Refused("The output exists and is not a folder.", where=str(out), fix="choose another name")
    if not overwrite:
        raise Refused("The output exists.", where=str(out), expected="a folder that does not exist yet", found="a folder",
                      fix="choose another name, --overwrite, or --resume, which finds out whether it is what this command would write")
    names = list_files(out)
    if not names and not (out / MANIFEST).exists():
        return
    try:
        ours = read_manifest(out)["files"]
    except Refused as error:
        raise Refused("The output exists and was not written by qmerge, so it is not replaced.", where=str(out),
                      expected=f"{MANIFEST} of qmerge", found=error.what, fix="choose another name, or remove the folder yourself") from None
    foreign = [name for name in names if name not in ours]
    if foreign:
        raise Refused("The output holds files that qmerge did not write; they would be lost.", where=str(out), found=", ".join(foreign[:5]),
                      fix="move them away, or choose another name")


def _digest_of(folder: Path) -> str | None:
    """Of its manifest; None where it has none."""
    try:
        return str(digest_file(folder / MANIFEST)["sha256"])
    except OSError:
        return None


class OutputFolder:
    """A folder that becomes OUT by :meth:`commit`, and vanishes without it.

    >>> with OutputFolder(out, [base, adapter], overwrite=False) as folder:
    ...     write_into(folder.path)
    ...     folder.commit(manifest)
    """

    def __init__(self, out: Path, inputs: list[Path], overwrite: bool = False) -> None:
        """Checks only (:func:`check_output`); nothing is created before the ``with`` block."""
        check_output(Path(out), inputs, overwrite)
        self.out = Path(out).parent.resolve() / Path(out).name
        self.inputs, self.overwrite, self.committed = list(inputs), overwrite, False
        self.path = self._sibling("tmp")
        self._made: list[Path] = []

    def __enter__(self) -> OutputFolder:
        self._make_parents()
        with room_needed(self.out.name):
            self.path.mkdir()
        return self

    def _make_parents(self) -> None:
        missing = [parent for parent in self.out.parents if not parent.exists()]
        with room_needed(self.out.name):
            for parent in reversed(missing):
                parent.mkdir(exist_ok=True)
                self._made.append(parent)

    def _take_parents_back(self) -> None:
        for made in reversed(self._made):
            with contextlib.suppress(OSError):
                made.rmdir()

    def commit(self, manifest: Mapping[str, Any], instead_of: str | None = None) -> None:
        """Make the files durable, write ``manifest`` last, rename to OUT. Refused if OUT has meanwhile become something else; with ``instead_of``, the SHA-256 of a manifest, also if OUT's
        is another one by now."""
        sync_tree(self.path)
        write_json(self.path / MANIFEST, dict(manifest))
        sync(self.path)
        check_output(self.out, self.inputs, self.overwrite)
        aside = self._sibling("old") if self.out.exists() else None
        if aside:
            os.rename(self.out, aside)
        if instead_of is not None and (aside is None or _digest_of(aside) != instead_of):
            self._put_back(aside)
            raise Refused("The output was replaced by another run meanwhile; it is left as that run wrote it.", where=str(self.out), fix="run the same command again")
        try:
            os.rename(self.path, self.out)
        except BaseException as error:
            self._put_back(aside)
            if not isinstance(error, OSError) or error.errno == errno.ENOENT:
                raise
            raise Refused("Another run finished first with the same output; this run's result is dropped.", where=str(self.out),
                          found=error.strerror, fix="choose another name") from None
        self.committed = True
        for parent in [self.out.parent, *(made.parent for made in self._made)]:
            sync(parent)
        if aside:
            shutil.rmtree(aside, ignore_errors=True)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.committed:
            return
        shutil.rmtree(self.path, ignore_errors=True)
        self._take_parents_back()

    def _sibling(self, kind: str) -> Path:
        return self.out.parent / f".{self.out.name}.qmerge-{kind}-{uuid.uuid4().hex[:8]}"

    def _put_back(self, aside: Path | None) -> None:
        """The old OUT returns, unless the run that won has taken its place; then that run had leave to overwrite it."""
        if aside is None:
            return
        try:
            os.rename(aside, self.out)
        except OSError:
            shutil.rmtree(aside, ignore_errors=True)
