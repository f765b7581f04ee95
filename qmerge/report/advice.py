"""What should the reader do: keep the adapter separate, ship a file, or measure more? One sentence, and the reason from measured values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qmerge.report import fields
from qmerge.report.clean import clean
from qmerge.report.fields import Results
from qmerge.report.numbers import MISSING, format_limit, format_metric, format_value, metric_kind, metric_label
from qmerge.units import format_bytes


@dataclass(frozen=True)
class Advice:
    """``action``: ``ship``, ``keep_separate``, ``keep_accepted``, ``collect_more`` or ``unknown``. Strings are plain text with names cleaned, not yet escaped."""

    action: str
    candidate: str | None
    sentence: str
    reason: str


def worst_kl(results: Results, candidate: str) -> tuple[float, str] | None:
    """The candidate's largest mean KL over the texts, and the text: a file is as good as where it is worst."""
    texts = fields.as_dict(fields.one_arm(results, candidate).get("texts"))
    measured = [(kl, text) for text in texts if (kl := fields.value(results, candidate, text, "kl_mean")) is not None]
    return max(measured) if measured else None


def by_kl(results: Results, candidates: list[str]) -> list[str]:
    """Smallest worst-case KL first, then the smaller file, then the name; unmeasured candidates last."""

    def rank(name: str) -> tuple[float, float, str]:
        worst = worst_kl(results, name)
        size = fields.number(fields.one_arm(results, name).get("bytes"))
        infinite = float("inf")
        return (worst[0] if worst else infinite, infinite if size is None else size, name)

    return sorted(candidates, key=rank)


def _size(results: Results, name: str) -> float | None:
    size = fields.number(fields.one_arm(results, name).get("bytes"))
    return size if size and size > 0 else None


def _ship_reason(results: Results, name: str, others: list[str]) -> str:
    said = []
    worst = worst_kl(results, name)
    if worst:
        kl, text = worst
        floor = fields.number(fields.noise_floor(results, text).get("value"))
        where = f", {kl / floor:.1f} × the noise floor" if floor else ""
        place = ", where it is farthest from the separate model," if len(fields.text_names(results)) > 1 else ""
        said.append(f"on {clean(text)}{place} its mean KL is {format_value(kl, 'kl')} nats/token{where}")
    for text in fields.text_names(results):
        if fields.value(results, name, text, "retention") is not None:
            said.append(f"it keeps {format_metric(fields.metric(results, name, text, 'retention'), 'percent')} of the adapter's gain on {clean(text)}")
            break
    size = _size(results, name)
    if size:
        said.append(f"it takes {format_bytes(int(size))}")
    reason = "; ".join(said) or "every check of the budget passed"
    smaller = [other for other in others if size and (_size(results, other) or size) < 0.6 * size]
    if smaller:  # a dense file always wins on KL, and is rarely what one wants to ship
        reason += f". {clean(smaller[0])} passes too, at {format_bytes(int(_size(results, smaller[0]) or 0))}: ship it instead if size matters more"
    if fields.verdict_state(results) in ("fail", "inconclusive"):  # the verdict is about all candidates, the advice about one
        reason += f". {clean(name)} passes all of its own checks; the verdict is about the other candidates"
    return _sentence(reason)


def _sentence(text: str) -> str:
    return _ended(text[:1].upper() + text[1:])


def _ended(text: str) -> str:
    return text if text.endswith(".") else f"{text}."


def describe_check(check: dict[str, Any]) -> str:
    """``"mean KL on gsm8k is 0.038 (0.036 to 0.041), the budget asks for ≤ 0.005"``."""
    name = check.get("metric")
    text = f" on {clean(check['text'])}" if check.get("text") else ""
    measured = format_metric(check, metric_kind(name))
    limit = clean(format_limit(name, check.get("limit")))
    if str(name).endswith("_vs_baseline"):
        return f"{clean(metric_label(name))}{text} is {measured}" + (f", and the margin {limit}" if limit != MISSING else "")
    return f"{clean(metric_label(name))}{text} is {measured}" + (f", the budget asks for {limit}" if limit != MISSING else "")


def _first_reason(results: Results, name: str, state: str) -> str:
    own = fields.checks(results, name)
    shared = [check for check in fields.checks(results) if str(check.get("arm")) not in fields.candidate_names(results)]
    for check in own + shared:
        if check.get("state") == state and fields.number(check.get("value")) is None and isinstance(check.get("reason"), str):
            return _ended(clean(check["reason"], 400))
        if check.get("state") == state:
            return f"{clean(check.get('arm', name))}: {describe_check(check)}."
    stated = fields.reasons(results)
    return _ended(clean(stated[0], 400)) if stated else "The results name no reason."


def recommend(results: Results) -> Advice:
    """Ship the passing candidate with the smallest KL; else ask for more text if a candidate is undecided; else keep the adapter separate."""
    names = [name for name in fields.candidate_names(results) if name not in fields.FOR_COMPARISON]
    states = {name: fields.candidate_state(results, name) for name in names}
    passed, undecided, failed = (by_kl(results, [n for n in names if states[n] == s]) for s in ("pass", "inconclusive", "fail"))
    if passed:
        best = passed[0]
        return Advice("ship", best, f"Ship {clean(best)}.", _ship_reason(results, best, passed[1:]))
    if undecided:
        best = undecided[0]
        return Advice(
            "collect_more",
            best,
            f"Collect more evaluation text before deciding about {clean(best)}; until then keep the adapter separate.",
            _first_reason(results, best, "inconclusive"),
        )
    if failed:
        best = failed[0]
        wrong = [check for check in fields.checks(results) if check.get("state") == "fail" and str(check.get("arm")) in (best, *fields.NOT_CANDIDATES)]
        if wrong and all(str(check.get("metric")).endswith("_vs_baseline") for check in wrong):
            return Advice("keep_accepted", None, f"Keep what was accepted before: {clean(best)} is inside the budget and worse than the baseline.", _first_reason(results, best, "fail"))
        which = "the candidate is" if len(names) == 1 else "every candidate is"
        return Advice("keep_separate", None, f"Keep the adapter separate: {which} outside the budget.", _first_reason(results, best, "fail"))
    return Advice("unknown", None, "No recommendation.", "No candidate was checked against a budget.")
