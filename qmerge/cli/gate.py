"""`qmerge compare`: are results inside a budget, and not worse than an accepted run?"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import click

from qmerge.api.judging import judge
from qmerge.api.targets import check_file, check_results_file
from qmerge.cli.completing import BUDGET, PLACE
from qmerge.cli.evidence import brief_verdict, show_verdict
from qmerge.cli.options import json_option
from qmerge.cli.output import QuietCommand, result_json, say, warn
from qmerge.errors import Refused
from qmerge.units import format_bytes


@click.command("compare", cls=QuietCommand, short_help="Judge results by a budget and against accepted ones.", example="qmerge compare OUT.eval/results.json --budget strict\nqmerge compare OUT.eval/results.json --save-baseline accepted.json\nqmerge compare OUT.eval/results.json --baseline accepted.json")
@click.argument("results", type=PLACE, metavar="results.json")
@click.option("--budget", type=BUDGET, default="default", show_default=True, metavar="FILE", help="strict, default, lenient, or a YAML file.")
@click.option("--baseline", type=PLACE, metavar="results.json", help="Older results to hold the candidates against; paired token by token where the .npz of both are there.")
@click.option("--ignore-versions", is_flag=True, help="Compare with a --baseline that was measured with other versions of torch, transformers, …")
@click.option("--recompute", is_flag=True, help="Judge numbers computed anew from the per-token arrays and items beside the results, not the stored ones.")
@click.option("--save-baseline", type=PLACE, metavar="FILE", help="Accept these results: write what a later --baseline needs of them. Refused where they fail.")
@click.option("--junit", type=PLACE, metavar="FILE", help="Write the checks as JUnit XML too.")
@click.option("--strict", is_flag=True, help="Exit 3 also where the text is too little to tell.")
@json_option("the verdict (state, reasons, checks)")
@click.pass_context
def compare_command(
    context: click.Context, results: str, budget: str, baseline: str | None, ignore_versions: bool, recompute: bool, save_baseline: str | None, junit: str | None, strict: bool,
    as_json: bool,
) -> None:
    """Judge results against a budget, and against older results. Exit 0: pass; 3: below budget, or worse than the baseline."""
    from qmerge.quality.compare import exit_code, load_budget
    from qmerge.report.write import write_junit

    read = [place for place in (results, baseline, budget) if place]
    if junit:
        check_file(junit, "--junit", read)
    if save_baseline:
        # the accepted results may be replaced by what is accepted now, but never the results by their own excerpt
        check_results_file(save_baseline, "--save-baseline", [results, budget, Path(results).with_suffix(".npz")])
    judged = judge(results, load_budget(budget), baseline, ignore_versions, warn, recompute=recompute)
    verdict = judged["verdict"]
    # files first: whoever reads the verdict through `head` still gets them
    if junit:
        write_junit(judged, junit, strict)
        say(f"wrote {junit}")
    if save_baseline and verdict["state"] != "fail":
        accept(judged, save_baseline)
    if as_json:
        result_json(verdict)
        brief_verdict(verdict)
    else:
        show_verdict(verdict)
    if save_baseline and verdict["state"] == "fail":
        raise Refused("these results failed, so they do not become a baseline", where=save_baseline, found=verdict["reasons"][0], fix="a budget that they hold, if that is meant: --budget FILE")
    say(_keep(results, save_baseline) if save_baseline else f"Next: qmerge report {results} --out DIR")
    context.exit(exit_code(verdict, strict))


def _keep(results: str, baseline: str) -> str:
    """Which files a later ``--baseline`` reads, for whoever has just accepted one."""
    tokens, beside = Path(results).with_suffix(".npz"), Path(baseline).with_suffix(".npz")
    lines = [f"Next: commit {baseline}, and hold later runs against it with --baseline {baseline}. It is all that a baseline must have."]
    if tokens.is_file() and tokens.resolve() != beside.resolve():
        lines.append(f"Smaller differences can be told token by token: keep the per-token numbers ({format_bytes(tokens.stat().st_size)}) beside it: {shlex.join(('cp', str(tokens), str(beside)))}")
    return "\n".join(lines)


def not_compared(results: dict[str, Any], why: Refused) -> dict[str, Any]:
    """``results`` judged by the budget alone, and no longer passed: whether they are worse than the baseline is not known."""
    verdict, reason = results["verdict"], f"the baseline was not compared: {why.what} ({why.found})"
    row = {"arm": "", "text": "", "metric": "baseline", "value": None, "ci_low": None, "ci_high": None, "limit": None, "state": "inconclusive", "reason": reason}
    state, rest = ("fail", [*verdict["reasons"], reason]) if verdict["state"] == "fail" else ("inconclusive", [reason, *verdict["reasons"]])
    return results | {"verdict": verdict | {"state": state, "reasons": rest, "checks": [*verdict["checks"], row]}}


def accept(results: dict[str, Any], target: str) -> None:
    """Write a baseline."""
    from qmerge.quality.baseline import baseline_of
    from qmerge.report.write import write_json

    write_json(baseline_of(results), target)
    say(f"wrote {target}")
