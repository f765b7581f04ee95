"""Does a written checkpoint hold what its manifest, its own files, a signature and (when named) its inputs say?

OUT may come from a stranger: nothing that is no regular file is opened, no code of it runs, and what is wrong is said, one line for each check. What the checks prove, and
what only a signature or the inputs can, is in docs/verify.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qmerge.device import exact_products
from qmerge.errors import Interrupted, QmergeError, Refused
from qmerge.pipeline.calibrate import load_tokenizer
from qmerge.pipeline.rederive import Check, check_against_inputs, explain, plan_again
from qmerge.pipeline.skeleton import Skeleton, build_skeleton
from qmerge.pipeline.written import Written, weights_fault
from qmerge.store.checkpoint import INDEX, Checkpoint
from qmerge.store.foreign import check_model_folder
from qmerge.store.inert import NAMES_CODE
from qmerge.store.jsonfiles import read_object
from qmerge.store.manifest import MANIFEST, read_manifest, seal_fault, special_files, verify_files
from qmerge.store.publish import written_folder
from qmerge.store.sidefiles import is_side_file
from qmerge.store.signature import check_signature

__all__ = ["Check", "verify"]

CARD = "README.md"
OWN = ("config.json", "quantize_config.json", INDEX, CARD)
"""what qmerge writes beside weights and copied files"""


@exact_products()  # as in the merge: another library rounds products of many factors otherwise, and floats are compared bit for bit
def verify(out: str, base: str | None = None, adapters: Sequence[str] = (), allow_pickle: bool = False, signature: str | None = None, public_key: str | None = None) -> list[Check]:
    """All checks in order. ``adapters``: places, in the order of the merge; weights are the manifest's (one that is named must be it). ``signature`` and ``public_key``:
    files of model-transparency. Raises `QmergeError` only where there is nothing to check (no folder, no manifest, one that is malformed) or the inputs are of another merge."""
    folder = written_folder(out)
    here = _place(folder)
    if special := special_files(folder):
        fix = "; a download with links: hf download ORG/NAME --local-dir DIR" if any((folder / name).is_symlink() for name in special) else ""
        return [Check("files", False, f"{special[0]} is no regular file, and {len(special) - 1} others; nothing in the folder was opened{fix}")]
    if not (folder / MANIFEST).is_file():
        raise Refused("qmerge did not write this folder", where=out, expected=MANIFEST, found="none", fix="verify checks what qmerge merge and qmerge run wrote")
    manifest = read_manifest(folder)
    inputs = plan_again(manifest, base, adapters, allow_pickle) if base and adapters else None
    problems = verify_files(folder)
    checks = [Check("files", not problems, "; ".join(problems[:5]) or f"{len(manifest['files'])} files have the size and SHA-256 of the manifest")]
    if signature and public_key:
        problem = check_signature(folder, Path(signature), Path(public_key), [MANIFEST, *manifest["files"]])
        checks.append(Check("signature", problem is None, problem or f"{MANIFEST} and its {len(manifest['files'])} files are what the holder of this key signed"))
    try:
        checks.append(_kinds(manifest))
        checkpoint = check_model_folder(out)
        checks.append(Check("headers", True, f"{len(checkpoint.specs)} tensors, headers and index agree"))
        skeleton = _class_of(checkpoint)
        checks.append(_config(folder, checkpoint, skeleton))
        written = Written(checkpoint)
        fault = weights_fault(written, skeleton)
        floats = len(checkpoint.specs) - len(written.parts)
        checks.append(Check("weights", fault is None, fault or f"{len(written.linears)} quantized linears unpack and pack again to the same bytes, {floats} float tensors, all finite"))
        checks.append(_tokenizer(folder))
        if inputs:
            checks += check_against_inputs(manifest, written, inputs)
    except QmergeError as problem:
        checks.append(Check("reading", False, explain(problem)))
    if _place(folder) != here:
        raise Interrupted("the folder was replaced while it was being verified", where=out, found="another folder of that name", fix="run the same command again", written="nothing")
    fault = seal_fault(folder)
    return [*checks, Check("manifest", fault is None, fault or f"{MANIFEST} is what its own digest says")]


def _place(folder: Path) -> tuple[int, int] | None:
    """Which folder it is, whatever its name. A run with ``--overwrite`` puts another one in its place."""
    try:
        found = folder.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _kinds(manifest: dict[str, Any]) -> Check:
    """Only what qmerge writes: weights, configs, the files that it copies. Code, pickles and adapters are none of it."""
    foreign = [name for name in manifest["files"] if not (name in OWN or ("/" not in name and name.endswith(".safetensors") and name.startswith("model")) or is_side_file(name))]
    return Check("kinds", not foreign, f"{foreign[0]} is of a kind that qmerge never writes" if foreign else "weights, configs, tokenizer and licences only: no code, no pickles")


def _class_of(checkpoint: Checkpoint) -> Skeleton | None:
    """The model class; None where transformers has no such architecture and the weights are plain floats, which need none. Raises Refused for quantized ones."""
    try:
        return build_skeleton(checkpoint)
    except Refused:
        if Written(checkpoint).linears:
            raise
        return None


def _config(folder: Path, checkpoint: Checkpoint, skeleton: Skeleton | None) -> Check:
    """Does transformers know it, is it free of code, do its copies for other loaders say the same?"""
    for name in ("config.json", "tokenizer_config.json", "generation_config.json"):
        found = read_object(folder / name, what="a config") if (folder / name).is_file() else {}
        if named := sorted(found.keys() & NAMES_CODE):
            return Check("config", False, f"{name} names code or other files ({named[0]}), which qmerge never writes and did not follow")
    fmt = Written(checkpoint).format
    if fmt is not None and fmt.config_file and read_object(folder / fmt.config_file, what="a copy of the quantization's settings") != checkpoint.config["quantization_config"]:
        return Check("config", False, f"{fmt.config_file} and config.json say different things")
    return Check("config", True, f"transformers builds {type(skeleton.model).__name__} from it" if skeleton else "transformers has no class for it, so names are not held against one")


def _tokenizer(folder: Path) -> Check:
    try:
        tokenizer = load_tokenizer([folder])
    except QmergeError as problem:
        return Check("tokenizer", False, explain(problem))
    return Check("tokenizer", True, f"{len(tokenizer)} tokens")
