"""What does a call give back? Frozen values with names, units and intervals."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qmerge.errors import EXIT_CODES, BelowBudget, CheckFailed
from qmerge.types import Metric

if TYPE_CHECKING:
    from qmerge.quality.sidecar import Scores


@dataclass(frozen=True)
class MergeResult:
    """A written checkpoint. ``nbytes``: of all its files. ``delta_survival``: per linear, how much of ΔW is in the written weights, ⟨W_out − W_base, ΔW⟩ / ⟨ΔW, ΔW⟩; 1 is all of it.

    ``notes`` are sentences that a person has to read, such as warnings of the plan. ``floor_s``: what the matrix products of its method alone would take, at the rate that this machine showed before it began; None where that
    cannot be told (`qmerge.pipeline.floor`).
    """

    out: Path
    format: str
    nbytes: int
    elapsed_s: float
    peak_rss_bytes: int
    delta_survival: Mapping[str, float] = field(repr=False)
    notes: tuple[str, ...] = ()
    floor_s: float | None = None


@dataclass(frozen=True)
class ArmResult:
    """One of the models that were measured. ``texts``: text -> name of a metric -> value with its 95 % interval and unit. ``kind``: ``base``, ``separate``, ``merged``, ``rtn``, ``original``, or how
    a candidate is quantized (``gptq``, ``none``, …); ``nbytes``: of its weight files, None for what is on no disk."""

    name: str
    kind: str
    nbytes: int | None
    texts: Mapping[str, Mapping[str, Metric]] = field(repr=False)


@dataclass(frozen=True)
class LimitCheck:
    """One line of a verdict. ``limit``: such as ``{"max": 0.05}``, or None; ``state``: ``pass``, ``fail``, ``inconclusive`` or ``skipped``; ``value`` and its 95 % interval are None where nothing was measured."""

    arm: str
    text: str
    metric: str
    value: float | None
    ci_low: float | None
    ci_high: float | None
    limit: Mapping[str, float] | None
    state: str
    reason: str


@dataclass(frozen=True)
class Verdict:
    """``state``: ``pass``, ``fail`` or ``inconclusive`` (the text is too little to tell); ``reasons``: sentences, the decisive ones first. ``exit_code``: what `qmerge compare` would exit with."""

    state: str
    reasons: tuple[str, ...] = field(repr=False)
    checks: tuple[LimitCheck, ...] = field(repr=False)
    budget: str
    exit_code: int

    @property
    def meaning(self) -> str:
        """Of the exit code, in words."""
        return EXIT_CODES[self.exit_code]

    def require(self) -> None:
        """Raises `BelowBudget` where the exit code is not 0: for scripts that must stop there."""
        if self.exit_code:
            raise BelowBudget(f"the verdict is {self.state}", expected=f"within the budget {self.budget}", found="; ".join(self.reasons[:3]), fix="look at the report; keep the adapter separate, or merge with other settings")


@dataclass(frozen=True)
class EvalResult:
    """Results as `qmerge.evaluate` measures them and ``results.json`` holds them.

    ``path``: of results.json, None where nothing was written. ``arms``: by name, ``base``, ``separate`` (the reference) and ``merged`` first. ``floor``: text -> mean KL, in nats per
    token, of the reference as its public loader runs it to the reference in the evaluation's arithmetic. ``content``: all of results.json (docs/results.md). ``tokens``: text -> arm ->
    arrays with one number per scored token (``nll_ref``, ``nll_cand``, ``kl`` in nats, ``agree``, ``delta_p``, ``window``, ``doc``); empty where the .npz is not there.
    """

    path: Path | None
    arms: Mapping[str, ArmResult]
    floor: Mapping[str, Metric]
    verdict: Verdict
    notes: tuple[str, ...]
    content: Mapping[str, Any] = field(repr=False)
    tokens: Scores = field(repr=False)

    @property
    def candidates(self) -> tuple[ArmResult, ...]:
        """The arms that are judged."""
        from qmerge.quality.compare import REFERENCE_ARMS

        return tuple(arm for arm in self.arms.values() if arm.name not in REFERENCE_ARMS)


@dataclass(frozen=True)
class CheckResult:
    """One check of `verify`, in words."""

    name: str
    passed: bool
    detail: str


@dataclass(frozen=True)
class Verification:
    """What `verify` found, check by check."""

    out: Path
    checks: tuple[CheckResult, ...]

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    def require(self) -> None:
        """Raises `CheckFailed`, naming the first check that failed."""
        if failed := [check for check in self.checks if not check.passed]:
            raise CheckFailed(f"{len(failed)} of {len(self.checks)} checks failed", where=str(self.out), found=f"{failed[0].name}: {failed[0].detail}", fix="do not serve this checkpoint; merge again")


def metric_of(row: Mapping[str, Any]) -> Metric:
    """From JSON."""
    return Metric(row.get("value"), row.get("ci_low"), row.get("ci_high"), int(row.get("n") or 0), str(row.get("unit") or ""), row.get("note"))


def verdict_of(row: Mapping[str, Any], exit_code: int) -> Verdict:
    """From JSON, and the exit code that goes with it."""
    names = ("arm", "text", "metric", "value", "ci_low", "ci_high", "limit", "state", "reason")
    return Verdict(row["state"], tuple(row["reasons"]), tuple(LimitCheck(**{name: check.get(name) for name in names}) for check in row["checks"]), str(row.get("budget", "default")), exit_code)


def eval_result(content: Mapping[str, Any], exit_code: int, path: Path | None, tokens: Scores, notes: tuple[str, ...] = ()) -> EvalResult:
    """From results.json's content, and what lies beside it."""
    arms = {
        name: ArmResult(name, str(row["kind"]), row.get("bytes"), {text: {key: metric_of(metric) for key, metric in one["metrics"].items()} for text, one in row["texts"].items()})
        for name, row in content["arms"].items()
    }
    floor = {text: metric_of(row) for text, row in content.get("noise_floor", {}).items()}
    return EvalResult(path, arms, floor, verdict_of(content["verdict"], exit_code), notes, content, tokens)
