"""What does a cell of the support matrix claim, and how is its adapter made?

PEFT makes and saves every adapter; where PEFT cannot (older files, marks of wrappers, a pickle), the saved folder is changed afterwards.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

Model = Any
TOLERANCE = 2e-5
"""of the largest logit. Both sides compute in fp32 and differ in the order of summation alone: (W + sBA)x against Wx + sB(Ax), 2^-24 per step over sums of 64 to 96 and two layers"""
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@dataclass(frozen=True)
class Exact:
    """The merged model answers as PEFT's separate adapter. ``lora``: fields of the PEFT config; ``prepare``: what becomes of the base before PEFT sees it; ``change``: what becomes
    of the saved folder; ``flags``: what the merge is told; ``others``: more adapters, as Exact, with ``weights``; ``base``: the kind of base, where it cannot be the usual one;
    ``oracle``: None for PEFT's own forward of the saved file, ``live`` for that of the model that was trained, or what makes the wanted model of (base model, folder);
    ``tolerance``: of the largest logit, the usual one unless ``note`` says why not."""

    lora: dict[str, Any] = field(default_factory=dict)
    kind: str = "LORA"
    prepare: Callable[[Model], None] | None = None
    change: Callable[[Path], None] | None = None
    save: dict[str, Any] = field(default_factory=dict)
    flags: dict[str, Any] = field(default_factory=dict)
    others: tuple[Exact, ...] = ()
    weights: tuple[float, ...] = ()
    base: str | None = None
    oracle: str | Callable[[Model, Path], Model] | None = None
    note: str | None = None
    tolerance: float = TOLERANCE


@dataclass(frozen=True)
class Refusal:
    """The merge is refused with a message that matches ``message``; ``why`` is for the page. The adapter is ``case``'s."""

    message: str
    why: str
    case: Exact = Exact()


@dataclass(frozen=True)
class Blank:
    """There is nothing to merge: no such adapter can exist here."""

    why: str


Cell = Exact | Refusal | Blank


def make(model: Model, case: Exact, folder: Path, seed: int = 1) -> Model:
    """Save ``case``'s adapter, trained on ``model`` (which it changes), in ``folder``; returns PEFT's model. Everything that trains has moved."""
    from peft import get_peft_model
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    if case.prepare is not None:
        case.prepare(model)
    folder.mkdir(parents=True)
    (folder / "README.md").write_text("---\nbase_model: none\n---\n")  # PEFT compiles a template for a new one, a sixth of a cell's time
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trained = get_peft_model(model, PEFT_TYPE_TO_CONFIG_MAPPING[case.kind](**{"task_type": "CAUSAL_LM"} | case.lora)).eval()
        if case.lora.get("init_lora_weights") == "pissa":
            trained.save_pretrained(folder / "pissa_init")
        shake(trained)
        trained.save_pretrained(folder, **case.save)
    if case.change is not None:
        case.change(folder)
    return trained


@torch.no_grad()
def shake(model: Model) -> None:
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(0.1 * torch.randn_like(parameter))


def settings(**changes: Any) -> Callable[[Path], None]:
    """Set fields of the saved config."""

    def change(folder: Path) -> None:
        config = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps(config | changes))

    return change


def keys(rename: Callable[[str], str]) -> Callable[[Path], None]:
    """Rename the tensors of the saved file."""

    def change(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        save_file({rename(name): tensor for name, tensor in tensors.items()}, folder / WEIGHTS, {"format": "pt"})

    return change


def pickled(folder: Path) -> None:
    """The file as PEFT wrote it before safetensors."""
    torch.save(load_file(folder / WEIGHTS), folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()


def disagreeing(folder: Path) -> None:
    """A saved module twice in one file, once changed."""
    tensors = load_file(folder / WEIGHTS)
    copies = {name: tensor + 1 if ".modules_to_save." in name else tensor for name, tensor in tensors.items()}
    save_file(copies, folder / WEIGHTS, {"format": "pt"})


def named(name: str) -> Callable[[Path], None]:
    """Into a subfolder, as PEFT saves an adapter whose name is not ``default``; another one lies beside it."""

    def change(folder: Path) -> None:
        for place in (name, "other"):
            (folder / place).mkdir()
            tensors = load_file(folder / WEIGHTS)
            save_file({key: tensor * (1 if place == name else 3) for key, tensor in tensors.items()}, folder / place / WEIGHTS, {"format": "pt"})
            (folder / place / CONFIG).write_bytes((folder / CONFIG).read_bytes())
        (folder / WEIGHTS).unlink()
        (folder / CONFIG).unlink()

    return change
