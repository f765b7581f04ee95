"""What did the merge cost, against keeping the adapter separate? Runs all arms over all texts and returns results.json's content.

Two models are alive at a time: the reference and one other arm (`qmerge.quality.running`). Left out: the folder that results go to and their rendering (``cli``, ``report``).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from qmerge.adapters.adapter import Adapter
from qmerge.adapters.choices import AdapterSet
from qmerge.device import exact_products
from qmerge.errors import Refused, UsageProblem
from qmerge.formats.training import recipe_from_adapter
from qmerge.quality import arms as loading
from qmerge.quality.asked import Request, check_request, parse_requests
from qmerge.quality.attach import as_set, check_separate
from qmerge.quality.compare import compare, load_budget
from qmerge.quality.fingerprint import protocol, text_protocol
from qmerge.quality.generation import Generations, check_room, choose_prompts, end_tokens
from qmerge.quality.loaders import quantization_method
from qmerge.quality.merging import edited_weights
from qmerge.quality.paired import task_rows
from qmerge.quality.perplexity import Perplexities
from qmerge.quality.plain import place
from qmerge.quality.protocols import context_length, plan, read_request
from qmerge.quality.running import Progress, Run, Work
from qmerge.quality.samples import name_samples
from qmerge.quality.sidecar import Scores
from qmerge.quality.suites import Suite, load_suite
from qmerge.quality.tasks import Answers as ItemAnswers
from qmerge.quality.tasks import items_digest, open_tasks
from qmerge.quality.tokenizers import check_tokenizers
from qmerge.ranks import ALONE, Ranks
from qmerge.store.foreign import check_tokenizer_folder
from qmerge.store.overlap import Overlap, ngram_overlap, overlapping
from qmerge.store.texts import Document, read_documents
from qmerge.store.windows import TokenDoc, Windows, pack_windows, tokenize_documents

SCHEMA_VERSION = 1


def evaluate(base: str, adapter: str | AdapterSet, candidates: dict[str, str], texts: dict[str, str], tokens: int, **options: Any) -> dict[str, Any]:
    """results.json's content; `evaluate_in_full` takes the same arguments, and also gives the per-token arrays and the answers."""
    return evaluate_in_full(base, adapter, candidates, texts, tokens, **options).results


@dataclass(frozen=True)
class Evaluation:
    """``results`` is results.json's content, ``scores`` the per-token arrays, ``answers`` the benchmark items: arm -> task -> items."""

    results: dict[str, Any]
    scores: Scores
    answers: dict[str, ItemAnswers]


@exact_products()
def evaluate_in_full(
    base: str,
    adapter: str | AdapterSet,
    candidates: dict[str, str],
    texts: dict[str, str],
    tokens: int,
    *,
    on: str = "dequantized",
    nf4_recipe: dict[str, Any] | None = None,
    original: str | None = None,
    also: Sequence[str] = (),
    template: str | None = None,
    doc_separator: str | None = None,
    keep_tail: bool = False,
    device: str = "cpu",
    suite: str | Suite | None = None,
    perplexity: Sequence[str] = (),
    generate: int = 0,
    new_tokens: int = 64,
    budget: dict[str, Any] | None = None,
    results_dir: str | Path | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    agree: Callable[[dict[str, Any]], None] | None = None,
    ranks: Ranks = ALONE,
) -> Evaluation:
    """Measure every arm. ``candidates``: name -> checkpoint folder; ``texts``: name -> file, folder or hub dataset; ``tokens`` per window.

    ``on``: what the merge starts from (``dequantized`` or ``original``); ``nf4_recipe`` (``block_size``, ``double_quant``) for a float base;
    ``also``: ``rtn`` and ``original`` (which needs the ``original`` folder); ``perplexity``: requests as ``protocols`` spells them;
    ``generate``: prompts per text that are continued greedily by ``new_tokens``. Paths in the results are relative to ``results_dir``, or folder names.
    ``ranks`` share the batches; the first gives what one alone would, the others nothing. ``agree`` hears the fingerprint before anything is measured, and may raise.
    """
    started = time.perf_counter()
    check_request(candidates, texts, also, original)
    tasks = open_tasks(suite if isinstance(suite, Suite) else load_suite(suite)) if suite else None
    limits = budget or load_budget("default")
    requests = {label: (request, read_request(request)) for label, request in parse_requests(perplexity).items()}
    adapter = as_set(adapter)
    opened = check_separate(adapter)
    for path in (base, *candidates.values(), *((original,) if original else ())):
        loading.check_method(path)
    how: dict[str, Any] = {"on": on, "nf4_recipe": recipe_of(base, opened, on, nf4_recipe)}
    tokenizer = load_tokenizer(base, *(str(one.path) for one in opened))
    windows, prints, token_docs = _read_texts(texts, tokenizer, tokens, template, doc_separator, keep_tail)
    notes = check_tokenizers(candidates, tokenizer, texts, template=template, doc_separator=doc_separator)
    reference = loading.load_separate(base, adapter, **how)
    _check_length(reference.model, tokens)
    extras = _extras(reference.model, tokenizer, requests, windows, token_docs, generate, new_tokens)
    edits = reference.edits or {}
    foundation = edited_weights(reference.model if original is None or on != "original" else loading.load_base(original, on="original").model, edits)
    place(reference.model, device)
    elsewhere = on == "original" and quantization_method(base) != "none"
    options = {"merged_into": "another base" if elsewhere else "the reference's base", "window_tokens": tokens, "keep_tail": keep_tail, "template": template, "doc_separator": doc_separator, "seed": seed, **how}
    fingerprint = protocol(reference.model, tokenizer, device, options) | {"texts": prints, "suite": tasks.suite.content if tasks else None}
    fingerprint |= {extra.name: extra.fingerprint for extra in extras}
    if agree:
        agree(fingerprint)

    run = Run(reference, Work(windows, device, tokenizer, tasks, extras, foundation, edits), results_dir, progress, ranks)
    run.add_reference()
    for name, load, linears in _loaders(base, adapter, candidates, also, original, how):
        run.add(name, load, linears)
    run.noise_floor(base, adapter, how)
    if not run.gather():
        return Evaluation({}, {}, {})
    results = _results(run, fingerprint, notes, tasks is not None, seed)
    results["verdict"] = compare(results, limits)
    results["elapsed_s"] = round(time.perf_counter() - started, 3)
    return Evaluation(results, run.scores, run.samples)


def _extras(model: Any, tokenizer: Any, requests: dict[str, tuple[Request, list[str]]], windows: dict[str, Windows], token_docs: dict[str, list[TokenDoc]], generate: int, new_tokens: int) -> list[Any]:
    """What is measured of each arm beside its windows: perplexities by protocol, and greedy continuations."""
    context = context_length(model.config, tokenizer)
    extras: list[Any] = [Perplexities({label: plan(request, documents, tokenizer, context) for label, (request, documents) in requests.items()})] if requests else []
    if generate:
        prompts = {text: choose_prompts(token_docs[text], windows[text], generate, check_room(new_tokens, context)) for text in windows}
        extras.append(Generations(prompts, new_tokens, end_tokens(model, tokenizer)))
    return extras


def _results(run: Run, fingerprint: dict[str, Any], notes: dict[str, str], benchmarked: bool, seed: int) -> dict[str, Any]:
    """results.json without its verdict; of benchmarks, the fingerprint learns which items were answered."""
    results: dict[str, Any] = {"schema_version": SCHEMA_VERSION, "fingerprint": fingerprint, "arms": run.rows(), "noise_floor": run.floor()}
    for name, note in notes.items():
        results["arms"][name]["tokenizer_note"] = note
    results["tasks"] = task_rows(run.samples, results["arms"], seed=seed) if benchmarked else {}
    if benchmarked:
        name_samples(run.samples, results["arms"])
        fingerprint["suite"] |= {"items_sha256": items_digest(run.samples["separate"])}
    return results


def recipe_of(base: str, adapters: Iterable[Adapter], on: str, given: dict[str, Any] | None) -> dict[str, Any] | None:
    """How a float base was quantized while the adapter was trained: as ``given``, else as the adapters' folders say. Refused where nothing says it, as in a merge."""
    if given is not None or on == "original" or quantization_method(base) != "none":
        return given
    told = {found for one in adapters if (found := recipe_from_adapter(one.config, one.path)) is not None}
    if len(told) != 1:
        raise Refused("the base is a float checkpoint, and how it was used while the adapter was trained must not be guessed", where=Path(base).name, expected="--nf4-recipe or --on original",
                      found="neither" if not told else f"{len(told)} adapters that contradict each other",
                      fix="--nf4-recipe double|single|FILE if it was loaded with load_in_4bit while training (QLoRA); --on original if it was trained on in float")
    return told.pop().to_json()


def load_tokenizer(base: str, *adapters: str) -> Any:
    """The first tokenizer that an adapter's folder has (training may have added tokens or a chat template), else the base's."""
    source = next((folder for folder in adapters if (Path(folder) / "tokenizer_config.json").is_file()), base)
    check_tokenizer_folder(source)
    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError) as error:
        where = Path(source).name
        raise Refused("the tokenizer cannot be loaded", where=where, expected="a tokenizer beside the model", found=str(error).splitlines()[0], fix="copy tokenizer.json and tokenizer_config.json of the original model into the folder of the base") from error


def check_overlap(calibration: Sequence[Document], text: Sequence[Document], *, allow: bool = False, n: int = 13) -> list[Overlap]:
    """13-grams that calibration and evaluation share. ``Refused`` where there are any, unless ``allow``: a model calibrated on its test looks better than it is."""
    found = ngram_overlap([d.text for d in calibration], [d.text for d in text], n)
    if found and not allow:
        docs = len(overlapping([d.text for d in calibration], [d.text for d in text], n))
        raise Refused(
            "calibration and evaluation text overlap", expected=f"no shared run of {n} words",
            found=f"{len(found)} in {docs} of {len(text)} evaluation documents, the first: {found[0].ngram!r}",
            fix="take those documents out of one of the two, or use other text; --allow-overlap where it is a template, or a few by chance",
        )
    return found


def _loaders(base: str, adapter: str | AdapterSet, candidates: dict[str, str], also: Sequence[str], original: str | None, how: dict[str, Any]) -> list[tuple[str, Callable[[], loading.Arm], bool]]:
    """Every arm but the reference: its name, a function that loads it, and whether its linears are set against ΔW."""
    extra = {"rtn": partial(loading.load_rtn, base, adapter, original=original, **how), "original": partial(loading.load_original, str(original), adapter)}
    fixed: list[tuple[str, Callable[[], loading.Arm], bool]] = [("base", partial(loading.load_base, base, **how), False), ("merged", partial(loading.load_merged, base, adapter, original=original, **how), False)]
    return fixed + [(name, extra[name], True) for name in also] + [(name, partial(loading.load_candidate, name, path), True) for name, path in candidates.items()]


def _read_texts(
    texts: dict[str, str], tokenizer: Any, tokens: int, template: str | None, separator: str | None, keep_tail: bool
) -> tuple[dict[str, Windows], dict[str, Any], dict[str, list[TokenDoc]]]:
    windows, prints, tokenized = {}, {}, {}
    for name, path in texts.items():
        docs = read_documents(path, template, tokenizer, doc_separator=separator)
        tokenized[name] = tokenize_documents(docs, tokenizer)
        windows[name] = pack_windows(tokenized[name], tokens, keep_tail)
        prints[name] = text_protocol(docs, tokenized[name], windows[name], tokenizer)
        if not prints[name]["scored_tokens"]:
            raise Refused("the text leaves nothing to score", where=name, expected="at least one scored token after the first of a window", found="none", fix="give more text, or longer windows: --tokens")
    return windows, prints, tokenized


def _check_length(model: torch.nn.Module, tokens: int) -> None:
    longest = getattr(model.config, "max_position_embeddings", None)
    if longest is not None and tokens > longest:
        raise UsageProblem("the windows are longer than the model's context", expected=f"--tokens up to {longest}", found=tokens)
