"""Is the gate's JUnit file what CI servers read, with the verdict's own words?"""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
from report_rich import hostile_rich_results, rich_results
from test_report_results import build_results, judge, passing_results

from qmerge.report.junit import render_junit

# What Jenkins' and GitLab's readers both know, element by element: attributes that must be there, those that may, and what may stand inside.
GRAMMAR = {
    "testsuites": ({"tests", "failures"}, {"name", "time", "errors", "disabled"}, {"testsuite"}),
    "testsuite": ({"name", "tests"}, {"failures", "errors", "skipped", "time", "timestamp", "hostname", "id", "package", "file"}, {"testcase", "properties", "system-out"}),
    "testcase": ({"name", "classname"}, {"time", "assertions", "status", "file", "line"}, {"failure", "error", "skipped", "system-out"}),
    "failure": (set(), {"message", "type"}, set()),
    "skipped": (set(), {"message", "type"}, set()),
}


def _read(page: str) -> ElementTree.Element:
    root = ElementTree.fromstring(page.encode())
    assert root.tag == "testsuites"
    for element in root.iter():
        needed, allowed, inside = GRAMMAR[element.tag]
        assert needed <= set(element.attrib) <= needed | allowed, element.tag
        assert {child.tag for child in element} <= inside
    return root


@pytest.mark.parametrize("strict", [False, True])
def test_counts_are_those_of_the_cases(strict: bool) -> None:
    """Catches a suite that says 0 failures above a failed test, which servers believe."""
    results = rich_results()
    results["verdict"]["checks"][0]["state"] = "inconclusive"
    root = _read(render_junit(results, strict))
    for suite in root:
        assert int(suite.get("tests", "")) == len(suite)
        assert int(suite.get("failures", "")) == len(suite.findall("testcase/failure")) and int(suite.get("skipped", "")) == len(suite.findall("testcase/skipped"))
    assert int(root.get("tests", "")) == len(results["verdict"]["checks"]) and int(root.get("failures", "")) == len(root.findall(".//failure")) == 2 + strict


def test_one_case_per_check_with_its_reason() -> None:
    """Catches a failed build that does not say why, and two checks under one name, which servers join into one."""
    root = _read(render_junit(build_results()))
    (failure,) = root.findall(".//failure")
    assert failure.get("message") == "naive on gsm8k-test: retention 0.031, min 0.9" and failure.text == "measured 3.1 % (1.0 to 5.2), limit ≥ 90 %"
    names = [(case.get("classname"), case.get("name")) for case in root.iter("testcase")]
    assert len(names) == len(set(names)) and ("qmerge.nf4", "mean KL (nats/token) on wikitext-2") in names
    assert [row.get("message") for row in root.iter("skipped")] == ["the gain is noise"]


def test_inconclusive_fails_only_where_the_gate_does() -> None:
    """Catches a pipeline whose exit code and test tab contradict each other."""
    results = passing_results()
    for check in results["verdict"]["checks"]:
        check["state"] = "inconclusive" if check["state"] == "pass" else check["state"]
    assert _read(render_junit(results)).get("failures") == "0"
    assert next(_read(render_junit(results)).iter("skipped")).get("message", "").startswith("inconclusive: ")
    assert _read(render_junit(results, strict=True)).get("failures") == "5"


@pytest.mark.parametrize("longer", [0, 10_000])
def test_hostile_names_stay_text(longer: int) -> None:
    """Catches an element that a name brought along, and characters that XML 1.0 has no form for: the file would not be read at all."""
    plain, hostile = (_read(render_junit(results)) for results in (rich_results(), hostile_rich_results(longer)))
    assert [element.tag for element in plain.iter()] == [element.tag for element in hostile.iter()]
    assert "\x1b" not in render_junit(hostile_rich_results()) and "\u202e" not in render_junit(hostile_rich_results())
    results = build_results()
    results["verdict"]["checks"][0]["reason"] = "".join(map(chr, (*range(32), 0x7F, 0x85, 0xFFFE, 0xFFFF, 0xD800))) + "]]>&<!--"
    _read(render_junit(results))


@pytest.mark.parametrize("verdict", [None, {}, {"state": "pass"}, {"state": "fail", "checks": [None, 7, {}]}, judge([{"state": "inconclusive", "arm": "", "text": "", "metric": "", "reason": "there is no candidate to judge"}])])
def test_odd_verdicts_are_files_too(verdict: Any) -> None:
    """Catches a traceback, or an empty file, which servers take for "no tests: fine"."""
    assert len(list(_read(render_junit({"verdict": verdict})).iter("testcase"))) >= 1


def test_commands_write_it(cli, tmp_path: Path) -> None:
    """Catches an option that is parsed and forgotten; the folder is made."""
    (tmp_path / "results.json").write_text(json.dumps(rich_results()))
    assert cli("report", tmp_path / "results.json", "--out", tmp_path / "page", "--junit", tmp_path / "ci/gate.xml").code == 0
    assert len(_read((tmp_path / "ci/gate.xml").read_text())) == 2
    assert cli("compare", tmp_path / "results.json", "--budget", "lenient", "--junit", tmp_path / "again.xml").code == 3
    assert int(_read((tmp_path / "again.xml").read_text()).get("failures", "")) >= 1
    assert cli("compare", tmp_path / "results.json", "--junit", tmp_path).code == 2
