"""Does the results reader answer for any bytes, and can a verdict be made of what follows its schema?

An input is results.json. The pages that are made of results, which takes longer, have a harness of their own: report.
"""

from __future__ import annotations

import json
from random import Random
from typing import Any

from fuzz import bending
from fuzz.places import Seeds, folder, refused
from qmerge.errors import QmergeError
from qmerge.quality.compare import compare, load_budget
from qmerge.report.load import check_whole, load_results
from qmerge.report.numbers import METRICS

ARMS = ("base", "separate", "merged", "nf4", "rtn", "gptq")
WORDS = (
    *ARMS, *METRICS, "schema_version", "arms", "texts", "metrics", "tasks", "kind", "path", "bytes", "value", "ci_low", "ci_high", "n", "unit", "note", "kl_quantiles", "kl_by_confidence", "window_nll_delta", "linears", "delta_survival",
    "delta_ratio", "error_ratio", "noise_floor", "source", "verdict", "state", "reasons", "checks", "pass", "fail", "inconclusive", "skipped", "arm", "text", "metric", "limit", "max", "min", "reason", "serving", "rows", "decode_tokens_per_s",
    "prefill_tokens_per_s", "time_to_first_token_s", "perplexity", "protocol", "generation", "first_divergence", "fingerprint", "versions", "elapsed_s", "accuracy", "flips", "mcnemar_p", "holm_p", "margin_delta", "samples", "engine", "vllm",
    "packages", "kernel", "%", "points", "merged_into", "another base", "1", "8", "budget", "default", "kl_mean_vs_baseline", "old", "new", "paired",
)  # fmt: skip
MAX_LEN = 6000
_FILE = folder("results") / "results.json"
_BUDGET = load_budget("default")


def _metric(value: float | None, spread: float = 0.01, unit: str = "nats/token") -> dict[str, Any]:
    return {"value": value, "ci_low": None if value is None else value - spread, "ci_high": None if value is None else value + spread, "n": 9, "unit": unit}


def _cell(kl: float) -> dict[str, Any]:
    metrics = {"ppl": _metric(9.5), "kl_mean": _metric(kl), "ppl_ratio": _metric(1.01), "top1_agreement": _metric(0.95), "retention": _metric(0.97), "kl_vs_base": _metric(0.1), "nonfinite": _metric(0, 0)}
    return {"metrics": metrics, "kl_quantiles": [0, 0.01, 0.1], "window_nll_delta": [0.1, -0.1, 0.05], "kl_by_confidence": [{"from": 0, "to": 1, "n": 9, "kl_mean": kl}]}


def _small() -> dict[str, Any]:
    """One text, four arms, a verdict."""
    arms = {name: {"kind": "nf4", "path": f"../{name}", "bytes": 1000, "texts": {"prose": _cell(kl)}} for name, kl in (("base", 0.1), ("separate", 0.0), ("merged", 0.0), ("nf4", 0.01))}
    check = {"arm": "nf4", "text": "prose", "metric": "kl_mean", "limit": {"max": 0.05}, "state": "pass", "reason": "nf4 on prose: fine"} | {key: value for key, value in _metric(0.01).items() if key not in ("n", "unit")}
    return {
        "schema_version": 1, "measured_at": "2026-01-01T00:00:00+00:00", "elapsed_s": 1.5, "fingerprint": {"seed": 0, "versions": {"torch": "2.14"}, "texts": {"prose": {"tokens": 9}}}, "arms": arms,
        "noise_floor": {"prose": _metric(0.001) | {"source": "itself"}}, "verdict": {"state": "pass", "reasons": ["nf4 on prose: fine"], "checks": [check], "budget": "default"},
    }  # fmt: skip


def _rich() -> dict[str, Any]:
    """Two arms with everything that can be measured."""
    results = _small()
    results["arms"] = {name: results["arms"][name] for name in ("separate", "nf4")}
    task = {"accuracy": _metric(0.4), "delta": _metric(-0.01), "margin_delta": _metric(-0.02), "flips": 3, "lost": 2, "won": 1, "mcnemar_p": 0.7, "holm_p": 0.9, "smallest_detectable": 0.02, "metric": "acc", "samples": "x.jsonl"}
    more = {
        "tasks": {"arc_easy": task, "macro_accuracy_delta": _metric(-0.01)}, "linears": {"model.layers.0.q_proj": {"delta_survival": 0.9, "delta_ratio": 0.01, "error_ratio": 5.0}, "model.layers.1.q_proj": {"delta_survival": 0.1}},
        "perplexity": {"gptq": {"protocol": "as in GPTQ", "metrics": {"ppl": _metric(9.1), "bits_per_byte": _metric(1.1)}, "ratio": _metric(1.0)}},
        "generation": {"prose": {"exact_match": _metric(0.5), "prompts": 8, "new_tokens": 64, "first_divergence": _metric(30), "divergence_quantiles": [1, 2]}},
    }  # fmt: skip
    row = {"bytes": 1000, "load_s": _metric(1.2), "peak_decode_bytes": 2000, "time_to_first_token_s": _metric(0.1), "decode_tokens_per_s": {"1": _metric(10), "8": _metric(60)}, "packages": ["peft"], "kernel": "x", "hot_swap": True}
    for arm in results["arms"].values():
        arm |= {key: json.loads(json.dumps(value)) for key, value in more.items()}
    results["serving"] = {"device": "cpu", "threads": 2, "engine": "transformers", "rows": {"separate": row, "nf4": row}}
    results["tasks"] = {"arc_easy": {"chance": 0.25}}
    results["verdict"]["checks"].append({"arm": "nf4", "text": "prose", "metric": "kl_mean_vs_baseline", "value": 0.1, "ci_low": 0.0, "ci_high": 0.2, "new": 0.2, "old": 0.1, "paired": False, "limit": {"max": 0}, "state": "inconclusive", "reason": "x"})
    return results


def floors() -> tuple[bytes, ...]:
    """What has no more than a page can be made of: a verdict needs more."""
    floor = {"schema_version": 1}
    return tuple(json.dumps(value).encode() for value in (floor, floor | {"arms": {}}, floor | {"serving": _rich()["serving"]}, floor | {"arms": {"nf4": {}}, "verdict": {"state": "fail"}}))


def seeds() -> Seeds:
    return Seeds(tuple(json.dumps(value).encode() for value in (_small(), _rich())), (*floors(), b"[]", b"", b"NaN", b"\xef\xbb\xbf{}"))


def loaded(data: bytes) -> dict[str, Any] | None:
    """What the reader makes of an input; None where it refuses."""
    _FILE.write_bytes(data)
    try:
        return load_results(_FILE)
    except QmergeError as error:
        refused(error)
        return None


def check(data: bytes) -> bool:
    if (results := loaded(data)) is None:
        return False
    try:
        check_whole(results, _FILE)
    except QmergeError as error:
        return refused(error)
    compare(results, _BUDGET)
    return True


def mutate(data: bytes, random: Random) -> bytes:
    text = bending.bend_text(data.decode("utf-8", "replace"), random, WORDS)
    return bending.bend_bytes(data, random, WORDS) if text is None or random.random() < 0.03 else text.encode("utf-8", "surrogatepass")

