"""Do all ranks have the same evaluation before them?

Settings, versions, code, processors and files are compared before a model is loaded, texts (by the fingerprint) before anything is measured. Else a table would mix two measurements.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from qmerge.pipeline.along import identities, look, other_inputs, other_settings
from qmerge.pipeline.identity import SOLVER, differences, processor, solver_digest, versions
from qmerge.ranks import Ranks, agreed
from qmerge.store.manifest import digest_file

KINDS = (".safetensors", ".bin", ".json", ".jinja", ".model", ".txt")
"""what is read of a model's folder: weights, configs, tokenizer"""


def check_settings(ranks: Ranks, settings: Mapping[str, Any]) -> None:
    """Raises UsageProblem, on all ranks alike, where one was given others. ``settings``: JSON, without the names of places, which may differ from host to host."""
    agreed(ranks, settings, differences, other_settings)


def check_folders(ranks: Ranks, folders: Mapping[str, str | Path]) -> None:
    """Raises Refused, on all ranks alike, where code, versions, processor or a file of ``folders`` (what it is -> place) is another. Byte for byte, unless all ranks read the very same files."""
    files = {role: sorted(path for path in Path(folder).glob("*") if path.suffix in KINDS and path.is_file()) for role, folder in folders.items()}
    facts: dict[str, Any] = {"version": versions(), "code of qmerge": solver_digest((*SOLVER, "quality")), "processor": processor()}
    agreed(ranks, facts | {"file": {role: {path.name: look(path) for path in paths} for role, paths in files.items()}}, differences, other_inputs)
    everybody = ranks.hear(identities([path for paths in files.values() for path in paths]))
    if any(one != everybody[0] or "" in one for one in everybody):
        own = {role: {path.name: digest_file(path)["sha256"] for path in paths} for role, paths in files.items()}
        agreed(ranks, {"bytes of file": own}, differences, other_inputs)


def check_fingerprint(ranks: Ranks, fingerprint: Mapping[str, Any]) -> None:
    """Raises Refused, on all ranks alike, where texts, items or anything else of how it is measured is another."""
    agreed(ranks, fingerprint, differences, other_inputs)


def told(adapter: Any, names: Mapping[str, Iterable[str]], rest: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of an evaluation as JSON. ``adapter``: an `AdapterSet`, of which the places are left out."""
    combination = {key: getattr(adapter.combination, key) for key in ("how", "density", "rank", "seed")}
    about = {"weights": adapter.weights, "combination": combination, "residual base": adapter.residual_base, "pickles": adapter.allow_pickle}
    return {"adapter": about} | {what: list(found) for what, found in names.items()} | dict(rest)
