"""`qmerge run`: merge, measure, judge and report in one go. What `make merge-qlora` calls."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
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
from qmerge.cli.planning import announce, describe_estimate, detail, estimate_json, evaluation_of, fit_option
from qmerge.cli.progress import Steps
from qmerge.cli.several import several
from qmerge.errors import Interrupted, Refused, UsageProblem
from qmerge.extras import need_loader
from qmerge.ranks import Ranks

if TYPE_CHECKING:
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
@json_option("verdict, out, results, report (paths); with --dry-run the plan and the estimate")
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


def _run(
    ranks: Ranks, *, recipe_file: str | None, settings: tuple[str, ...], texts: tuple[str, ...], eval_tokens: int | None, also: str, suite: str | None, tasks: str | None, allow_task_code: bool,
    budget: str, baseline: str | None, ignore_versions: bool, junit: str | None, allow_overlap: bool, strict: bool, dry_run: bool, resume: bool, unchecked: bool, as_json: bool, perplexity: tuple[str, ...], generate: int, new_tokens: int, **flags: Any,
) -> dict[str, Any] | None:
    """The verdict; None where nothing was judged, and on ranks but the first."""
    from qmerge.pipeline.recipe import build_recipe

    recipe = build_recipe(recipe_file, settings, flags)
    if recipe.each:
        raise UsageProblem("--each writes several checkpoints, and run measures one", where="--each", fix="qmerge merge --each …, then qmerge eval for each of them")
    if eval_tokens is not None and eval_tokens < 2:
        raise UsageProblem("a window needs at least 2 tokens", where="--eval-tokens", expected="2 or more", found=eval_tokens)
    asked, recipe = recipe, to_plan(recipe, resume)
    steps = Steps()
    from qmerge.pipeline.plan import describe_plan, plan
    from qmerge.quality.arms import check_method
    from qmerge.quality.attach import check_separate
    from qmerge.quality.compare import load_budget
    from qmerge.quality.evaluate import candidate_names, check_request
    from qmerge.quality.generation import check_room
    from qmerge.quality.protocols import parse_requests
    from qmerge.quality.suites import load_suite, split_names
    from qmerge.quality.tasks import open_tasks
    from qmerge.report.load import load_results
    from qmerge.store.hub import resolve

    # all that measuring would refuse, before hours of merging
    limits = load_budget(budget)
    if baseline and ranks.first:
        check_versions(load_results(baseline, whole=True), ignore_versions)
    check_request(candidate_names((recipe.out,)), named_texts(texts) or {"held-out": ""}, [part for part in also.split(",") if part], recipe.original)
    check_separate(recipe.adapter_set)
    need_loader(recipe.format)
    requests = parse_requests(perplexity)
    if suite or tasks:
        open_tasks(load_suite(suite, split_names(tasks), allow_task_code))
    found = plan(recipe, ranks.first)
    for place in (recipe.base, recipe.original):
        if place:
            check_method(str(resolve(place)[0]))
    evidence = Path(recipe.out.rstrip("/") + ".eval")
    if ranks.first:
        check_results_file(evidence / "results.json", "OUT.eval/results.json")
        for page in ("report.md", "report.html", *(["held-out.jsonl"] if not texts else [])):
            check_file(evidence / page, f"OUT.eval/{page}")
    if junit and ranks.first:
        check_file(junit, "--junit", [recipe.base, *texts, *filter(None, (baseline, recipe_file, budget))])
    steps.step("planned")
    say(describe_plan(found))
    if eval_tokens and found.context_length and eval_tokens > found.context_length:
        raise UsageProblem("the windows are longer than the model's context", where="--eval-tokens", expected=f"up to {found.context_length}", found=eval_tokens)
    if generate and found.context_length:
        check_room(new_tokens, found.context_length)
    calibration, held_out = prepare_texts(found, named_texts(texts), allow_overlap, tuple(requests.values()))
    evaluating = evaluation_of(found, found.bytes_out, _tokens(named_texts(texts), held_out), eval_tokens or min(recipe.tokens, found.context_length or recipe.tokens))
    expected = foreseen([found], calibration, warn, check_fit=not unchecked and ranks.first, resumed=resume, evaluating=evaluating, processes=ranks.local_size)
    if dry_run:
        if as_json:
            result_json(found.to_json() | estimate_json(expected, evaluating))
        else:
            result("\n".join((describe_plan(found), describe_estimate(expected, evaluating), detail(expected))))
        say("dry run: nothing was written. Next: the same command without --dry-run")
        return None
    announce(expected, evaluating)
    from qmerge.pipeline.resume import Resume
    from qmerge.pipeline.run import run
    from qmerge.pipeline.stop import Stop
    from qmerge.pipeline.streams import Place

    with Stop(say) as stop:
        done = run(found, steps.step, calibration, steps.count, resume=Resume(asked.overwrite) if resume else None, stop=stop, say=say, ranks=ranks, place=Place(expected.work.streams_on_host))
    steps.step(f"wrote {done.out}")
    for note in done.notes:
        warn(note)
    files = named_texts(texts) or {"held-out": str(_write_held_out(evidence, held_out, ranks))}
    ranks.barrier()  # OUT is there, and what was held out
    if not Path(done.out).is_dir():
        raise Refused("A rank cannot see OUT, which it is to measure.", where=f"rank {ranks.rank}", expected="a file system that all ranks share", fix="put OUT on shared storage, and run the same command again with --resume; or qmerge merge on these hosts, then qmerge eval on one")
    context_length = found.context_length or recipe.tokens
    say(f"         the checkpoint is whole; should measuring it fail, this does that part again: {eval_line(recipe, done.out)}")
    try:
        results = evaluate_to(
            evidence / "results.json", (str(done.out),), files, base=recipe.base, adapter=recipe.adapter_set,
            tokens=eval_tokens or min(recipe.tokens, context_length), template=recipe.template, also=also, original=recipe.original, on=recipe.on,
            nf4_recipe=recipe.nf4_recipe, suite=suite, tasks=tasks, allow_task_code=allow_task_code, budget=budget, device=recipe.device, steps=steps, perplexity=perplexity, generate=generate, new_tokens=new_tokens, ranks=ranks,
        )
    except KeyboardInterrupt:
        raise Interrupted("interrupted while measuring", written=f"{done.out} is whole; of what was measured, nothing", fix=f"the same command with --resume, or {eval_line(recipe, done.out)}") from None
    if not ranks.first:
        return None
    from qmerge.report.tables import terminal_table
    from qmerge.report.write import write_json, write_junit, write_report

    refused = None
    if baseline:
        try:
            results = judged_again(results, evidence / "results.json", limits, baseline, ignore_versions)
        except Refused as error:
            refused, results = error, not_compared(results, error)
        write_json(results, evidence / "results.json")
    if junit:
        write_junit(results, junit, strict)
    pages = [str(page) for page in write_report(results, evidence)]
    steps.step("reported")
    if refused:
        raise Refused(refused.what, where=refused.where, expected=refused.expected, found=refused.found, fix=refused.fix, written=f"{done.out} and {evidence}: the checkpoint and its results are whole, and judged by the budget alone")
    if as_json:
        result_json({"verdict": results["verdict"], "out": str(done.out), "results": str(evidence / "results.json"), "report": pages})
        brief_verdict(results["verdict"])
    else:
        result(terminal_table(results))
        show_verdict(results["verdict"])
        result("\n".join(f"{label:<12}{path}" for label, path in zip(("checkpoint", "report.md", "report.html"), [str(done.out), *pages], strict=True)))
    say(f"Next: open {pages[1]}" + ("" if results["verdict"]["state"] == "fail" else f", or serve {done.out}"))
    found_verdict: dict[str, Any] = results["verdict"]
    return found_verdict


def _apart(calibration: Sequence[Document], kept: list[Document]) -> list[Document]:
    """The held-out documents that share no 13 words in a row with the calibration text. All of them where that would leave less than half: such text has a
    template or copies, what is left would be a choice of the unusual, and the overlap is to be refused."""
    from qmerge.store.texts import overlapping

    shared = set(overlapping([one.text for one in calibration], [one.text for one in kept]))
    if not shared or 2 * len(shared) > len(kept):
        return kept
    warn(f"{len(shared)} of the {len(kept)} held-out documents share 13 words in a row with the calibration text, and are not measured on")
    return [one for index, one in enumerate(kept) if index not in shared]


def prepare_texts(found: Any, texts: dict[str, str], allow_overlap: bool, requests: Iterable[Any] = ()) -> tuple[Any, list[Document]]:
    """(calibration or None where the format needs none, documents held out for evaluation where no text was given). Refuses overlap before any work,
    also with the texts of ``requests``, the perplexities, and those that fill no window."""
    from qmerge.pipeline.calibrate import hold_out, load_tokenizer
    from qmerge.pipeline.run import calibration_for
    from qmerge.quality.evaluate import check_overlap
    from qmerge.store.texts import read_documents

    recipe = found.recipe
    tokenizer = load_tokenizer([*(adapter.path for adapter in found.adapters), found.checkpoint.path])
    evaluated = [document for path in texts.values() for document in read_documents(path, template=recipe.template, tokenizer=tokenizer)]
    others = [document for request in requests for document in _checked(request, tokenizer, found.context_length)]
    if not texts and recipe.calibration is None:
        raise Refused("there is no text to measure on", where="--text", expected="held-out text", found="none", fix="--text FILE, or qmerge merge to write without measuring")
    documents: list[Document] | None = None
    kept: list[Document] = []
    if not texts:
        documents, kept = hold_out(read_documents(recipe.calibration, template=recipe.template, tokenizer=tokenizer), recipe.seed)
        warn(f"no --text: {len(kept)} of the {len(kept) + len(documents)} calibration documents are held out to measure on")
    calibration = calibration_for(found, documents)
    if calibration and kept and not allow_overlap:
        kept = _apart(calibration.documents, kept)
    if calibration:
        shared = check_overlap(calibration.documents, (evaluated or kept) + others, allow=allow_overlap)
        if shared:
            warn(f"calibration and evaluation text share {len(shared)} run(s) of 13 words; the more, the more the figures flatter the merged model")
    return calibration, kept


def _checked(request: Any, tokenizer: Any, context: int | None) -> list[Document]:
    """The documents of a perplexity, once they are known to fill its windows."""
    from qmerge.quality.protocols import context_length, plan, read_request
    from qmerge.store.texts import Document

    texts = read_request(request)
    plan(request, texts, tokenizer, context or context_length(None, tokenizer))
    return [Document(text) for text in texts]


def _tokens(texts: dict[str, str], held_out: list[Document]) -> int:
    """Of what is measured on, about: three bytes to a token."""
    files = [file for path in texts.values() if Path(path).exists() for file in ([Path(path)] if Path(path).is_file() else Path(path).rglob("*")) if file.is_file()]
    return (sum(file.stat().st_size for file in files) + sum(len(document.text) for document in held_out)) // 3


def _write_held_out(folder: Path, documents: list[Document], ranks: Ranks) -> Path:
    path = folder / "held-out.jsonl"
    if not ranks.first:
        return path
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        {"prompt": document.spans[0][0], "completion": document.spans[1][0]} if len(document.spans) == 2 else {"text": document.text}
        for document in documents
    ]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path
