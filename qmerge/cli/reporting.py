"""`qmerge report`, `qmerge advise`: show results, many of them over time, and say what to ship."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from qmerge.api.judging import judge
from qmerge.api.targets import check_file
from qmerge.cli.completing import BUDGET, PLACE
from qmerge.cli.options import json_option
from qmerge.cli.output import QuietCommand, result, result_json, say, warn
from qmerge.errors import UsageProblem


@click.command("report", cls=QuietCommand, short_help="Results as pages: report.md, report.html, or a history.", example="qmerge report OUT.eval/results.json --out DIR\nqmerge report --history runs --out DIR")
@click.argument("results", type=PLACE, metavar="[results.json]", required=False)
@click.option("--out", type=PLACE, required=True, metavar="DIR", help="Folder for report.md and report.html (history.md and history.html with --history).")
@click.option("--budget", type=BUDGET, metavar="FILE", help="Judge again by this budget (default: the verdict in the results; with --baseline: default).")
@click.option("--baseline", type=PLACE, metavar="results.json", help="Older results to hold the candidates against.")
@click.option("--ignore-versions", is_flag=True, help="Compare, or join in a history, what was measured with other versions of torch, transformers, …")
@click.option("--history", type=PLACE, metavar="DIR", help="Instead of one report: a metric over all results below DIR, by time.")
@click.option("--metric", metavar="NAME", default="kl_mean", show_default=True, help="The metric of --history.")
@click.option("--junit", type=PLACE, metavar="FILE", help="Write the checks as JUnit XML too.")
@json_option("report (paths)")
def report_command(
    results: str | None, out: str, budget: str | None, baseline: str | None, ignore_versions: bool, history: str | None, metric: str, junit: str | None, as_json: bool
) -> None:
    """Write report.md and report.html from results; with --history, how a metric went over many of them."""
    if Path(out).exists() and not Path(out).is_dir():
        raise UsageProblem("--out names a file", where=out, expected="a folder for the report", found="a file", fix="--out DIR: report.md and report.html are written into it")
    for page in ("history.md", "history.html") if history else ("report.md", "report.html"):
        check_file(Path(out) / page, page)
    if junit:
        check_file(junit, "--junit", [place for place in (results, baseline, budget) if place])
    if (results is None) == (history is None):
        raise UsageProblem("a report is of one results.json, or of a --history", where="qmerge report", expected="one of the two", found="neither" if results is None else "both", fix="qmerge report results.json --out DIR, or qmerge report --history DIR --out DIR")
    if history:
        pages = _history(history, metric, ignore_versions, out)
    else:
        pages = _report(str(results), out, budget, baseline, ignore_versions, junit)
    if as_json:
        result_json({"report": pages})
    else:
        result("\n".join(pages))
    say(f"Next: open {pages[1]}")


def _report(results: str, out: str, budget: str | None, baseline: str | None, ignore_versions: bool, junit: str | None) -> list[str]:
    from qmerge.quality.compare import load_budget
    from qmerge.report.load import load_results
    from qmerge.report.write import write_junit, write_report

    shown = judge(results, load_budget(budget or "default"), baseline, ignore_versions, warn) if budget or baseline else load_results(results)
    if junit:
        write_junit(shown, junit)
    return [str(page) for page in write_report(shown, out)]


def _history(folder: str, metric: str, ignore_versions: bool, out: str) -> list[str]:
    from qmerge.report.history import collect, render_history_html, render_history_markdown
    from qmerge.report.write import write_page

    found = collect(folder, metric, ignore_versions)
    for name, why in found.unread:
        warn(f"{name} is left out: {why}")
    if not found.series:
        raise UsageProblem("no results below this folder hold the metric", where=folder, expected=f"results.json files with {metric}", found=f"{found.files} results files", fix="--metric names what to show; qmerge run and qmerge eval write results.json")
    pages = {"history.md": render_history_markdown(found), "history.html": render_history_html(found)}
    for name, page in pages.items():
        write_page(Path(out) / name, page)
    return [str(Path(out) / name) for name in pages]


@click.command("advise", cls=QuietCommand, short_help="Keep the adapter separate, or ship a merged file?", example="qmerge advise OUT.eval/results.json --adapters 3 --engine vllm")
@click.argument("results", type=PLACE, metavar="results.json")
@click.option("--adapters", metavar="N", type=click.IntRange(1, 1_000_000), default=1, show_default=True, help="How many adapters of this base are to be served.")
@click.option("--engine", type=click.Choice(["transformers", "vllm", "sglang"]), help="What will serve it.")
@json_option("the choice, its reason, an alternative and the table")
def advise_command(results: str, adapters: int, engine: str | None, as_json: bool) -> None:
    """Keep the adapter separate, or ship a merged file? One line why, and the usual table with this model's measured values."""
    from qmerge.report.choice import choose, compared
    from qmerge.report.load import load_results
    from qmerge.report.tables import plain_table

    found = load_results(results)
    choice, table = choose(found, adapters, engine), compared(found, adapters)
    if as_json:
        rows = [[cell if isinstance(cell, str) else list(cell) for cell in row] for row in table.rows] if table else []
        result_json(asdict(choice) | {"table": {"heads": list(table.heads) if table else [], "rows": rows}})
        return
    result(f"{choice.sentence} {choice.reason}" + (f"\n{choice.alternative}" if choice.alternative else ""))
    if table:
        result("\n" + plain_table(table))
        for note in table.notes:
            say(note)
    say(f"Next: qmerge report {results} --out DIR")
