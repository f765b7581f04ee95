"""Do all ranks have the same work before them, and can it be shared?

Settings, versions, code, processors, text and what the inputs' files look like are compared before anything is written; what the files hold, byte for byte, before the first block is kept.
A rank on the first one's host that reads the very same files need not read them for that.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from qmerge.errors import QmergeError, Refused, UsageProblem
from qmerge.pipeline.calibrate import Calibration
from qmerge.pipeline.identity import differences, processor, solver_digest, text_facts, versions
from qmerge.pipeline.plan import MergePlan
from qmerge.pipeline.requantize import Steps
from qmerge.ranks import Ranks, agreed

ENDS_BYTES = 1 << 20
"""of a large file that are compared at once, at either end"""
ALONE_ONLY = {"blocks": "--polish blocks"}
"""polishing that one process does on all text"""


def check_shared(plans: Sequence[MergePlan], calibration: Calibration | None, steps: Steps | None, ranks: Ranks) -> None:
    """Raises, on all ranks alike: UsageProblem for what cannot be shared and for other settings, Refused for other versions, processors, text and files."""
    if ranks.alone:
        return
    for name in (ALONE_ONLY[part] for plan in plans for part in plan.recipe.polish if part in ALONE_ONLY):
        raise UsageProblem("This step is not shared among ranks.", where=name, found=f"{ranks.size} ranks", fix="leave it out, or run on one rank: start qmerge without torchrun or srun")
    recipes = [plan.recipe.to_json() | {"shard_size": plan.recipe.shard_bytes} for plan in plans]
    agreed(ranks, {"setting": recipes[0] if len(recipes) == 1 else dict(enumerate(recipes)), "step": asdict(steps or Steps())}, differences, other_settings)
    facts: dict[str, Any] = {"version": versions(), "code of qmerge": solver_digest(), "processor": processor()}
    if calibration is not None:
        facts["calibration"] = text_facts(calibration.facts)
    facts["input"] = {role: {path.name: look(path) for path in files} for role, files in inputs_of(plans).items()}
    agreed(ranks, facts, differences, other_inputs)


def inputs_of(plans: Sequence[MergePlan]) -> dict[str, list[Path]]:
    """Role -> files that are read."""
    sources = {"base": plans[0].checkpoint} | {f"adapter {number + 1}": adapter for number, adapter in enumerate(adapter for plan in plans for adapter in plan.adapters)}
    return {role: sorted(source.files() + source.config_files(), key=lambda path: path.name) for role, source in sources.items()}


def other_settings(rank: int, found: list[str]) -> QmergeError:
    """For `agreed`: not one command."""
    return UsageProblem("The ranks were not started with one command.", where=f"rank {rank}", expected="what rank 0 was given", found="; ".join(found[:4]), fix="start all ranks with the same settings")


def other_inputs(rank: int, found: list[str]) -> QmergeError:
    """For `agreed`: not the same files, or another environment."""
    return Refused("A rank has not what rank 0 has.", where=f"rank {rank}", expected="the same files, versions and kind of processor everywhere, or the bytes would not be those of one rank", found="; ".join(found[:4]),
                   fix="give every host the same files and environment")


def look(path: Path) -> str:
    """Size, and a digest of both ends: all of a small file."""
    size, digest = path.stat().st_size, hashlib.sha256()
    with path.open("rb") as file:
        digest.update(file.read(ENDS_BYTES))
        if size > 2 * ENDS_BYTES:
            file.seek(size - ENDS_BYTES)
        digest.update(file.read(ENDS_BYTES))
    return f"{size} bytes, {digest.hexdigest()[:16]}"


def identities(paths: Sequence[Path]) -> list[str]:
    """Of the very files, on this machine, as long as it runs: no two hosts have the same."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    machine = boot.read_text().strip() if boot.exists() else ""
    stats = [path.stat() for path in paths]
    whole = [f"{machine} {stat.st_dev} {stat.st_ino} {stat.st_size} {stat.st_mtime_ns}" for stat in stats]
    return [hashlib.sha256(one.encode()).hexdigest()[:16] if machine else "" for one in whole]


class SameBytes:
    """Whether all ranks read the same bytes. ``hashes``: this rank has to find the digests of its files, which `check` then asks for."""

    def __init__(self, plans: Sequence[MergePlan], ranks: Ranks) -> None:
        self.ranks, self.hashes, self._checked = ranks, True, ranks.alone
        if not ranks.alone:
            everybody = ranks.hear(identities([path for files in inputs_of(plans).values() for path in files]))
            mine = everybody[ranks.rank]
            self.hashes = ranks.first or mine not in everybody[: ranks.rank] or "" in mine

    def check(self, digests: Callable[[], Sequence[Mapping[str, Any]]]) -> None:
        """Once, on all ranks. ``digests``: per plan, role -> `input_digests`. Raises Refused, naming rank and file."""
        if self._checked:
            return
        self._checked = True
        own = [{role: {name: row["sha256"] for name, row in found["files"].items()} for role, found in plan.items()} for plan in digests()] if self.hashes else None
        everybody = self.ranks.hear(own)
        for rank, other in enumerate(everybody):
            for first, its in zip(everybody[0], other or everybody[0], strict=True):
                if found := differences(first, its):
                    raise other_inputs(rank, [f"other bytes in {name}" for name in found])
