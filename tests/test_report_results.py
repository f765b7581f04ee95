"""Do the lookups of a report answer for whole, partial and damaged results? Also builds the results that the other report tests read."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest

from qmerge.report import fields, tables
from qmerge.report.html import render_html
from qmerge.report.markdown import render_markdown

KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
UNIT = {"top1_agreement": "fraction", "retention": "fraction", "delta_p_rms": "fraction", "nonfinite": "tokens", "ppl": "", "ppl_ratio": ""}


def _metric(name: str, value: float | None, spread: float, note: str | None = None) -> dict[str, Any]:
    low, high = (None, None) if value is None else (value - spread, value + spread)
    row = {"value": value, "ci_low": low, "ci_high": high, "n": 48, "unit": UNIT.get(name, "nats/token")}
    return row | ({"note": note} if note else {})


def _measured(seed: int, kl: float, nll_delta: float, ppl: float, retention: float | None, top1: float) -> dict[str, Any]:
    """One arm on one text: log-normal KLs with the given mean, windows scattered around the given ΔNLL."""
    rng = np.random.default_rng(seed)
    tokens = rng.lognormal(0, 1.6, 4000)
    tokens *= kl / tokens.mean()
    windows = nll_delta + rng.normal(0, max(abs(nll_delta), kl) * 1.4, 48)
    half = float(1.96 * windows.std() / np.sqrt(len(windows)))
    metrics = {
        "ppl": _metric("ppl", ppl, ppl * 0.021),
        "nll": _metric("nll", float(np.log(ppl)), 0.021),
        "nll_delta": _metric("nll_delta", float(windows.mean()), half),
        "ppl_ratio": _metric("ppl_ratio", float(np.exp(nll_delta)), 0.0004),
        "kl_mean": _metric("kl_mean", kl, kl * 0.12),
        "top1_agreement": _metric("top1_agreement", top1, 0.004),
        "retention": _metric("retention", retention, 0.021, None if retention is not None else "the adapter's gain is inside the noise"),
        "nonfinite": _metric("nonfinite", 0.0, 0.0),
    }
    for name, share in (("kl_median", 50), ("kl_p90", 90), ("kl_p99", 99), ("kl_p999", 99.9)):
        metrics[name] = _metric(name, float(np.percentile(tokens, share)), 1e-6)
    return {
        "metrics": metrics,
        "kl_quantiles": [float(value) for value in np.percentile(tokens, np.arange(101))],
        "kl_by_confidence": [{"from": 0.0, "to": 0.5, "n": 2000, "kl_mean": kl * 1.6}, {"from": 0.5, "to": 1.0, "n": 2000, "kl_mean": kl * 0.4}],
        "window_nll_delta": [float(value) for value in windows],
    }


def _reference(ppl: float, with_retention: bool) -> dict[str, Any]:
    return {"metrics": {"ppl": _metric("ppl", ppl, ppl * 0.021), "kl_mean": _metric("kl_mean", 0.0, 0.0), "retention": _metric("retention", 1.0 if with_retention else None, 0.0)}}


def _linears(seed: int, centre: float, spread: float) -> dict[str, dict[str, float]]:
    """42 linears: six layers of seven."""
    rng = np.random.default_rng(seed)
    return {
        f"model.layers.{layer}.{'self_attn' if index < 4 else 'mlp'}.{kind}": {
            "delta_survival": float(rng.normal(centre, spread)),
            "delta_ratio": float(rng.uniform(0.006, 0.014)),
            "error_ratio": float(rng.uniform(4.0, 9.0)),
        }
        for layer in range(6)
        for index, kind in enumerate(KINDS)
    }


def _check(results: dict[str, Any], arm: str, text: str, metric: str, limit: float, state: str) -> dict[str, Any]:
    row = results["arms"][arm]["texts"][text]["metrics"][metric]
    side = "min" if metric in ("retention", "top1_agreement") else "max"
    reason = f"{arm} on {text}: {metric} {row['value']:.3g}, {side} {limit:g}"
    return {"arm": arm, "text": text, "metric": metric, "limit": {side: limit}, "state": state, "reason": reason} | {key: row[key] for key in ("value", "ci_low", "ci_high")}


def build_results() -> dict[str, Any]:
    """Two candidates on two texts, with the numbers of the lab in the design's first table: nf4 passes, the naive merge fails."""
    texts = ("gsm8k-test", "wikitext-2")
    kls = {"base": (0.0407, 0.0312), "merged": (0.00009, 0.00008), "nf4": (0.00011, 0.00052), "naive": (0.0383, 0.0297)}
    kept = {"base": 0.0, "merged": 1.0, "nf4": 0.9912, "naive": 0.031}
    loss = {"base": 0.061, "merged": 0.0, "nf4": 0.0006, "naive": 0.059}
    size = {"base": 8_106_936, "separate": 8_902_112, "merged": 25_310_208, "nf4": 8_106_936, "naive": 8_106_936}
    arms: dict[str, Any] = {}
    for order, name in enumerate(("base", "separate", "merged", "nf4", "naive")):
        arms[name] = {"kind": "nf4" if name in ("nf4", "naive") else "bf16", "path": f"../{name}", "bytes": size[name], "texts": {}, "tasks": {}}
        for index, text in enumerate(texts):
            ppl = (12.34, 41.07)[index]
            if name == "separate":
                arms[name]["texts"][text] = _reference(ppl, index == 0)
                continue
            shown = kept[name] if index == 0 else None
            ratio = float(np.exp(loss[name]))
            arms[name]["texts"][text] = _measured(10 * order + index, kls[name][index], loss[name], ppl * ratio, shown, 1 - 8 * kls[name][index] ** 0.7)
    arms["nf4"]["linears"], arms["naive"]["linears"] = _linears(1, 0.97, 0.04), _linears(2, 0.06, 0.05)
    arms["nf4"]["tasks"]["gsm8k"] = {"accuracy": _metric("top1_agreement", 0.412, 0.03), "delta": _metric("top1_agreement", -0.004, 0.011), "flips": 9, "mcnemar_p": 0.74}
    results: dict[str, Any] = {"schema_version": 1, "arms": arms, "elapsed_s": 412.6}
    results["fingerprint"] = {
        "protocol": {"window": 2048, "stride": 2048, "mask": "completion", "arithmetic": "fp32", "texts": list(texts)},
        "versions": {"qmerge": "0.1.0", "torch": "2.11.0", "transformers": "5.17.0", "bitsandbytes": "0.46.1"},
        "device": "cpu",
    }
    source = "the separate model in fp32 from dequantized weights against its public loader"
    results["noise_floor"] = {text: _metric("kl_mean", 0.00008, 0.00001) | {"source": source} for text in texts}
    checks = [_check(results, "nf4", text, metric, limit, "pass") for text in texts for metric, limit in (("kl_mean", 0.05), ("top1_agreement", 0.9))]
    checks += [_check(results, "nf4", texts[0], "retention", 0.9, "pass"), _check(results, "naive", texts[0], "retention", 0.9, "fail")]
    checks.append({"arm": "nf4", "text": texts[1], "metric": "retention", "value": None, "limit": {"min": 0.9}, "state": "skipped", "reason": "the gain is noise"})
    results["verdict"] = judge(checks)
    return results


def judge(checks: list[dict[str, Any]]) -> dict[str, Any]:
    """The verdict on ``checks``, as the gate gives it: the worst check decides, and its reason comes first."""
    order = ["fail", "inconclusive", "pass", "skipped"]
    ranked = sorted(checks, key=lambda check: order.index(check["state"]))
    return {"state": ranked[0]["state"], "reasons": [check["reason"] for check in ranked], "checks": checks, "budget": "default"}


def passing_results() -> dict[str, Any]:
    """``build_results`` without the candidate that fails."""
    results = build_results()
    del results["arms"]["naive"]
    results["verdict"] = judge([check for check in results["verdict"]["checks"] if check["arm"] != "naive"])
    return results


HOSTILE = '<script>alert(1)</script>|"\'onload=x` \x1b[31mred\x1b[0m [a](javascript:x) *b* $c$ @me http://evil.example\u202e\n# head {{7*7}} </style>&amp;\ud800'


def hostile_results() -> dict[str, Any]:
    """The same results with every name, note, reason and path hostile."""

    def poison(node: Any, depth: int = 0) -> Any:
        if isinstance(node, dict):
            return {(key if key in KNOWN else f"{key}{HOSTILE}"): poison(item, depth + 1) for key, item in node.items()}
        if isinstance(node, list):
            return [poison(item, depth + 1) for item in node]
        return f"{node}{HOSTILE}" if isinstance(node, str) and node not in KNOWN else node

    return poison(build_results())


KNOWN = set(
    "schema_version fingerprint arms base separate merged kind path bytes texts metrics kl_quantiles kl_by_confidence window_nll_delta tasks linears "
    "noise_floor verdict state reasons checks elapsed_s value ci_low ci_high n unit note source accuracy delta flips mcnemar_p delta_survival "
    "delta_ratio error_ratio arm text metric limit reason budget max min skipped from to kl_mean ppl nll nll_delta ppl_ratio kl_median kl_p90 kl_p99 kl_p999 top1_agreement "
    "delta_p_rms retention nonfinite pass fail inconclusive".split()
)


def _paths(node: Any, path: tuple = ()) -> list[tuple]:
    """Every key of the results down to a metric, lists not entered."""
    found = [path] if path else []
    if isinstance(node, dict) and len(path) < 6:
        for key, item in node.items():
            found += _paths(item, (*path, key))
    return found


def _without(results: dict[str, Any], path: tuple, replacement: Any = ...) -> dict[str, Any]:
    changed = copy.deepcopy(results)
    node = changed
    for key in path[:-1]:
        node = node[key]
    if replacement is ...:
        del node[path[-1]]
    else:
        node[path[-1]] = replacement
    return changed


def test_any_missing_part_degrades() -> None:
    """Catches a report that crashes after an hour's evaluation because one optional list is absent."""
    results = build_results()
    paths = [path for path in _paths(results) if len(path) <= 3 or path[1] in ("nf4", "verdict")]
    for path in paths[:: max(1, len(paths) // 60)]:
        part = _without(results, path)
        assert render_markdown(part) and tables.terminal_table(part), path
    for path in [path for path in paths if len(path) <= 2]:
        assert "</html>" in render_html(_without(results, path)), path


@pytest.mark.parametrize("junk", [None, [], {}, "text", 7, float("nan"), True])
def test_wrong_types_degrade(junk: Any) -> None:
    """Catches a lookup that trusts a part to be a mapping or a list."""
    results = build_results()
    for path in [path for path in _paths(results) if len(path) <= 2 or path[:2] == ("arms", "nf4")][:40]:
        part = _without(results, path, junk)
        assert render_markdown(part)
        assert tables.terminal_table(part)
    for key in results:
        render_html(_without(results, (key,), junk))
    assert render_markdown({}) and render_html({}) and tables.terminal_table({})


def test_candidates_are_the_other_arms() -> None:
    """Catches the base or the dense merge being recommended for shipping."""
    assert fields.candidate_names(build_results()) == ["nf4", "naive"]
    assert fields.text_names(build_results()) == ["gsm8k-test", "wikitext-2"]


def test_candidate_is_judged_by_its_own_checks() -> None:
    """Catches one verdict for all: here one candidate passes and the other fails."""
    results = build_results()
    assert fields.candidate_state(results, "nf4") == "pass"
    assert fields.candidate_state(results, "naive") == "fail"
    del results["verdict"]["checks"][:]
    assert fields.candidate_state(results, "nf4") is None, "two candidates and no checks: the overall verdict says nothing about one"


def test_worst_linears_first() -> None:
    """Catches a list sorted the wrong way, or that puts NaN first."""
    results = build_results()
    results["arms"]["naive"]["linears"]["model.broken"] = {"delta_survival": float("nan")}
    kept = [row["delta_survival"] for _, row in fields.worst_linears(results, "naive")]
    assert kept == sorted(kept) and len(kept) == 10


def test_a_share_above_all_is_explained_where_it_stands() -> None:
    """Catches a retention of 103 % that a reader takes for a gain, and the sentence where nothing calls for it."""
    results = build_results()
    text = fields.text_names(results)[0]
    assert not any("above 100 %" in line for line in tables.notes(results, text))
    results["arms"]["nf4"]["texts"][text]["metrics"]["retention"] |= {"value": 1.031, "ci_low": 0.99, "ci_high": 1.07}
    assert [line for line in tables.notes(results, text) if line.startswith("Retention above 100 % (nf4): ")]
    for page in (render_markdown(results), render_html(results), tables.terminal_table(results)):
        assert "above 100 %" in page
