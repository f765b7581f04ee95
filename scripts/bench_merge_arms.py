"""What does each process of bench_merge.py do, apart from qmerge: read, copy, merge with PEFT, compare the outputs?

Run as ``bench_merge_arms.py MODE JSON``. Reading and copying import the standard library only. Its result goes to the file that the JSON names as ``answer``.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

CHUNK = 8 << 20  # bytes
LOOKED_AT = 4 << 20  # values of a weight, about
UNCHANGED = ("model.embed_tokens.weight", "model.norm.weight", "model.layers.0.input_layernorm.weight", "lm_head.weight")


def read(folders: list[str]) -> None:
    """Every byte of every file of some folders, once, in order, through one buffer."""
    buffer = bytearray(CHUNK)
    for path in files(*folders):
        with open(path, "rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass


def copy(source: str, target: str) -> None:
    """``cp -r`` by read and write, then fsync of each file and of the folder. No reflinks: the bytes are written."""
    Path(target).mkdir()
    buffer = memoryview(bytearray(CHUNK))
    for path in files(source):
        there = Path(target) / path.relative_to(source)
        there.parent.mkdir(exist_ok=True)
        with open(path, "rb", buffering=0) as reader, open(there, "xb", buffering=0) as writer:
            while count := reader.readinto(buffer):
                part = buffer[:count]
                while part:
                    part = part[writer.write(part) :]
            os.fsync(writer.fileno())
    sync(Path(target))


def sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in Path(folder).rglob("*") if path.is_file())


def peft(base: str, adapter: str, out: str) -> dict[str, float]:
    """Seconds of each stage of the way that PEFT documents, on the CPU in bf16; and of an fsync afterwards, which is not part of it."""
    stages: dict[str, float] = {}

    def stage(name: str, work: Callable[[], Any]) -> Any:
        began = time.perf_counter()
        result = work()
        stages[name] = time.perf_counter() - began
        return result

    torch, automodel, peft_model = stage("import", _imports)
    model = stage("load", lambda: automodel.from_pretrained(base, dtype=torch.bfloat16, device_map={"": "cpu"}))
    model = stage("dequantize", lambda: model.dequantize())
    model = stage("attach", lambda: peft_model.from_pretrained(model, adapter))
    model = stage("merge_and_unload", lambda: model.merge_and_unload())
    stage("save", lambda: model.save_pretrained(out, save_original_format=False))
    stage("fsync", lambda: [sync(path) for path in (*files(out), Path(out))])
    return stages


def _imports() -> tuple[Any, Any, Any]:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    return torch, AutoModelForCausalLM, PeftModel


def compare(base: str, adapter: str, ours: str, theirs: str | None, scaling: float, modules: list[str]) -> dict[str, Any]:
    """Do both outputs hold the merge? One row per tensor: of ``modules``, which the adapter changes, and of two norms and the embeddings.

    The reference is W + s·B·A in fp64, W in fp32 from bitsandbytes' own dequantization. Errors are in units of what arithmetic allows: half a bf16
    step for the last rounding (qmerge; PEFT rounds W to bf16 too, before it adds), and (rank + 2)·2^-24 of |W| + s·|B|·|A| for sums in fp32 (Higham,
    Accuracy and Stability of Numerical Algorithms, section 3.1). At most 1 is right. Of large weights every k-th row is looked at.
    """
    outputs = {"qmerge": Stored(ours)} | ({"peft": Stored(theirs)} if theirs else {})
    stored, pairs = Stored(base), Stored(adapter)
    if theirs and outputs["qmerge"].shapes != outputs["peft"].shapes:
        odd = sorted(set(outputs["qmerge"].shapes.items()) ^ set(outputs["peft"].shapes.items()))
        raise SystemExit(f"the outputs differ in names, shapes or dtypes: {odd[:4]}")
    rows = [_merged_row(module, stored, pairs, outputs, scaling) for module in modules]
    copied = {name: all(stored.same(name, output) for output in outputs.values()) for name in UNCHANGED}
    return {"tensors_in_output": len(outputs["qmerge"].shapes), "merged": rows, "unchanged": copied}


class Stored:
    """Tensors of a folder of safetensors files by name."""

    def __init__(self, folder: str) -> None:
        from safetensors import safe_open

        self.handles, self.shapes = {}, {}
        for path in files(folder):
            if path.suffix == ".safetensors":
                handle = safe_open(path, "pt")
                for name in handle.keys():
                    part = handle.get_slice(name)
                    self.handles[name], self.shapes[name] = handle, (tuple(part.get_shape()), part.get_dtype())

    def get(self, name: str) -> Any:
        return self.handles[name].get_tensor(name)

    def rows(self, name: str, step: int = 8192) -> Iterator[Any]:
        part, count = self.handles[name].get_slice(name), self.shapes[name][0][0]
        return (part[start : start + step] for start in range(0, count, step))

    def same(self, name: str, other: Stored) -> bool:
        import torch

        return self.shapes[name] == other.shapes[name] and all(map(torch.equal, self.rows(name), other.rows(name)))


def _merged_row(module: str, base: Stored, adapter: Stored, outputs: dict[str, Stored], scaling: float) -> dict[str, Any]:
    name = f"{module}.weight"
    weight = dequantized(base, name)
    a, b = (adapter.get(f"base_model.model.{module}.lora_{side}.weight").double() for side in "AB")
    step, columns = max(1, weight.numel() // LOOKED_AT), weight.shape[1]
    weight, b, found = weight[::step], b[::step], {arm: output.get(name)[::step] for arm, output in outputs.items()}
    parts = []
    for start in range(0, len(weight), count := max(1, CHUNK // 8 // columns)):
        rows = slice(start, start + count)
        parts.append(_errors(weight[rows].double(), a, scaling * b[rows], {arm: tensor[rows].double() for arm, tensor in found.items()}))
    total = {key: max(part[key] for part in parts) for key in parts[0] if key != "differing"}
    row = {"tensor": name, "values": weight.numel(), "error": {arm: total.pop(arm) for arm in outputs}} | total
    return row | ({"differing_share": sum(part["differing"] for part in parts) / weight.numel()} if "differing" in parts[0] else {})


def _errors(weight: Any, a: Any, b: Any, found: dict[str, Any]) -> dict[str, float]:
    """Largest |value − exact| over its bound for each arm, and of their difference over the sum of their bounds; all arguments fp64."""
    exact = weight + b @ a
    arithmetic = (len(a) + 2) * 2.0**-24 * (weight.abs() + b.abs() @ a.abs())
    allowed = {arm: bf16_step(value.abs().maximum(exact.abs())) / 2 + arithmetic for arm, value in found.items()}
    if "peft" in found:
        allowed["peft"] += bf16_step(weight) / 2
    result = {arm: largest((value - exact).abs() / allowed[arm]) for arm, value in found.items()}
    if "peft" in found:
        apart = (found["qmerge"] - found["peft"]).abs()
        result |= {"max_abs_difference": largest(apart), "difference": largest(apart / (allowed["qmerge"] + allowed["peft"]))}
        result["differing"] = int((apart > 0).sum())
    return result


def largest(values: Any) -> float:
    """inf where one is NaN, which a maximum over Python floats would lose."""
    return float(values.nan_to_num(nan=float("inf")).max())


def bf16_step(values: Any) -> Any:
    """The distance of bf16 numbers (8 significant bits) at each value's size: 2^-7 at 1, 0 at 0."""
    import torch

    _, exponent = torch.frexp(values)
    return torch.ldexp((values != 0).to(values.dtype), exponent - 8)


def dequantized(base: Stored, weight: str) -> Any:
    """fp32 ``[out, in]``, by bitsandbytes from the stored quant state."""
    import torch
    from bitsandbytes.functional import QuantState, dequantize_4bit

    parts = {name: base.get(name) for name in base.shapes if name.startswith(weight + ".")}
    state = QuantState.from_dict(parts, device=torch.device("cpu"))
    state.dtype = torch.float32
    return dequantize_4bit(base.get(weight), state)


def main() -> None:
    mode, job = sys.argv[1], json.loads(sys.argv[2])
    answer = Path(job.pop("answer"))
    result = {"read": read, "copy": copy, "peft": peft, "compare": compare}[mode](**job)
    answer.write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main()
