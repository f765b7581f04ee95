"""A head shares its tensor with the embedding, and an adapter edits one side or both: does the tie hold?"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from qmerge.adapters.edits import Change, Edit
from qmerge.adapters.equality import same_edit
from qmerge.adapters.lowrank import LowRank
from qmerge.adapters.replace import Replace, ReplaceRows
from qmerge.adapters.several import Chain


@dataclass(frozen=True)
class Both(Edit):
    """The edit of a shared tensor, which an adapter holds once for each side."""

    edit: Edit
    second: tuple[str, ...]

    @property
    def keys(self) -> tuple[str, ...]:  # type: ignore[override]
        return self.edit.keys + self.second

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return self.edit.shape

    @property
    def needs_base(self) -> bool:  # type: ignore[override]
        return self.edit.needs_base

    def load(self, device: torch.device) -> Change:
        return self.edit.load(device)


def head_follows(entrance: str, first: Edit | None, second: Edit | None, configs: Iterable[Mapping[str, Any]]) -> bool:
    """Does the tied head take the embedding's edit ``first`` (its own is ``second``)? As PEFT runs them.

    It does where single tokens were trained (PEFT ties those), where the vocabulary was resized (saved without being asked for), and where both sides have one and
    the same edit (``ensure_weight_tying``). Otherwise the head stays as it was, or takes its own edit, and the model is untied.
    """
    if first is None or second is None:
        listed = [str(name) for config in configs for name in config.get("modules_to_save") or []]
        return second is None and (isinstance(first, ReplaceRows) or (isinstance(first, Replace) and not _listed(entrance, listed)))
    return same_edit(first, second)


def head_edit(first: Edit | None, second: Edit | None) -> Edit | None:
    """What an untied head gets: its own edit, over the trained tokens of the embedding that it shared when PEFT put its LoRA on top."""
    return Chain((first, second)) if isinstance(first, ReplaceRows) and isinstance(second, LowRank) else second


def _listed(parameter: str, modules_to_save: list[str]) -> bool:
    module = parameter.rpartition(".")[0]
    return any(module == name or module.endswith("." + name) for name in modules_to_save)
