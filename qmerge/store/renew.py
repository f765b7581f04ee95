"""How does a finished output gain a file, such as a model card, without ever being half changed?

The folder is built anew beside it from hard links (nothing is copied where the file system has them), the manifest is renewed, and one
rename swaps the two, as a merge with ``--overwrite`` does. Digests of the other files stay what they were: a file that has changed since it was written is still found.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from qmerge.errors import Refused
from qmerge.store.durable import room_needed, write_chunks
from qmerge.store.manifest import MANIFEST, digest_file, list_files, read_manifest, seal_fault, sealed
from qmerge.store.publish import OutputFolder


def add_file(out: Path, name: str, text: str) -> None:
    """Write ``text`` as ``name`` into the output folder ``out`` and into its manifest; one of that name that qmerge wrote is replaced.

    Raises Refused where ``out`` is not qmerge's, was replaced by another run meanwhile, holds files that are not (also a ``name`` of the user's own), or lacks some of its own.
    """
    out = Path(out)
    before = digest_file(out / MANIFEST)["sha256"] if (out / MANIFEST).is_file() else None
    manifest = read_manifest(out)
    if fault := seal_fault(out):
        raise Refused("The manifest is damaged, and a new one would hide that.", where=str(out), found=fault, fix="merge again; qmerge verify tells more")
    with OutputFolder(out, [], overwrite=True) as folder:
        present = list_files(out)
        if missing := sorted(set(manifest["files"]) - set(present) - {name}):
            raise Refused("The output lacks files that its manifest names.", where=str(out), found=", ".join(missing[:5]), fix="merge again; qmerge verify tells more")
        for other in present:
            if other != name:
                _link(out / other, folder.path / other)
        write_chunks(folder.path / name, [text.encode("utf-8")])
        kept = {key: digest for key, digest in manifest["files"].items() if key != name}
        folder.commit(sealed(manifest | {"files": dict(sorted((kept | {name: digest_file(folder.path / name)}).items()))}), before)


def _link(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:  # a file system without hard links
        try:
            with room_needed(target.name):
                shutil.copyfile(source, target)
        except FileNotFoundError:
            raise Refused("The output was replaced by another run meanwhile; it is left as that run wrote it.", where=source.name, fix="run the same command again") from None
