"""How long does an evaluation take, as a ratio to two plain forward passes of the same models over the same windows?

Both take turns in one process: (a) two calls of the model per batch as a user makes them, whole fp32 logits that nobody reads, at the batch size that is quickest here;
(b) ``measure`` of both arms and every number of the text's row. Writes JSON and a page. Left out: loading, tokenizing and writing, which are timed once and named.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench_speed import ROOT, in_turn, machine, ratio, say, table

SHARED = ROOT.parent / "shared"
DEMO = ROOT / "examples" / "demo"
LIMIT = 1.2
BATCHES = (256, 1024, 2048, 4096)
"""tokens of a plain forward pass, of which the quickest is taken"""

INTRODUCTION = """Ours: NLL of both arms, full-vocabulary KL, top-1 agreement, Δp, confidence per token, and every number of the text's row, from one call of `measure` and one of `text_row`.
Other: the same two models called once per batch, whole fp32 logits dropped unread, at the batch size that is quickest here. One thing after the other in one process, in an order
that turns round with every round; the interval is over rounds. The reference is base + adapter as PEFT runs it, the candidate the merged model, both in fp32. `32k` and `128k` are random
models with few layers, whose head is most of the work: the hardest case for whatever is done with logits.

Several candidates: the separate model runs once, its last hidden states are kept (up to 3 GiB) and its head is applied to them again for each candidate, one of which is loaded at a time."""


@dataclass(frozen=True)
class Case:
    """``shape``: a synthetic model (`synthetic_llama.Shape`) is made and removed; else ``base``, ``adapter`` and ``text`` are there. ``windows``: (windows, tokens of each)."""

    name: str
    windows: tuple[tuple[int, int], ...]
    base: Path | None = None
    adapter: Path | None = None
    text: Path | None = None
    several: int = 0
    """as many candidates against one reference, on half of the first windows"""
    shape: dict[str, int] | None = None


CASES = (
    Case("demo", ((32, 256),), DEMO / "base-nf4", DEMO / "adapter", DEMO / "eval-prose.jsonl"),
    Case("light", ((16, 256), (4, 1024)), SHARED / "models" / "bench-llama-12m-nf4", SHARED / "models" / "adapter-gsm8k-light", SHARED / "data" / "gsm8k_test.jsonl", several=3),
    Case("strong", ((8, 256),), SHARED / "models" / "bench-llama-12m-nf4", SHARED / "models" / "adapter-gsm8k", SHARED / "data" / "gsm8k_test.jsonl"),
    Case("32k", ((4, 256), (1, 2048)), shape={"layers": 4, "hidden": 512, "ffn": 1408, "heads": 8, "kv_heads": 4, "vocab": 32000}),
    Case("128k", ((2, 256), (1, 1024)), shape={"layers": 2, "hidden": 1024, "ffn": 2816, "heads": 16, "kv_heads": 4, "vocab": 128256}),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", action="append", choices=[case.name for case in CASES], help="only this one; repeatable")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--keep", action="store_true", help="add to the file that is there: cases can be measured one at a time")
    parser.add_argument("--out", type=Path, default=ROOT / ".bench" / "evaluation-speed.json", help="the page is written beside it")
    args = parser.parse_args()
    if args.rounds < 2:
        parser.error("--rounds must be at least 2: one round has no spread")
    words = ["python", "scripts/bench_eval.py", *(f"--case={name}" for name in args.case or ()), f"--rounds={args.rounds}"]
    words += [] if args.out.is_absolute() else [f"--out={args.out}"]
    found: dict[str, Any] = {"schema": "speed/1", "command": " ".join(words)} | machine() | {"rows": {}, "beside": {}}
    if args.keep and args.out.is_file():
        old = json.loads(args.out.read_text(encoding="utf-8"))
        if any(old[key] != found[key] for key in ("machine", "versions")):
            parser.error("--keep: the file was measured on another machine or with other versions")
        found = old | {"command": f"{old['command']} && {found['command']} --keep"}
    for case in CASES:
        if args.case and case.name not in args.case:
            continue
        try:
            rows, beside = run(case, args.rounds)
        except LookupError as lost:
            say(f"skipped: {case.name}: {lost.args[0]}")
            continue
        found["rows"] |= {row["name"]: row for row in rows}
        found["beside"][case.name] = beside
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(found, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
        args.out.with_suffix(".md").write_text(page(found), encoding="utf-8")
        say(f"{case.name} done")
    print(page(found))


def run(case: Case, rounds: int) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows of `bench_speed.ratio`, one per window length, and what was timed beside them. LookupError where the models are not there."""
    with opened(case) as (reference, candidate, cut, beside):
        rows = []
        for count, tokens in case.windows:
            row, more = compare(f"{case.name}/{tokens}", reference, candidate, cut(count, tokens), rounds)
            rows.append(row)
            beside[str(tokens)] = more
        if case.several:
            rows.append(several(case.name, reference, candidate, cut(case.windows[0][0] // 2, case.windows[0][1]), case.several, beside[str(case.windows[0][1])]["plain_batch_windows"], rounds))
        return rows, beside


def compare(name: str, reference: Any, candidate: Any, windows: Any, rounds: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """One row, and the seconds of its parts. The first call of either is not counted."""
    import torch

    from qmerge.device import PeakMemory
    from qmerge.quality.measure import measure
    from qmerge.quality.metrics import text_row

    def plain(size: int) -> None:
        plain_passes((reference, candidate), windows, size)

    parts: dict[str, list[float]] = {"measure": [], "statistics": []}

    def ours() -> None:
        began = time.perf_counter()
        scores = measure(reference, candidate, windows)
        middle = time.perf_counter()
        text_row(scores, scores)
        parts["measure"].append(middle - began), parts["statistics"].append(time.perf_counter() - middle)

    sizes = sorted({max(1, min(len(windows), batch // windows.tokens)) for batch in BATCHES})
    plain(sizes[0])
    tried = {size: seconds(lambda size=size: plain(size)) for size in sizes}
    best = min(tried, key=tried.__getitem__)
    memory, peaks = PeakMemory(torch.device("cpu")), {}
    ours()
    for arm, call in (("plain", lambda: plain(best)), ("ours", ours)):
        give_back()
        memory.reset()
        before = resident()
        call()
        peaks[arm] = memory.peak() - before
    for kept in parts.values():
        kept.clear()
    taken = in_turn(rounds, {"ours": ours, "plain": lambda: plain(best)})
    width = reference.get_output_embeddings().weight.shape[0]
    what = f"{name}: {len(windows)} windows of {windows.tokens}, vocabulary {width:,}"
    middle = {part: sorted(kept)[len(kept) // 2] for part, kept in parts.items()}
    return ratio(f"evaluate/{name}", what, taken["ours"], taken["plain"], LIMIT), {"plain_batch_windows": best, "plain_seconds_by_batch": tried, "median_s": middle, "peak_above_start_bytes": peaks}


def several(name: str, reference: Any, candidate: Any, windows: Any, count: int, size: int, rounds: int) -> dict[str, Any]:
    """One candidate in the place of ``count``: the reference runs once and keeps its states, its head is applied again for each. Plain: one pass of every model."""
    from qmerge.quality.measure import measure
    from qmerge.quality.reference import CACHE_BYTES, Answers

    def ours() -> None:
        answers = Answers(reference, CACHE_BYTES)
        for _ in range(count):
            measure(answers, candidate, windows)

    ours()
    taken = in_turn(rounds, {"ours": ours, "plain": lambda: plain_passes((reference, *[candidate] * count), windows, size)})
    return ratio(f"evaluate/{name}/{count} candidates", f"{name}: {count} candidates on {len(windows)} windows of {windows.tokens} / {count + 1} passes", taken["ours"], taken["plain"], LIMIT)


def plain_passes(models: tuple[Any, ...], windows: Any, size: int) -> None:
    """``size`` windows at a time through every model, whole fp32 logits each time."""
    import torch

    with torch.inference_mode():
        for model in models:
            for start in range(0, len(windows), size):
                model(input_ids=torch.stack(windows.ids[start : start + size]), use_cache=False)


@contextmanager
def opened(case: Case) -> Iterator[tuple[Any, Any, Callable[[int, int], Any], dict[str, Any]]]:
    """(separate, merged, a function that cuts windows, seconds of what came before)."""
    work = Path(tempfile.mkdtemp(prefix="bench-eval-"))
    try:
        base, adapter = case.base, case.adapter
        if case.shape:
            from synthetic_llama import Shape, write_adapter, write_base

            base, adapter, shape = work / "base", work / "adapter", Shape(**case.shape)
            write_base(base, shape), write_adapter(adapter, shape, "base")
        if not (base.is_dir() and adapter.is_dir()):
            raise LookupError(f"{base.name} or {adapter.name} is not there")
        from qmerge.quality import arms as loading
        from qmerge.quality.attach import as_set

        began = time.perf_counter()
        reference = loading.load_separate(str(base), as_set(str(adapter))).model
        candidate = loading.load_merged(str(base), as_set(str(adapter))).model
        beside: dict[str, Any] = {"load_both_s": time.perf_counter() - began}
        began = time.perf_counter()
        stream = tokens_of(case, reference)
        beside["tokenize_s"] = time.perf_counter() - began
        beside["tokens"] = len(stream.ids)
        yield reference, candidate, lambda count, tokens: first_windows(stream, count, tokens), beside
    finally:
        shutil.rmtree(work)


def tokens_of(case: Case, model: Any) -> Any:
    """The text as one stream; random tokens for a model that has no tokenizer."""
    import torch

    from qmerge.quality.evaluate import load_tokenizer
    from qmerge.store.texts import read_documents
    from qmerge.store.windows import TokenDoc, tokenize_documents

    if case.text is None:
        ids = torch.randint(3, model.get_output_embeddings().weight.shape[0], (4096,), generator=torch.Generator().manual_seed(0))
        return TokenDoc(ids, torch.ones(len(ids), dtype=torch.bool))
    tokenizer = load_tokenizer(str(case.base))
    docs = tokenize_documents(read_documents(str(case.text), None, tokenizer), tokenizer)
    return TokenDoc(torch.cat([doc.ids for doc in docs]), torch.cat([doc.scored for doc in docs]))


def first_windows(stream: Any, count: int, tokens: int) -> Any:
    """The first ``count`` windows; each counts as a document of its own, so that intervals have clusters."""
    from qmerge.store.windows import TokenDoc, pack_windows

    if len(stream.ids) < count * tokens:
        raise LookupError(f"the text has {len(stream.ids)} tokens, {count * tokens} are needed")
    cuts = [slice(start * tokens, (start + 1) * tokens) for start in range(count)]
    return pack_windows([TokenDoc(stream.ids[cut], stream.scored[cut]) for cut in cuts], tokens)


def seconds(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def give_back() -> None:
    """What was freed goes back to the system, where the C library can do that: else a peak would hide in it."""
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def page(found: dict[str, Any]) -> str:
    """The Markdown beside the JSON."""
    versions, place = ", ".join(f"{name} {number}" for name, number in found["versions"].items()), found["machine"]
    lines = ["# How long an evaluation takes", "", f"`{found['command']}` writes this file and the JSON beside it.", "", INTRODUCTION, "",
             f"Versions: {versions}. Machine: {place['cpu']}, {place['cores']} cores, {place['threads']} threads.", "", "```", table(found), "```", "",
             "Beside the ratio, once each: what comes before and after, and the highest resident memory above the start of a call (weights are there already).", "", "```"]  # fmt: skip
    rows = [("case", "load both", "tokenize", "statistics", "peak: plain", "peak: ours", "plain batch")]
    for name, beside in found["beside"].items():
        for tokens, more in ((key, value) for key, value in beside.items() if isinstance(value, dict)):
            peaks = more["peak_above_start_bytes"]
            rows.append((f"{name}/{tokens}", f"{beside['load_both_s']:.2f} s", f"{beside['tokenize_s']:.2f} s ({beside['tokens']:,})", f"{more['median_s']['statistics'] * 1000:.1f} ms",
                         f"{peaks['plain'] / 2**20:.0f} MiB", f"{peaks['ours'] / 2**20:.0f} MiB", f"{more['plain_batch_windows'] * int(tokens)} tokens"))  # fmt: skip
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines += ["  ".join(cell.ljust(width) if not index else cell.rjust(width) for index, (cell, width) in enumerate(zip(row, widths, strict=True))) for row in rows]
    return "\n".join([*lines, "```", ""])


if __name__ == "__main__":
    sys.exit(main())
