"""`qmerge eval`: measure what a candidate lost."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qmerge.api.measuring import measure, named_texts, notes
from qmerge.cli.completing import BUDGET, PLACE
from qmerge.cli.helping import BASE, JUDGE, MEASURE, RUNNING
from qmerge.cli.options import adapter_options, adapter_set, json_option, measure_options, topic
from qmerge.cli.output import QuietCommand, result, result_json, say, warn
from qmerge.cli.progress import Steps
from qmerge.cli.several import several
from qmerge.ranks import ALONE, Ranks

if TYPE_CHECKING:
    from qmerge.adapters.choices import AdapterSet
    from qmerge.pipeline.recipe import Recipe


@click.command("eval", cls=QuietCommand, short_help="Measure what a checkpoint lost against base + adapter.", example="qmerge eval --base BASE --adapter ADAPTER --candidate OUT --text held-out.jsonl --out results.json")
@click.option("--base", type=PLACE, required=True, metavar="PATH", help="The base that the adapter was trained on.")
@adapter_options
@click.option("--candidate", "candidates", type=PLACE, required=True, multiple=True, metavar="PATH", help="A checkpoint to measure. Repeatable.")
@click.option("--text", "texts", type=PLACE, required=True, multiple=True, metavar="[NAME=]FILE", help="Text to measure on. Repeatable; the adapter's own domain first.")
@click.option("--out", type=PLACE, required=True, metavar="FILE", help="results.json to write (per-token numbers go beside it as .npz).")
@topic(
    BASE,
    click.option("--on", type=click.Choice(["dequantized", "original"]), default="dequantized", show_default=True, help="What the merge started from."),
    click.option("--original", type=PLACE, metavar="PATH", help="The float base, for --also original and --on original."),
    click.option("--nf4-recipe", type=PLACE, metavar="RECIPE", help="For a float base: double, single, or a config file."),
)
@topic(
    MEASURE,
    click.option("--tokens", type=int, default=256, show_default=True, help="Tokens per window."),
    click.option("--template", metavar="TEMPLATE", help="How a row becomes text."),
    click.option("--also", default="", metavar="A,B", help="Other models to measure beside them: original (merged into the float base), rtn (plain round-to-nearest NF4)."),
)
@measure_options
@topic(JUDGE, click.option("--budget", type=BUDGET, default="default", show_default=True, metavar="FILE", help="strict, default, lenient, or a YAML file."))
@topic(RUNNING, click.option("--device", default="auto", show_default=True, metavar="DEVICE", help="cpu, cuda, cuda:N or auto."))
@json_option("the results, as in the file")
def eval_command(candidates: tuple[str, ...], texts: tuple[str, ...], out: str, as_json: bool, **options: Any) -> None:
    """Measure what a candidate lost against base + separate adapter, on text.

    Started by torchrun or srun, several processes share the work, to the same numbers (docs/scale.md).
    """
    with several(options["device"]) as ranks:
        results = evaluate_to(Path(out), candidates, named_texts(texts), adapter=adapter_set(options), ranks=ranks, **options)
    if not ranks.first:
        return
    if as_json:
        result_json(results)
    else:
        from qmerge.report.tables import terminal_table

        result(terminal_table(results))
    say(f"wrote {out}. Next: qmerge compare {out}, or qmerge report {out} --out DIR")


def evaluate_to(out: Path, candidates: tuple[str, ...], texts: dict[str, str], *, adapter: AdapterSet, also: str, budget: str, steps: Steps | None = None, ranks: Ranks = ALONE, **measures: Any) -> dict[str, Any]:
    """Evaluate and write ``out`` with its sidecar; the folder must exist or is made. Shared by ``eval`` and ``run``. Nothing comes of ``ranks`` but the first. ``measures``: the other arguments of `qmerge.api.measuring.measure`."""
    from qmerge.quality.compare import load_budget

    arms = tuple(part for part in also.split(",") if part)
    done = measure(out, candidates, texts, adapter=adapter, also=arms, limits=load_budget(budget), count=(steps or Steps()).count, ranks=ranks, **measures)
    for note in notes(done.results) if ranks.first else ():
        warn(note)
    return done.results


def eval_line(recipe: Recipe, out: str | Path) -> str:
    """The `qmerge eval` that measures what ``recipe`` wrote to ``out``: the same base and adapters, told in the same way. Ready for a shell, but for the text."""
    words = ["qmerge", "eval", "--base", recipe.base]
    for text in recipe.adapter:
        words += ["--adapter", text]
    for flag, value, usual in (("--combine", recipe.combine, "sum"), ("--density", recipe.density, None), ("--combine-rank", recipe.combine_rank, None), ("--on", recipe.on, "dequantized"),
                               ("--original", recipe.original, None), ("--nf4-recipe", recipe.nf4_recipe, None), ("--seed", recipe.seed if recipe.combine != "sum" else 0, 0)):  # fmt: skip
        words += [flag, str(value)] if value != usual else []
    words += [flag for flag, given in (("--residual-base", recipe.residual_base), ("--allow-pickle", recipe.allow_pickle)) if given]
    return f"{shlex.join([*words, '--candidate', str(out)])} --text FILE --out results.json"


def brief_verdict(verdict: dict[str, Any]) -> None:
    """For a log whose stdout went into a file: the state and what decided it, on stderr."""
    say(f"{verdict['state'].upper()} (budget {verdict.get('budget', 'default')})")
    for check in verdict["checks"]:
        if verdict["state"] != "pass" and check["state"] == verdict["state"]:
            say(f"  {check['reason']}")


def show_verdict(verdict: dict[str, Any]) -> None:
    """The state and every reason, one per line, on stdout."""
    budget = f"budget {verdict.get('budget', 'default')}"
    failed = {check["metric"].endswith("_vs_baseline") for check in verdict["checks"] if check["state"] == "fail"}
    result(f"{verdict['state'].upper()} ({f'against the baseline, not by the {budget}' if failed == {True} else budget})")
    for reason in verdict["reasons"]:
        result(f"  {reason}")
    if verdict["state"] == "inconclusive":
        warn("the text is too little to tell, or the adapter's gain on it too small: give more held-out text")
