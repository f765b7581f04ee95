"""Does a merged and requantized model keep the fine-tune better than the peers' do, at the same bits?

Writes docs/measurements/quality.md and quality.json. Every arm of a case starts from the same NF4 base and adapter, every quantizer sees the same calibration windows, and
every checkpoint is loaded from disk by its public loader and measured in one arithmetic, against base + adapter kept separate. Cases that need ../shared say so where it is
missing. The parts: bench_quality_cases (what), _arms (which ways), _make, _ours, _peers (making), _measure, _promises, _page.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shlex
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from bench_quality_arms import ABLATED, ABLATED_CASES, OURS, PEERS, TIMED, TIMED_CASES, arms_of, without
from bench_quality_cases import CACHE, IN_DOMAIN, ROOT, SHARED, WINDOW, Case, all_cases, facts, ready
from bench_quality_make import Maker, code_digest
from bench_quality_measure import Measurer, Read, first, read_texts, rows
from bench_quality_ours import steps
from bench_quality_page import markdown
from bench_quality_promises import kl_ratio, promises
from transformers.utils import logging

from qmerge.device import pick_device
from qmerge.quality.fingerprint import versions
from qmerge.quality.metrics import json_metric, text_metrics

ABLATION_WINDOWS = 150
PAGE = ROOT / "docs/measurements/quality.md"
QUICK = ("ours-gptq-int4", "ours-nf4", "gptqmodel")
"""the start of the names that --quick makes"""


def main() -> None:
    args = arguments()
    data = args.out.with_suffix(".json")
    if args.page_only:
        args.out.write_text(markdown(json.loads(data.read_text(encoding="utf-8"))), encoding="utf-8")
        return say(f"wrote {args.out}")
    logging.disable_progress_bar()
    torch.set_num_threads(args.threads)
    cases = [case for case in all_cases(args.shared, CACHE) if args.case is None or case.name in args.case]
    cases = [found for case in cases if (found := ready(case, say, args.shared))]
    if not cases:
        return None
    found = about(args) | bench(cases, args)
    if found["solver_sha256"] != code_digest():
        found["warning"] = "the solver's sources changed while this ran: arms may come from different code"
    args.out.parent.mkdir(parents=True, exist_ok=True)
    data.write_text(json.dumps(found, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
    args.out.write_text(markdown(found), encoding="utf-8")
    say(f"wrote {args.out} and {data.name}")
    failed = [
        f"{case['case']}: {name}: {row['reason']}"
        for case in found["cases"]
        for name, row in case["arms"].items()
        if name.startswith("ours") and row["state"] == "failed"
    ]
    if failed:
        raise SystemExit("arms of ours failed, which is a bug:\n" + "\n".join(failed))


def arguments() -> argparse.Namespace:
    names = [case.name for case in all_cases()]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", action="append", choices=names, help="only this case; repeatable")
    parser.add_argument("--arm", action="append", help="only arms whose name starts so, or is so where it ends in $ (references always); repeatable")
    parser.add_argument("--docs", type=int, default=400, help="measure so many in-domain documents; 0: all (default 400)")
    parser.add_argument(
        "--skip-docs",
        type=int,
        help="leave out the first N in-domain documents (default 400 of gsm8k_test, whose first were looked at while tuning)",
    )
    parser.add_argument("--timing", type=int, help="repeats of the timing section; 0: none (default 2; with --arm or --make-only 0)")
    parser.add_argument("--no-ablations", action="store_true")
    parser.add_argument("--quick", action="store_true", help="a few arms, 8 windows per text, no ablations, no timing: does it run?")
    parser.add_argument("--make-only", action="store_true", help="make the checkpoints and stop")
    parser.add_argument("--page-only", action="store_true", help="write the page again from its JSON")
    parser.add_argument("--retry", action="store_true", help="make again what a tool refused or failed at before")
    parser.add_argument(
        "--out", type=Path, help="the page; the JSON goes beside it (default: docs/measurements/quality.md; .bench/quality.md for a part)"
    )
    parser.add_argument(
        "--work", type=Path, default=CACHE / "work", help="checkpoints stay here, and are used again for the same inputs, settings and code"
    )
    parser.add_argument("--shared", type=Path, default=SHARED, help="the folder with data/ and models/")
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda or auto")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of every process (default: torch's own choice)")
    args = parser.parse_args()
    if args.timing is None:
        args.timing = 0 if args.arm or args.quick or args.make_only else 2
    if args.quick:
        args.no_ablations, args.arm = True, args.arm or list(QUICK)
    whole = not (args.case or args.arm or args.quick or args.no_ablations or args.make_only) and args.timing > 0
    args.out = args.out or (PAGE if whole or args.page_only else CACHE / PAGE.name)
    args.device, args.work = str(pick_device(args.device)), args.work.resolve()
    return args


def say(text: str, began: float = time.perf_counter()) -> None:  # noqa: B008  the process's start
    print(f"{time.perf_counter() - began:7.1f} s  {text}", file=sys.stderr, flush=True)


def bench(cases: list[Case], args: argparse.Namespace) -> dict[str, Any]:
    """Time first, while the machine does nothing else; then make, then measure."""
    with Maker(args.work, CACHE, args.threads, args.device, args.retry, say) as maker:
        for case in cases:
            maker.prepare(case)
        times = {case.name: timing(case, maker, args.timing) for case in cases if case.name in TIMED_CASES and args.timing}
        made = {case.name: {arm.name: maker.make(case, arm) for arm in arms_of(case.name, args.arm)} for case in cases}
        off = {case.name: ablations(case, maker, args.arm) for case in cases if case.name in ABLATED_CASES and not args.no_ablations}
        if args.make_only:
            raise SystemExit(0)
        return {"cases": [measured(case, maker, made[case.name], off.get(case.name, {}), times.get(case.name), args) for case in cases]}


def timing(case: Case, maker: Maker, repeats: int) -> dict[str, Any]:
    """The same arms again and again in turn, each in a fresh process; the order turns round. ``ratio``: ours over gptqmodel's, median of the rounds, with their range."""
    known, rounds = {arm.name: arm for arm in (*OURS, *PEERS)}, []
    for number in range(repeats):
        order = TIMED if number % 2 == 0 else TIMED[::-1]
        rounds.append({name: maker.make(case, known[name], again=True) for name in order})
        say(f"{case.name}: timed " + ", ".join(f"{name} {one.get('seconds', float('nan')):.1f} s" for name, one in rounds[-1].items()))
    found: dict[str, Any] = {"n": repeats, "arms": {}}
    for name in TIMED:
        made = [one[name] for one in rounds if one[name]["state"] == "made"]
        if made:
            found["arms"][name] = spread([one["seconds"] for one in made]) | {
                "others_share": max(one["others_share"] or 0.0 for one in made),
                "peak_rss_bytes": max(one["peak_rss_bytes"] for one in made),
            }
    ratios = [
        one[TIMED[0]]["seconds"] / one["gptqmodel"]["seconds"]
        for one in rounds
        if one[TIMED[0]]["state"] == one["gptqmodel"]["state"] == "made"
    ]
    if ratios:
        found["ratio"] = {"value": median(ratios), "ci_low": min(ratios), "ci_high": max(ratios), "n": len(ratios)}
    return found


def spread(values: list[float]) -> dict[str, float]:
    return {"median": median(values), "min": min(values), "max": max(values)}


def ablations(case: Case, maker: Maker, wanted: list[str] | None) -> dict[str, dict[str, dict[str, Any]]]:
    """Arm -> step that is off ("": none) -> how it was made. One row per switch that the solver has; of the arms that were asked for."""
    names = [name for name in ABLATED if wanted is None or name.startswith(tuple(wanted))]
    found = {}
    for name in names:
        switches = ["", *(ABLATED[name] or steps())]
        found[name] = dict(zip(switches, maker.side_by_side(case, [without(name, step or None) for step in switches]), strict=True))
    return found


def measured(
    case: Case, maker: Maker, made: dict[str, Any], off: dict[str, Any], times: dict[str, Any] | None, args: argparse.Namespace
) -> dict[str, Any]:
    """Everything about one case, as JSON."""
    prepared, folder = maker.prepared[case.name], maker.work / case.name
    texts = read_texts(case, folder, args.skip_docs, args.docs, args.quick)
    measurer = Measurer(case, prepared, folder, args.device, maker.say)
    scores, served = measurer.in_memory(texts)
    for name, one in made.items():
        if one["state"] != "made":
            continue
        found, problem = measurer.from_disk(name, one["folder"], one["key"], texts)
        if problem:
            made[name] = one | {"state": "not loaded", "reason": problem}
        for text, row in found.items():
            scores[text][name] = row
    tables = {text: rows(arms) for text, arms in scores.items()}
    return {
        "case": case.name, "note": case.note, "base": case.base.name, "adapter": case.adapter.name, "training": facts(case),
        "weights": prepared["weights"], "calibration": prepared["calibration"], "texts": {name: read.facts for name, read in texts.items()},
        "served": served, "arms": {name: public(one) for name, one in made.items()}, "metrics": tables, "timing": times,
        "promises": promises(case.name, scores, made, times), "ablations": ablated(measurer, texts[IN_DOMAIN], off),
    }  # fmt: skip


def public(made: dict[str, Any]) -> dict[str, Any]:
    """How an arm was made, without folders and keys."""
    return {name: value for name, value in made.items() if name not in ("folder", "key")}


def ablated(measurer: Measurer, read: Read, off: dict[str, Any]) -> dict[str, Any]:
    """Arm -> step -> KL without the step, its ratio to all steps (paired), and seconds. On the first windows of the in-domain text."""
    short = {IN_DOMAIN: Read(first(read.windows, ABLATION_WINDOWS), read.facts)}
    found: dict[str, Any] = {}
    for name, rest in off.items():
        whole, found[name] = None, {}
        for step, one in rest.items():
            row = {key: value for key, value in public(one).items() if key != "recipe"}
            if one["state"] == "made":
                part, problem = measurer.from_disk(without(name, step or None).name, one["folder"], one["key"], short)
                if problem:
                    row |= {"state": "not loaded", "reason": problem}
                else:
                    whole = part[IN_DOMAIN] if step == "" else whole
                    row |= {
                        "kl_mean": json_metric(text_metrics(part[IN_DOMAIN])["kl_mean"]),
                        "ratio": kl_ratio(part[IN_DOMAIN], whole) if whole is not None else None,
                    }
            found[name][step] = row
    return found


def about(args: argparse.Namespace) -> dict[str, Any]:
    """How the figures were made: what a person types to make them again, versions, machine. No paths, host names or dates."""
    words = [
        "python",
        "scripts/bench_quality.py",
        *(f"--case={name}" for name in args.case or ()),
        *(f"--arm={name}" for name in args.arm or ()),
        f"--docs={args.docs}",
    ]
    words += (
        [f"--timing={args.timing}", f"--threads={args.threads}", f"--device={args.device}"]
        + ["--no-ablations"] * args.no_ablations
        + ["--quick"] * args.quick
    )
    cpu = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else "")
    machine = {"cpu": cpu[1] if cpu else platform.machine(), "cores": os.cpu_count(), "threads": args.threads}
    if args.device != "cpu":
        machine["gpu"] = torch.cuda.get_device_name(args.device)
    arithmetic = "fp32 on the CPU" if args.device == "cpu" else f"fp16 on {torch.device(args.device).type}"
    return {
        "command": shlex.join(words),
        "versions": versions(),
        "solver_sha256": code_digest(),
        "machine": machine,
        "window": WINDOW,
        "arithmetic": arithmetic,
    }


if __name__ == "__main__":
    main()
