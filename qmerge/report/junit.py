"""How does a CI server that knows JUnit XML show the gate: one test per check?

JUnit has no word for "not known": an inconclusive check is a skipped test with its reason, as servers show it beside the passed ones
without failing the build, and a failed one under ``strict``, where it does. Only elements and attributes that Jenkins' and GitLab's readers both know.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any
from xml.sax.saxutils import escape, quoteattr

from qmerge.report import fields
from qmerge.report.clean import clean
from qmerge.report.fields import Results
from qmerge.report.numbers import MISSING, format_limit, format_metric, metric_kind, metric_label

REASON = 600
MAX_CASES = 5000


def render_junit(results: Results, strict: bool = False) -> str:
    """The file: a suite per arm, a test per check. Names are cleaned of control and other characters that XML 1.0 lacks, and escaped."""
    suites: dict[str, list[dict[str, Any]]] = {}
    for check in fields.checks(results)[:MAX_CASES]:
        suites.setdefault(clean(check.get("arm") or "evaluation"), []).append(check)
    if not suites:
        state = fields.verdict_state(results)
        suites["evaluation"] = [{"metric": "verdict", "state": state or "inconclusive", "reason": "the results hold no check"}]
    bodies = [_suite(arm, checks, strict) for arm, checks in suites.items()]
    counts = [sum(column) for column in zip(*((tests, failures) for _, tests, failures in bodies), strict=True)]
    head = f'<testsuites name="qmerge" tests="{counts[0]}" failures="{counts[1]}" errors="0">'
    return "\n".join(['<?xml version="1.0" encoding="UTF-8"?>', head, *(body for body, _, _ in bodies), "</testsuites>"]) + "\n"


def _suite(arm: str, checks: list[dict[str, Any]], strict: bool) -> tuple[str, int, int]:
    outcomes = [_outcome(check, strict) for check in checks]
    failures, skipped = outcomes.count("failure"), outcomes.count("skipped")
    head = f'  <testsuite name={quoteattr(arm)} tests="{len(checks)}" failures="{failures}" errors="0" skipped="{skipped}">'
    names = list(_names(checks))
    cases = [_case(arm, name, check, outcome) for name, check, outcome in zip(names, checks, outcomes, strict=True)]
    return "\n".join([head, *cases, "  </testsuite>"]), len(checks), failures


def _outcome(check: dict[str, Any], strict: bool) -> str:
    state = check.get("state")
    if state == "pass":
        return ""
    return "failure" if state == "fail" or (strict and state != "skipped") else "skipped"


def _names(checks: list[dict[str, Any]]) -> Iterable[str]:
    """``"mean KL (nats/token) on prose"``, unique within the arm, since servers join tests of one name."""
    seen: dict[str, int] = {}
    for check in checks:
        place = f" on {clean(check['text'])}" if check.get("text") else ""
        name = f"{clean(metric_label(check.get('metric') or 'check'))}{place}"
        seen[name] = seen.get(name, 0) + 1
        yield name if seen[name] == 1 else f"{name} ({seen[name]})"


def _case(arm: str, name: str, check: dict[str, Any], outcome: str) -> str:
    start = f'    <testcase classname={quoteattr(f"qmerge.{arm}")} name={quoteattr(name)} time="0"'
    if not outcome:
        return f"{start}/>"
    reason = clean(check.get("reason") or check.get("state") or "no reason", REASON)
    word = "inconclusive: " if check.get("state") == "inconclusive" else ""
    message = f"message={quoteattr(word + reason)}"
    if outcome == "skipped":
        return f"{start}><skipped {message}/></testcase>"
    metric = check.get("metric")
    measured, limit = format_metric(check, metric_kind(metric)), clean(format_limit(metric, check.get("limit")))
    detail = f"measured {measured}" + (f", limit {limit}" if limit != MISSING else "")
    return f'{start}><failure type="{"inconclusive" if word else "below-budget"}" {message}>{escape(detail)}</failure></testcase>'
