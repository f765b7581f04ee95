"""How are candidates measured against base + separate adapter, and where do the numbers go? `qmerge eval`, `qmerge run` and `qmerge.evaluate` all go this way."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qmerge.api.merging import Adapters, Hear, Place, adapter_words
from qmerge.api.targets import check_results_file
from qmerge.api.values import EvalResult, MergeResult, eval_result
from qmerge.errors import UsageProblem
from qmerge.ranks import ALONE, Ranks

if TYPE_CHECKING:
    from qmerge.adapters.choices import AdapterSet
    from qmerge.quality.evaluate import Evaluation

Candidate = Place | MergeResult
Candidates = Candidate | Sequence[Candidate] | Mapping[str, Candidate]
"""checkpoints, under the names of their folders or the names given"""
Texts = Place | Sequence[Place] | Mapping[str, Place]
"""files, folders or hub data sets, under the names of the files or the names given; the adapter's own domain first"""


def evaluate(
    base: Place, adapter: Adapters, candidates: Candidates, texts: Texts, *, out: Place | None = None, tokens: int = 256, template: str | None = None, also: str | Sequence[str] = (),
    original: Place | None = None, on: str = "dequantized", nf4_recipe: Place | None = None, suite: Place | None = None, tasks: str | Sequence[str] = (), allow_task_code: bool = False,
    perplexity: str | Sequence[str] = (), generate: int = 0, new_tokens: int = 64, budget: Place | Mapping[str, Any] = "default", device: str = "auto", combine: str = "sum",
    density: float | None = None, combine_rank: int | None = None, seed: int = 0, residual_base: bool = False, allow_pickle: bool = False, progress: Hear | None = None,
) -> EvalResult:  # fmt: skip
    """Measure what ``candidates`` lost against base + separate adapter on ``texts``. The same numbers as ``qmerge eval``.

    ``candidates``: checkpoints (or what `merge` gave); ``texts``: held-out text. ``tokens`` per window. ``out``: the results.json to write, with the per-token .npz beside it; None: nothing is written.
    ``also``: more arms, ``"original"`` (merged into the float base ``original``) and ``"rtn"``. ``on``, ``nf4_recipe``, ``combine``, ``density``, ``combine_rank``, ``seed``, ``residual_base``,
    ``allow_pickle``: as in the merge. ``suite``, ``tasks``: benchmarks through lm-eval. ``perplexity``: requests as ``--perplexity`` spells them; ``generate``: prompts per text to continue greedily
    by ``new_tokens``. ``budget``: as in `compare`. ``progress`` hears a line as work goes on: ``print``.

    Raises `UsageProblem` for what cannot be asked, `Refused` for inputs that cannot be measured.
    """
    from qmerge.adapters.choices import AdapterSet, Combination, parse_choice
    from qmerge.quality.compare import budget_of, exit_code

    chosen = AdapterSet(tuple(parse_choice(word) for word in adapter_words(adapter)), Combination(combine, density, combine_rank, seed), residual_base, allow_pickle)
    hear = progress or (lambda _: None)
    done = measure(
        None if out is None else Path(out), _candidates(candidates), _texts(texts), base=str(base), adapter=chosen, tokens=tokens, template=template, also=_several(also), original=_word(original), on=on,
        nf4_recipe=_word(nf4_recipe), suite=_word(suite), tasks=",".join(_several(tasks)) or None, allow_task_code=allow_task_code, limits=budget_of(budget), device=device,
        count=lambda label, count, total: hear(f"{label} {count}/{total}"), perplexity=_several(perplexity), generate=generate, new_tokens=new_tokens,
    )  # fmt: skip
    return eval_result(done.results, exit_code(done.results["verdict"]), None if out is None else Path(out), done.scores, tuple(notes(done.results)))


def load_results(path: Place) -> EvalResult:
    """Results that were written before: results.json at ``path``, and the per-token arrays beside it where they are there. Raises `UsageProblem` and `Refused` where it is no such file, or not whole."""
    from qmerge.quality.compare import exit_code
    from qmerge.quality.sidecar import read_scores
    from qmerge.report.load import load_results as load

    content, beside = load(path, whole=True), Path(path).with_suffix(".npz")
    return eval_result(content, exit_code(content["verdict"]), Path(path), read_scores(beside) if beside.is_file() else {}, tuple(notes(content)))


def measure(
    out: Path | None, candidates: Mapping[str, str] | Sequence[str], texts: dict[str, str], *, base: str, adapter: AdapterSet, tokens: int, template: str | None, also: Sequence[str], original: str | None, on: str,
    nf4_recipe: str | None, suite: str | None, tasks: str | None, allow_task_code: bool, limits: dict[str, Any], device: str, count: Callable[[str, int, int], None], ranks: Ranks = ALONE, **measures: Any,
) -> Evaluation:  # fmt: skip
    """Evaluate and, with ``out``, write results.json there with what goes beside it. ``candidates``: folders or ids, under the names of their folders or those given; ``limits``: a budget, read;
    ``measures``: ``perplexity``, ``generate`` and ``new_tokens``. ``ranks`` share the work: the first writes and gives the results, the others give none. Raises as `evaluate`."""
    from qmerge.api.first import look_at_models, look_at_texts
    from qmerge.device_names import check_device_name
    from qmerge.pipeline.recipe import read_nf4_recipe
    from qmerge.quality.asked import candidate_names, check_request, parse_requests
    from qmerge.quality.suites import load_suite, split_names
    from qmerge.store.hub import resolve

    places = list(candidates.values()) if isinstance(candidates, Mapping) else list(candidates)
    if out is not None and ranks.first:
        check_results_file(out, "--out", (base, *(one.place.partition("#")[0] for one in adapter.choices), *places))
    benchmarks = load_suite(suite, split_names(tasks), allow_task_code) if suite or tasks else None
    recipe, requests = read_nf4_recipe(nf4_recipe), parse_requests(measures.get("perplexity", ()))
    check_device_name(device)
    look_at_texts((*texts.values(), *(one.source for one in requests.values())))
    look_at_models((base, original), adapter)
    folders = [str(resolve(place)[0]) for place in places]
    named = dict(zip(candidates, folders, strict=True)) if isinstance(candidates, Mapping) else candidate_names(folders)
    check_request(named, texts, also, original)
    from qmerge.device import own_device, pick_device
    from qmerge.quality.evaluate import evaluate_in_full
    from qmerge.quality.sidecar import write_results

    on_device, source, chosen = pick_device(own_device(device, ranks.local_rank, ranks.local_size)), str(resolve(base)[0]), str(resolve(original)[0]) if original else None
    agree = None
    if not ranks.alone:
        from qmerge.api.alike import check_fingerprint, check_folders, check_settings, told

        agree = partial(check_fingerprint, ranks)
        check_settings(ranks, told(adapter, {"candidates": named, "texts": texts, "also": also, "perplexity": requests}, {
            "tokens": tokens, "template": template, "original": original is not None, "on": on, "nf4 recipe": recipe.to_json() if recipe else None, "suite": benchmarks.content if benchmarks else None,
            "budget": limits, "device": on_device.type, "generate": measures.get("generate", 0), "new tokens": measures.get("new_tokens"),
        }))  # fmt: skip
        adapters = {f"adapter {number}": one.path for number, one in enumerate(adapter.open(), 1)}
        check_folders(ranks, {"base": source, **adapters, **{f"candidate {name}": folder for name, folder in named.items()}, **({"original": chosen} if chosen else {})})
    done = evaluate_in_full(
        source, adapter, named, texts, tokens, on=on, nf4_recipe=recipe.to_json() if recipe else None,
        original=chosen, also=also, template=template, device=str(on_device), suite=benchmarks, budget=limits,
        results_dir=out.parent if out is not None else None, keep_tail=True, progress=count, agree=agree, ranks=ranks, **measures,
    )  # fmt: skip
    if not ranks.first:
        return done
    done.results["measured_at"] = datetime.now(timezone.utc).isoformat(timespec="seconds")  # what a history is sorted by
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_results(done.results, done.scores, out, done.answers)
    return done


def notes(results: Mapping[str, Any]) -> list[str]:
    """What a person must know to read the numbers, sentence by sentence."""
    found = []
    for name, arm in results["arms"].items():
        found += [f"{name} was read by {arm['loader']}"] if arm.get("loader") else []
        found += [f"{name} needed memory for the logits {arm['logits']}"] if arm.get("logits") else []
        found += [f"{name}: {arm['tokenizer_note']}"] if arm.get("tokenizer_note") else []
    return found + [
        f"{task}: {row['truncated']} of {row['n']} prompts are longer than the model's context; lm-eval cut their beginning, for all arms alike"
        for task, row in results.get("tasks", {}).items() if row.get("truncated")
    ]  # fmt: skip


def named_texts(values: Sequence[str]) -> dict[str, str]:
    """``[NAME=]FILE`` words to name -> file; a name is taken from the file where none is given, and must be unique."""
    found: dict[str, str] = {}
    for value in values:
        name, sign, path = value.partition("=")
        if not sign or not name.isidentifier() and not name.replace("-", "_").replace(".", "_").isidentifier():
            name, path = Path(value).stem, value
        if not path:
            raise UsageProblem("a text has no file", where=f"--text {value}", expected="--text NAME=FILE", found="nothing after the =", fix="is a shell variable not set?")
        if name in found:
            raise UsageProblem("two texts have the same name", where=f"--text {value}", found=name, fix="give one a name of its own: --text NAME=FILE")
        found[name] = path
    return found


def _candidates(given: Candidates) -> dict[str, str] | list[str]:
    def place(one: Candidate) -> str:
        return str(one.out if isinstance(one, MergeResult) else one)

    if isinstance(given, Mapping):
        return {name: place(one) for name, one in given.items()}
    return [place(one) for one in ([given] if isinstance(given, (str, Path, MergeResult)) else given)]


def _texts(given: Texts) -> dict[str, str]:
    if isinstance(given, Mapping):
        return {name: str(path) for name, path in given.items()}
    return named_texts([str(path) for path in ([given] if isinstance(given, (str, Path)) else given)])


def _several(words: str | Sequence[str]) -> tuple[str, ...]:
    return (words,) if isinstance(words, str) else tuple(words)


def _word(place: Place | None) -> str | None:
    return None if place is None else str(place)
