"""How is an adapter, or several, attached to a model so that base and adapter stay separate? By PEFT's own loader: this is the reference.

Several adapters with weights are PEFT's active adapters, each scaled; a named combination is PEFT's ``add_weighted_adapter``. An adapter whose initialisation changed
the base, and which keeps what it was before training, is two active adapters: the trained one, and the first one with weight -1.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from safetensors.torch import save_file
from torch import nn

from qmerge.adapters.adapter import Adapter
from qmerge.adapters.choices import SUM, AdapterSet
from qmerge.adapters.claims import PREFIX
from qmerge.adapters.config import changed_base
from qmerge.adapters.several_adapters import check_several
from qmerge.errors import Refused
from qmerge.store.adapter import CONFIG, WEIGHTS

_KEPT = "qmerge merge writes the checkpoint all the same; measure it against a separate model of your own"
_KEYS = {
    "lora_A": "lora_A.weight", "lora_B": "lora_B.weight", "lora_B.bias": "lora_B.bias", "lora_embedding_A": "lora_embedding_A", "lora_embedding_B": "lora_embedding_B",
    "magnitude": "lora_magnitude_vector", "base.weight": "base_layer.weight", "base.bias": "base_layer.bias", "tokens": "token_adapter.trainable_tokens_delta",
}  # fmt: skip
"""the names that PEFT's loader knows, by the part of a module's LoRA"""


@dataclass(frozen=True)
class _Part:
    """One of PEFT's active adapters."""

    adapter: Adapter
    weight: float


def as_set(adapter: str | AdapterSet) -> AdapterSet:
    return adapter if isinstance(adapter, AdapterSet) else AdapterSet.of(adapter)


def check_separate(adapter: str | AdapterSet) -> tuple[Adapter, ...]:
    """The adapters, opened: headers only. Raises Refused where PEFT has no separate form of what was asked for, so that nobody waits for models before hearing it."""
    chosen = as_set(adapter)
    opened = chosen.open()
    check_several(opened, chosen.combination)
    for one in opened:
        if one.config.get("use_qalora"):
            raise Refused("PEFT runs QA-LoRA on its own GPTQ layers only, so there is no separate model in fp32 to compare with.", where=one.name, expected="use_qalora unset", found="true", fix=_KEPT)
    if chosen.combination.how != SUM and (odd := next((one for one in opened if one.initial is not None), None)):
        raise Refused("A named combination is defined for adapters on the base as it is.", where=odd.name, expected="no initialisation that changed the base", found=str(odd.config.get("init_lora_weights")),
                      fix="leave --combine out: the exact sum of deltas")
    parts = _parts(opened, chosen)
    for part in parts if chosen.combination.how == SUM else ():
        if part.weight != 1.0 and not _scales(part.adapter):
            raise Refused("PEFT cannot weigh this adapter, so there is no separate model to compare with.", where=part.adapter.name,
                          expected="LoRA without DoRA, or weight 1", found=f"{_kind(part.adapter)}, weight {part.weight:g}", fix=_KEPT)
    if len(parts) > 1 and chosen.combination.how == SUM:
        _check_together(parts)
    return opened


def attach(model: nn.Module, adapter: str | AdapterSet, device: str = "cpu") -> Any:
    """PEFT's model in eval mode. Grows (or cuts) the embeddings first where the adapter brings others than the base has.

    Raises Refused as `check_separate`, and where PEFT's loader leaves a part of the adapter at its random start.
    """
    chosen = as_set(adapter)
    parts = _parts(check_separate(chosen), chosen)
    _resize(model, parts)
    names = [f"adapter_{index}" for index in range(len(parts))]
    peft: Any = None
    for name, part in zip(names, parts, strict=True):
        with _folder(part.adapter) as folder, warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            config = _config(folder, keep=chosen.combination.how != SUM)
            if peft is None:
                peft = PeftModel.from_pretrained(model, folder, adapter_name=name, config=config, is_trainable=False, torch_device=device)
            else:
                peft.add_adapter(name, config)  # load_adapter alone would read the folder's config, and initialise as it says
                found = peft.load_adapter(folder, adapter_name=name, is_trainable=False, torch_device=device)
                _check_loaded(part.adapter, [key for key in found.missing_keys if name in key])
        _check_loaded(part.adapter, [text for note in said if "missing adapter keys" in (text := str(note.message))])
    if chosen.combination.how != SUM:
        return _combined(peft, names, chosen)
    for name, part in zip(names, parts, strict=True):
        _weigh(peft, name, part.weight)
    if len(names) > 1:
        peft.base_model.set_adapter(names, inference_mode=True)
    return peft.eval()


def _parts(opened: tuple[Adapter, ...], chosen: AdapterSet) -> list[_Part]:
    """DoRA first: PEFT scales all that stands before it, which must be the base alone."""
    parts = [_Part(adapter, weight) for adapter, weight in zip(opened, chosen.weights, strict=True)]
    parts += [_Part(part.adapter.initial, -part.weight) for part in parts if part.adapter.initial is not None]
    return parts if chosen.combination.how != SUM else sorted(parts, key=lambda part: not part.adapter.config.get("use_dora"))


def _check_together(parts: list[_Part]) -> None:
    for part in parts:
        saved = sorted(part.adapter.saved) + [claims.parts["tokens"] for claims in part.adapter.claims.modules.values() if "tokens" in claims.parts]
        if saved:
            raise Refused("PEFT cannot have several adapters active where one of them replaces tensors, so there is no separate model to compare with.",
                          where=f"{part.adapter.name}: {saved[0]}", expected="LoRA pairs alone", found=f"{len(parts)} adapters", fix=_KEPT)
    scaled: dict[str, str] = {}
    for part in parts:
        for module in part.adapter.pairs if part.adapter.config.get("use_dora") else ():
            if module in scaled:
                raise Refused("Two DoRA adapters change one linear, which PEFT applies one to the other's result, so there is no separate model of their sum.",
                              where=f"{module} in {part.adapter.name} and {scaled[module]}", expected="DoRA in one of the adapters", found="in both", fix=_KEPT)
            scaled[module] = part.adapter.name


def _scales(adapter: Adapter) -> bool:
    return adapter.kind == "LORA" and not adapter.config.get("use_dora")


def _kind(adapter: Adapter) -> str:
    return "DoRA" if adapter.config.get("use_dora") else adapter.kind


def _config(folder: Path, keep: bool) -> Any:
    """PEFT's config, without an initialisation that PEFT would do again while loading (all values come from the file, and some initialisations change the base).

    ``keep`` one that leaves the base alone: a combination that drops values at random draws them after the numbers of the first adapter's initialisation.
    """
    config: Any = PeftConfig.from_pretrained(str(folder))
    if hasattr(config, "init_lora_weights") and not (keep and changed_base(config.to_dict()) is None):
        config.init_lora_weights = True
    if hasattr(config, "megatron_config"):
        config.megatron_config = None  # else PEFT imports whatever module the file names
    config.inference_mode = True
    return config


@contextlib.contextmanager
def _folder(adapter: Adapter) -> Iterator[Path]:
    """The adapter's folder; one made of it where the file spells names as PEFT's loader does not (marks of wrappers, several adapters, pickles)."""
    claims, keys = adapter.claims, dict[str, str]()
    for module, mine in claims.modules.items():
        keys |= {_spelled(module, slot, key): key for slot, key in mine.parts.items()} | {key: key for key in mine.idle}
    keys |= {f"{PREFIX}{parameter}": key for parameter, key in claims.saved.items()}
    as_it_is = adapter.kind != "LORA" or {_plain(key) for key in keys} == {_plain(key) for key in adapter.specs}
    if as_it_is and (adapter.path / WEIGHTS).is_file():
        yield adapter.path
        return
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        (folder / CONFIG).write_text(json.dumps(adapter.config), encoding="utf-8")
        save_file({name: adapter.load(key).contiguous() for name, key in (keys if adapter.kind == "LORA" else {key: key for key in adapter.specs}).items()}, folder / WEIGHTS)
        yield folder


def _spelled(module: str, slot: str, key: str) -> str:
    """The name that PEFT's loader looks for."""
    inner = ".token_adapter" if slot.startswith("base.") and ".token_adapter.base_layer." in key else ""
    return f"{PREFIX}{module}{inner}.{_KEYS[slot]}"


def _plain(key: str) -> str:
    """Spellings that PEFT reads as one."""
    return key.removesuffix(".weight").replace(".modules_to_save.", ".")


def _check_loaded(adapter: Adapter, missing: list[str]) -> None:
    if missing:
        raise Refused("PEFT's loader does not find all of this adapter's tensors in it, so there is no separate model to compare with.", where=adapter.name, expected="every tensor of the modules that its config targets",
                      found=f"missing: {missing[0][:300]}", fix=_KEPT)


def _combined(peft: Any, names: list[str], chosen: AdapterSet) -> Any:
    combination = chosen.combination
    torch.manual_seed(combination.seed)
    options: dict[str, Any] = {"density": combination.density} if combination.density is not None else {}
    if combination.rank is not None:
        options["svd_rank"] = combination.rank
    peft.add_weighted_adapter(names, chosen.weights, adapter_name="combined", combination_type=combination.how, **options)
    peft.set_adapter("combined")
    return peft.eval()


def _weigh(model: PeftModel, name: str, weight: float) -> None:
    if weight == 1.0:
        return
    for module in model.modules():
        scaling = getattr(module, "scaling", None)
        if isinstance(scaling, dict) and name in scaling:
            scaling[name] *= weight


def _resize(model: Any, parts: list[_Part]) -> None:
    entrance = model.get_input_embeddings()
    ends = [name for name, module in model.named_modules() if module in (entrance, model.get_output_embeddings())]
    held = {part.adapter.specs[key].shape[0] for part in parts for key in part.adapter.specs for name in ends if _plain(key).replace(".token_adapter", "").replace(".base_layer", "") == f"{PREFIX}{name}"}
    if len(held) == 1 and (rows := held.pop()) != entrance.weight.shape[0]:
        model.resize_token_embeddings(rows, mean_resizing=False)
