"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from qmerge.errors import UsageProblem

Command = Callable[..., Any]


def stack(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    def add(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return add


merge_options = stack(
    click.option("--base", metavar="P", help="NF4 checkpoint, or a float one with --nf4-recipe: a folder or a hub id."),
    click.option("--adapter", metavar="P", help="PEFT LoRA adapter: a folder or a hub id."),
    click.option("--out", metavar="P", help="Folder to create. It appears whole at the end, or not at all."),
    click.option("--format", "format", metavar="F", help="gptq (default), nf4, bf16, fp16. Known and not built yet: fp4, fp32, compressed-tensors, awq."),
    click.option("--bits", type=int, help="gptq: bits per weight (4)."),
    click.option("--group-size", type=int, help="gptq: inputs per scale, 128, 64, 32 or -1 for a whole row (128)."),
    click.option("--sym/--asym", "symmetric", default=None, help="gptq: symmetric grid (default; what Marlin kernels take) or asymmetric."),
    click.option("--calibration", metavar="P", help="Text like what the adapter was trained on: .jsonl, .json, .parquet, .txt, a folder, or a hub dataset."),
    click.option("--template", metavar="T", help="How a row becomes text, as in 'Question: {question} Answer: {answer}'."),
    click.option("--generic", metavar="P", help="General text, so that the model does not drift elsewhere."),
    click.option("--generic-share", type=float, help="Share of calibration windows from --generic (0.25)."),
    click.option("--samples", type=int, help="Calibration windows (128)."),
    click.option("--tokens", type=int, help="Tokens per calibration window (2048, capped by the model's context)."),
    click.option("--seed", type=int, help="Seed for drawing calibration windows (0)."),
    click.option("--rtn", is_flag=True, default=None, help="Round to nearest without calibration. Can erase a small adapter."),
    click.option("--on", type=click.Choice(["dequantized", "original"]), help="Merge into the dequantized NF4 base (default) or into the float one."),
    click.option("--original", metavar="P", help="The float base for --on original, where --base names the NF4 one."),
    click.option("--nf4-recipe", metavar="R", help="For a float base: how the adapter's training quantized it, double, single, or a config file."),
    click.option("--device", metavar="D", help="cpu, cuda, cuda:N or auto (default)."),
    click.option("--overwrite", is_flag=True, default=None, help="Replace an OUT that qmerge wrote, by a swap after success."),
    click.option("--recipe", "recipe_file", metavar="FILE", help="YAML with these settings; flags win over it."),
    click.option("--set", "settings", metavar="KEY=VALUE", multiple=True, help="One setting by name."),
)


def named_texts(values: tuple[str, ...]) -> dict[str, str]:
    """``[NAME=]FILE`` arguments to name -> file; a name is taken from the file where none is given, and must be unique."""
    from pathlib import Path

    found: dict[str, str] = {}
    for value in values:
        name, sign, path = value.partition("=")
        if not sign or not name.isidentifier() and not name.replace("-", "_").replace(".", "_").isidentifier():
            name, path = Path(value).stem, value
        if name in found:
            raise UsageProblem("two texts have the same name", where=f"--text {value}", found=name, fix="give one a name of its own: --text NAME=FILE")
        found[name] = path
    return found
