"""`qmerge eval`: measure what a candidate lost."""

from __future__ import annotations

import shlex
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qmerge.cli.options import adapter_options, adapter_set, measure_options, named_texts
from qmerge.cli.output import QuietCommand, Steps, result, result_json, say, warn
from qmerge.errors import UsageProblem

if TYPE_CHECKING:
    from qmerge.adapters.several_adapters import AdapterSet
    from qmerge.pipeline.recipe import Recipe


@click.command("eval", cls=QuietCommand)
@click.option("--base", required=True, metavar="P", help="The base that the adapter was trained on.")
@adapter_options
@click.option("--candidate", "candidates", required=True, multiple=True, metavar="P", help="A checkpoint to measure. Repeatable.")
@click.option("--text", "texts", required=True, multiple=True, metavar="[NAME=]FILE", help="Text to measure on. Repeatable; the adapter's own domain first.")
@click.option("--tokens", type=int, default=256, show_default=True, help="Tokens per window.")
@click.option("--template", metavar="T", help="How a row becomes text.")
@click.option("--also", default="", metavar="A,B", help="More arms: original (merged into the float base), rtn (plain round-to-nearest NF4).")
@click.option("--original", metavar="P", help="The float base, for --also original and --on original.")
@click.option("--on", type=click.Choice(["dequantized", "original"]), default="dequantized", show_default=True, help="What the merge started from.")
@click.option("--nf4-recipe", metavar="R", help="For a float base: double, single, or a config file.")
@measure_options
@click.option("--budget", default="default", show_default=True, metavar="FILE", help="strict, default, lenient, or a YAML file.")
@click.option("--out", required=True, metavar="FILE", help="results.json to write (per-token numbers go beside it as .npz).")
@click.option("--device", default="auto", show_default=True, metavar="D", help="cpu, cuda, cuda:N or auto.")
@click.option("--json", "as_json", is_flag=True, help="The results as JSON on stdout too.")
def eval_command(candidates: tuple[str, ...], texts: tuple[str, ...], out: str, as_json: bool, **options: Any) -> None:
    """Measure what a candidate lost against base + separate adapter, on text."""
    adapter = adapter_set(options)
    results = evaluate_to(Path(out), candidates, named_texts(texts), adapter=adapter, **options)
    if as_json:
        result_json(results)
    else:
        from qmerge.report.tables import terminal_table

        result(terminal_table(results))
    say(f"wrote {out}. Next: qmerge compare {out}, or qmerge report {out} --out DIR")


def evaluate_to(
    out: Path, candidates: tuple[str, ...], texts: dict[str, str], *, base: str, adapter: AdapterSet, tokens: int, template: str | None, also: str,
    original: str | None, on: str, nf4_recipe: str | None, suite: str | None, budget: str, device: str, steps: Steps | None = None, tasks: str | None = None, allow_task_code: bool = False, **measures: Any,
) -> dict[str, Any]:
    """Evaluate and write ``out`` with its sidecar; the folder must exist or is made. Shared by ``eval`` and ``run``. ``measures``: what `measure_options` gave."""
    from qmerge.device import pick_device
    from qmerge.pipeline.recipe import read_nf4_recipe
    from qmerge.quality.compare import load_budget
    from qmerge.quality.evaluate import candidate_names, evaluate_in_full
    from qmerge.quality.sidecar import write_results
    from qmerge.quality.suites import load_suite, split_names
    from qmerge.store.hub import resolve

    check_target(out)
    limits = load_budget(budget)
    benchmarks = load_suite(suite, split_names(tasks), allow_task_code) if suite or tasks else None
    recipe = read_nf4_recipe(nf4_recipe)
    base, original = (str(resolve(place)[0]) if place else None for place in (base, original))
    named = candidate_names(str(resolve(place)[0]) for place in candidates)
    done = evaluate_in_full(
        base, adapter, named, texts, tokens, on=on, nf4_recipe=recipe.to_json() if recipe else None, original=original,
        also=tuple(part for part in also.split(",") if part), template=template, device=str(pick_device(device)), suite=benchmarks, budget=limits,
        results_dir=out.parent, keep_tail=True, progress=(steps or Steps()).count, **measures,
    )
    for name, arm in done.results["arms"].items():
        if arm.get("loader"):
            warn(f"{name} was read by {arm['loader']}")
        if arm.get("logits"):
            warn(f"{name} needed memory for the logits {arm['logits']}")
        if arm.get("tokenizer_note"):
            warn(f"{name}: {arm['tokenizer_note']}")
    for task, row in done.results["tasks"].items():
        if row.get("truncated"):
            warn(f"{task}: {row['truncated']} of {row['n']} prompts are longer than the model's context; lm-eval cut their beginning, for all arms alike")
    done.results["measured_at"] = datetime.now(timezone.utc).isoformat(timespec="seconds")  # what a history is sorted by
    out.parent.mkdir(parents=True, exist_ok=True)
    write_results(done.results, done.scores, out, done.answers)
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


def check_target(out: Path) -> None:
    """Refuse a results file that cannot be written, before anything is measured."""
    if out.is_dir():
        raise UsageProblem("--out names a folder", where=str(out), expected="a file to write", found="a folder", fix=f"--out {out / 'results.json'}")
    if out.parent.exists() and not out.parent.is_dir():
        raise UsageProblem("--out lies below a file", where=str(out.parent), expected="a folder", found="a file")


def recomputed(path: Path, stored: dict[str, Any]) -> dict[str, Any]:
    """The results with their numbers computed anew; warns where the stored ones differ."""
    from qmerge.quality.compare import differing_keys
    from qmerge.quality.sidecar import recompute_file

    found = recompute_file(path, stored)
    keys = [key for part in ("arms", "tasks") for key in differing_keys(found.get(part), stored.get(part), part)]
    if keys:
        warn(f"{len(keys)} stored numbers are not what the files beside {path.name} give: {', '.join(keys[:5])}{', …' if len(keys) > 5 else ''}")
    return found


def show_verdict(verdict: dict[str, Any]) -> None:
    """The state and every reason, one per line, on stdout."""
    result(f"{verdict['state'].upper()} (budget {verdict.get('budget', 'default')})")
    for reason in verdict["reasons"]:
        result(f"  {reason}")
    if verdict["state"] == "inconclusive":
        warn("the text is too little to tell, or the adapter's gain on it too small: give more held-out text")
