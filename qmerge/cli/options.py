"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from qmerge.cli.completing import PLACE, words_of
from qmerge.cli.helping import BASE, CALIBRATION, FORMAT, INPUTS, MEASURE, RECIPE, RUNNING, SEVERAL, SOLVER, TOPIC
from qmerge.errors import UsageProblem

Command = Callable[..., Any]


def stack(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    def add(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return add


def topic(title: str, *options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    """``options``, shown in ``--help`` under ``title`` (`qmerge.cli.helping`)."""

    def add(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
            setattr(command.__click_params__[-1], TOPIC, title)  # type: ignore[attr-defined]
        return command

    return add


def json_option(holds: str) -> Callable[[Command], Command]:
    """``--json``: the same words for every command, then what its document holds."""
    return topic(RUNNING, click.option("--json", "as_json", is_flag=True, help=f"One JSON document on stdout, nothing else there: {holds}."))


merge_options = stack(
    topic(
        INPUTS,
        click.option("--base", type=PLACE, metavar="PATH", help="NF4, FP4, LLM.int8, GPTQ or AWQ checkpoint, or a float one with --nf4-recipe or --on original: a folder or a hub id."),
        click.option("--adapter", type=PLACE, metavar="PATH[=WEIGHT]", multiple=True, help="PEFT adapter: a folder or a hub id; PATH#NAME picks one of several in a folder. Repeat it to merge several, with weights."),
        click.option("--out", type=PLACE, metavar="PATH", help="Folder to create. It appears whole at the end, or not at all."),
    ),
    topic(
        RECIPE,
        click.option("--recipe", "recipe_file", type=PLACE, metavar="FILE", help="YAML with these settings; flags win over it."),
        click.option("--set", "settings", metavar="KEY=VALUE", multiple=True, help="One setting by name."),
    ),
    topic(
        FORMAT,
        click.option("--format", "format", type=words_of("format"), metavar="FORMAT", help="gptq (default), nf4, fp4, compressed-tensors, awq, bf16, fp16, fp32."),
        click.option("--bits", type=int, help="Bits per weight: gptq 2, 3, 4 (default) or 8; compressed-tensors 4 or 8."),
        click.option("--group-size", type=int, help="gptq, compressed-tensors, awq: inputs per scale, 128 (default), 64, 32 or -1 for a whole row."),
        click.option("--sym/--asym", "symmetric", default=None, help="Int formats: symmetric grid (default; what gptq's Marlin kernels take) or asymmetric (always with awq)."),
        click.option("--block-size", type=int, help="nf4, fp4: elements per block maximum, 32 to 4096 (default: the base's, else 64)."),
        click.option("--double-quant/--single-quant", "double_quant", default=None, help="nf4, fp4: block maxima in 8 bits or in 32 (default: as in the base, else 8)."),
        click.option("--bits-per-weight", type=float, metavar="BITS", help="compressed-tensors: mixed precision, 8 bits, smaller groups or float where the measured loss asks for it, at most BITS stored bits on average."),
        click.option("--quantize-head", is_flag=True, default=None, help="All quantizing formats but awq: quantize the output head too (not where it is tied to the embeddings)."),
        click.option("--pad", is_flag=True, default=None, help="gptq, compressed-tensors: write shapes that do not fill words or groups padded. transformers reads that; most engines' kernels do not."),
        click.option("--shard-size", metavar="SIZE", help="Largest weight file, such as 5GB (default) or 500MB."),
    ),
    topic(
        CALIBRATION,
        click.option("--calibration", type=PLACE, metavar="PATH", help="Text like what the adapter was trained on: .jsonl, .json, .parquet, .txt, a folder, or a hub dataset. Formats that quantize need it, or --rtn."),
        click.option("--template", metavar="TEMPLATE", help="How a row becomes text, as in 'Question: {question} Answer: {answer}'."),
        click.option("--generic", type=PLACE, metavar="PATH", help="General text, so that the model does not drift elsewhere."),
        click.option("--generic-share", type=float, help="Share of calibration windows from --generic (0.25)."),
        click.option("--samples", type=int, help="Calibration windows (128)."),
        click.option("--tokens", type=int, help="Tokens per calibration window (2048, capped by the model's context)."),
        click.option("--seed", type=int, help="Seed for drawing calibration windows (0)."),
        click.option("--rtn", is_flag=True, default=None, help="Round to nearest, without calibration text. Can erase a small adapter."),
    ),
    topic(
        SOLVER,
        click.option("--quick", is_flag=True, default=None, help="Solve without the separate model beside it, with gradients of fewer tokens: in half the time, a third to four fifths further from base + adapter where it was measured (int4, windows of 256 tokens). With --curvature-tokens 0 it is GPTQ as it was published."),
        click.option("--curvature-tokens", type=int, metavar="N", help="Calibration tokens that gradients are taken on, to learn which errors of a linear's outputs cancel (8192, of 8 windows at least; with --quick 1024, of 4); 0: none, quicker and worse."),
        click.option("--polish", type=words_of("polish"), multiple=True, metavar="HOW", help="Slow steps after the solver, for less loss at the same size: distill (scales and norms trained on the separate model's logits), blocks (codes tuned block by block). Repeat it, or separate with commas."),
        click.option("--low-traffic", type=words_of("low_traffic"), metavar="HOW", help="Experts that saw too few tokens: pooled (default: the layer's pooled statistics) or rtn (round to nearest)."),
        click.option("--compute", type=words_of("compute"), metavar="HOW", help="In what matrix products on calibration text are taken: fp32, mixed (statistics and gradients in bf16, summed in fp32), bf16 (the passes too: quicker; it shows in outputs as fine as nf4), or auto (default: on a GPU and on CPUs that are quick at bf16, bf16 for whole numbers of up to 4 bits and with --quick, else mixed; on other CPUs fp32)."),
    ),
    topic(
        BASE,
        click.option("--on", type=click.Choice(["dequantized", "original"]), help="Merge into the dequantized NF4 base (default) or into the float one."),
        click.option("--original", type=PLACE, metavar="PATH", help="The float base for --on original, where --base names the NF4 one."),
        click.option("--nf4-recipe", type=PLACE, metavar="RECIPE", help="For a float base: how the adapter's training quantized it, double, single, or a config file (bitsandbytes, Axolotl, LLaMA-Factory, TRL)."),
        click.option("--residual-base", is_flag=True, default=None, help="The base is the one that the adapter's initialisation (PiSSA, OLoRA, LoftQ, …) left behind."),
    ),
    topic(
        SEVERAL,
        click.option("--combine", type=words_of("combine"), metavar="HOW", help="Several adapters: sum (default: the exact weighted sum of their deltas), or PEFT's svd, ties, dare_ties, magnitude_prune, …"),
        click.option("--density", type=float, help="Share of values that ties, dare_* and magnitude_prune* keep."),
        click.option("--combine-rank", type=int, help="Rank of the result of *svd (default: the largest of the adapters')."),
        click.option("--each", is_flag=True, default=None, help="Write one checkpoint per adapter, OUT/<adapter>, in one pass over the base (float formats)."),
    ),
    topic(
        RUNNING,
        click.option("--device", metavar="DEVICE", help="cpu, cuda, cuda:N or auto (default)."),
        click.option("--device-memory", metavar="SIZE", help="Most that may be taken of a GPU's memory, such as 20GiB (default: what is free). Where two streams of activations do not fit, they lie in main memory; the bytes that come out are the same."),
        click.option("--allow-pickle", is_flag=True, default=None, help="Read an adapter_model.bin (a pickle can run code): in a child process with weights_only."),
        click.option("--overwrite", is_flag=True, default=None, help="Replace an OUT that qmerge wrote, by a swap after success."),
    ),
)


adapter_options = stack(
    click.option("--adapter", type=PLACE, metavar="PATH[=WEIGHT]", multiple=True, required=True, help="The adapter, kept separate: base + adapter is the reference. Several, with weights, as in the merge."),
    topic(
        SEVERAL,
        click.option("--combine", type=words_of("combine"), metavar="HOW", default="sum", show_default=True, help="How several adapters were combined."),
        click.option("--density", type=float, help="As in the merge."),
        click.option("--combine-rank", type=int, help="As in the merge."),
        click.option("--seed", type=int, default=0, show_default=True, help="Of a combination that drops values at random."),
    ),
    topic(BASE, click.option("--residual-base", is_flag=True, help="As in the merge.")),
    topic(RUNNING, click.option("--allow-pickle", is_flag=True, help="Read an adapter_model.bin (a pickle can run code): in a child process with weights_only.")),
)


measure_options = topic(
    MEASURE,
    click.option("--suite", type=PLACE, metavar="FILE", help="Benchmarks to run through lm-eval, a YAML file."),
    click.option("--allow-task-code", is_flag=True, help="Run a suite with an include_path: lm-eval's task files can hold code."),
    click.option("--tasks", metavar="A,B", help="Benchmarks by lm-eval's names, such as arc_easy,hellaswag."),
    click.option("--perplexity", multiple=True, metavar="PROTOCOL[,KEY=N…]:FILE", help="Perplexity as papers and tools compute it: gptq:wiki.txt, strided,tokens=512,stride=128:wiki.txt, llama.cpp:wiki.txt, lm-eval:wiki.txt. Repeatable."),
    click.option("--generate", type=click.IntRange(min=0), default=0, show_default=True, metavar="N", help="Prompts per text to continue greedily with every arm, to see where it leaves the separate model."),
    click.option("--new-tokens", type=click.IntRange(min=1), default=64, show_default=True, metavar="N", help="Tokens per continuation of --generate."),
)


def adapter_set(options: dict[str, Any]) -> Any:
    """Take `adapter_options` out of ``options``, as an ``AdapterSet``."""
    from qmerge.adapters.choices import AdapterSet, Combination, parse_choice
    from qmerge.pipeline.recipe_values import value_fault

    if fault := value_fault("combine", options["combine"]) or value_fault("density", options["density"]):
        raise UsageProblem(fault, fix="as in the merge: manifest.json names it")
    combination = Combination(options.pop("combine"), options.pop("density"), options.pop("combine_rank"), options.pop("seed"))
    return AdapterSet(tuple(parse_choice(text) for text in options.pop("adapter")), combination, options.pop("residual_base"), options.pop("allow_pickle"))


def settings_of_a_merge() -> dict[str, tuple[str, str]]:
    """Setting of a recipe -> (its topic, its help), in the order of ``--help``."""

    @merge_options
    def unused() -> None: ...

    options = reversed(unused.__click_params__)  # type: ignore[attr-defined]
    return {str(option.name): (getattr(option, TOPIC), str(option.help)) for option in options if getattr(option, TOPIC) != RECIPE}
