"""Does the file hold everything that the config says was trained, on this base? What is missing would silently stay the base's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from qmerge.adapters.claims import EMBEDDINGS
from qmerge.errors import Refused

if TYPE_CHECKING:
    from qmerge.adapters.adapter import Adapter

_FIX = "the adapter was saved incompletely: save it again"


def check_promises(adapter: Adapter, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refused, naming the module, where a saved module, a trained bias or a trained token of the config has no tensor in the file."""
    if not adapter.config.get("layer_replication"):  # the new stack has other names than the base
        _check_saved(adapter, shapes)
        _check_biases(adapter, shapes)
    _check_tokens(adapter, shapes)


def _check_saved(adapter: Adapter, shapes: Iterable[str]) -> None:
    """PEFT saves every module whose name ends with a listed one, whole."""
    listed = tuple(adapter.config.get("modules_to_save") or ())
    if not listed:
        return
    for parameter in shapes:
        parts = parameter.split(".")[:-1]
        owners = (".".join(parts[: count + 1]) for count in range(len(parts)))
        if parameter not in adapter.saved and any(owner.endswith(listed) for owner in owners):
            _refuse(adapter, "a saved module", parameter, f"modules_to_save: {list(listed)}")


def _check_biases(adapter: Adapter, shapes: Iterable[str]) -> None:
    """``bias="lora_only"`` trains the biases of adapted linears, ``"all"`` every one."""
    kind = adapter.config.get("bias")
    if kind not in ("all", "lora_only"):
        return
    held = set(adapter.saved) | {f"{module}.bias" for module, claims in adapter.claims.modules.items() if "base.bias" in claims.parts}
    for parameter in shapes:
        module, _, leaf = parameter.rpartition(".")
        if leaf == "bias" and parameter not in held and (kind == "all" or module in adapter.pairs):
            _refuse(adapter, "a trained bias", parameter, f"bias: {kind!r}")


def _check_tokens(adapter: Adapter, shapes: Iterable[str]) -> None:
    """A list needs one embedding with trained tokens, a table one for each of its lists (a tied head may share its embedding's)."""
    table = adapter.config.get("trainable_token_indices")
    if not table:
        return
    trained = [module for module, claims in adapter.claims.modules.items() if "tokens" in claims.parts]
    named = table if isinstance(table, dict) else {}
    held = {name for name in named if any(module == name or module.endswith(f".{name}") for module in trained)}
    lost = [name for name in named if named[name] and name not in held and not any(named[other] == named[name] for other in held)]
    if lost or not trained:
        entrance = next((name for name in shapes if name.rpartition(".")[0].rpartition(".")[2] in EMBEDDINGS and "head" not in name), "the embedding")
        _refuse(adapter, "trained tokens", lost[0] if lost else entrance, f"trainable_token_indices: {table!r}"[:120])


def _refuse(adapter: Adapter, what: str, name: str, promise: str) -> None:
    raise Refused(f"The adapter's config promises {what} that the file does not hold.", where=f"{name} in {adapter.name}", expected=promise, found="no such tensor", fix=_FIX)
