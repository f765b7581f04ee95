"""What can somebody change in a checkpoint of qmerge, and make the manifest vouch for?

Each change is made in the tensors of one linear, as they lie in the file of its format; afterwards every SHA-256 in the manifest is renewed. None touches the record of how
the linear was solved: whoever has the inputs can compute that anew, and is caught by a signature alone.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from qmerge.store.durable import json_bytes
from qmerge.store.manifest import digest_files, sealed

Tensors = dict[str, torch.Tensor]
Change = Callable[[Tensors, str], None]


def renew(folder: Path) -> None:
    """Every digest of the manifest anew, its own too."""
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"] = digest_files(folder)
    (folder / "manifest.json").write_bytes(json_bytes(sealed(manifest)))


def tampered(source: Path, target: Path, change: Change, linear: str) -> Path:
    """A copy whose ``linear`` (a module's name) was changed."""
    shutil.copytree(source, target)
    for shard in sorted(target.glob("model*.safetensors")):
        tensors = load_file(shard)
        mine = {name: tensor for name, tensor in tensors.items() if name.startswith(f"{linear}.")}
        if mine:
            before = {name: tensor.clone() for name, tensor in mine.items()}
            change(mine, linear)
            assert any(not torch.equal(mine[name].reshape(-1).view(torch.uint8), before[name].reshape(-1).view(torch.uint8)) for name in before), "nothing was changed"
            save_file(tensors | {name: tensor.contiguous() for name, tensor in mine.items()}, shard, {"format": "pt"})
    renew(target)
    return target


def packed(tensors: Tensors, linear: str) -> str:
    return next(name for name in (f"{linear}.qweight", f"{linear}.weight_packed", f"{linear}.weight") if name in tensors)


def scales(tensors: Tensors, linear: str) -> str:
    return next(name for name in (f"{linear}.scales", f"{linear}.weight_scale", f"{linear}.weight.absmax") if name in tensors)


def one_code(tensors: Tensors, linear: str) -> None:
    """The lowest four bits of one word (or byte) in the middle: one code by one step."""
    flat = tensors[packed(tensors, linear)].reshape(-1)
    place = flat.numel() // 2 + 1
    code = int(flat[place]) & 15
    flat[place] += 1 if code < 15 else -1


def one_scale(tensors: Tensors, linear: str) -> None:
    """The scale of one block up by 2 %, or by the least that the file can hold where that is more (the uint8 of double quantization)."""
    held = tensors[scales(tensors, linear)]
    flat = held.reshape(-1)
    place = flat.numel() // 2 + 1
    if held.dtype == torch.uint8:
        flat[place] = flat[place] + 1 if flat[place] < 255 else flat[place] - 1
    else:
        flat[place] = (flat[place].float() * 1.02).to(held.dtype)


def two_rows(tensors: Tensors, linear: str) -> None:
    """Rows 1 and 2 of ``[out, in]`` change places, codes and scales alike, so that every row stays a row that was solved."""
    for name, tensor in tensors.items():
        last = name.removeprefix(f"{linear}.")
        if last in ("weight_packed", "weight_scale"):
            tensor[[1, 2]] = tensor[[2, 1]]
        elif last == "scales" or (last == "qweight" and "g_idx" in "".join(tensors)):
            tensor[:, [1, 2]] = tensor[:, [2, 1]]
        elif last == "qweight":  # awq: eight outputs in a word, in the order 0 2 4 6 1 3 5 7
            one, two = (tensor >> 16) & 15, (tensor >> 4) & 15
            tensor ^= (one ^ two) << 16 | (one ^ two) << 4
    if f"{linear}.weight" in tensors:  # nf4: blocks of 64 along the rows
        codes, maxima = tensors[f"{linear}.weight"].reshape(-1), tensors[f"{linear}.weight.absmax"].reshape(-1)
        state = json.loads(bytes(next(tensor for name, tensor in tensors.items() if ".quant_state." in name).tolist()))
        columns = state["shape"][1]
        for flat, width in ((codes, columns // 2), (maxima, columns // state["blocksize"])):
            first = flat[width : 2 * width].clone()
            flat[width : 2 * width] = flat[2 * width : 3 * width]
            flat[2 * width : 3 * width] = first


CHANGES: dict[str, Change] = {"one code by one step": one_code, "one block's scale by 2 %": one_scale, "two rows swapped": two_rows}
