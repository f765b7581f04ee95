"""Where are an adapter's files, and which tensors lie in them?

A folder in PEFT's layout, local or on the hub: ``adapter_config.json`` and ``adapter_model.safetensors`` (a pickle only when asked for, read in a child process).
Several adapters may share a folder, one per subfolder; ``folder#name`` picks one. What the tensors mean is for `qmerge.adapters`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from qmerge.errors import Refused
from qmerge.numerics.finite import all_finite
from qmerge.store.headers import read_header, rows_of
from qmerge.store.hub import resolve, split_name
from qmerge.store.jsonfiles import read_object
from qmerge.store.regular import check_contained
from qmerge.store.steady import Stamp, stamps_of
from qmerge.store.tensors import read_tensor
from qmerge.store.unpickle import as_safetensors
from qmerge.types import TensorSpec

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"


@dataclass(frozen=True)
class AdapterFiles:
    """An adapter folder: config and header are read, no weights. ``specs``: every tensor by its name in the file. ``weights`` is where they are read from."""

    path: Path
    name: str
    wanted: str | None
    """the adapter that was picked by name, or None"""
    revision: str | None
    config: dict[str, Any]
    weights: Path
    specs: dict[str, TensorSpec]
    source: Path = field(default=Path())
    """the weight file as the user has it: ``weights``, or the pickle that it was made of"""
    keep: Any = field(default=None, repr=False)
    """holds a temporary folder alive"""
    stamps: Mapping[Path, Stamp | None] = field(default_factory=dict, repr=False)
    """of all files, as they were before the first was read"""

    def load(self, tensor_name: str) -> torch.Tensor:
        """A tensor of the file as stored. Refused for an unknown name."""
        return read_tensor(self.weights.parent, self._spec(tensor_name))

    def rows(self, tensor_name: str, start: int, stop: int) -> torch.Tensor:
        """Rows ``start`` … ``stop`` of a tensor, fp32, checked to be finite."""
        found = read_tensor(self.weights.parent, rows_of(self._spec(tensor_name), start, stop)).float()
        check_finite(f"{self.name}: {tensor_name}", found)
        return found

    def fp32(self, tensor_name: str) -> torch.Tensor:
        """A whole tensor in fp32, checked to be finite."""
        found = self.load(tensor_name).float()
        check_finite(f"{self.name}: {tensor_name}", found)
        return found

    def _spec(self, tensor_name: str) -> TensorSpec:
        if tensor_name not in self.specs:
            raise Refused("The adapter has no such tensor.", where=self.name, expected=tensor_name, found=f"{len(self.specs)} other tensors")
        return self.specs[tensor_name]

    def files(self) -> list[Path]:
        """The weight files, as the user has them."""
        return [self.source]

    def config_files(self) -> list[Path]:
        """The other files that decide what the weights mean."""
        return [self.path / CONFIG]

    def still_so(self) -> bool:
        """Do config and header say what they said when the folder was opened? Reads them again; of a pickle nobody can tell without it being read once more, so: no."""
        try:
            return self.weights == self.source and read_object(self.path / CONFIG, what="the adapter's config") == self.config and read_header(self.weights)[0] == self.specs
        except Refused:
            return False

    @property
    def weight_bytes(self) -> int:
        """Bytes on disk of all weight files, headers included."""
        return sum(path.stat().st_size for path in self.files())


def check_finite(name: str, tensor: torch.Tensor) -> None:
    """Refused, naming the tensor and counting each kind, if a floating-point ``tensor`` holds NaN, +Inf or -Inf."""
    if not tensor.is_floating_point():
        return
    values = tensor.float() if tensor.element_size() == 1 else tensor
    if all_finite(values):
        return
    counts = [("NaN", int(torch.isnan(values).sum())), ("+Inf", int(torch.isposinf(values).sum())), ("-Inf", int(torch.isneginf(values).sum()))]
    raise Refused("A tensor holds values that are not finite.", where=f"tensor {name!r}", expected=f"{tensor.numel()} finite values",
                  found=", ".join(f"{count} {kind}" for kind, count in counts if count), fix="this training run diverged: use an earlier checkpoint")


def open_files(path_or_id: str | Path, revision: str | None = None, allow_pickle: bool = False) -> AdapterFiles:
    """Find an adapter. ``folder#name`` or ``org/repo#name`` names one of several in a folder.

    Raises Refused: no such folder or name, a folder of several adapters and no name, missing or malformed files, pickle weights without ``allow_pickle``.
    """
    text, wanted = split_name(str(path_or_id))
    folder, name, commit = resolve(text if isinstance(path_or_id, str) or wanted else path_or_id, revision, (PICKLE,) if allow_pickle else ())
    if wanted and not _inside(folder, wanted) and (folder / CONFIG).is_file():
        named = name  # one file that may hold several adapters by name
    elif wanted:
        if not _inside(folder, wanted):
            raise Refused("There is no adapter of this name in the folder.", where=name, expected=", ".join(_adapters_below(folder)) or CONFIG, found=wanted)
        check_contained(folder, wanted)
        folder, named = folder / wanted, f"{name}/{wanted}"
    else:
        named = name
    if not (folder / CONFIG).is_file() and (names := _adapters_below(folder)):
        raise Refused("The folder holds several adapters, and none was named.", where=name, expected="one of " + ", ".join(f"{text}#{item}" for item in names),
                      found=text, fix=f"--adapter '{text}#{names[0]}'")
    if not (folder / CONFIG).is_file() and (folder / "config.json").is_file():
        raise Refused("adapter_config.json is missing: this is a model, not an adapter.", where=name, expected=CONFIG, found="config.json, as models have it",
                      fix="are --base and --adapter in each other's place? qmerge inspect tells them apart")
    check_contained(folder, CONFIG)
    stamps = stamps_of([folder / CONFIG, folder / (WEIGHTS if (folder / WEIGHTS).is_file() else PICKLE)])
    config = read_object(folder / CONFIG, what="the adapter's config")
    weights, source, keep = _weights(folder, named, allow_pickle)
    return AdapterFiles(folder, named, wanted, commit, config, weights, read_header(weights)[0], source, keep, stamps)


def _inside(folder: Path, name: str) -> bool:
    return name not in ("", ".", "..") and not any(mark in name for mark in "/\\\0") and (folder / name / CONFIG).is_file()


def _adapters_below(folder: Path) -> list[str]:
    return sorted(path.parent.name for path in folder.glob(f"*/{CONFIG}"))


def _weights(folder: Path, name: str, allow_pickle: bool) -> tuple[Path, Path, Any]:
    """(safetensors file to read, the user's own file, something to keep alive)."""
    if (folder / WEIGHTS).is_file():
        check_contained(folder, WEIGHTS)
        return folder / WEIGHTS, folder / WEIGHTS, None
    if not (folder / PICKLE).is_file():
        raise Refused("The adapter's weights are missing.", where=name, expected=WEIGHTS, found="no such file", fix="name the folder that adapter_model.safetensors lies in")
    if not allow_pickle:
        raise Refused("The adapter's weights are there as pickle only, which qmerge does not read unasked (a pickle can run code).", where=name, expected=WEIGHTS,
                      found=PICKLE, fix="--allow-pickle reads it in a child process with weights_only; or convert it once: PeftModel.from_pretrained(base, folder).save_pretrained(new_folder)")
    weights, keep = as_safetensors(folder / PICKLE)
    return weights, folder / PICKLE, keep
