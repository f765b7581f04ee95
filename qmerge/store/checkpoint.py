"""What is in a model folder, and how is one of its tensors read?

A checkpoint is data: names, shapes, bytes and a config. No model class is built, and opening reads headers only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from qmerge.errors import Refused
from qmerge.store.headers import read_header
from qmerge.store.hub import resolve
from qmerge.store.jsonfiles import read_object
from qmerge.store.regular import check_contained
from qmerge.store.steady import Stamp, stamps_of
from qmerge.store.tensors import read_tensor
from qmerge.types import TensorSpec

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MOST_LETTERS = 200
"""of a shard's name; file systems stop at 255 bytes"""


@dataclass(frozen=True)
class Checkpoint:
    """A model folder. ``name`` is for people (folder name or hub id), ``revision`` the hub's commit hash, ``config`` its config.json."""

    path: Path
    name: str
    revision: str | None
    config: dict[str, Any]
    specs: dict[str, TensorSpec]
    stamps: Mapping[Path, Stamp | None] = field(default_factory=dict, repr=False)
    """of all files, as they were before the first was read"""

    def load(self, name: str) -> torch.Tensor:
        """The tensor ``name`` as stored (shape and dtype of ``specs[name]``), fresh and writable. Refused for an unknown name."""
        if name not in self.specs:
            raise Refused("The checkpoint has no such tensor.", where=self.name, expected=name, found=f"{len(self.specs)} other tensors")
        return read_tensor(self.path, self.specs[name])

    def files(self) -> list[Path]:
        """The weight files, sorted by name."""
        return [self.path / file for file in sorted({spec.file for spec in self.specs.values()})]

    def config_files(self) -> list[Path]:
        """The other files that decide what the weights mean: the config, and the index where there is one."""
        return [path for path in (self.path / "config.json", self.path / INDEX) if path.is_file()]

    def still_so(self) -> bool:
        """Do config, index and headers say what they said when the folder was opened? Reads them again."""
        try:
            now = open_checkpoint(self.path)
        except Refused:
            return False
        return now.config == self.config and now.specs == self.specs

    @property
    def weight_bytes(self) -> int:
        """Bytes on disk of all weight files, headers included."""
        return sum(path.stat().st_size for path in self.files())


def open_checkpoint(path_or_id: str | Path, revision: str | None = None) -> Checkpoint:
    """Open a model folder or hub id: config.json and every header are read and checked, no weights.

    Raises Refused: no such folder or model, config.json missing or not an object, weights missing or only as pickle, a shard missing,
    index and headers that disagree in either direction, a tensor in two shards, a shard path that is not a plain file name.
    """
    folder, name, commit = resolve(path_or_id, revision)
    check_contained(folder, "config.json")
    stamps = stamps_of([folder / "config.json", folder / INDEX, *sorted(folder.glob("*.safetensors"))])
    config = read_object(folder / "config.json", what="the model's config")
    single, index = folder / SINGLE, folder / INDEX
    if single.is_file() and index.is_file():
        raise Refused("The folder holds a single weight file and an index of shards; it is unclear which of them counts.", where=name,
                      expected=f"{SINGLE} or {INDEX}", found="both", fix="remove the stale one")
    if index.is_file():
        specs = _sharded(folder, name)
    elif single.is_file():
        check_contained(folder, SINGLE)
        specs = read_header(single)[0]
    else:
        raise _no_weights(folder, name)
    if not specs:
        raise Refused("The checkpoint holds no tensors.", where=name, expected="weights", found="an empty header", fix="download it again, or save it again with save_pretrained")
    used = {folder / "config.json", folder / INDEX, *(folder / spec.file for spec in specs.values())}
    return Checkpoint(folder, name, commit, config, specs, {path: stamp for path, stamp in stamps.items() if path in used})


def _no_weights(folder: Path, name: str) -> Refused:
    pickles = sorted(path.name for path in folder.glob("pytorch_model*.bin"))
    if pickles:
        return Refused("The weights are there as pickle only, which qmerge does not read (a pickle can run code).", where=name,
                       expected=f"{SINGLE} or {INDEX}", found=", ".join(pickles[:3]),
                       fix="convert once: AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)")
    return Refused("The folder holds no safetensors weights.", where=name, expected=f"{SINGLE} or {INDEX}", found="neither",
                   fix="check the folder; pickle weights (pytorch_model.bin) are not read: save them as safetensors first")


def _weight_map(folder: Path, name: str) -> dict[str, str]:
    """tensor -> shard, from the index; Refused unless every shard is a plain base name of a file that exists."""
    check_contained(folder, INDEX)
    weight_map = read_object(folder / INDEX, what="the index of shards").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise Refused("The index names no weights.", where=f"{INDEX} in {name}", expected='"weight_map": {tensor: file}',
                      found=type(weight_map).__name__, fix="download it again, or save it again with save_pretrained")
    for tensor, file in weight_map.items():
        where = f"tensor {tensor!r} in {INDEX} of {name}"
        if not isinstance(file, str) or not 0 < len(file) <= MOST_LETTERS or not file.isprintable() or file in (".", "..") or any(mark in file for mark in "/\\:"):
            raise Refused("The index names a shard that is not a plain file name; qmerge does not follow paths.", where=where,
                          expected="a file beside the index", found=repr(file)[:120], fix="download it again, or save it again with save_pretrained")
        if not file.endswith(".safetensors"):
            raise Refused("The index names a shard that is not a safetensors file.", where=where, expected="*.safetensors", found=file, fix="download it again, or save it again with save_pretrained")
        if not (folder / file).is_file():
            raise Refused("A shard is missing.", where=where, expected=file, found="no such file", fix="download the model again")
    return weight_map


def _sharded(folder: Path, name: str) -> dict[str, TensorSpec]:
    weight_map = _weight_map(folder, name)
    specs: dict[str, TensorSpec] = {}
    for file in sorted(set(weight_map.values())):
        check_contained(folder, file)
        for tensor, spec in read_header(folder / file)[0].items():
            where = f"tensor {tensor!r} in {name}"
            if tensor in specs:
                raise Refused("A tensor is in two shards.", where=where, expected="one", found=f"{specs[tensor].file} and {file}", fix="download it again, or save it again with save_pretrained")
            if tensor not in weight_map:
                raise Refused("A shard holds a tensor that the index does not name.", where=where, expected=f"an entry in {INDEX}", found=file, fix="download it again, or save it again with save_pretrained")
            if weight_map[tensor] != file:
                raise Refused("A tensor is in another shard than the index says.", where=where, expected=weight_map[tensor], found=file, fix="download it again, or save it again with save_pretrained")
            specs[tensor] = spec
    for tensor, file in weight_map.items():
        if tensor not in specs:
            raise Refused("The index names a tensor that its shard does not hold.", where=f"tensor {tensor!r} in {name}",
                          expected=f"in {file}", found="not there", fix="download the model again")
    return specs
