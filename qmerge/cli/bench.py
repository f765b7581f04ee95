"""`qmerge bench`: what does serving cost, separate, merged and requantized?"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import click

from qmerge.api.targets import check_results_file
from qmerge.cli.completing import PLACE
from qmerge.cli.helping import BASE, MEASURE, RUNNING
from qmerge.cli.options import adapter_options, adapter_set, json_option, topic
from qmerge.cli.output import QuietCommand, result, result_json, say, warn
from qmerge.cli.progress import Steps
from qmerge.errors import UsageProblem
from qmerge.units import format_bytes, format_seconds


@click.command("bench", cls=QuietCommand, short_help="What serving costs: memory, load time, tokens per second.", example="qmerge bench --base BASE --adapter ADAPTER --candidate OUT --into OUT.eval/results.json")
@click.option("--base", type=PLACE, required=True, metavar="PATH", help="The base that the adapter was trained on.")
@adapter_options
@click.option("--candidate", "candidates", type=PLACE, required=True, multiple=True, metavar="PATH", help="A checkpoint to measure. Repeatable.")
@topic(
    BASE,
    click.option("--on", type=click.Choice(["dequantized", "original"]), default="dequantized", show_default=True, help="What the merge started from."),
    click.option("--nf4-recipe", type=PLACE, metavar="RECIPE", help="For a float base: double, single, or a config file."),
)
@topic(
    MEASURE,
    click.option("--merged", type=PLACE, metavar="PATH", help="A float checkpoint of the merge (default: one is written to a temporary folder, in bf16)."),
    click.option("--without-merged", is_flag=True, help="Leave the float merge out."),
    click.option("--batches", default="1,8,32", show_default=True, metavar="N,N", help="Sequences at a time."),
    click.option("--prompt-tokens", type=int, default=128, show_default=True, help="Tokens of each prompt."),
    click.option("--new-tokens", type=int, default=32, show_default=True, help="Tokens decoded after each prompt."),
    click.option("--repeats", type=int, default=3, show_default=True, help="Timings in each process, after one that is not timed."),
    click.option("--rounds", type=int, default=3, show_default=True, help="Processes per arm; arms take turns."),
    click.option("--timeout", type=float, default=3600, show_default=True, metavar="SECONDS", help="Seconds after which a process is stopped."),
)
@topic(
    RUNNING,
    click.option("--device", default="auto", show_default=True, metavar="DEVICE", help="cpu, cuda, cuda:N or auto."),
    click.option("--out", type=PLACE, metavar="FILE", help="JSON to write."),
    click.option("--into", type=PLACE, metavar="results.json", help="Results of `qmerge eval` or `run` to put the figures into; replaced whole."),
)
@json_option("the figures, as --out writes them under serving")
def bench_command(
    base: str, candidates: tuple[str, ...], merged: str | None, without_merged: bool, on: str, nf4_recipe: str | None, batches: str, prompt_tokens: int, new_tokens: int,
    repeats: int, rounds: int, timeout: float, device: str, out: str | None, into: str | None, as_json: bool, **options: Any,
) -> None:
    """Measure bytes, load time, peak memory and tokens per second of base + separate adapter, the float merge and candidates, each in processes of its own."""
    if out and into:
        raise UsageProblem("--out and --into exclude each other", where="qmerge bench", fix="--into adds to results, --out writes a file of its own")
    if merged and without_merged:
        raise UsageProblem("--merged and --without-merged exclude each other", where="qmerge bench", fix="leave one of them out")
    sizes, adapter = _sizes(batches), adapter_set(options)
    if out:
        check_results_file(out, "--out", (base, *(one.place.partition("#")[0] for one in adapter.choices), *candidates))
    from qmerge.api.first import look_at_models
    from qmerge.device_names import check_device_name
    from qmerge.pipeline.recipe import read_nf4_recipe
    from qmerge.quality.asked import candidate_names
    from qmerge.report.load import load_results
    from qmerge.store.hub import resolve

    check_device_name(device)
    recipe, results = read_nf4_recipe(nf4_recipe), load_results(into) if into else None
    look_at_models((base, merged, *candidates), adapter)
    names = candidate_names(str(resolve(place)[0]) for place in candidates)
    from qmerge.device import pick_device
    from qmerge.quality.serving import Load, check_known, measure_serving

    if results:
        check_known(results, names)
    load = Load(sizes, prompt_tokens, new_tokens, repeats, rounds, timeout)
    whole = str(resolve(merged)[0]) if merged else None
    section = measure_serving(str(resolve(base)[0]), adapter, names, load, device=str(pick_device(device)), merged=whole, with_merged=not without_merged, on=on,
                              nf4_recipe=recipe.to_json() if recipe else None, progress=Steps().step)  # fmt: skip
    written = _write(section, out, into)
    if as_json:
        result_json(section)
    else:
        result(serving_tables(section))
    for name, row in section["rows"].items():
        if row.get("note"):
            warn(f"{name}: {row['note']}")
    say(f"wrote {written}" + (f". Next: qmerge report {into} --out DIR" if into else "") if written else "nothing was written: --out FILE or --into results.json keeps the figures")


def _sizes(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UsageProblem("the batch sizes are malformed", where="--batches", expected="whole numbers, as in 1,8,32", found=text) from None


def _write(section: dict[str, Any], out: str | None, into: str | None) -> str | None:
    """The file that was written. ``into`` is read again: another command may have added to it meanwhile."""
    if not (place := into or out):
        return None
    from qmerge.report.load import SCHEMA_VERSION, load_results

    content = load_results(into) | {"serving": section} if into else {"schema_version": SCHEMA_VERSION, "serving": section}
    path = Path(place)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    part.write_text(json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(part, path)
    return str(path)


def serving_tables(section: dict[str, Any]) -> str:
    """Size, time to load and memory; tokens per second by batch; kernels and packages. Plain aligned text."""
    rows, sizes = section["rows"], [str(size) for size in section["settings"]["batches"]]
    cost: list[tuple[str, ...]] = [("arm", "weights", "imports", "load", "peak: load", "prefill", "decode", "first token", "hot swap")]
    speed: list[tuple[str, ...]] = [("arm", *(f"{phase} ×{size}" for phase in ("prefill", "decode") for size in sizes))]
    words = []
    for name, row in rows.items():
        memory = (_bytes(row.get(f"peak_{phase}_bytes")) for phase in ("load", "prefill", "decode"))
        cost.append((name, _bytes(row.get("bytes")), _seconds(row.get("import_s")), _seconds(row.get("load_s")), *memory, _seconds(row.get("time_to_first_token_s")), "yes" if row["hot_swap"] else "lost"))
        speed.append((name, *(_rate(row.get(f"{phase}_tokens_per_s", {}).get(size)) for phase in ("prefill", "decode") for size in sizes)))
        if "kernel" in row:
            words.append(f"{name}: {row['kernel']}; needs {', '.join(['torch', 'transformers', *row['packages']])}")
    about = f"on {section['device']}, {section['threads']} threads, load average {section['load_average']['before']} before and {section['load_average']['after']} after"
    return "\n".join([about, "", *_aligned(cost), "", "tokens per second (± 95 %)", *_aligned(speed), "", "kernels", *words])


def _bytes(count: int | None) -> str:
    return "—" if count is None else format_bytes(count)


def _seconds(metric: dict[str, Any] | None) -> str:
    if not metric:
        return "—"
    return f"{metric['value'] * 1000:.1f} ms" if metric["value"] < 1 else format_seconds(metric["value"])


def _rate(metric: dict[str, Any] | None) -> str:
    if not metric:
        return "—"
    spread = "" if metric["ci_high"] is None else f" ±{metric['ci_high'] / metric['value'] - 1:.0%}"
    return f"{metric['value']:,.0f}{spread}"


def _aligned(table: list[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = ["  ".join(cell.ljust(width) if index == 0 else cell.rjust(width) for index, (cell, width) in enumerate(zip(line, widths, strict=True))) for line in table]
    return [lines[0], "-" * len(lines[0]), *lines[1:]]
