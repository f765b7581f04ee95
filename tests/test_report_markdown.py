"""Is report.md complete, small and inert?"""

from __future__ import annotations

import re

from test_report_results import build_results, hostile_results, passing_results

from qmerge.report.clean import clean, markdown_text
from qmerge.report.html import render_html
from qmerge.report.markdown import render_markdown
from qmerge.report.write import write_report


def _tables(page: str) -> list[list[str]]:
    blocks = [block.splitlines() for block in page.split("\n\n")]
    return [block for block in blocks if block[0].startswith("|")]


def test_verdict_comes_first() -> None:
    """Catches a CI summary whose answer is below the fold."""
    assert render_markdown(passing_results()).splitlines()[0] == "**✅ Pass**: all 5 checks are inside the budget default; 1 could not be made."
    lines = render_markdown(build_results()).splitlines()
    assert lines[0] == "**❌ Fail**: naive on gsm8k-test: retention 0.031, min 0.9"
    assert lines[2].startswith("**Recommendation: Ship nf4.**")


def test_every_section_is_there() -> None:
    """Catches a section that vanished."""
    page = render_markdown(build_results())
    for words in ("Recommendation: Ship nf4.", "## Gate", "## Arms on gsm8k-test", "Noise floor on wikitext-2: 0.000080", "## Linears", "## Environment", "## How to"):
        assert words in page
    assert "&#" not in page, "ordinary names and numbers stay readable as text"


def test_a_reader_who_knows_no_word_of_it_is_told() -> None:
    """Catches a CI summary full of arms, KL and retention that only the README explains, and a skipped check without its reason."""
    for page in (render_markdown(passing_results()), render_html(passing_results())):
        assert "how far an arm" in page and "retention the share" in page and "separate, the reference" in page
        assert page.count("skipped: ") == 1


def test_settings_that_do_not_fit_are_counted() -> None:
    """Catches a fingerprint that ends in the middle of a text without a word."""
    results = build_results()
    results["fingerprint"] |= {f"more{index}": index for index in range(60)}
    assert re.search(r"\n\d+ more settings are in report.html", render_markdown(results)) and "more settings" not in render_markdown(build_results())


def test_columns_are_constant_with_hostile_names() -> None:
    """Catches a name with a pipe or a newline that shifts every column after it."""
    for results in (build_results(), hostile_results()):
        found = _tables(render_markdown(results))
        assert len(found) >= 6
        for rows in found:
            assert len({row.count("|") for row in rows}) == 1, rows


def test_nothing_active_survives() -> None:
    """Catches elements, links, mentions, emphasis, math and control characters that come from names."""
    page = render_markdown(hostile_results())
    assert "<" not in page and "\x1b" not in page and "\u202e" not in page
    assert "http:" not in page and "@" not in page and "$" not in page and "](" not in page
    assert not re.search(r"(?<!\*)\*(?!\*)", page)
    page.encode("utf-8")


def test_size_stays_below_the_limit_of_a_summary() -> None:
    """Catches a report that CI refuses to show because a model has thousands of linears or arms."""
    results = hostile_results()
    arm = next(name for name in results["arms"] if name.startswith("nf4"))
    for index in range(300):
        results["arms"][f"{arm}{index}"] = results["arms"][arm]
        results["verdict"]["checks"].append(results["verdict"]["checks"][0])
    assert len(render_markdown(results).encode()) < 100_000


def test_text_helpers() -> None:
    """Catches list markers and headings made by a name at the start of a line, and names that grow without bound."""
    assert markdown_text("model.layers.0.self_attn.q_proj") == "model.layers.0.self_attn.q_proj"
    assert markdown_text("# x").startswith("&#35;") and markdown_text("- x").startswith("&#45;") and markdown_text("1. x") == "1&#46; x"
    assert markdown_text("_x_") == "&#95;x&#95;"
    assert clean("a\x1b]0;title\x07b\x1b[1;31mc\n\td\u200be") == "abc de"
    assert len(clean("y" * 10_000)) == 160


def test_write_is_whole_and_repeatable(tmp_path) -> None:
    """Catches half-written reports, left-over temporary files, and bytes that change between two runs on the same results."""
    first = [path.read_bytes() for path in write_report(build_results(), tmp_path / "new")]
    again = write_report(build_results(), tmp_path / "new")
    assert [path.read_bytes() for path in again] == first
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["report.html", "report.md"]
