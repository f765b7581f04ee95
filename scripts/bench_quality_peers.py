"""How do the peers make their 4-bit checkpoint, each as its own documentation says?

Run as ``bench_quality_peers.py JSON``, one peer per process, with the Python of the environment that has it. Nothing of qmerge is imported. What is handed over:
the merged model as an fp32 checkpoint and the calibration windows as token ids (PEFT: base and adapter, no windows). Cost and versions go to the file ``done``.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_quality_clock import Clock


def main() -> None:
    job = json.loads(sys.argv[1])
    torch.set_num_threads(job["threads"])
    tool, done = job.pop("tool"), Path(job["done"])
    cost = TOOLS[tool](job)
    done.write_text(json.dumps(cost | {"version": version(PACKAGES[tool]), "torch": torch.__version__}), encoding="utf-8")


def windows_of(job: dict[str, Any]) -> torch.Tensor:
    """int64 ``[windows, T]``."""
    return torch.from_numpy(np.load(job["ids"]))


def warm(folder: str) -> None:
    """Import the model's code, which is not part of what is timed."""
    from transformers import AutoConfig, AutoModelForCausalLM

    AutoModelForCausalLM._model_mapping[type(AutoConfig.from_pretrained(folder))]


def load(folder: str, **options: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, device_map={"": "cpu"}, **options)


def output_head(model: Any) -> str:
    """The name that is left float; the peers know it for some architectures only."""
    return next(name for name, module in model.named_modules() if module is model.get_output_embeddings())


def gptqmodel(job: dict[str, Any]) -> dict[str, Any]:
    """Fails unless every linear saw every token."""
    from gptqmodel import GPTQModel, QuantizeConfig
    from gptqmodel.quantization.config import GPTAQConfig

    options, ids = dict(job["options"]), windows_of(job)
    if options.pop("gptaq", False):
        options["gptaq"] = GPTAQConfig()
    warm(job["model"])
    clock = Clock()
    config = QuantizeConfig(**{"bits": 4, "group_size": 128} | options)
    loaded = GPTQModel.load(job["model"], config, device=job["device"], dtype=torch.float32)
    log = loaded.quantize([{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in ids], batch_size=1)
    loaded.save(job["out"])
    cost = clock.cost()
    seen = {int(row["samples"]) for rows in log.values() for row in rows if str(row.get("samples", "")).isdigit()}
    if seen - {ids.numel()}:
        raise SystemExit(f"gptqmodel calibrated its linears on {sorted(seen)} tokens, not on the {ids.numel()} that it was given")
    return cost


def llmcompressor(job: dict[str, Any]) -> dict[str, Any]:
    """``options``: ``scheme`` (a preset), and ``weight_observer`` where it is not the default."""
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier

    ids = windows_of(job)
    warm(job["model"])
    clock = Clock()
    model = load(job["model"], dtype=torch.float32)
    rows = Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()})
    recipe = GPTQModifier(targets="Linear", ignore=[output_head(model)], **{"scheme": "W4A16"} | job["options"])
    how = {"num_calibration_samples": len(ids), "max_seq_length": ids.shape[1], "shuffle_calibration_samples": False}
    oneshot(model=model, dataset=rows, recipe=recipe, **how)
    model.save_pretrained(job["out"], save_compressed=True)
    return clock.cost()


def autoround(job: dict[str, Any]) -> dict[str, Any]:
    """Its own scheme, steps and learning rate but for ``options``; written as a gptq file, which transformers reads with gptqmodel."""
    from auto_round import AutoRound
    from transformers import AutoTokenizer

    ids = windows_of(job)
    warm(job["model"])
    clock = Clock()
    model, tokenizer = load(job["model"], dtype=torch.float32), AutoTokenizer.from_pretrained(job["model"])
    batches = [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in ids.split(8)]
    how = {"dataset": batches, "seqlen": ids.shape[1], "nsamples": len(ids), "device_map": "cpu"}
    AutoRound(model, tokenizer, **{"scheme": "W4A16"} | how | job["options"]).quantize_and_save(job["out"], format="auto_gptq")
    cost = clock.cost()
    for inner in [file.parent for file in Path(job["out"]).glob("*/config.json")]:  # it writes into a folder of its own naming
        for file in inner.iterdir():
            file.rename(Path(job["out"]) / file.name)
    return cost


def peft(job: dict[str, Any]) -> dict[str, Any]:
    """``merge_and_unload`` on a fresh load of the NF4 base: nothing ran forward before, which on some CPUs would repack the weights in place."""
    from peft import PeftModel

    warm(job["base"])
    clock = Clock()
    merged = PeftModel.from_pretrained(load(job["base"]), job["adapter"]).merge_and_unload()
    merged.save_pretrained(job["out"], save_original_format=False)
    return clock.cost()


PACKAGES = {"gptqmodel": "gptqmodel", "llmcompressor": "llmcompressor", "autoround": "auto-round", "peft": "peft"}
TOOLS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "gptqmodel": gptqmodel,
    "llmcompressor": llmcompressor,
    "autoround": autoround,
    "peft": peft,
}


if __name__ == "__main__":
    main()
