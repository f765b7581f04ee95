"""Did the holder of a key sign this folder?

By model-transparency (https://github.com/sigstore/model-transparency), whose library is asked; it is an extra. The signature is a DSSE envelope over an in-toto statement that lists
every file with its SHA-256. Left out: identities and certificates (its own command verifies those).
"""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from pathlib import Path

from qmerge.errors import Refused
from qmerge.extras import need
from qmerge.store.regular import read_plain

MAX_SIGNATURE_BYTES = 100_000_000
MAX_KEY_BYTES = 100_000


def check_signature(folder: Path, signature: Path, public_key: Path, files: Sequence[str]) -> str | None:
    """What is wrong, or None: the signature is of this key, every file that it lists is as signed, and it lists all ``files`` (relative names).

    Raises `UsageProblem` where the library is not installed, `Refused` where signature or key cannot be read.
    """
    need("checking a signature", "model_signing", "OpenSSL")
    from model_signing import verifying

    for path, most in ((signature, MAX_SIGNATURE_BYTES), (public_key, MAX_KEY_BYTES)):
        try:
            read_plain(path, most)
        except (OSError, ValueError) as problem:
            raise Refused("the signature or its key cannot be read", where=path.name, found=getattr(problem, "strerror", None) or str(problem), fix="check both paths; docs/signing.md shows how a signature is made") from problem
    try:
        verifying.Config().use_elliptic_key_verifier(public_key=public_key).set_ignore_unsigned_files(True).verify(folder, signature)
        signed = _signed_files(signature)
    except Exception as problem:  # noqa: BLE001  the library raises ValueError, cryptography's and protobuf's errors: all mean "not verified"
        return f"not verified: {(str(problem) or type(problem).__name__).splitlines()[0][:300]}"
    missing = [name for name in files if name not in signed]
    return f"the signature does not cover {missing[0]}, and {len(missing) - 1} others" if missing else None


def _signed_files(signature: Path) -> set[str]:
    """The names in the statement, which the library has verified by now."""
    payload = json.loads(signature.read_text(encoding="utf-8"))["dsseEnvelope"]["payload"]
    return {row["name"] for row in json.loads(base64.b64decode(payload))["predicate"]["resources"]}
