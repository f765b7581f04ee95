"""What do the figures of bench_stats.py say, as a page? Made of the JSON alone."""

from __future__ import annotations

from typing import Any


def percent(x: float | None) -> str:
    return "—" if x is None else f"{100 * x:.1f}"


def table(heads: list[str], rows: list[list[str]]) -> str:
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cell(row: dict[str, Any] | None) -> str:
    """Coverage with the simulation's own uncertainty, and how often there was no interval."""
    if row is None or row["coverage"] is None:
        return "— (no interval)" if row else "—"
    none = f"; none in {percent(row['undefined'])}" if row["undefined"] > 0.001 else ""
    return f"{percent(row['coverage'])} ({percent(row['ci_low'])} to {percent(row['ci_high'])}{none})"


def means(rows: list[dict[str, Any]]) -> str:
    mean, tokens = ([r for r in rows if r["estimator"] == name] for name in ("cluster_mean", "tokens taken for independent"))
    by = {(r["values"], r["clusters"], r["sizes"]): r for r in tokens}
    lines = [[f"{r['values']}, ρ {r['rho']:g}", str(r["clusters"]), r["sizes"], cell(r), cell(by[r["values"], r["clusters"], r["sizes"]]) if r["rho"] == 0.3 else ""] for r in mean]
    return table(["values", "clusters", "sizes", "cluster_mean", "tokens taken for independent"], lines)


def by_clusters(rows: list[dict[str, Any]]) -> str:
    lines, columns = [], ["cluster_ratio", "retention", 0.5, 0.9, 0.99, 0.999]
    keyed = {(r["clusters"], r["sizes"], r.get("level", r["estimator"])): r for r in rows if r["estimator"] in ("cluster_ratio", "retention", "cluster_quantiles")}
    for groups, sizes in dict.fromkeys((key[0], key[1]) for key in keyed):
        lines.append([str(groups), sizes, *(cell(keyed.get((groups, sizes, column))) for column in columns)])
    return table(["clusters", "sizes", "cluster_ratio", "retention", "median", "p90", "p99", "p99.9"], lines)


def items(rows: list[dict[str, Any]]) -> str:
    names = {"paired_share": "difference of one task", "macro_share": "mean over 4 tasks, t interval", "macro_bootstrap": "mean over 4 tasks, bootstrap", "wilson": "accuracy, Wilson"}
    lines = []
    for r in rows:
        if r["estimator"] in names:
            what = f"right {100 * r['rate']:g} %" if "rate" in r else f"{100 * r['lost']:g} % lost, {100 * r['won']:g} % won" + (", twins" if r.get("twins") else "")
            lines.append([names[r["estimator"]], str(r.get("items", "200 to 2,000")), what, cell(r)])
    return table(["interval", "items", "truth", "coverage, %"], lines)


def gate(rows: list[dict[str, Any]]) -> str:
    lines = [[r["check"], f"{r['documents']} documents" if r["documents"] else "4 tasks, 6,300 items", f"{r['regression']}: {r['truth']}", *(percent(r[s]) for s in ("pass", "inconclusive", "fail"))] for r in rows]
    return table(["check", "size", "regression: true value", "pass, %", "inconclusive, %", "fail, %"], lines)


def markdown(found: dict[str, Any]) -> str:
    tests = table(["test", "truth", "aim", "significant, %"], [[r["test"], r["what"], r["aim"], f"{percent(r['rate'])} ({percent(r['ci_low'])} to {percent(r['ci_high'])})"] for r in found["tests"]])
    rows = found["coverage"]
    return f"""# Do the statistics hold?

`{found["command"]}` writes this file and the JSON beside it ({found["cpu_seconds"]:.0f} s of one core). Seeded; {rows[0]["rounds"]:,} simulated data sets per figure, {found["gate"][0]["rounds"]:,} for the gate.
In brackets: the simulation's own 95 % interval. "none in": share of data sets, in %, for which qmerge gives no interval, and says so; coverage is of the others.

## Coverage of 95 % intervals, in %

Tokens in clusters, correlation ρ inside a cluster. Equal: {found["sizes"]["equal"]}. Unequal: {found["sizes"]["unequal"]}. Skewed: log-normal, as KL is.

{means(rows)}

With few clusters of unequal size intervals are somewhat too wide rather than too narrow: their errors and degrees of freedom allow for the worst,
that whole documents move together. Strongly skewed values on few documents stay below 95 %: there the largest values are not in the sample.
The same holds for p99 of few documents, where there is an interval at all.

Ratios, retention (true value 0.90) and quantiles of skewed values, ρ = 0.3:

{by_clusters(rows)}

Benchmark items, paired. Twins: two items share a sentence and half of these pairs change together.

{items(rows)}

## Tests

{tests}

## The gate

`qmerge.quality.compare` with the default budget's limits (retention ≥ 0.90, macro accuracy ≥ −2 points) on synthetic token scores and answers. A candidate that is truly at the limit
may fail in 2.5 % of cases: a limit is held against the end of a two-sided 95 % interval.

{gate(found["gate"])}
"""
