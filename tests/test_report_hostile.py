"""Do names from outside stay text: in HTML, Markdown, the terminal, whatever part of the results they stand in?"""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
from report_rich import hostile_rich_results, rich_results
from test_report_html import _read
from test_report_markdown import _tables

from qmerge.report.choice import choose, compared
from qmerge.report.html import render_html
from qmerge.report.markdown import render_markdown, summary_markdown
from qmerge.report.sections import sections
from qmerge.report.tables import plain_table, terminal_table

bs4 = pytest.importorskip("bs4")
LONG = [0, 10_000]


def _shape(page: str) -> list[tuple[str, tuple[str, ...]]]:
    """Every element with its attributes' names and classes, as a parser makes them that forgives what browsers forgive; the marks inside drawings, which follow the data, are left out."""
    soup = bs4.BeautifulSoup(page, "html.parser")
    kept = [element for element in soup.find_all(True) if element.name not in ("path", "text", "rect", "desc")]
    return [(element.name, (*sorted(element.attrs), *element.get("class", []))) for element in kept]


def _kinds(page: str) -> set[str]:
    """The kinds of nodes that a Markdown parser with tables, bare addresses and mathematics finds."""
    mistune = pytest.importorskip("mistune")
    found: set[str] = set()

    def walk(nodes: list[dict[str, Any]]) -> None:
        for node in nodes:
            found.add(node["type"])
            walk(node.get("children") or [])

    walk(mistune.create_markdown(renderer=None, plugins=["table", "url", "strikethrough", "math", "footnotes", "task_lists"])(page))
    return found


@pytest.mark.parametrize("longer", LONG)
def test_html_has_the_elements_and_attributes_of_a_clean_report(longer: int) -> None:
    """Catches one name anywhere that brings an element or an attribute along, closes one, or is cut in the middle of an entity."""
    page = render_html(hostile_rich_results(longer))
    assert _shape(page) == _shape(render_html(rich_results()))
    assert "\x1b" not in page and "\u202e" not in page and "\ud800" not in page and len(page) < 3_000_000
    for tag, attributes in _read(page):
        assert not [name for name in attributes if name.startswith("on") or name in ("src", "href")], tag


@pytest.mark.parametrize("longer", LONG)
def test_markdown_tables_keep_their_shape(longer: int) -> None:
    """Catches a pipe or a newline that shifts columns, and anything that formats, links, mentions or runs; also in the notebook's summary."""
    plain = [len(rows) for rows in _tables(render_markdown(rich_results()))]
    for results, render in ((hostile_rich_results(longer), render_markdown), (hostile_rich_results(longer), summary_markdown)):
        page = render(results)
        found = _tables(page)
        assert all(len({row.count("|") for row in rows}) == 1 for rows in found)
        assert "<" not in page and "@" not in page and "$" not in page and "](" not in page and "http:" not in page and "\x1b" not in page and "\u202e" not in page
        assert not re.search(r"(?<!\*)\*(?!\*)", page) and page.count("`") == (2 if render is render_markdown else 0), "the fingerprint's digest is the only code"
        assert _kinds(page) <= _kinds(render_markdown(rich_results()))
        assert len(page.encode()) < 100_000
    if not longer:
        assert [len(rows) for rows in _tables(render_markdown(hostile_rich_results()))][: len(plain) - 3] == plain[: len(plain) - 3]


@pytest.mark.parametrize("longer", LONG)
def test_terminals_get_no_escapes_and_no_wide_lines(longer: int) -> None:
    """Catches a name that writes to the terminal's title or colours, and a table that a name makes a thousand columns wide."""
    results = hostile_rich_results(longer)
    words = [terminal_table(results), *(plain_table(section) for section in [*sections(results), compared(results)])]
    words += [text for adapters in (1, 9) for found in [choose(results, adapters)] for text in (found.sentence, found.reason, found.alternative)]
    for text in words:
        assert not any(ord(char) < 32 and char != "\n" or 0x7F <= ord(char) < 0xA0 or char in "\u202e\u200b" for char in text)
    assert max(len(line) for line in words[0].splitlines()) <= 110
    assert max(len(line) for text in words[1:-6] for line in text.splitlines()) <= 150


@pytest.mark.parametrize("value", ["<img src=x onerror=alert(1)>", "a|b\n|c|\x1b]0;owned\x07]]>{{ 7*7 }}", "\u202e`` ` `` javascript:alert(1)" + "x" * 10_000])
def test_each_string_in_turn(value: str) -> None:
    """Catches the one field that is not cleaned: every string of the new sections, one at a time, is replaced."""
    clean_shape = None
    for path in _strings(rich_results()):
        results = copy.deepcopy(rich_results())
        node: Any = results
        for key in path[:-1]:
            node = node[key]
        node[path[-1]] = value
        page = render_markdown(results)
        assert "\x1b" not in page and "\u202e" not in page and "<img" not in page, path
        assert all(len({row.count("|") for row in rows}) == 1 for rows in _tables(page)), path
    shape = _shape(render_html(results))
    clean_shape = _shape(render_html(rich_results()))
    assert shape == clean_shape


def _strings(results: dict[str, Any]) -> list[tuple]:
    """Places of strings in serving, tasks, perplexity, verdict and fingerprint: a dozen, spread."""
    found: list[tuple] = []

    def walk(node: Any, path: tuple) -> None:
        for key, item in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
            if isinstance(item, str) and key not in ("unit", "metric", "state"):
                found.append((*path, key))
            walk(item, (*path, key))

    for part in ("serving", "verdict", "noise_floor", "fingerprint"):
        walk(results[part], (part,))
    walk(results["arms"]["nf4"]["perplexity"], ("arms", "nf4", "perplexity"))
    return found[:: max(1, len(found) // 11)]
