"""What is in this folder, and does it hold what it claims? `inspect` and `verify` as Python calls."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qmerge.adapters.choices import AdapterSet
from qmerge.api.merging import Adapters, Place, adapter_words
from qmerge.api.values import CheckResult, Verification
from qmerge.errors import UsageProblem


def inspect(path: Place) -> dict[str, Any]:
    """What a base, an adapter (``"folder#name"``: one of several) or a folder of adapters is; ``problems`` stand in the way of merging it. As ``qmerge inspect --json``. Headers only.

    Raises `Refused` where it is none of them.
    """
    from qmerge.api.first import look_at_models
    from qmerge.store.hub import split_name

    look_at_models((split_name(str(path))[0],))
    from qmerge.pipeline.inspection import inspect as look

    return look(str(path))


def verify(out: Place, *, base: Place | None = None, adapter: Adapters = (), allow_pickle: bool = False, signature: Place | None = None, public_key: Place | None = None) -> Verification:
    """Hash ``out`` again, unpack its codes, check its configs; with ``base`` and ``adapter`` derive it again from them. As ``qmerge verify``. A failed check is a value; ``.require()`` raises it.

    Raises `UsageProblem` where one of a pair is missing, `Refused` where there is nothing to check or the inputs are of another merge.
    """
    adapters = adapter_words(adapter)
    check_asked(str(out), base, adapters, signature, public_key, "qmerge.verify")
    from qmerge.pipeline.verify import verify as check

    words = [None if place is None else str(place) for place in (base, signature, public_key)]
    return Verification(Path(out), tuple(CheckResult(found.name, found.passed, found.detail) for found in check(str(out), words[0], adapters, allow_pickle, words[1], words[2])))


def check_asked(out: str, base: Place | None, adapters: Sequence[str], signature: Place | None, public_key: Place | None, where: str) -> None:
    """Raises `UsageProblem` where one of two that go together is missing, and `Refused` for a folder that is not there."""
    from qmerge.api.first import look_at_models
    from qmerge.store.publish import written_folder

    for first, second, names in ((base, adapters, "--base and --adapter"), (signature, public_key, "--signature and --public-key")):
        if bool(first) != bool(second):
            raise UsageProblem(f"{names} go together", where=where, fix="give both, or neither")
    written_folder(out)
    look_at_models((None if base is None else str(base),), AdapterSet.of(*adapters))
