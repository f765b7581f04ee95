"""`qmerge merge`: base + adapter to one checkpoint."""

from __future__ import annotations

from typing import Any

import click

from qmerge.api.merging import carry_out, prepare
from qmerge.cli.evidence import eval_line
from qmerge.cli.helping import RUNNING
from qmerge.cli.options import json_option, merge_options, topic
from qmerge.cli.output import QuietCommand, result, result_json, say, warn
from qmerge.cli.planning import announce, describe_estimate, detail, estimate_json, fit_option, took, took_json
from qmerge.cli.progress import Steps
from qmerge.cli.several import several
from qmerge.ranks import Ranks

EXAMPLE = """
qmerge merge --base BASE --adapter ADAPTER --calibration train.jsonl --out OUT --dry-run
qmerge merge --base BASE --adapter ADAPTER --out OUT --format bf16
"""


@click.command("merge", cls=QuietCommand, short_help="Merge an adapter into its base; write one checkpoint.", example=EXAMPLE)
@merge_options
@topic(
    RUNNING,
    click.option("--dry-run", is_flag=True, help="Check everything, say what would be done, write nothing."),
    click.option("--resume", is_flag=True, help="Continue an interrupted run of this OUT; where there is none, start; where OUT is there whole, say so."),
)
@fit_option
@json_option("out, elapsed_s, floor_s, peak_rss_bytes, the plan and the estimate; with --each a list of these")
def merge_command(recipe_file: str | None, settings: tuple[str, ...], dry_run: bool, resume: bool, unchecked: bool, as_json: bool, **flags: Any) -> None:
    """Merge an adapter into its base and write one checkpoint.

    The base is dequantized and the adapter's change added in fp32; for quantizing formats each linear is then requantized so that the model answers as base + adapter did.
    `qmerge run` does the same, and measures what it cost. Started by torchrun or srun, several processes share the work (docs/scale.md).
    """
    with several(flags["device"]) as ranks:
        _merge(recipe_file, settings, dry_run, resume, unchecked, as_json, flags, ranks)


def _merge(recipe_file: str | None, settings: tuple[str, ...], dry_run: bool, resume: bool, unchecked: bool, as_json: bool, flags: dict[str, Any], ranks: Ranks) -> None:
    from qmerge.pipeline.recipe import build_recipe

    recipe = build_recipe(recipe_file, settings, flags)
    prepared = prepare(recipe, resume=resume, check_fit=not unchecked, warn=warn, ranks=ranks)
    from qmerge.pipeline.plan import describe_plan

    plans, expected = prepared.plans, prepared.estimate
    if dry_run:
        if as_json:
            rows = [found.to_json() | estimate_json(expected) for found in plans]
            result_json(rows if recipe.each else rows[0])
        else:
            result("\n".join([*(describe_plan(found) for found in plans), describe_estimate(expected), detail(expected)]))
            say("dry run: nothing was written. Next: the same command without --dry-run")
        return
    from qmerge.pipeline.floor import floor_seconds
    from qmerge.pipeline.stop import Stop

    for found in plans:
        say(describe_plan(found))
    announce(expected)
    steps = Steps()
    with Stop(say) as stop:
        done = carry_out(prepared, steps.step, steps.count, say, stop, ranks, steps.count)
    if not ranks.first:
        return
    floor_s = floor_seconds(expected, recipe, resume, ranks)
    rows = [{"out": str(one.out), **took_json(one, floor_s), **found.to_json(), **estimate_json(expected)} for one, found in zip(done, plans, strict=True)]
    if as_json:
        result_json(rows if recipe.each else rows[0])
    else:
        result("\n".join(row["out"] for row in rows))
    for one in done:
        say(_survival(one.linears))
        for note in one.notes:
            say(note)
    say(took(done[0], floor_s))
    say(f"Next: {eval_line(plans[0].recipe, plans[0].recipe.out)}")


def _survival(linears: dict[str, dict[str, Any]]) -> str:
    """How much of ΔW is in the written weights, linear by linear (1: all of it; each value is in the manifest)."""
    found = {name: row["delta_survival"] for name, row in linears.items() if "delta_survival" in row}
    if not found:
        return "delta survival: no linear was changed"
    lowest, highest = min(found, key=found.__getitem__), max(found, key=found.__getitem__)
    return f"delta survival in {len(found)} tensors: {found[lowest]:.4f} ({lowest}) to {found[highest]:.4f} ({highest}); all in manifest.json. Of weights, one by one: what the model keeps, qmerge eval measures"
