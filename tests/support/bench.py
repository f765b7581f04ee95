"""How far is a merged checkpoint from the separate adapter, in one cell of the support matrix?

Both sides are transformers models in fp32: the float twin of the base with PEFT's adapter (or adapters) attached, and the folder that qmerge wrote with ``--format fp32``.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from support.adapters import Exact, make
from support.architectures import ARCHITECTURES, VOCABULARY
from support.bases import KINDS, Written, save_float, write_base
from support.references import separate

MOVED = 1e-2
"""of the largest logit: an adapter that changes less than this proves nothing"""


@dataclass(frozen=True)
class Measured:
    """``error``: largest difference between merged and separate; ``moved``: between base and separate; both relative to the largest logit."""

    error: float
    moved: float


class Bench:
    """Bases by architecture and kind, each written and loaded once."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._floats: dict[str, Path] = {}
        self._bases: dict[tuple[str, str], Written] = {}
        self._models: dict[Path, Any] = {}
        self._plain: dict[tuple[str, str] | None, Path] = {}
        self._count = 0

    def folder(self) -> Path:
        self._count += 1
        return self.root / f"cell-{self._count}"

    def base(self, architecture: str, kind: str) -> Written:
        key = (architecture, kind)
        if key not in self._bases:
            if architecture not in self._floats:
                self._floats[architecture] = save_float(ARCHITECTURES[architecture], self.root / f"{architecture}-source")
            place = self.root / f"{architecture}-{kind}"
            self._bases[key] = write_base(ARCHITECTURES[architecture], KINDS[kind], self._floats[architecture], place, place.with_name(place.name + "-twin"))
        return self._bases[key]

    def model(self, architecture: str, kind: str) -> Any:
        """A fresh fp32 model of the weights that the base stands for."""
        twin = self.base(architecture, kind).twin
        if twin not in self._models:
            self._models[twin] = load(twin)
        return copy.deepcopy(self._models[twin])

    def merge(self, base: Path, adapters: list[str], flags: dict[str, Any]) -> Path:
        """The merged folder. Raises what the merge raises."""
        from qmerge.pipeline.plan import plan, plan_each
        from qmerge.pipeline.recipe import build_recipe
        from qmerge.pipeline.run import run, run_dense

        out = self.folder()
        recipe = build_recipe(None, (), {"base": str(base), "adapter": tuple(adapters), "out": str(out), "format": "fp32", "device": "cpu"} | flags)
        if recipe.each:
            run_dense(plan_each(recipe))
        else:
            run(plan(recipe))
        return out

    def adapters(self, architecture: str, kind: str, case: Exact) -> tuple[list[Path], Any]:
        """The folders of ``case``'s adapters, and the model that the first was trained on, with it. A plain adapter is made once, whatever the kind of base."""
        folders, first = [], None
        key = (architecture, repr(case.lora)) if case == Exact(case.lora) and "init_lora_weights" not in case.lora else None
        if key in self._plain:
            return [self._plain[key]], None
        for number, one in enumerate((case, *case.others)):
            folders.append(self.folder())
            trained = make(self.model(architecture, kind), one, folders[-1], seed=number + 1)
            first = first or trained
        if key:
            self._plain[key] = folders[0]
        return folders, first

    def run(self, architecture: str, kind: str, case: Exact) -> Measured:
        """Make, merge, load, compare. Raises what the merge raises."""
        kind = case.base or kind
        folders, trained = self.adapters(architecture, kind, case)
        place, written = case.flags.get("pick", ""), self.base(architecture, kind)
        texts = [f"{folder}{place}" + (f"={weight:g}" if weight != 1 else "") for folder, weight in zip(folders, case.weights or (1.0,) * len(folders), strict=True)]
        flags = KINDS[kind].flags | {name: value for name, value in case.flags.items() if name != "pick"}
        if flags.get("on") == "original" and KINDS[kind].pack is not None:
            flags["original"] = str(written.source)
        base = written.folder
        if flags.get("residual_base"):
            base = self._residual(trained)
        out = self.merge(base, texts, flags)
        plain = self.model(architecture, kind)
        if case.prepare is not None:
            case.prepare(plain)
        wanted = [answers(model) for model in separate(case, lambda: copy.deepcopy(plain), folders, trained)]
        error = max(distance(answers(load(out / folder.name if flags.get("each") else out)), one) for folder, one in zip(folders[: len(wanted)], wanted, strict=True))
        return Measured(error, distance(answers(plain), wanted[0]))

    def _residual(self, trained: Any) -> Path:
        """The base as the initialisation left it, saved."""
        place = self.folder()
        copy.deepcopy(trained).unload().save_pretrained(place)
        return place


def load(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def answers(model: Any) -> torch.Tensor:
    """Logits of 2 x 32 tokens, those of a grown vocabulary among them."""
    size = model.config.get_text_config().vocab_size
    ids = torch.arange(64).reshape(2, 32) * 7 % VOCABULARY
    ids[1, -6:] = torch.arange(size - 6, size)
    return model(input_ids=ids).logits


def distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max()) if found.shape == wanted.shape else float("inf")
