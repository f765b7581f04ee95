"""Are results inside a budget, and not worse than an accepted run? `qmerge compare`, `report`, `run` and `qmerge.compare` all go this way."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qmerge.api.merging import Hear, Place
from qmerge.api.values import EvalResult, Verdict, verdict_of

if TYPE_CHECKING:
    from qmerge.quality.sidecar import Scores

UNJUDGED = {"verdict": {"state": "inconclusive"}}
"""what stands for a stored verdict, which a new one never rests on"""


def compare(
    results: EvalResult | Place, *, budget: Place | Mapping[str, Any] = "default", baseline: Place | None = None, ignore_versions: bool = False, recompute: bool = False, strict: bool = False
) -> Verdict:
    """The verdict on ``results``: what `evaluate` gave, or the path of a results.json. The same as ``qmerge compare``.

    ``budget``: ``"strict"``, ``"default"``, ``"lenient"``, a YAML file, or limits as ``{"kl_mean": {"max": 0.01}}``. ``baseline``: older results to hold the candidates against too, paired token by
    token where both .npz are there. ``ignore_versions``: although other versions of the libraries measured them. ``recompute``: judge numbers computed anew from the files beside ``results``.
    ``strict``: an inconclusive verdict exits with 3 as well.

    Raises `UsageProblem` for a budget or a file that is none, `Refused` for damaged results and for a baseline that was measured otherwise. A failed verdict is a value, not an error;
    ``.require()`` makes it one.
    """
    from qmerge.quality.compare import budget_of, exit_code

    limits, older = budget_of(budget), None if baseline is None else str(baseline)
    if isinstance(results, EvalResult) and results.path is None:
        judged = judged_again(dict(results.content), results.tokens, limits, older, ignore_versions)
    else:
        path = results.path if isinstance(results, EvalResult) else results
        judged = judge(str(path), limits, older, ignore_versions, lambda _: None, recompute=recompute)
    return verdict_of(judged["verdict"], exit_code(judged["verdict"], strict))


def judge(path: str, limits: dict[str, Any], baseline: str | None, ignore_versions: bool, warn: Hear, *, recompute: bool = False) -> dict[str, Any]:
    """The results at ``path`` with the verdict that ``limits`` (a budget, read) and ``baseline`` give them now."""
    from qmerge.report.load import check_whole, load_results

    results = load_results(path) | UNJUDGED
    check_whole(results, path)
    if recompute:
        results = recomputed(Path(path), results, warn)
    return judged_again(results, path, limits, baseline, ignore_versions)


def recomputed(path: Path, stored: dict[str, Any], warn: Hear) -> dict[str, Any]:
    """The results with their numbers computed anew; warns where the stored ones differ."""
    from qmerge.quality.compare import differing_keys
    from qmerge.quality.sidecar import recompute_file

    found = recompute_file(path, stored)
    keys = [key for part in ("arms", "tasks") for key in differing_keys(found.get(part), stored.get(part), part)]
    if keys:
        warn(f"{len(keys)} stored numbers are not what the files beside {path.name} give: {', '.join(keys[:5])}{', …' if len(keys) > 5 else ''}")
    return found


def judged_again(results: dict[str, Any], source: str | Path | Scores, limits: dict[str, Any], baseline: str | None, ignore_versions: bool) -> dict[str, Any]:
    """``results`` with a verdict from ``limits`` and, where given, from the results at ``baseline``, paired where both have their per-token numbers. ``source``: the path of ``results``, or their
    per-token numbers themselves."""
    from qmerge.quality.compare import compare as verdict_on
    from qmerge.report.load import load_results

    old = load_results(baseline, whole=True) if baseline else None
    return results | {"verdict": verdict_on(results, limits, old, ignore_versions=ignore_versions, tokens=_tokens(source, baseline) if baseline else None)}


def check_versions(baseline: dict[str, Any], ignore_versions: bool) -> None:
    """What is known before anything is measured: ``Refused`` where the baseline is of other versions than those installed."""
    from qmerge.quality.baseline import check_fingerprints
    from qmerge.quality.fingerprint import versions

    told = {"fingerprint": {"versions": baseline["fingerprint"].get("versions")}}
    if told["fingerprint"]["versions"]:
        check_fingerprints({"fingerprint": {"versions": versions()}}, told, ignore_versions)


def _tokens(new: str | Path | Scores, old: str) -> tuple[Scores, Scores] | str:
    """The arrays of both, or which are missing. Imported here: without them a verdict needs no torch."""
    from qmerge.quality.baseline import SIDES

    places = [None if isinstance(new, Mapping) else Path(new).with_suffix(".npz"), Path(old).with_suffix(".npz")]
    missing = [f"{place.name} is not beside {whose}" for place, whose in zip(places, SIDES, strict=True) if place is not None and not place.is_file()]
    if missing:
        return " and ".join(missing)
    from qmerge.quality.sidecar import read_scores

    return new if isinstance(new, Mapping) else read_scores(Path(new).with_suffix(".npz")), read_scores(Path(old).with_suffix(".npz"))
