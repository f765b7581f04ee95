"""Do the sections of optional measurements hold what was measured, and are they there only then?"""

from __future__ import annotations

from report_rich import rich_results
from test_report_results import build_results

from qmerge.report.html import render_html
from qmerge.report.markdown import render_markdown
from qmerge.report.sections import baseline, generation, perplexity, sections, serving, speed, tasks, text_of

TITLES = ["Against the baseline", "Perplexity by protocol", "Greedy continuations against separate", "Benchmarks", "Serving", "Serving speed"]


def _rows(section) -> list[list[str]]:
    return [[text_of(cell) for cell in row] for row in section.rows]


def test_sections_are_there_only_where_measured() -> None:
    """Catches empty tables, and a section that one of the two pages forgot."""
    assert [part.title for part in sections(rich_results())] == TITLES
    assert [part.title for part in sections(build_results())] == ["Benchmarks"] and sections({}) == []
    for page, mark in ((render_markdown(rich_results()), "## {}\n"), (render_html(rich_results()), "<h2>{}</h2>")):
        assert all(mark.format(title) in page for title in TITLES)


def test_every_row_has_a_cell_per_head() -> None:
    """Catches a column that was added to the rows and not to the heads."""
    for part in sections(rich_results()):
        assert {len(row) for row in part.rows} == {len(part.heads)} and all(column < len(part.heads) for column in part.right)


def test_tasks_are_told_with_difference_and_flips() -> None:
    """Catches an accuracy without its paired difference, and a column of margins that were not measured."""
    assert _rows(tasks(build_results())) == [["nf4", "gsm8k", "41.2 % (38.2 to 44.2)", "−0.4 points (−1.5 to 0.7)", "9", "0.74"]]
    found = tasks(rich_results())
    assert found.heads[-1] == "gold margin, nats" and found.notes == ("By chance: arc_easy 25.0 %, piqa 25.0 %, winogrande 25.0 %.",)
    assert _rows(found)[0] == ["separate", "arc_easy (acc)", "41.2 % (38.2 to 44.2)", "0 (reference)", "", "", ""]


def test_margins_and_means_over_tasks_are_named() -> None:
    """Catches an accuracy whose metric is not said, a margin without its sign and interval, and keys of the file shown as names of tasks."""
    results = build_results()
    found = results["arms"]["nf4"]["tasks"]
    found["gsm8k"] |= {"metric": "acc_norm", "margin_delta": {"value": -0.0123, "ci_low": -0.02, "ci_high": -0.0046, "n": 400, "unit": "nats"}}
    found["macro_accuracy_delta"] = found["macro_bootstrap"] = {"value": -0.004, "ci_low": -0.01, "ci_high": 0.002, "n": 400, "unit": "share"}
    rows = _rows(tasks(results))
    assert [row[1] for row in rows] == ["gsm8k (acc_norm)", "mean over tasks", "mean over tasks, bootstrap"]
    assert rows[0][-1] == "−0.0123 (−0.0200 to −0.0046)" and rows[1][3] == "−0.4 points (−1.0 to 0.2)"


def test_protocols_and_generation() -> None:
    """Catches one unit's figure under another's name, and a median at the full length that is told as a position."""
    rows = _rows(perplexity(rich_results()))
    assert rows[2] == ["nf4", "wikitext-2", "perplexity per token", "13.20 (13.00 to 13.40)", "1.0040 (1.0030 to 1.0050)"]
    assert {row[2] for row in rows if row[1] == "lm-eval"} == {"perplexity per word", "perplexity per byte", "bits per byte"}
    results = rich_results()
    assert _rows(generation(results))[1] == ["nf4", "gsm8k-test", "52.0 % (47.0 to 57.0)", "57.5 (45.5 to 69.5)", "64", "128"]
    results["arms"]["nf4"]["generation"]["gsm8k-test"]["first_divergence"] |= {"value": 128, "ci_low": None}
    assert _rows(generation(results))[1][3] == "≥ 128"


def test_baseline_says_new_old_and_how() -> None:
    """Catches a difference without its two values, and unpaired ones that are not said so; what got worse stands first."""
    found = baseline(rich_results())
    assert _rows(found)[0] == ["nf4", "wikitext-2", "mean KL (nats/token)", "0.00030", "0.00010", "+0.00020 (+0.00018 to +0.00022)", "fail"]
    assert found.notes[0].startswith("1 of 2 differences come from the two intervals")
    told = rich_results()
    told["verdict"]["checks"][-1]["unpaired"] = "old.npz is not beside the baseline"
    assert baseline(told).notes[0].endswith("not token by token: old.npz is not beside the baseline.")


def test_serving_names_sizes_times_and_kernels() -> None:
    """Catches seconds shown as milliseconds, bytes without their unit, and batches in the order of words (1, 32, 8)."""
    assert _rows(serving(rich_results()))[2] == ["nf4", "8.11 MB", "1.42 s (1.37 to 1.47)", "11.3 MB", "17 MB", "13 MB", "31.2 ms (30.1 to 32.3)", "bitsandbytes gemv 4-bit", "transformers, bitsandbytes"]
    found = speed(rich_results())
    assert found.heads[1:] == ("prefill, batch 1", "prefill, batch 8", "prefill, batch 32", "decode, batch 1", "decode, batch 8", "decode, batch 32")
    assert _rows(found)[0][4:] == ["41.0 (40.2 to 41.8)", "226 (221 to 230)", "574 (563 to 585)"]
    assert "cpu with 2 threads" in serving(rich_results()).how
    results = rich_results()
    for row in results["serving"]["rows"].values():
        row["decode_tokens_per_s"] = {"16": row["decode_tokens_per_s"]["8"], "2": row["decode_tokens_per_s"]["1"], "two": row["decode_tokens_per_s"]["1"]}
        del row["prefill_tokens_per_s"]
    assert speed(results).heads[1:] == ("decode, batch 2", "decode, batch 16"), "whatever sizes were measured"
