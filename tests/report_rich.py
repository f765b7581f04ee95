"""Results with everything that an evaluation can hold: protocols, generation, benchmarks with margins, serving, a baseline. Read by the report's tests."""

from __future__ import annotations

import copy
from typing import Any

from test_report_results import HOSTILE, KNOWN, build_results, judge

ARMS = ("separate", "merged", "nf4", "naive")
MORE_KNOWN = set(
    "perplexity protocol ratio word_ppl byte_ppl bits_per_byte generation prompts new_tokens exact_match first_divergence divergence_quantiles margin_delta holm_p "
    "macro_accuracy_delta macro_bootstrap chance samples serving device threads rows load_s peak_load_bytes peak_prefill_bytes peak_decode_bytes time_to_first_token_s "
    "prefill_tokens_per_s decode_tokens_per_s packages kernel hot_swap 1 8 32 new old paired measured_at versions smallest_detectable lost won kl_mean_vs_baseline".split()
)


def metric(value: float, half: float = 0.0, unit: str = "", n: int = 48) -> dict[str, Any]:
    return {"value": value, "ci_low": value - half, "ci_high": value + half, "n": n, "unit": unit}


def _serving_row(size: int, speed: float, swap: bool) -> dict[str, Any]:
    rates = {batch: metric(speed * factor, speed * factor * 0.02, "tokens/s", 5) for batch, factor in (("1", 1.0), ("8", 5.5), ("32", 14.0))}
    return {
        "bytes": size, "load_s": metric(1.42, 0.05, "s", 5), "peak_load_bytes": int(size * 1.4), "peak_prefill_bytes": int(size * 2.1), "peak_decode_bytes": int(size * 1.6),
        "time_to_first_token_s": metric(0.0312, 0.0011, "s", 5), "prefill_tokens_per_s": {key: copy.deepcopy(row) for key, row in rates.items()},
        "decode_tokens_per_s": rates, "packages": ["transformers", "bitsandbytes", *(["peft"] if swap else [])], "kernel": "bitsandbytes gemv 4-bit", "hot_swap": swap,
    }  # fmt: skip


def _task(change: float) -> dict[str, Any]:
    return {
        "accuracy": metric(0.412 + change, 0.03, "share"), "delta": metric(change, 0.011, "share"), "margin_delta": metric(change * 2, 0.004, "nats"), "flips": 9, "lost": 5, "won": 4,
        "mcnemar_p": 0.74, "holm_p": 0.9, "smallest_detectable": 0.02, "metric": "acc", "samples": "samples_arc.jsonl",
    }  # fmt: skip


def rich_results() -> dict[str, Any]:
    """``build_results`` with every optional part."""
    results = build_results()
    results["measured_at"] = "2026-03-01T10:00:00+00:00"
    results["tasks"] = {task: {"n": 500, "metric": "acc", "chance": 0.25} for task in ("arc_easy", "piqa", "winogrande")}
    for order, name in enumerate(ARMS):
        arm, change = results["arms"][name], (0.0, 0.0, -0.004, -0.061)[order]
        arm["perplexity"] = {
            "wikitext-2": {"protocol": "GPTQ: 2048-token windows over the joined test split", "metrics": {"ppl": metric(11.2 + order, 0.2), "ratio": metric(1.0 + order * 0.002, 0.001)}},
            "lm-eval": {"protocol": "lm-eval word and byte perplexity", "metrics": {"word_ppl": metric(60.1, 1.0), "byte_ppl": metric(1.9, 0.01), "bits_per_byte": metric(0.93, 0.01), "ratio": metric(1.0, 0.001)}},
        }
        if name != "separate":
            arm["generation"] = {"gsm8k-test": {"prompts": 64, "new_tokens": 128, "exact_match": metric(0.92 - 0.2 * order, 0.05, "share"), "first_divergence": metric(57.5, 12.0, "tokens"), "divergence_quantiles": [3, 20, 57, 100, 128]}}
        arm["tasks"] = {task: _task(change + 0.003 * index) for index, task in enumerate(results["tasks"])}
        arm["tasks"] |= {"macro_accuracy_delta": metric(change, 0.008, "share"), "macro_bootstrap": metric(change, 0.009, "share")}
    rows = {name: _serving_row(results["arms"][name]["bytes"], speed, name == "separate") for name, speed in zip(ARMS, (41.0, 44.0, 63.0, 64.0), strict=True)}
    results["serving"] = {"device": "cpu", "threads": 2, "rows": rows}
    checks = results["verdict"]["checks"]
    for text, difference, state in (("gsm8k-test", 0.00001, "pass"), ("wikitext-2", 0.0002, "fail")):
        checks.append({
            "arm": "nf4", "text": text, "metric": "kl_mean_vs_baseline", "value": difference, "ci_low": difference - 0.00002, "ci_high": difference + 0.00002, "limit": {"max": 0.00003},
            "state": state, "reason": f"nf4 on {text}: kl_mean 0.0003, the baseline's 0.0001", "new": 0.0003, "old": 0.0001, "paired": state == "pass",
        })  # fmt: skip
    results["verdict"] = judge(checks)
    return results


def hostile_rich_results(longer: int = 0) -> dict[str, Any]:
    """``rich_results`` with every name, note, reason, package and path hostile; ``longer`` characters are added to each."""
    known, tail = KNOWN | MORE_KNOWN, HOSTILE + "x" * longer

    def poison(node: Any) -> Any:
        if isinstance(node, dict):
            return {(key if key in known else f"{key}{tail}"): poison(item) for key, item in node.items()}
        if isinstance(node, list):
            return [poison(item) for item in node]
        return f"{node}{tail}" if isinstance(node, str) and node not in known else node

    return poison(rich_results())
