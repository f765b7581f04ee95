"""What is the separate model of a cell: PEFT's adapter or adapters on the float twin of the base, or, where PEFT cannot, a few lines of our own?"""

from __future__ import annotations

import copy
import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file
from support.adapters import CONFIG, WEIGHTS, Exact
from torch import nn
from transformers.pytorch_utils import Conv1D

Model = Any
Fresh = Callable[[], Model]


def separate(case: Exact, fresh: Fresh, folders: list[Path], trained: Model) -> list[Model]:
    """The wanted models: one, or with ``each`` one per adapter. ``fresh`` gives the base, prepared as training prepared it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if case.oracle == "live":
            return [trained]
        if callable(case.oracle):
            return [case.oracle(fresh(), folders[0]).eval()]
        if case.flags.get("each"):
            return [attached(fresh(), [folder]) for folder in folders]
        if case.flags.get("combine"):
            return [combined(fresh(), folders, case)]
        return [attached(fresh(), [folders[0] / case.flags.get("pick", "").removeprefix("#"), *folders[1:]], case.weights)]


def attached(model: Model, folders: list[Path], weights: tuple[float, ...] = ()) -> Model:
    """All adapters active at once; a weight scales its adapter's own factor."""
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer

    found = PeftModel.from_pretrained(model, folders[0], adapter_name="a0")
    for number, folder in enumerate(folders[1:], 1):
        found.load_adapter(folder, adapter_name=f"a{number}")
    if len(folders) > 1 or weights:
        found.base_model.set_adapter([f"a{number}" for number in range(len(folders))])
    for module in found.modules():
        for number, weight in enumerate(weights if isinstance(module, LoraLayer) else ()):
            if f"a{number}" in module.scaling:
                module.scaling[f"a{number}"] *= weight
    return found.eval()


def combined(model: Model, folders: list[Path], case: Exact) -> Model:
    """PEFT's own combination, after ``torch.manual_seed(0)``."""
    found = attached(model, folders)
    names, rank = [f"a{number}" for number in range(len(folders))], case.flags.get("combine_rank")
    torch.manual_seed(case.flags.get("seed", 0))
    found.add_weighted_adapter(names, list(case.weights), "joint", case.flags["combine"], svd_rank=rank, density=case.flags.get("density"), svd_full_matrices=False)
    found.set_adapter("joint")
    return found.eval()


def by_hand(model: Model, folder: Path, change: Callable[[nn.Module, dict[str, torch.Tensor], float], torch.Tensor] | None = None) -> Model:
    """The base plus ``s · B A`` per module of the file, nothing else looked at. ``change(module, parts, scaling)`` gives another delta ``[out, in]``."""
    config, tensors = json.loads((folder / CONFIG).read_text()), load_file(folder / WEIGHTS)
    modules: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        match = re.fullmatch(r"base_model\.model\.(.+)\.(lora_[AB])\.weight", re.sub(r"_(orig_mod|fsdp_wrapped_module|checkpoint_wrapped_module)\.", "", name))
        modules.setdefault(match[1], {})[match[2]] = tensor
    model = copy.deepcopy(model)
    for name, parts in modules.items():
        module, scaling = model.get_submodule(name), config["lora_alpha"] / config["r"]
        delta = change(module, parts, scaling) if change else scaling * parts["lora_B"] @ parts["lora_A"]
        module.weight.data += delta.T if isinstance(module, Conv1D) else delta
    return model


def pooled(module: nn.Module, parts: dict[str, torch.Tensor], scaling: float) -> torch.Tensor:
    """QA-LoRA (Xu et al., 2023): what PEFT's forward of one layer makes of the unit vectors."""
    from peft.tuners.lora.variants import QALoraLinearVariant

    (rank, groups), (outputs, _) = parts["lora_A"].shape, parts["lora_B"].shape
    inputs = module.weight.numel() // outputs
    a, b = nn.Linear(groups, rank, bias=False), nn.Linear(rank, outputs, bias=False)
    a.weight.data, b.weight.data = parts["lora_A"], parts["lora_B"]
    layer = SimpleNamespace(lora_A={"q": a}, lora_B={"q": b}, lora_dropout={"q": nn.Identity()}, scaling={"q": scaling}, qalora_group_size={"q": inputs // groups},
                            in_features=inputs, training=False)  # fmt: skip
    return QALoraLinearVariant.forward(layer, "q", torch.eye(inputs), torch.zeros(inputs, outputs)).detach().T
