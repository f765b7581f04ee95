"""What does the model's module tree look like, without its weights?

transformers builds the class from the config with parameters on the meta device. Everything that differs between architectures is read off
this tree: the decoder's ``ModuleList``, linears by type, which of them store their weight transposed, whether the head is tied.
"""

from __future__ import annotations

import importlib.util
import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from qmerge.errors import Refused
from qmerge.store.checkpoint import Checkpoint
from qmerge.store.durable import room_needed
from qmerge.store.settings import known_settings

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MALFORMED = (ArithmeticError, AttributeError, ImportError, LookupError, MemoryError, OSError, RecursionError, RuntimeError, TypeError, ValueError)
"""what transformers and torch raise where a config says what no model has"""
LEAST_LAYERS = 1000


@dataclass(frozen=True)
class Skeleton:
    """``linears``: weight names that bitsandbytes would quantize, each with whether it is a Conv1D. ``inside``: those within decoder blocks."""

    model: PreTrainedModel
    blocks_name: str
    linears: dict[str, bool]
    inside: tuple[str, ...]
    input_embedding: str | None
    output_embedding: str | None

    @property
    def blocks(self) -> nn.ModuleList:
        found = self.model.get_submodule(self.blocks_name)
        assert isinstance(found, nn.ModuleList)  # `describe` has looked
        return found

    @property
    def experts(self) -> tuple[str, ...]:
        """Modules that hold the weights of all routed experts of a layer in parameters of three axes, the experts first."""
        return tuple(name for name, module in self.model.named_modules() if hasattr(module, "is_transposed") and any(p.dim() == 3 for p in module.parameters(recurse=False)))

    @property
    def tied(self) -> bool:
        return bool(getattr(self.model.config.get_text_config(), "tie_word_embeddings", False))

    @property
    def tied_names(self) -> frozenset[str]:
        """The head's name where it shares the embedding's tensor: a file may leave it out."""
        head = self.output_embedding
        return frozenset({head}) if self.tied and head is not None and head != self.input_embedding else frozenset()


def may_hold_conv1d(config: dict[str, Any]) -> bool:
    """Might linears of this architecture store their weights ``[in, out]``? Answered from the text of transformers' source, which imports nothing.

    True also where the text cannot be found: then the model class has to be asked.
    """
    found = importlib.util.find_spec("transformers")
    if found is None or found.origin is None:
        return True
    kinds = [str(part["model_type"]) for part in (config, *(value for value in config.values() if isinstance(value, dict))) if part.get("model_type")]
    for kind in kinds or [""]:
        folder = Path(found.origin).parent / "models" / kind.replace("-", "_")
        sources = sorted(folder.glob("modeling_*.py")) if kind and "/" not in kind and ".." not in kind else []
        if not sources or any("Conv1D" in source.read_text(encoding="utf-8") for source in sources):
            return True
    return False


def build_skeleton(checkpoint: Checkpoint, changed: dict[str, Any] | None = None) -> Skeleton:
    """``changed``: the config of the output, where the adapter changes it (more tokens or layers).

    Raises `Refused` where transformers has no causal LM for this config, or the decoder is not one ``ModuleList``. Never runs remote code.
    """
    from accelerate import init_empty_weights
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig, AutoModelForCausalLM

    _check_layers(checkpoint.config if changed is None else changed, checkpoint)
    try:
        config = _config(known_settings(checkpoint.config if changed is None else changed)[0], AutoConfig)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        with init_empty_weights(include_buffers=False):
            # None: what transformers picks for this class, whatever the file asks for; Gemma 2 has no sdpa, and no machine every kernel. eager: one expert after the other
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=None, experts_implementation="eager", trust_remote_code=False)
    except (*MALFORMED, StrictDataclassError) as problem:
        raise Refused("transformers cannot build a causal language model from this config", where=f"{checkpoint.name}/config.json",
                      found=(str(problem).splitlines() or [type(problem).__name__])[0][:200], fix="qmerge never runs remote code; the architecture must be one that transformers has") from problem
    model.eval().requires_grad_(False)
    return describe(model, checkpoint.name)


def _check_layers(config: Mapping[str, Any], checkpoint: Checkpoint) -> None:
    """Refused where a config counts layers that no file of this size could hold: each would be built, for ever."""
    most = max(LEAST_LAYERS, 2 * len(checkpoint.specs))
    for key, value in config.items():
        if isinstance(value, Mapping):
            _check_layers(value, checkpoint)
        elif isinstance(value, (int, float)) and value > most and ("layers" in key or key == "n_layer"):
            raise Refused("the config counts more layers than the checkpoint could hold", where=f"{checkpoint.name}/config.json: {key}", expected=f"at most {most}, as there are {len(checkpoint.specs)} tensors", found=str(value)[:40], fix="is config.json that of another model? Download the base again")


def _config(source: dict[str, Any], loader: Any) -> Any:
    with tempfile.TemporaryDirectory() as folder:  # transformers reads configs from folders
        with room_needed("the folder for temporary files"):
            (Path(folder) / "config.json").write_text(json.dumps(source), encoding="utf-8")
        return loader.from_pretrained(folder, trust_remote_code=False, local_files_only=True)


def describe(model: PreTrainedModel, where: str) -> Skeleton:
    """The parts of a model on the meta device. Raises `Refused` where its decoder is not one ``ModuleList``."""
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    linears: dict[str, bool] = {}
    for name, module in model.named_modules():
        if module is not head and (type(module) is nn.Linear or isinstance(module, Conv1D)):
            linears[f"{name}.weight"] = isinstance(module, Conv1D)
    blocks_name = _find_blocks(model, where)
    inside = tuple(name for name in linears if name.startswith(blocks_name + "."))
    names = {module: name for name, module in model.named_modules()}
    entrance = model.get_input_embeddings()
    return Skeleton(model, blocks_name, linears, inside, f"{names[entrance]}.weight" if entrance is not None else None, f"{names[head]}.weight" if head is not None else None)


def _find_blocks(model: nn.Module, where: str) -> str:
    """The outermost ``ModuleList`` that holds most of the model's parameters."""
    best, size = "", 0
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module):
            count = sum(parameter.numel() for parameter in module.parameters())
            if count > size:
                best, size = name, count
    if not best:
        raise Refused("the model has no list of decoder blocks", where=where, expected="one ModuleList of decoder blocks", found=type(model).__name__, fix="use --format bf16")
    return best


def set_weight(module: nn.Module, name: str, weight: torch.Tensor) -> None:
    """Put a real tensor in place of parameter ``name`` (dotted, below ``module``)."""
    path, _, leaf = name.rpartition(".")
    owner: Any = module.get_submodule(path) if path else module
    owner._parameters[leaf] = nn.Parameter(weight, requires_grad=False)


def move_buffers(model: nn.Module, device: torch.device) -> None:
    """Those that are not on the meta device."""
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.device.type != "meta":
                module._buffers[name] = buffer.to(device)
