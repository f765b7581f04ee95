"""What is in this folder, and does it hold what it claims? `inspect` and `verify` as Python calls."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qmerge.api.merging import Adapters, Place, adapter_words
from qmerge.api.values import CheckResult, Verification
from qmerge.errors import UsageProblem


def inspect(path: Place) -> dict[str, Any]:
    """What a base, an adapter (``"folder#name"``: one of several) or a folder of adapters is; ``problems`` stand in the way of merging it. As ``qmerge inspect --json``. Headers only.

    Raises `Refused` where it is none of them.
    """
    from qmerge.pipeline.inspection import inspect as look

    return look(str(path))


def verify(out: Place, *, base: Place | None = None, adapter: Adapters = (), allow_pickle: bool = False, signature: Place | None = None, public_key: Place | None = None) -> Verification:
    """Hash ``out`` again, unpack its codes, check its configs; with ``base`` and ``adapter`` derive it again from them. As ``qmerge verify``. A failed check is a value; ``.require()`` raises it.

    Raises `UsageProblem` where one of a pair is missing, `Refused` where there is nothing to check or the inputs are of another merge.
    """
    from qmerge.pipeline.verify import verify as check

    adapters = adapter_words(adapter)
    check_pairs(base, adapters, signature, public_key, "qmerge.verify")
    words = [None if place is None else str(place) for place in (base, signature, public_key)]
    return Verification(Path(out), tuple(CheckResult(found.name, found.passed, found.detail) for found in check(str(out), words[0], adapters, allow_pickle, words[1], words[2])))


def check_pairs(base: object, adapters: object, signature: object, public_key: object, where: str) -> None:
    """Raises `UsageProblem` where one of two that go together is missing."""
    for first, second, names in ((base, adapters, "--base and --adapter"), (signature, public_key, "--signature and --public-key")):
        if bool(first) != bool(second):
            raise UsageProblem(f"{names} go together", where=where, fix="give both, or neither")
