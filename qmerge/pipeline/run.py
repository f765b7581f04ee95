"""Execute a plan: compute every output tensor, write it, and publish the folder whole."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qmerge import __version__, formats
from qmerge.device import exact_matmuls, peak_rss_bytes, pick_device
from qmerge.formats import dense, gptq, nf4
from qmerge.formats.base import Nf4Recipe, quantize_as_bitsandbytes
from qmerge.pipeline.calibrate import Calibration, load_calibration, load_tokenizer
from qmerge.pipeline.merge import Merged
from qmerge.pipeline.plan import MergePlan
from qmerge.pipeline.requantize import Linear, Solved, round_to_nearest
from qmerge.pipeline.streams import requantize_blocks
from qmerge.store.manifest import build_manifest, input_digests
from qmerge.store.publish import OutputFolder
from qmerge.store.sidefiles import copy_side_files
from qmerge.store.writer import ShardWriter
from qmerge.types import QuantState

NEVER_COPIED = ("quantization_config", "auto_map", "_name_or_path", "_attn_implementation_internal", "trust_remote_code", "torch_dtype")


@dataclass(frozen=True)
class RunReport:
    """What a run did. ``documents`` are the calibration texts, for the overlap check against evaluation text."""

    out: Path
    elapsed_s: float
    peak_rss_bytes: int
    documents: tuple
    linears: dict[str, dict[str, Any]]


def quiet(_: str) -> None:
    """No progress."""


def run(plan: MergePlan, progress: Callable[[str], None] = quiet, calibration: Calibration | None = None) -> RunReport:
    """Write ``plan`` to its OUT: absent or whole, never half. Raises `qmerge.errors.QmergeError` kinds only for what the inputs can cause."""
    began = time.perf_counter()
    recipe = plan.recipe
    device = pick_device(recipe.device)
    exact_matmuls()
    if calibration is None:
        calibration = calibration_for(plan)
    merged = Merged(plan.base, plan.adapter, device)
    out = Path(recipe.out)
    records: dict[str, dict[str, Any]] = {}
    with OutputFolder(out, [plan.checkpoint.path, plan.adapter.path], recipe.overwrite) as folder:
        writer = ShardWriter(folder.path)
        with torch.no_grad():
            for name, tensor in tensors(plan, merged, calibration, records, progress):
                writer.add(name, tensor)
        writer.finish()
        merged.check_all_used()
        config = output_config(plan)
        (folder.path / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        if recipe.format == "gptq":
            (folder.path / "quantize_config.json").write_text(json.dumps(config["quantization_config"], indent=2, sort_keys=True) + "\n", encoding="utf-8")
        copy_side_files(plan.checkpoint.path, plan.adapter.path, folder.path)
        progress("hashing and publishing")
        folder.commit(manifest(plan, calibration, records, folder.path))
    return RunReport(out, time.perf_counter() - began, peak_rss_bytes(), calibration.documents if calibration else (), records)


def calibration_for(plan: MergePlan, documents: list | None = None) -> Calibration | None:
    """The calibration windows that the plan's recipe asks for (from ``documents`` where given), or None where the format needs none."""
    recipe = plan.recipe
    if recipe.format not in formats.QUANTIZING or recipe.rtn:
        return None
    tokenizer = load_tokenizer([plan.adapter.path, plan.checkpoint.path])
    context = getattr(plan.skeleton.model.config.get_text_config(), "max_position_embeddings", None) or recipe.tokens
    return load_calibration(
        recipe.calibration, recipe.generic, tokenizer, template=recipe.template, generic_share=recipe.generic_share,
        samples=recipe.samples, tokens=min(recipe.tokens, context), seed=recipe.seed, documents=documents,
    )


def tensors(
    plan: MergePlan, merged: Merged, calibration: Calibration | None, records: dict, progress: Callable[[str], None]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of the output by name, each once. ``records`` fills with what was chosen per linear."""
    packed = set(plan.requantized)
    for name in plan.base.names:
        if name not in packed:
            yield from _float_or_kept(plan, merged, name)
    yield from _untied_pair(plan, merged)
    model_dtype = _model_dtype(plan)
    like = _nf4_template(plan) if plan.recipe.format == "nf4" else None
    if calibration is None:
        for number, name in enumerate(plan.requantized):
            yield from _packed(plan, name, round_to_nearest(Linear(name, merged.weight(name), merged.four_bit(name)), plan.recipe.grid, model_dtype, like), records)
            if number % 50 == 0:
                progress(f"linear {number + 1}/{len(plan.requantized)}")
        return
    for _, solved in requantize_blocks(plan, merged, calibration, model_dtype, like, progress):
        for name, result in solved.items():
            yield from _packed(plan, name, result, records)


def _float_or_kept(plan: MergePlan, merged: Merged, name: str) -> Iterator[tuple[str, torch.Tensor]]:
    fmt = plan.recipe.format
    if name in plan.kept_4bit:
        yield from nf4.pack(name, merged.four_bit(name)).items()
    elif fmt in dense.DTYPES:
        tensor = merged.in_file_order(name, merged.weight(name)) if merged.base.is_4bit(name) or not merged.untouched(name) else merged.base.stored(name)
        yield from dense.pack(name, tensor, fmt).items() if tensor.is_floating_point() else ((name, tensor),)
    else:
        yield name, merged.float_tensor(name)


def _untied_pair(plan: MergePlan, merged: Merged) -> Iterator[tuple[str, torch.Tensor]]:
    """The head of a pair that is no longer tied: its own replacement, or the embedding as it was."""
    if not plan.untied or plan.untied in plan.base.names:
        return
    head, entrance = plan.untied, plan.skeleton.input_embedding
    original = merged.base.stored(entrance)
    tensor = merged.weight(head).to(original.dtype) if head in merged.adapter.saved else original
    yield from dense.pack(head, tensor, plan.recipe.format).items() if plan.recipe.format in dense.DTYPES else ((head, tensor),)


def _packed(plan: MergePlan, name: str, solved: Solved, records: dict) -> Iterator[tuple[str, torch.Tensor]]:
    module = name.removesuffix(".weight")
    records[module] = solved.to_json()
    parts = gptq.pack(module, solved.quantized) if plan.recipe.format == "gptq" else nf4.pack(name, solved.quantized)
    yield from parts.items()


def _model_dtype(plan: MergePlan) -> torch.dtype:
    """The dtype that a loader will give the model: scales are made to fit it."""
    config = plan.checkpoint.config
    named = config.get("dtype") or config.get("torch_dtype") or (config.get("text_config") or {}).get("dtype") or "bfloat16"
    return getattr(torch, str(named).removeprefix("torch."))


def _nf4_template(plan: MergePlan) -> QuantState:
    """Block size, code books and nesting for linears that had no NF4 form: the base's recipe, or bitsandbytes' with double quantization."""
    recipe = plan.base.recipe or Nf4Recipe()
    named = str(_model_dtype(plan)).removeprefix("torch.")
    return quantize_as_bitsandbytes(torch.zeros(64, 64, dtype=_model_dtype(plan)), Nf4Recipe(recipe.block_size, recipe.double_quant, named)).state


def output_config(plan: MergePlan) -> dict[str, Any]:
    """The base's config without anything of the old quantization, and with the new one's."""
    recipe = plan.recipe
    config = {key: value for key, value in plan.checkpoint.config.items() if key not in NEVER_COPIED}
    named = str(_model_dtype(plan)).removeprefix("torch.")
    config["dtype"] = dense.CONFIG_NAMES.get(recipe.format, named)
    if plan.untied:
        config["tie_word_embeddings"] = False
    if recipe.format == "gptq":
        prefix = plan.skeleton.blocks_name + "."
        short = sorted({name.removeprefix(prefix).partition(".")[2].removesuffix(".weight") for name in plan.requantized})
        kept = [short] if len(plan.requantized) != len(plan.skeleton.inside) else None
        config["quantization_config"] = gptq.config(recipe.grid, plan.skeleton.blocks_name, kept, __version__)
    elif recipe.format == "nf4":
        double = _nf4_template(plan).nested if not plan.base.quantized else True
        old = plan.checkpoint.config.get("quantization_config") if plan.base.quantized else None
        config["quantization_config"] = nf4.config(old, double, named)
    return config


def manifest(plan: MergePlan, calibration: Calibration | None, records: dict, folder: Path) -> dict[str, Any]:
    """What is known at the commit point: inputs with digests, recipe, versions, choices per linear."""
    inputs = {"base": input_digests(plan.checkpoint), "adapter": input_digests(plan.adapter)}
    if calibration:
        inputs["calibration"] = calibration.facts
    recipe = plan.recipe.to_json() | {"merged_on": "float base" if plan.recipe.on == "original" else "dequantized NF4 base"}
    if plan.base.recipe:
        recipe["nf4"] = plan.base.recipe.to_json()
    return build_manifest(folder, inputs=inputs, recipe=recipe, versions=versions(), extra={"linears": records, "warnings": list(plan.warnings)})


def versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {"qmerge": __version__}
    for package in ("torch", "transformers", "peft", "bitsandbytes", "safetensors"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
