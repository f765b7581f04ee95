"""What do the runs of bench_merge.py say, as numbers and as a page?"""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from typing import Any

LABELS = {"qmerge": "qmerge merge --format bf16", "read": "read of the input", "copy": "copy of the output, fsync", "peft": "PEFT merge_and_unload"}
Runs = list[dict[str, Any]]


def spread(values: list[float]) -> dict[str, float]:
    return {"median": median(values), "min": min(values), "max": max(values)}


def of(runs: Runs, arm: str, key: str) -> list[Any]:
    """One number per run of an arm, in the order of the rounds."""
    return [run[key] for run in sorted(runs, key=lambda run: run["round"]) if run["arm"] == arm]


def summary(runs: Runs, bytes_in: int, bytes_out: int) -> dict[str, Any]:
    """Each arm's medians and ranges; ``bytes`` is what it has to read and to write, ``bytes_per_s`` that over the median."""
    moved = {"qmerge": (bytes_in, bytes_out), "read": (bytes_in, 0), "copy": (bytes_out, bytes_out), "peft": (bytes_in, bytes_out)}
    rows = {}
    for arm, (read, written) in moved.items():
        if walls := of(runs, arm, "wall_s"):
            rows[arm] = {"n": len(walls), "bytes_read": read, "bytes_written": written, "bytes_per_s": (read + written) / median(walls)}
            rows[arm] |= {key: spread(of(runs, arm, key)) for key in ("wall_s", "cpu_s", "peak_rss_bytes", "anonymous_bytes", "disk_read_bytes")}
    return rows


def floors(runs: Runs) -> list[float]:
    """Seconds of copy + read, per round."""
    return [copy + read for copy, read in zip(of(runs, "copy", "wall_s"), of(runs, "read", "wall_s"), strict=True)]


def limits(runs: Runs) -> list[dict[str, Any]]:
    """The limits set for the merge. ``value`` decides; ``low`` and ``high`` are the range that the runs allow."""
    wall, rss = of(runs, "qmerge", "wall_s"), of(runs, "qmerge", "peak_rss_bytes")
    over = [ours / floor for ours, floor in zip(wall, floors(runs), strict=True)]
    rows = [
        limit("peak memory of qmerge, worst run, GB", "≤", 2.0, max(rss) / 1e9, min(rss) / 1e9, max(rss) / 1e9, f"{len(rss)}"),
        limit("wall time: qmerge / (copy + read), median of the rounds (aim 1.3)", "≤", 1.5, median(over), min(over), max(over), f"{len(over)}"),
    ]
    theirs, their_rss = of(runs, "peft", "wall_s"), of(runs, "peft", "peak_rss_bytes")
    if theirs:
        n = f"{len(theirs)} of PEFT, {len(wall)} of qmerge"
        faster, least, most = median(theirs) / median(wall), min(rss) / max(their_rss), max(rss) / min(their_rss)
        rows += [
            limit("wall time: PEFT / qmerge, medians", "≥", 2.0, faster, min(theirs) / max(wall), max(theirs) / min(wall), n),
            limit("peak memory: qmerge, worst run / PEFT, best run", "≤", 0.2, most, least, most, n),
        ]
    return rows


def limit(what: str, sign: str, bound: float, value: float, low: float, high: float, n: str) -> dict[str, Any]:
    good = [number <= bound if sign == "≤" else number >= bound for number in (value, low, high)]
    state = ("met" if good[0] else "missed") + ("" if len(set(good)) == 1 else " (some runs lie on the other side)")
    return {"what": what, "sign": sign, "limit": bound, "value": value, "low": low, "high": high, "n": n, "state": state}


def markdown(found: dict[str, Any]) -> str:
    """The page: how it was measured, arms, limits, agreement."""
    libraries, machine = (", ".join(f"{key.replace('_', ' ')} {value}" for key, value in found[part].items()) for part in ("versions", "machine"))
    shape = found["shape"]
    cache = "dropped (fsync, then posix_fadvise DONTNEED)" if found["page_cache"] == "cold" else "read into the page cache, which cannot be dropped here,"
    return f"""# Dense merge of an 8B-shaped NF4 base

`{found["command"]}` writes this file and the JSON beside it.

Versions: {libraries}. Machine: {machine}.

Base: the shapes of Llama-3-8B (hidden {shape["hidden"]:,}, ffn {shape["ffn"]:,}, {shape["heads"]} heads, {shape["kv_heads"]} kv heads, vocabulary
{shape["vocab"]:,}, untied bf16 embeddings) with **{shape["layers"]} of 32 layers**, NF4 with double quantization, random values. Adapter: rank {shape["rank"]}
on all seven linears, fp32. Input {gb(found["bytes_in"])} GB, output {gb(found["bytes_out"])} GB (GB = 10^9 bytes).

Every run is a process of its own, timed from start to exit, imports included; libraries were loaded once before. Runs are interleaved. Before each
run dirty pages were written and its input files were {cache};
a virtual disk's host may still hold them. qmerge and copy fsync what they write inside their time; PEFT as its users run it does not, which favours
it. The copy also reads its source, so copy + read is more than a merge has to move: by one read of the output.
qmerge writes large files past the page cache (O_DIRECT); the copy goes through it, as cp does, and pays system time for that. A copy past the cache
was not measured, and would be quicker here.
Peak memory is ru_maxrss from wait4: page cache that read() and write() fill is not in it, pages of mapped files that the process touched are;
anonymous is the part without them, sampled every 50 ms.

{arms_table(found)}

{limits_table(found)}

{agreement_table(found["agreement"])}
"""


def gb(count: float) -> str:
    return f"{count / 1e9:.2f}"


def between(row: dict[str, float], text: Callable[[float], str]) -> str:
    return f"{text(row['median'])} ({text(row['min'])} to {text(row['max'])})"


def arms_table(found: dict[str, Any]) -> str:
    lines = [
        "| process | n | wall time, s: median (min to max) | CPU, s | peak memory, GB | anonymous, GB | read + written, GB | MB/s | from the disk, GB |",
        "|---" * 9 + "|",
    ]
    for arm, row in found["arms"].items():
        moved = f"{gb(row['bytes_read'])} + {gb(row['bytes_written'])}"
        cells = [LABELS[arm], row["n"], between(row["wall_s"], "{:.2f}".format), f"{row['cpu_s']['median']:.1f}", between(row["peak_rss_bytes"], gb)]
        cells += [gb(row["anonymous_bytes"]["median"]), moved, f"{row['bytes_per_s'] / 1e6:.0f}", gb(row["disk_read_bytes"]["median"])]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    sums = floors(found["runs"])
    lines.append(f"| copy + read | {len(sums)} | {between(spread(sums), '{:.2f}'.format)} | | | | | | |")
    stages = [run["stages_s"] for run in found["runs"] if run.get("stages_s")]
    if stages:
        words = ", ".join(f"{name} {median(row[name] for row in stages):.1f}" for name in stages[0])
        lines += ["", f"PEFT's stages, s (median): {words} (not in its wall time)."]
    return "\n".join(lines)


def limits_table(found: dict[str, Any]) -> str:
    lines = ["| limit | value (range of the runs) | limit | n | |", "|---" * 5 + "|"]
    for row in found["limits"]:
        value, low, high = (f"{row[key]:.3f}" for key in ("value", "low", "high"))
        lines.append(f"| {row['what']} | {value} ({low} to {high}) | {row['sign']} {row['limit']:g} | {row['n']} | {row['state']} |")
    if "peft" in found["arms"]:
        ours, theirs = (found["arms"][arm]["anonymous_bytes"] for arm in ("qmerge", "peft"))
        durable = median(of(found["runs"], "peft", "wall_with_fsync_s")) / found["arms"]["qmerge"]["wall_s"]["median"]
        lines += ["", f"With its output fsynced, as qmerge's is, PEFT takes {durable:.3f} × qmerge's wall time."]
        lines += [f"Of anonymous memory alone qmerge's worst run takes {ours['max'] / max(1, theirs['min']):.3f} of PEFT's best."]
    else:
        lines += ["", "PEFT was not run (`--skip-peft`)."]
    return "\n".join(lines)


def agreement_table(found: dict[str, Any]) -> str:
    arms = list(found["merged"][0]["error"])
    heads = ["tensor", "values", *(f"error of {arm}" for arm in arms), *(["difference", "absolute", "values that differ"] if "peft" in arms else ())]
    both = f"Both outputs hold the same {found['tensors_in_output']} names, shapes and dtypes. " if "peft" in arms else ""
    lines = [
        f"{both}These are the base's bit for bit: {', '.join(found['unchanged'])}.\n",
        "Merged weights against W + s·B·A in fp64, W dequantized by bitsandbytes: the largest error over what rounding allows (qmerge: half a bf16",
        "step of the result; PEFT: half a step of W as well, which it rounds before it adds; both: sums in fp32, (rank + 2)·2^-24 of |W| + s·|B|·|A|),",
        "and the largest difference between the two over the sum of these. At most 1 is the same merge. Of large weights every k-th row was looked at.\n",
        f"| {' | '.join(heads)} |",
        "|---" * len(heads) + "|",
    ]
    for row in found["merged"]:
        cells = [row["tensor"], f"{row['values']:,}", *(f"{value:.3f}" for value in row["error"].values())]
        if "peft" in arms:
            cells += [f"{row['difference']:.3f}", f"{row['max_abs_difference']:.2e}", f"{100 * row['differing_share']:.1f} %"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines).strip()
