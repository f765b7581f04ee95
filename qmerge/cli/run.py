"""`qmerge run`: merge, measure, judge and report in one go. What `make merge-qlora` calls."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qmerge.api.judging import check_versions, judged_again
from qmerge.api.measuring import named_texts
from qmerge.api.merging import foreseen, to_plan
from qmerge.api.targets import check_file, check_results_file
from qmerge.cli.completing import BUDGET, PLACE
from qmerge.cli.evidence import brief_verdict, eval_line, evaluate_to, show_verdict
from qmerge.cli.gate import not_compared
from qmerge.cli.helping import JUDGE, MEASURE, RUNNING
from qmerge.cli.options import json_option, measure_options, merge_options, topic
from qmerge.cli.output import QuietCommand, result, result_json, say, warn
from qmerge.cli.planning import announce, describe_estimate, detail, estimate_json, evaluation_of, fit_option, took, took_json
from qmerge.cli.progress import Steps
from qmerge.cli.run_texts import check_other_file, prepare_texts, tokens_about, write_held_out
from qmerge.cli.several import several
from qmerge.errors import Interrupted, Refused, UsageProblem
from qmerge.extras import need_loader
from qmerge.ranks import Ranks

if TYPE_CHECKING:
    from qmerge.pipeline.estimate import Estimate
    from qmerge.pipeline.plan import MergePlan
    from qmerge.pipeline.recipe import Recipe
    from qmerge.store.texts import Document


@click.command("run", cls=QuietCommand, short_help="Merge, measure, judge and report in one go.", example="qmerge run --base BASE --adapter ADAPTER --calibration train.jsonl --text held-out.jsonl --out OUT")
@merge_options
@topic(
    MEASURE,
    click.option("--text", "texts", type=PLACE, multiple=True, metavar="[NAME=]FILE", help="Held-out text to measure on; without it a fifth of the calibration documents is held out."),
    click.option("--eval-tokens", type=int, help="Tokens per evaluation window (--tokens, capped by the model's context)."),
    click.option("--allow-overlap", is_flag=True, help="Do not refuse evaluation text that the calibration text holds too."),
    click.option("--also", default="", metavar="A,B", help="Other models to measure beside it: original (merged into the float base), rtn (plain round-to-nearest NF4)."),
)
@measure_options
@topic(
    JUDGE,
    click.option("--budget", type=BUDGET, default="default", show_default=True, metavar="FILE", help="strict, default, lenient, or a YAML file."),
    click.option("--baseline", type=PLACE, metavar="results.json", help="Older results to hold the candidate against too."),
    click.option("--ignore-versions", is_flag=True, help="Compare with a --baseline that was measured with other versions of torch, transformers, …"),
    click.option("--strict", is_flag=True, help="Exit 3 also where the text is too little to tell."),
    click.option("--junit", type=PLACE, metavar="FILE", help="Write the checks as JUnit XML too."),
)
@topic(
    RUNNING,
    click.option("--dry-run", is_flag=True, help="Check everything, say what would be done, write nothing."),
    click.option("--resume", is_flag=True, help="Continue an interrupted run of this OUT; where there is none, start; where OUT is there whole, measure it."),
)
@fit_option
@json_option("verdict, out, results, report (paths), merge (elapsed_s, floor_s, peak_rss_bytes); with --dry-run the plan and the estimate")
@click.pass_context
def run_command(context: click.Context, /, strict: bool, **options: Any) -> None:
    """Merge, then measure the result against base + separate adapter, judge it by a budget, and write a report to OUT.eval/.

    Exit 0: OUT is whole and inside the budget. 3: OUT is whole and lost more than the budget allows.
    Started by torchrun or srun, several processes share the work (docs/scale.md).
    """
    with several(options["device"]) as ranks:
        verdict = _run(ranks, strict=strict, **options)
    if verdict is not None:
        from qmerge.quality.compare import exit_code

        context.exit(exit_code(verdict, strict))


@dataclass(frozen=True)
class Asked:
    """The command's options that are no settings of the recipe; texts by name."""

    texts: dict[str, str]
    eval_tokens: int | None
    also: str
    suite: str | None
    tasks: str | None
    allow_task_code: bool
    budget: str
    baseline: str | None
    ignore_versions: bool
    junit: str | None
    allow_overlap: bool
    strict: bool
    dry_run: bool
    resume: bool
    unchecked: bool
    as_json: bool
    perplexity: tuple[str, ...]
    generate: int
    new_tokens: int


def _run(ranks: Ranks, *, recipe_file: str | None, settings: tuple[str, ...], texts: tuple[str, ...], **options: Any) -> dict[str, Any] | None:
    """The verdict; None where nothing was judged, and on ranks but the first."""
    from qmerge.pipeline.recipe import build_recipe

    own = {field.name: options.pop(field.name) for field in fields(Asked) if field.name != "texts"}
    asked = Asked(named_texts(texts), **own)
    recipe = build_recipe(recipe_file, settings, options)
    if recipe.each:
        raise UsageProblem("--each writes several checkpoints, and run measures one", where="--each", fix="qmerge merge --each …, then qmerge eval for each of them")
    if asked.eval_tokens is not None and asked.eval_tokens < 2:
        raise UsageProblem("a window needs at least 2 tokens", where="--eval-tokens", expected="2 or more", found=asked.eval_tokens)
    overwrite, recipe = recipe.overwrite, to_plan(recipe, asked.resume)
    steps = Steps()
    found, limits, requests = _check(recipe, asked, recipe_file, ranks)
    steps.step("planned")
    evidence = Path(recipe.out.rstrip("/") + ".eval")
    calibration, held_out = _texts(found, asked, requests)
    evaluating = evaluation_of(found, found.bytes_out, tokens_about(asked.texts, held_out), _window(found, asked))
    expected = foreseen([found], calibration, warn, check_fit=not asked.unchecked and ranks.first, resumed=asked.resume, evaluating=evaluating, processes=ranks.local_size)
    if asked.dry_run:
        _dry(found, expected, evaluating, asked.as_json)
        return None
    announce(expected, evaluating)
    out, merge = _merge(found, calibration, expected, asked, overwrite, steps, ranks)
    files = asked.texts or {"held-out": str(write_held_out(evidence, held_out, ranks))}
    ranks.barrier()  # OUT is there, and what was held out
    results = _measure(found, out, files, evidence, asked, steps, ranks)
    return None if results is None else _judge(results, out, merge, evidence, asked, limits, steps)


def _window(found: MergePlan, asked: Asked) -> int:
    """Tokens of a window that is measured on."""
    return asked.eval_tokens or min(found.recipe.tokens, found.context_length or found.recipe.tokens)


def _check(recipe: Recipe, asked: Asked, recipe_file: str | None, ranks: Ranks) -> tuple[MergePlan, dict[str, Any], dict[str, Any]]:
    """All that measuring would refuse, before hours of merging; what needs no torch first. The plan, the budget, and the perplexities that are asked for."""
    from qmerge.api.first import look_at_models, look_at_recipe, look_at_texts
    from qmerge.quality.asked import candidate_names, check_request, parse_requests
    from qmerge.quality.compare import load_budget
    from qmerge.quality.suites import load_suite, split_names
    from qmerge.report.load import load_results
    from qmerge.store.hub import resolve

    limits, requests = load_budget(asked.budget), parse_requests(asked.perplexity)
    baseline = load_results(asked.baseline, whole=True) if asked.baseline and ranks.first else None
    check_request(candidate_names((recipe.out,)), asked.texts or {"held-out": ""}, [part for part in asked.also.split(",") if part], recipe.original)
    need_loader(recipe.format)
    suite = load_suite(asked.suite, split_names(asked.tasks), asked.allow_task_code) if asked.suite or asked.tasks else None
    look_at_texts((*asked.texts.values(), *(one.source for one in requests.values())))
    if not asked.allow_overlap:
        check_other_file(recipe.calibration, asked.texts)
    look_at_recipe(recipe, ranks.first)
    look_at_models((recipe.base, recipe.original))
    if ranks.first:
        _check_places(recipe, asked, recipe_file)
    from qmerge.pipeline.plan import plan
    from qmerge.quality.arms import check_method
    from qmerge.quality.attach import check_separate
    from qmerge.quality.tasks import open_tasks

    if baseline:
        check_versions(baseline, asked.ignore_versions)
    check_separate(recipe.adapter_set)
    if suite:
        open_tasks(suite)
    found = plan(recipe, ranks.first)
    for place in (recipe.base, recipe.original):
        if place:
            check_method(str(resolve(place)[0]))
    return found, limits, requests


def _check_places(recipe: Recipe, asked: Asked, recipe_file: str | None) -> None:
    """Where evidence goes."""
    evidence = Path(recipe.out.rstrip("/") + ".eval")
    check_results_file(evidence / "results.json", "OUT.eval/results.json")
    for page in ("report.md", "report.html", *(["held-out.jsonl"] if not asked.texts else [])):
        check_file(evidence / page, f"OUT.eval/{page}")
    if asked.junit:
        check_file(asked.junit, "--junit", [recipe.base, *asked.texts.values(), *filter(None, (asked.baseline, recipe_file, asked.budget))])


def _texts(found: MergePlan, asked: Asked, requests: dict[str, Any]) -> tuple[Any, list[Document]]:
    """What to calibrate on, and what was held out of it to measure on; told what is planned, and refused what the model's context cannot hold."""
    from qmerge.pipeline.plan import describe_plan
    from qmerge.quality.generation import check_room

    if not asked.dry_run:  # it says so as its result
        say(describe_plan(found))
    if asked.eval_tokens and found.context_length and asked.eval_tokens > found.context_length:
        raise UsageProblem("the windows are longer than the model's context", where="--eval-tokens", expected=f"up to {found.context_length}", found=asked.eval_tokens)
    if asked.generate and found.context_length:
        check_room(asked.new_tokens, found.context_length)
    return prepare_texts(found, asked.texts, asked.allow_overlap, tuple(requests.values()))


def _dry(found: MergePlan, expected: Estimate, evaluating: int, as_json: bool) -> None:
    from qmerge.pipeline.plan import describe_plan

    if as_json:
        result_json(found.to_json() | estimate_json(expected, evaluating))
    else:
        result("\n".join((describe_plan(found), describe_estimate(expected, evaluating), detail(expected))))
    say("dry run: nothing was written. Next: the same command without --dry-run")


def _merge(found: MergePlan, calibration: Any, expected: Estimate, asked: Asked, overwrite: bool, steps: Steps, ranks: Ranks) -> tuple[Path, dict[str, Any]]:
    """OUT, written, and what that took."""
    from qmerge.pipeline.floor import floor_seconds
    from qmerge.pipeline.resume import Resume
    from qmerge.pipeline.run import run
    from qmerge.pipeline.stop import Stop
    from qmerge.pipeline.streams import Place

    with Stop(say) as stop:
        done = run(found, steps.step, calibration, steps.count, resume=Resume(overwrite) if asked.resume else None, stop=stop, say=say, ranks=ranks, place=Place(expected.work.streams_on_host), inside=steps.count)
    steps.step(f"wrote {done.out}")
    for note in done.notes:
        warn(note)
    floor_s = floor_seconds(expected, found.recipe, asked.resume, ranks)
    if not asked.resume:  # it may have found all done
        say(took(done, floor_s))
    return Path(done.out), took_json(done, floor_s)


def _measure(found: MergePlan, out: Path, files: dict[str, str], evidence: Path, asked: Asked, steps: Steps, ranks: Ranks) -> dict[str, Any] | None:
    """The results, written; None on ranks but the first."""
    recipe = found.recipe
    if not out.is_dir():
        raise Refused("A rank cannot see OUT, which it is to measure.", where=f"rank {ranks.rank}", expected="a file system that all ranks share", fix="put OUT on shared storage, and run the same command again with --resume; or qmerge merge on these hosts, then qmerge eval on one")
    say(f"         the checkpoint is whole; should measuring it fail, this does that part again: {eval_line(recipe, out)}")
    try:
        results = evaluate_to(
            evidence / "results.json", (str(out),), files, base=recipe.base, adapter=recipe.adapter_set,
            tokens=_window(found, asked), template=recipe.template, also=asked.also, original=recipe.original, on=recipe.on,
            nf4_recipe=recipe.nf4_recipe, suite=asked.suite, tasks=asked.tasks, allow_task_code=asked.allow_task_code, budget=asked.budget, device=recipe.device, steps=steps,
            perplexity=asked.perplexity, generate=asked.generate, new_tokens=asked.new_tokens, ranks=ranks,
        )  # fmt: skip
    except KeyboardInterrupt:
        raise Interrupted("interrupted while measuring", written=f"{out} is whole; of what was measured, nothing", fix=f"the same command with --resume, or {eval_line(recipe, out)}") from None
    return results if ranks.first else None


def _judge(results: dict[str, Any], out: Path, merge: dict[str, Any], evidence: Path, asked: Asked, limits: dict[str, Any], steps: Steps) -> dict[str, Any]:
    """The verdict, reported."""
    from qmerge.report.tables import terminal_table
    from qmerge.report.write import write_json, write_junit, write_report

    refused = None
    if asked.baseline:
        try:
            results = judged_again(results, evidence / "results.json", limits, asked.baseline, asked.ignore_versions)
        except Refused as error:
            refused, results = error, not_compared(results, error)
        write_json(results, evidence / "results.json")
    if asked.junit:
        write_junit(results, asked.junit, asked.strict)
    pages = [str(page) for page in write_report(results, evidence)]
    steps.step("reported")
    if refused:
        raise Refused(refused.what, where=refused.where, expected=refused.expected, found=refused.found, fix=refused.fix, written=f"{out} and {evidence}: the checkpoint and its results are whole, and judged by the budget alone")
    verdict: dict[str, Any] = results["verdict"]
    if asked.as_json:
        result_json({"verdict": verdict, "out": str(out), "results": str(evidence / "results.json"), "report": pages, "merge": merge})
        brief_verdict(verdict)
    else:
        result(terminal_table(results))
        show_verdict(verdict)
        result("\n".join(f"{label:<12}{path}" for label, path in zip(("checkpoint", "report.md", "report.html"), [str(out), *pages], strict=True)))
    say(f"Next: open {pages[1]}" + ("" if verdict["state"] == "fail" else f", or serve {out}"))
    return verdict
