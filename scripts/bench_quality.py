"""Does a merged and requantized model keep the fine-tune better than round-to-nearest and gptqmodel do, at the same bits?

Writes docs/measurements/quality.md and quality.json. Every arm of a case starts from the same NF4 base and adapter, the quantizers see
the same calibration windows, and all arms are loaded by their public loaders and measured in one arithmetic. Cases that need ../shared are
skipped where it is missing. Left out: text outside the adapter's domain, peak memory, other peers, distillation.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections import namedtuple
from collections.abc import Callable
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.utils import logging

from qmerge.device import pick_device
from qmerge.pipeline.plan import plan
from qmerge.pipeline.recipe import Recipe
from qmerge.pipeline.run import calibration_for, run
from qmerge.quality.arms import load_merged
from qmerge.quality.evaluate import check_overlap, evaluate_with_scores, load_tokenizer
from qmerge.quality.fingerprint import versions
from qmerge.report.numbers import format_metric, format_value
from qmerge.store.checkpoint import open_checkpoint
from qmerge.store.manifest import input_digests
from qmerge.store.texts import read_documents

ROOT = Path(__file__).resolve().parent.parent
SHARED, DEMO = ROOT.parent / "shared", ROOT / "examples" / "demo"
SOURCES = sorted(file for layer in ("numerics", "formats", "pipeline") for file in (ROOT / "qmerge" / layer).glob("*.py"))
SOLVER = hashlib.sha256(b"".join(file.read_bytes() for file in SOURCES)).hexdigest()
"""the code that decides a checkpoint's bytes, read now: the files may change while this process runs what it has loaded"""
WINDOW, SAMPLES, SEED, ROUNDS = 256, 128, 0, 2000
LABELS = {"rtn": "rtn (nearest NF4)", "gptqmodel": "gptqmodel defaults", "gptq": "qmerge gptq", "nf4": "qmerge nf4"}
OURS: dict[str, dict[str, Any]] = {"gptq": {"format": "gptq"}, "nf4": {"format": "nf4"}}
PEERS: dict[str, dict[str, Any]] = {"gptqmodel": {}}
MORE_OURS: dict[str, dict[str, Any]] = {"gptq-asym": {"symmetric": False}, "gptq-g32": {"group_size": 32}, "gptq-rtn": {"rtn": True}}
MORE_PEERS = {"gptqmodel-bf16": {"dtype": "bfloat16"}, "gptqmodel-asym": {"sym": False}, "gptqmodel-desc-act": {"desc_act": True}}
PROMISES = (("gptq", "gptqmodel", 0.7), ("nf4", "rtn", 0.01))  # KL of the first over KL of the second, at most
RETENTION = ("nf4", 0.96)  # at least
METRICS = {"kl_mean": ("kl", True), "kl_p99": ("kl", False), "ppl": ("ppl", False), "top1_agreement": ("percent", False)}
METRICS |= {"retention": ("percent", True)}
"""what the table shows: how it is written, and whether with its interval"""
Case = namedtuple("Case", "name base adapter calibration text")  # the texts are of the adapter's domain, and disjoint
MODELS, GSM8K = SHARED / "models", (SHARED / "data/gsm8k_train.jsonl", SHARED / "data/gsm8k_test.jsonl")
CASES = (
    Case("strong", MODELS / "bench-llama-12m-nf4", MODELS / "adapter-gsm8k", *GSM8K),
    Case("light", MODELS / "bench-llama-12m-nf4", MODELS / "adapter-gsm8k-light", *GSM8K),
    Case("demo", DEMO / "base-nf4", DEMO / "adapter", DEMO / "calibration.jsonl", DEMO / "eval-prose.jsonl"),
)


def main() -> None:
    """Make every checkpoint of every case, then measure: loading a gptq checkpoint patches this process, so no solving comes after it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", action="append", choices=[c.name for c in CASES], help="only this case; repeatable")
    parser.add_argument("--docs", type=int, default=400, help="measure on the first N documents of a text; 0: all (default 400)")
    parser.add_argument("--ablations", action="store_true", help="more settings of both sides")
    parser.add_argument("--out", type=Path, default=ROOT / "docs/measurements/quality.md")
    parser.add_argument("--work", type=Path, help="keep checkpoints here; reuse those of the same inputs, recipe and code")
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda or auto")
    parser.add_argument("--threads", type=int, help="torch's threads (default: torch's own choice)")
    parser.add_argument("--peer", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peer:
        return quantize_with_peer(**json.loads(args.peer))
    logging.disable_progress_bar()
    args.device = str(pick_device(args.device))
    torch.set_num_threads(args.threads or torch.get_num_threads())
    for case in CASES:
        if missing := [path.name for path in case[1:] if not path.exists()]:
            say(f"skipped: {case.name}: missing {', '.join(missing)}")
    cases = [case for case in CASES if all(path.exists() for path in case[1:]) and case.name in (args.case or [c.name for c in CASES])]
    if not cases:
        return
    with nullcontext(args.work) if args.work else tempfile.TemporaryDirectory() as folder:
        made = {case: make_all(case, Path(folder).resolve() / case.name, args) for case in cases}
        found = about(args) | {"cases": [measure(case, Path(folder).resolve() / case.name, made[case], args) for case in cases]}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.with_suffix(".json").write_text(json.dumps(found, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
    args.out.write_text(markdown(found), encoding="utf-8")
    say(f"wrote {args.out} and {args.out.with_suffix('.json').name}")


def say(text: str, began: float = time.perf_counter()) -> None:  # noqa: B008  the process's start
    print(f"{time.perf_counter() - began:7.1f} s  {text}", file=sys.stderr, flush=True)


def make_all(case: Case, work: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Every checkpoint of a case, made or found finished in ``work``: seconds and stored bits by arm, and what they were calibrated on."""
    work.mkdir(parents=True, exist_ok=True)
    common = {"base": str(case.base), "adapter": str(case.adapter), "calibration": str(case.calibration)}
    common |= {"samples": SAMPLES, "tokens": WINDOW, "seed": SEED, "device": args.device, "overwrite": True}
    ours, peers = OURS | (MORE_OURS if args.ablations else {}), PEERS | (MORE_PEERS if args.ablations else {})
    seconds, first = {}, None
    for arm, options in ours.items():
        seconds[arm], *found = make_ours(Recipe(**common, **options, out=str(work / arm)), work / arm)
        first = first or found
    job, calibration, inputs = first
    for arm, options in peers.items():
        seconds[arm] = make_peer(case, work / arm, torch.cat([calibration.train, calibration.held_out]), options, inputs, args.device)
    weights = int(sum(np.prod(job.base.shape(name)) for name in job.requantized))
    folders = {arm: work / arm for arm in seconds} | dict.fromkeys(("base", "rtn"), case.base)
    bits = {arm: stored_bits(folder, job.requantized, weights) for arm, folder in folders.items()}
    return {"seconds": seconds, "bits": bits, "calibration": calibration, "weights": weights}


def make_ours(recipe: Recipe, folder: Path) -> tuple[float, Any, Any, dict[str, Any]]:
    """(seconds, plan, calibration, what identifies inputs and windows) of one checkpoint of ours."""
    found = plan(recipe)
    calibration = calibration_for(found)
    inputs = {"base": input_digests(found.checkpoint), "adapter": input_digests(found.adapter), "threads": torch.get_num_threads()}
    inputs |= {"windows": calibration.facts["token_ids_sha256"] if calibration else None}
    key = {"recipe": recipe.to_json(), "code": SOLVER, "device": recipe.device} | inputs
    return once(folder, key, lambda: run(found, calibration=calibration).elapsed_s), found, calibration, inputs


def make_peer(case: Case, folder: Path, windows: torch.Tensor, options: dict[str, Any], inputs: dict[str, Any], device: str) -> float:
    """Seconds that gptqmodel took from loading the float model to a saved checkpoint, in a process of its own."""
    log, done, merged, ids = (folder.with_name(name) for name in (f"{folder.name}.log", f"{folder.name}.done", "merged", "windows.npy"))

    def call() -> float:
        shutil.rmtree(folder, ignore_errors=True)
        # The arm `merged` itself, in fp32; the loader's conversions (to NF4) must not be undone on the way to disk.
        load_merged(str(case.base), str(case.adapter)).model.save_pretrained(merged, save_original_format=False)
        load_tokenizer(str(case.base), str(case.adapter)).save_pretrained(merged)
        np.save(ids, windows.numpy())
        job = {"model": str(merged), "ids": str(ids), "out": str(folder), "done": str(done), "device": device, "options": options}
        env = os.environ | {"GPTQMODEL_CPU_WORKERS": "2", "OMP_NUM_THREADS": str(torch.get_num_threads())}
        command = [sys.executable, __file__, "--peer", json.dumps(job)]
        with open(log, "wb") as stream:
            code = subprocess.run(command, env=env, cwd=folder.parent, stdout=stream, stderr=stream).returncode
        if code != 0:
            raise SystemExit(f"gptqmodel failed with exit code {code}; the end of its log:\n{log.read_text(errors='replace')[-3000:]}")
        return float(done.read_text(encoding="utf-8"))

    return once(folder, {"gptqmodel": version("gptqmodel"), "options": options, "device": device} | inputs, call)


def quantize_with_peer(model: str, ids: str, out: str, done: str, device: str, options: dict[str, Any]) -> None:
    """The hidden mode: gptqmodel, 4 bits g128, its defaults but for ``options``. Fails unless every linear saw every token."""
    from gptqmodel import GPTQModel, QuantizeConfig

    windows = torch.from_numpy(np.load(ids))
    dtype = getattr(torch, options.pop("dtype", "float32"))
    began = time.perf_counter()
    loaded = GPTQModel.load(model, QuantizeConfig(bits=4, group_size=128, **options), device=device, dtype=dtype)
    log = loaded.quantize([{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in windows], batch_size=1)
    loaded.save(out)
    seconds = time.perf_counter() - began
    seen = {int(row["samples"]) for rows in log.values() for row in rows}
    if seen != {windows.numel()}:
        raise SystemExit(f"gptqmodel calibrated its linears on {sorted(seen)} tokens, not on the {windows.numel()} that it was given")
    Path(done).write_text(str(seconds), encoding="utf-8")


def once(folder: Path, key: dict[str, Any], work: Callable[[], float]) -> float:
    """The seconds that ``work`` takes to fill ``folder``, or took before for the same inputs, settings and code (``key``)."""
    record = folder.with_name(f"{folder.name}.made.json")
    found = json.loads(record.read_text(encoding="utf-8")) if record.is_file() and (folder / "config.json").is_file() else {}
    if found.get("key") == json.loads(json.dumps(key)):
        return found["seconds"]
    say(f"{folder.parent.name}: making {folder.name}")
    record.unlink(missing_ok=True)  # written last, so that it never stands beside half a checkpoint
    seconds = work()
    record.write_text(json.dumps({"seconds": seconds, "key": key}), encoding="utf-8")
    return seconds


def stored_bits(folder: Path, names: tuple[str, ...], weights: int) -> float:
    """Bits per weight of the linears ``names``: all tensors that a file holds for them but their biases."""
    modules, specs = tuple(name.removesuffix("weight") for name in names), open_checkpoint(folder).specs
    return 8 * sum(spec.nbytes for name, spec in specs.items() if name.startswith(modules) and not name.endswith(".bias")) / weights


def measure(case: Case, work: Path, made: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """Evaluate all arms in one call and put the table's numbers together."""
    lines = [line for line in case.text.read_text(encoding="utf-8").splitlines() if line.strip()]
    text, names = work / "eval.jsonl", {arm: str(work / arm) for arm in made["seconds"]}
    text.write_text("\n".join(lines[: args.docs or None]) + "\n", encoding="utf-8")
    results, scores = evaluate_with_scores(
        str(case.base), str(case.adapter), names, {"text": str(text)}, WINDOW, also=("rtn",), device=args.device,
        progress=lambda what, done, total: say(f"{case.name}: {what} measured") if done == total else None,
    )  # fmt: skip
    arms = {arm: {key: row["texts"]["text"]["metrics"][key] for key in METRICS} for arm, row in results["arms"].items()}
    for arm, row in arms.items():
        row |= {"bits_per_weight": made["bits"].get(arm), "seconds": made["seconds"].get(arm)}
    shared = len(check_overlap(made["calibration"].documents, read_documents(text), allow=True))
    read = {"file": case.text.name, "documents_in_file": len(lines), "shared_13_grams": shared}
    return {
        "case": case.name, "base": case.base.name, "adapter": case.adapter.name, "quantized_weights": made["weights"],
        "text": results["fingerprint"]["texts"]["text"] | read, "calibration": made["calibration"].facts,
        "arithmetic": results["fingerprint"]["arithmetic"], "noise_floor": results["noise_floor"]["text"],
        "elapsed_s": results["elapsed_s"], "arms": arms, "promises": promises(scores["text"], arms),
    }  # fmt: skip


def promises(scores: dict[str, Any], arms: dict[str, Any]) -> list[dict[str, Any]]:
    """What the project promises, each with its interval and, judged by the value, whether it is met."""
    rows = []
    for ours, peer, target in PROMISES:
        rows.append({"what": f"KL {LABELS[ours]} / {LABELS[peer]}", "sign": "≤", "target": target} | kl_ratio(scores[ours], scores[peer]))
    arm, target = RETENTION
    kept = {key: arms[arm]["retention"][key] for key in ("value", "ci_low", "ci_high")}
    rows.append({"what": f"retention {LABELS[arm]}", "sign": "≥", "target": target, "windows": rows[0]["windows"]} | kept)
    for row in rows:
        numbers = [row[key] for key in ("value", "ci_low", "ci_high")]
        good = [n is not None and (n <= row["target"] if row["sign"] == "≤" else n >= row["target"]) for n in numbers]
        word = "unknown" if numbers[0] is None else "met" if good[0] else "missed"
        row["state"] = word + ("" if word == "unknown" or len(set(good)) == 1 else " (the interval reaches over the target)")
    return rows


def kl_ratio(ours: Any, theirs: Any) -> dict[str, Any]:
    """Mean KL over mean KL, with a 95 % percentile interval from a seeded bootstrap over windows (paired: both arms saw the same ones)."""
    both = ours.finite & theirs.finite
    groups, index = np.unique(ours.clusters[both], return_inverse=True)
    top, bottom = (np.bincount(index, weights=arm.kl[both].astype(np.float64)) for arm in (ours, theirs))
    draws = np.random.default_rng(SEED).integers(0, len(groups), (ROUNDS, len(groups)))
    low, high = np.quantile(top[draws].sum(1) / bottom[draws].sum(1), [0.025, 0.975])
    return {"value": float(top.sum() / bottom.sum()), "ci_low": float(low), "ci_high": float(high), "windows": len(groups)}


def about(args: argparse.Namespace) -> dict[str, Any]:
    """How the figures were made: what a person types to make them again, versions, machine. No paths, host names or dates."""
    words = ["python", "scripts/bench_quality.py", *(f"--case={name}" for name in args.case or ()), f"--docs={args.docs}"]
    words += ["--ablations"] * args.ablations + [f"--device={args.device}"] + [f"--threads={args.threads}"] * bool(args.threads)
    cpu = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else "")
    machine = {"cpu": cpu[1] if cpu else platform.machine(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    if args.device != "cpu":
        machine["gpu"] = torch.cuda.get_device_name(args.device)
    return {"command": shlex.join(words), "versions": versions(), "solver_sha256": SOLVER, "machine": machine}


def markdown(found: dict[str, Any]) -> str:
    """The page: header, one section per case."""
    libraries, machine = (", ".join(f"{key} {value}" for key, value in found[part].items()) for part in ("versions", "machine"))
    notes = f"""# Quality at the same bits

`{found["command"]}` writes this file and the JSON beside it.

Versions: {libraries}; solver sources sha256 {found["solver_sha256"][:12]}. Machine: {machine}.

Reference of every figure: base + adapter kept separate. Intervals: 95 %, clustered by window; those of ratios by a seeded paired
bootstrap ({ROUNDS:,} draws). gptqmodel gets the arm `merged` as an fp32 checkpoint, computes in fp32, and sees the calibration windows that
qmerge sees (checked: every linear counted every token); its other options are its defaults at 4 bits, group size 128. `rtn` and `merged`
exist in memory only; the bits of `rtn` are those of the base, whose layout it has. Bits: all tensors of the quantized linears. Seconds:
from reading the model to the written checkpoint, without imports.

"""
    return notes + "\n".join(line for case in found["cases"] for line in section(case))


def section(case: dict[str, Any]) -> list[str]:
    """One case: what was measured on, the arms, the promises."""
    calibration, text, floor = (case[key] for key in ("calibration", "text", "noise_floor"))
    train, held = (calibration[key] for key in ("windows", "held_out_windows"))
    lines = [
        f"## {case['case']}: {case['base']} × {case['adapter']}\n",
        f"Text: first {text['documents']:,} of {text['documents_in_file']:,} documents of {text['file']}: n = {text['scored_tokens']:,}",
        f"scored tokens in {text['windows']:,} windows of {WINDOW}. Calibration: {train + held} windows of {WINDOW} tokens of",
        f"{calibration['in_domain']['source']} ({held} of them held out by qmerge, to choose with); the texts share",
        f"{text['shared_13_grams']} runs of 13 words. Arithmetic: {case['arithmetic']}. Quantized weights: {case['quantized_weights']:,}.",
        f"Noise floor ({floor['source']}): {format_metric(floor, 'kl')}.\n",
        "| arm | KL to separate [95 %] | KL p99 | perplexity | top-1 | retention [95 %] | bits per weight | seconds |",
        "|---" * 8 + "|",
    ]
    for arm, row in case["arms"].items():
        cells = [format_metric(row[m], k) if interval else format_value(row[m]["value"], k) for m, (k, interval) in METRICS.items()]
        cells += [format(row[key], pattern) if row[key] else "—" for key, pattern in (("bits_per_weight", ".3f"), ("seconds", ".1f"))]
        lines.append(f"| {LABELS.get(arm, arm)} | {' | '.join(cells)} |")
    lines += ["\n| promise | value [95 %] | target | n (windows) | |", "|---" * 5 + "|"]
    for row in case["promises"]:
        value, low, high = ("—" if row[key] is None else f"{row[key]:.4f}" for key in ("value", "ci_low", "ci_high"))
        lines.append(f"| {row['what']} | {value} ({low} to {high}) | {row['sign']} {row['target']} | {row['windows']} | {row['state']} |")
    return [*lines, "\n"]


if __name__ == "__main__":
    main()
