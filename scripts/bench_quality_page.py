"""What do the figures of bench_quality.py say, as a page? Made of the JSON alone."""

from __future__ import annotations

from typing import Any

from bench_quality_arms import LABELS, REFERENCES, TIMED, UNUSUAL
from bench_quality_cases import IN_DOMAIN

from qmerge.report.numbers import format_metric, format_value

LOADED = 0.1
"""share of the machine that others used from which on seconds carry a mark"""
METRICS = {
    "kl_mean": ("kl", True),
    "floor_factor": ("kl", False),
    "kl_p99": ("kl", False),
    "ppl": ("ppl", False),
    "top1_agreement": ("percent", False),
    "retention": ("percent", True),
}
"""what a table shows: how it is written, and whether with its interval"""
HEADS = ("KL to separate [95 %]", "KL / floor", "KL p99", "perplexity", "ratio to separate", "top-1", "retention [95 %]")
Lines = list[str]


def markdown(found: dict[str, Any]) -> str:
    libraries, machine = (", ".join(f"{key} {value}" for key, value in found[part].items()) for part in ("versions", "machine"))
    warning = [f"**{found['warning']}**\n"] if found.get("warning") else []
    lines = [f"""# Quality at the same bits

`{found["command"]}` writes this file and the JSON beside it.

Versions: {libraries}{peers_versions(found)}; solver sources sha256 {found["solver_sha256"][:12]}. Machine: {machine}. Arithmetic: {found["arithmetic"]}.

Reference of every figure: base + adapter kept separate. Every arm with seconds is a checkpoint that was written to disk and loaded from there by its public loader before it was
measured, all in one arithmetic; `base`, `separate`, `merged` and `nearest NF4` exist in memory only. Every quantizer got the same token windows; the peers got the arm `merged` as an
fp32 checkpoint (PEFT: base and adapter). Their other options are their defaults. Intervals: 95 %, clustered by window; those of ratios by a seeded bootstrap over windows, paired.
Noise floor: the reference as bitsandbytes and PEFT run it, against the reference in fp32. Bits: all tensors that the file holds for the linears that qmerge requantizes, but biases.
Seconds: from reading the model to the written checkpoint, without imports and without reading text. Peak memory: ru_maxrss of the arm's own process, its imports in it. Seconds with
“~” were taken while other processes used more than {LOADED:.0%} of the machine; the section on time is what counts.
""", *warning]  # fmt: skip
    lines += promise_table(found["cases"])
    for case in found["cases"]:
        lines += section(case)
    return "\n".join(lines) + "\n"


def peers_versions(found: dict[str, Any]) -> str:
    """Of the peers that have an environment of their own."""
    versions = {
        (name.split("-")[0], row["version"], row["torch"])
        for case in found["cases"]
        for name, row in case["arms"].items()
        if name.startswith(("llmcompressor", "autoround")) and "version" in row
    }
    return "".join(f", {tool} {version} (with torch {torch})" for tool, version, torch in sorted(versions))


def promise_table(cases: list[dict[str, Any]]) -> Lines:
    lines = ["## Promises\n", "| | case | what | arms | value [95 %] | target | windows | |", "|---" * 8 + "|"]
    rows = sorted(((row, case["case"]) for case in cases for row in case["promises"]), key=lambda pair: pair[0]["promise"])
    for row, name in rows:
        lines.append(
            f"| {row['promise']} | {name} | {row['what']} | {row['who']} | {interval(row)} | {row['sign']} {row['target']:g} | {row['n'] or '—'} | {row['state']} |"
        )
    return [*lines, ""]


def interval(row: dict[str, Any], digits: int = 4) -> str:
    if row["value"] is None:
        return "—"
    ends = "" if row["ci_low"] is None else f" ({row['ci_low']:.{digits}f} to {row['ci_high']:.{digits}f})"
    return f"{row['value']:.{digits}f}{ends}"


def section(case: dict[str, Any]) -> Lines:
    """One case: what was measured on, one table per text, what was not made, ablations, time."""
    calibration = case["calibration"]
    held, generic = calibration["held_out_windows"], calibration.get("generic", {"windows": 0, "source": "—"})
    lines = [
        f"## {case['case']}: {case['base']} × {case['adapter']}\n",
        *([case["note"] + training(case["training"]) + "\n"] if case["note"] else []),
        f"Calibration: {calibration['windows'] + held} windows of {calibration['tokens_per_window']} tokens, {calibration['in_domain']['windows']} of {calibration['in_domain']['source']} and",
        f"{generic['windows']} of {generic['source']} ({held} of them held out by qmerge, to choose with). Weights requantized: {case['weights']:,}. Noise floor: {case['served']}.\n",
    ]
    for text, facts in case["texts"].items():
        lines += table(case, text, facts)
    lines += refusals(case)
    for arm, rows in case["ablations"].items():
        lines += ablation(arm, rows)
    return lines + (timing(case["timing"]) if case["timing"] else [])


def training(facts: dict[str, Any]) -> str:
    if not facts:
        return ""
    words = f". Perplexity of the base on the adapter's domain {facts['ppl_base']:.1f}, with the adapter {facts['ppl_separate']:.1f}; mean ‖ΔW‖/‖W‖ {facts['delta_over_weight_mean']:.1%}"
    if "held_out_ppl_float" in facts:
        words += f"; of the float base on unseen text of its own domain {facts['held_out_ppl_float']:.0f} (token frequencies alone: {facts['held_out_ppl_unigram']:.0f})"
    return words + "."


def table(case: dict[str, Any], text: str, facts: dict[str, Any]) -> Lines:
    """All arms on one text; bits, seconds and memory beside the in-domain one."""
    metrics, made = case["metrics"][text], case["arms"]
    whole = text == IN_DOMAIN
    skipped = f" after the first {facts['skipped']:,}" if facts["skipped"] else ""
    lines = [
        f"### {case['case']}, {text}\n",
        f"{facts['documents']:,} of {facts['documents_in_file']:,} documents{skipped} of {facts['file']}: n = {len_scored(metrics):,} scored tokens in {facts['windows']:,} windows of",
        f"{facts['window_tokens']}. Runs of 13 words shared with calibration: {facts['shared_13_grams']}.\n",
        f"| arm | {' | '.join(HEADS)} |" + (" bits per weight | seconds | peak memory, GB |" if whole else ""),
        "|---" * (1 + len(HEADS) + 3 * whole) + "|",
    ]
    for arm in [name for name in (*REFERENCES, *made) if name in metrics]:
        row, how = metrics[arm], made.get(arm, {})
        cells = [
            format_metric(row[name], kind) if shown else format_value(row[name]["value"], kind) for name, (kind, shown) in METRICS.items()
        ]
        cells.insert(4, f"{row['ppl_ratio']['value']:.4f}")
        if whole:
            cells += [f"{how['bits_per_weight']:.3f}", seconds(how), f"{how['peak_rss_bytes'] / 1e9:.2f}"] if how else ["—"] * 3
        lines.append(f"| {LABELS.get(arm, arm)} | {' | '.join(cells)} |")
    return [*lines, ""]


def len_scored(metrics: dict[str, Any]) -> int:
    return next(iter(metrics.values()))["kl_mean"]["n"]


def seconds(row: dict[str, Any]) -> str:
    mark = "~" if (row.get("others_share") or 0) > LOADED else ""
    return f"{mark}{row['seconds']:.1f}"


def refusals(case: dict[str, Any]) -> Lines:
    """Arms without figures, each with the reason that its tool gave."""
    rows = [(name, row) for name, row in case["arms"].items() if row["state"] != "made"]
    if not rows:
        return []
    words = {"refused": "refused", "failed": "did not run", "absent": "did not run", "not loaded": "written, not loaded"}
    lines = ["| arm without figures | | reason |", "|---" * 3 + "|"]
    return lines + [f"| {LABELS.get(name, name)} | {words[row['state']]} | {cell(row['reason'])} |" for name, row in rows] + [""]


def cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")[:400]


def ablation(arm: str, rows: dict[str, Any]) -> Lines:
    """Each step switched alone; the first row has all as usual."""
    whole = rows[""]
    lines = [
        f"Ablations of {LABELS[arm]}: one step switched at a time, on the first windows of the in-domain text. Made with one thread each, several at a time: their seconds compare here only.\n"
    ]
    lines += ["| without | KL [95 %] | ratio to the usual steps [95 %] | seconds | saved |", "|---" * 5 + "|"]
    for step, row in rows.items():
        named = f"(with) {step}" if step in UNUSUAL else step or "nothing"
        if row["state"] != "made":
            lines.append(f"| {named} | {row['state']}: {cell(row['reason'])} | — | — | — |")
            continue
        ratio, saved = (
            interval(row["ratio"], 3) if step and row["ratio"] else "—",
            f"{whole['seconds'] - row['seconds']:+.1f}" if step and "seconds" in whole else "—",
        )
        lines.append(f"| {named} | {format_metric(row['kl_mean'], 'kl')} | {ratio} | {row['seconds']:.1f} | {saved} |")
    return [*lines, ""]


def timing(found: dict[str, Any]) -> Lines:
    lines = [
        f"Time, {found['n']} rounds in turn, each a fresh process on {'' if busy(found) else 'an otherwise idle machine'}{'a machine that others used too' if busy(found) else ''}:\n"
    ]
    lines += ["| arm | seconds: median (min to max) | peak memory, GB | machine used by others, at most |", "|---" * 4 + "|"]
    for name in TIMED:
        if row := found["arms"].get(name):
            lines.append(
                f"| {LABELS[name]} | {row['median']:.1f} ({row['min']:.1f} to {row['max']:.1f}) | {row['peak_rss_bytes'] / 1e9:.2f} | {row['others_share']:.0%} |"
            )
    if ratio := found.get("ratio"):
        lines += ["", f"{LABELS[TIMED[0]]} / {LABELS['gptqmodel']}: {interval(ratio, 2)} (median and range of the rounds)."]
    return [*lines, ""]


def busy(found: dict[str, Any]) -> bool:
    return any(row["others_share"] > LOADED for row in found["arms"].values())
