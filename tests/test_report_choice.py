"""Does the advice follow from the measured values, the number of adapters and the engine, and does the table say what was not measured?"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from report_rich import rich_results
from test_report_results import build_results, judge, passing_results

from qmerge.report.advice import recommend
from qmerge.report.choice import NOT_MEASURED, choose, compared
from qmerge.report.engines import ENGINES, snippets
from qmerge.report.sections import seconds_parts, text_of


def _served(results: dict, **speeds: float) -> dict:
    for name, speed in speeds.items():
        results.setdefault("serving", {"device": "cpu", "threads": 2, "rows": {}})["rows"][name] = {"decode_tokens_per_s": {"1": {"value": speed, "ci_low": speed, "ci_high": speed, "n": 5, "unit": "tokens/s"}}}
    return results


def test_one_adapter_and_a_passing_candidate_is_shipped() -> None:
    """Catches a last section that contradicts the first one."""
    results = build_results()
    found = choose(results)
    assert (found.action, found.arm) == ("ship nf4", "nf4") == ("ship nf4", recommend(results).candidate)
    assert "0.00052 nats/token" in found.reason and "\n" not in found.reason


def test_several_adapters_stay_separate_where_that_is_smaller() -> None:
    """Catches a 4-bit file per adapter, where one base serves all of them; and "separate" where it takes more room."""
    found = choose(build_results(), adapters=10)
    assert found.action == "keep separate" and "16.1 MB" in found.reason and "81.1 MB" in found.reason  # 8,106,936 + 10 × 795,176; 10 × 8,106,936
    results = build_results()
    results["arms"]["separate"]["bytes"] = 30_000_000
    assert choose(results, adapters=10).action == "ship nf4"
    fast = choose(_served(build_results(), separate=20.0, nf4=60.0), adapters=10)
    assert fast.action == "keep separate" and "nf4 decodes 60 tokens/s, separate 20" in fast.reason


def test_the_engine_must_load_the_format() -> None:
    """Catches a file recommended to an engine that cannot read it."""
    results = passing_results()
    results["arms"]["nf4"]["kind"] = "fp4"
    assert choose(results, engine="transformers").action == "ship fp4"
    assert choose(results, engine="vllm").action == "keep separate" and "vLLM does not load fp4" in choose(results, engine="vllm").sentence


def test_among_passing_candidates_measured_speed_decides() -> None:
    """Catches the slower of two files that both hold the budget, where speeds were measured and differ."""
    results = passing_results()
    results["arms"]["int4"] = json.loads(json.dumps(results["arms"]["nf4"])) | {"kind": "gptq"}
    for row in results["arms"]["int4"]["texts"].values():
        row["metrics"]["kl_mean"]["value"] *= 1.5
    results["verdict"]["checks"] += [check | {"arm": "int4"} for check in results["verdict"]["checks"] if check["arm"] == "nf4"]
    assert choose(results).action == "ship nf4"
    assert choose(_served(results, nf4=20.0, int4=60.0)).action == "ship gptq"
    assert choose(_served(results, nf4=58.0, int4=60.0)).action == "ship nf4", "a difference within noise decides nothing"


@pytest.mark.parametrize(("kind", "state", "engine", "word"), [
    ("gptq", "pass", None, "back"), ("gptq", "pass", "vllm", "not measured here"), ("fp4", "pass", None, ""), ("none", "pass", None, ""), ("bitsandbytes", "pass", None, ""),
    ("gptq", "fail", None, "before giving up on 4 bits"), ("bitsandbytes", "fail", None, ""),
])  # fmt: skip
def test_nf4_is_named_where_it_is_an_answer(kind: str, state: str, engine: str | None, word: str) -> None:
    """Catches int4 or nothing, where the other file of 4 bits was never tried; and NF4 recommended to somebody who has it."""
    results = passing_results()
    results["arms"]["nf4"]["kind"] = kind
    for check in results["verdict"]["checks"]:
        check["state"] = state
    results["verdict"] = judge(results["verdict"]["checks"])
    found = choose(results, engine=engine)
    assert bool(word) == bool(found.alternative) and (word == "back" or word in found.alternative), found
    assert not word or "nf4" in found.alternative


def test_nf4_that_was_measured_is_named_by_its_arm() -> None:
    """Catches "not measured" of an arm in the same table."""
    results = passing_results()
    results["arms"]["int4"] = json.loads(json.dumps(results["arms"]["nf4"])) | {"kind": "gptq"}
    results["verdict"]["checks"] += [check | {"arm": "int4"} for check in results["verdict"]["checks"] if check["arm"] == "nf4"]
    found = choose(_served(results, nf4=20.0, int4=60.0))
    assert found.action == "ship gptq" and found.alternative.startswith("nf4 (NF4) holds the budget too")


def test_a_speed_whose_interval_reaches_the_others_decides_nothing() -> None:
    """Catches "ship gptq, it decodes 238 tokens/s, nf4 155" from two processes whose intervals are 34 to 441 and 0 to 473."""
    results = passing_results()
    results["arms"]["int4"] = json.loads(json.dumps(results["arms"]["nf4"])) | {"kind": "gptq"}
    for row in results["arms"]["int4"]["texts"].values():
        row["metrics"]["kl_mean"]["value"] *= 1.5
    results["verdict"]["checks"] += [check | {"arm": "int4"} for check in results["verdict"]["checks"] if check["arm"] == "nf4"]
    _served(results, nf4=155.0, int4=238.0, separate=122.0)
    for row in results["serving"]["rows"].values():
        row["decode_tokens_per_s"]["1"] |= {"ci_low": 30.0, "ci_high": 450.0}
    found = choose(results)
    assert found.action == "ship nf4"
    assert "155 tokens/s (30 to 450)" in found.reason and "too unsteady" in found.reason


def test_a_serving_interval_is_written_in_plain_digits() -> None:
    """Catches "977 ms (0 to 2.55e+03)"."""
    assert seconds_parts({"value": 0.9766, "ci_low": 0.0, "ci_high": 2.5512}) == ("977 ms", "0 to 2,551")


def test_packages_that_are_none_are_not_unmeasured() -> None:
    """Catches "not measured" for float weights, which need nothing beyond torch and transformers."""
    results = _served(passing_results(), nf4=60.0)
    results["serving"]["rows"]["nf4"]["packages"] = []
    row = compared(results).rows[-1]
    assert "torch and transformers alone" in row and NOT_MEASURED in row


def test_float_weights_where_nothing_else_holds_and_they_are_faster() -> None:
    """Catches "keep separate" against a measured cost of keeping it, and bf16 without one."""
    results = build_results()
    for check in results["verdict"]["checks"]:
        check["state"] = "fail"
    results["verdict"] = judge([*results["verdict"]["checks"], {"arm": "merged", "text": "gsm8k-test", "metric": "merged_floor_factor", "value": 1.0, "limit": {"max": 2}, "state": "pass", "reason": "fine"}])
    assert choose(results).action == "keep separate"
    found = choose(_served(results, separate=20.0, merged=40.0))
    assert found.action == "ship merged bf16" and "25.3 MB" in found.reason and "40 tokens/s, separate 20" in found.reason


def test_worse_than_the_baseline_means_keep_the_old_one() -> None:
    """Catches "keep the adapter separate" for a candidate that holds the budget and only lost against the accepted one."""
    results = passing_results()
    results["verdict"] = judge([*results["verdict"]["checks"], {"arm": "nf4", "text": "gsm8k-test", "metric": "kl_mean_vs_baseline", "value": 0.001, "limit": {"max": 1e-5}, "state": "fail", "reason": "worse"}])
    assert choose(results).action == "keep what was accepted" and "baseline" in choose(results).sentence


def test_the_table_holds_measured_values_and_says_what_is_missing() -> None:
    """Catches an invented figure: without a serving section, everything about speed and memory is "not measured"."""
    bare, rich = ({row[0]: [text_of(cell) for cell in row[1:]] for row in compared(results).rows} for results in (build_results(), rich_results()))
    speedy = ("time to first token", "decode tokens/s, batch 1", "decode tokens/s, batch 32", "peak memory while decoding", "kernel", "packages to serve it")
    assert all(set(bare[key]) == {NOT_MEASURED} for key in speedy)
    assert rich["decode tokens/s, batch 1"][:3] == ["41.0 (40.2 to 41.8)", "44.0 (43.1 to 44.9)", "63.0 (61.7 to 64.3)"]
    assert bare["swap adapters while serving"][:2] == ["yes", "no, another checkpoint"] and bare["5 adapters of one base"][0] == "12.1 MB"
    assert bare["loss: mean KL where it is worst"] == ["0 (reference)", "0.000090 nats/token", "0.00052 nats/token", "0.0383 nats/token"]
    assert compared({}) is None


def test_the_table_counts_the_adapters_that_were_asked_for() -> None:
    """Catches a row of 5 adapters for someone who serves 2 or 12."""
    rows = {count: [row[0] for row in compared(build_results(), count).rows] for count in (1, 2, 12)}
    assert [next(name for name in rows[count] if "adapters of one base" in name).split()[0] for count in (1, 2, 12)] == ["5", "2", "12"]


def test_an_unmeasured_speed_names_the_command_that_measures_it(cli, tmp_path: Path) -> None:
    """Catches a table of "not measured" that does not say how to measure, and one that goes on asking after it was."""
    (tmp_path / "results.json").write_text(json.dumps(passing_results()))
    assert "qmerge bench --base" in cli("advise", tmp_path / "results.json").err
    (tmp_path / "rich.json").write_text(json.dumps(rich_results()))
    assert "qmerge bench" not in cli("advise", tmp_path / "rich.json").err


def test_command(cli, tmp_path: Path) -> None:
    """Catches options that are parsed and forgotten, and hostile names in a terminal."""
    (tmp_path / "results.json").write_text(json.dumps(passing_results()))
    answer = cli("advise", tmp_path / "results.json")
    assert answer.code == 0 and answer.out.startswith("Ship nf4: nf4. ") and NOT_MEASURED in answer.out
    assert cli("advise", tmp_path / "results.json", "--adapters", 12, "--engine", "vllm").out.startswith("Keep the 12 adapters separate. ")
    table = json.loads(cli("advise", tmp_path / "results.json", "--json").out)
    assert table["action"] == "ship nf4" and table["table"]["heads"][1:] == ["separate", "merged", "nf4"]
    assert cli("advise", tmp_path / "results.json", "--adapters", 0).code == 2


@pytest.mark.parametrize("kind", ["none", "gptq", "awq", "bitsandbytes", "compressed-tensors", "fp4"])
def test_snippets_compile_and_name_their_packages(kind: str) -> None:
    """Catches a loader snippet with a typing error, and one without the package that the format needs."""
    for engine, language, code in snippets(kind):
        assert engine in ("transformers", "vLLM", "SGLang") and "MODEL" in code
        if language == "python":
            compile(code, engine, "exec")
            assert kind == "none" or {"gptq": "gptqmodel", "awq": "gptqmodel", "compressed-tensors": "compressed-tensors"}.get(kind, "bitsandbytes") in code
    assert set(ENGINES) == {"transformers", "vllm", "sglang"}
