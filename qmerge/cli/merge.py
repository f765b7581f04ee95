"""`qmerge merge`: base + adapter to one checkpoint."""

from __future__ import annotations

from typing import Any

import click

from qmerge.cli.options import merge_options
from qmerge.cli.output import QuietCommand, Steps, result, result_json, say
from qmerge.errors import UsageProblem


@click.command("merge", cls=QuietCommand)
@merge_options
@click.option("--dry-run", is_flag=True, help="Check everything, say what would be done, write nothing.")
@click.option("--resume", is_flag=True, help="Continue an interrupted run (not built yet: a run is absent or whole).")
@click.option("--json", "as_json", is_flag=True, help="The result as JSON on stdout.")
def merge_command(recipe_file: str | None, settings: tuple[str, ...], dry_run: bool, resume: bool, as_json: bool, **flags: Any) -> None:
    """Merge an adapter into its base and write one checkpoint.

    W = dequantize(NF4) + scaling · B·A in fp32; then, for gptq and nf4, each linear is requantized so that the model answers as base + adapter did.
    """
    if resume:
        raise UsageProblem("--resume is not built yet", where="--resume", fix="run again without it: an interrupted run leaves nothing at OUT")
    from qmerge.pipeline.recipe import build_recipe

    recipe = build_recipe(recipe_file, settings, flags)
    from qmerge.pipeline.plan import describe_plan, plan

    found = plan(recipe)
    if dry_run:
        if as_json:
            result_json(found.to_json())
        else:
            result(describe_plan(found))
            say("dry run: nothing was written. Next: the same command without --dry-run")
        return
    from qmerge.pipeline.run import run
    from qmerge.units import format_bytes, format_seconds

    say(describe_plan(found))
    done = run(found, Steps().step)
    if as_json:
        result_json({"out": str(done.out), "elapsed_s": round(done.elapsed_s, 2), "peak_rss_bytes": done.peak_rss_bytes, **found.to_json()})
    else:
        result(str(done.out))
    say(f"merged in {format_seconds(done.elapsed_s)}, peak memory {format_bytes(done.peak_rss_bytes)}")
    say(f"Next: qmerge eval --base {recipe.base} --adapter {recipe.adapter} --candidate {recipe.out} --text FILE --out results.json")
