"""Intervals cover what they say and the gate finds what is there, on data whose truth is known; the figures are in docs/measurements/statistics.md."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
from oracles import cluster_slow
from scipy import stats as scipy_stats

from qmerge.quality.stats import (
    cluster_ratio,
    holm,
    macro_bootstrap,
    macro_share,
    mcnemar_exact,
    paired_share,
    ratio_error,
    smallest_difference,
)

SCRIPTS = Path(__file__).parents[1] / "scripts"
RECORD = SCRIPTS.parent / "docs" / "measurements" / "statistics.json"


@pytest.fixture(scope="module")
def bench():
    sys.path.insert(0, str(SCRIPTS))
    try:
        import bench_stats
    finally:
        sys.path.remove(str(SCRIPTS))
    return bench_stats


def test_cluster_errors_are_bell_and_mccaffreys():
    """The closed forms of the traces, against the matrices themselves, with clusters of unequal size and weights."""
    random = np.random.default_rng(0)
    for groups in (2, 3, 7):
        clusters = np.repeat(np.arange(groups), random.integers(1, 12, groups))
        num, den = random.normal(size=len(clusters)), random.uniform(0.2, 2.0, len(clusters))
        assert ratio_error(num, den, clusters) == pytest.approx(cluster_slow.ratio_error(num, den, clusters), rel=1e-9)
    equal = ratio_error(random.normal(size=40), np.ones(40), np.repeat(np.arange(8), 5))
    assert equal[2] == pytest.approx(7.0)


def test_one_large_cluster_widens_the_interval():
    """Nine short documents and one long one as ten observations."""
    sizes = np.array([100] + [5] * 9)
    _, _, df = ratio_error(np.arange(145.0), np.ones(145), np.repeat(np.arange(10), sizes))
    assert df < 2.0


def test_holm_is_the_closure_of_bonferroni():
    """Adjusted p-values that fall with rank, or are compared in the wrong order."""
    random = np.random.default_rng(1)
    for n in (1, 2, 5, 7):
        p = (random.uniform(size=n) ** 3).round(2).tolist()
        assert holm(p) == pytest.approx(cluster_slow.holm(p))


def test_paired_share_is_bonett_and_prices_interval():
    """No flips in few items as proof of no change."""
    for n, lost, won in ((50, 0, 0), (200, 3, 9), (1000, 40, 10)):
        difference = np.array([-1.0] * lost + [1.0] * won + [0.0] * (n - lost - won))
        p12, p21 = (lost + 1) / (n + 2), (won + 1) / (n + 2)
        half = scipy_stats.t.ppf(0.975, n - 1) * math.sqrt((p12 + p21 - (p12 - p21) ** 2) / (n + 1))
        found = paired_share(difference, np.arange(n))
        assert found.value == pytest.approx((won - lost) / n) and found.ci_high - found.value == pytest.approx(half)
    assert paired_share(np.zeros(1), np.zeros(1)).ci_low is None and paired_share(np.zeros(0), np.zeros(0)).value is None


def test_macro_bootstrap_is_the_plain_bootstrap():
    """The multinomial short cut, against drawing clusters one by one; tasks weigh the same whatever their size."""
    random = np.random.default_rng(2)
    differences = [random.choice([-1.0, 0, 0, 0, 1], size=n) for n in (60, 200)] + [random.uniform(-0.5, 0.3, 80)]
    clusters = [np.arange(60), np.arange(200) // 3, np.arange(80) // 2]
    found = macro_bootstrap(differences, clusters, seed=3)
    assert found.value == pytest.approx(np.mean([d.mean() for d in differences]))
    low, high = cluster_slow.macro_bootstrap(differences, clusters, 1500, 4)
    assert (found.ci_low, found.ci_high) == pytest.approx((low, high), abs=0.1 * (high - low))
    assert macro_bootstrap(differences, clusters, seed=3) == found != macro_bootstrap(differences, clusters, seed=5)


def test_macro_interval_is_welchs():
    """Variances of tasks added with weights of their items, or the degrees of the largest task for all."""
    random = np.random.default_rng(3)
    a, b = random.choice([-1.0, 0, 1], size=30), random.choice([-1.0, 0, 0, 1], size=400)
    found = macro_share([a, b], [np.arange(30), np.arange(400)])
    padded = [np.concatenate([x, [-1.0, 1.0]]) for x in (a, b)]
    variances = [x.var(ddof=1) / len(x) for x in padded]
    df = sum(variances) ** 2 / sum(v * v / (len(x) - 1) for v, x in zip(variances, (a, b), strict=True))
    half = scipy_stats.t.ppf(0.975, df) * math.sqrt(sum(variances)) / 2
    assert found.ci_high - found.value == pytest.approx(half) and found.value == pytest.approx((a.mean() + b.mean()) / 2)
    assert macro_share([a, np.zeros(1)], [np.arange(30), np.zeros(1)]).ci_low is None and macro_share([], []).value is None


@pytest.mark.parametrize(("groups", "sizes"), [(5, "unequal"), (20, "equal"), (20, "unequal"), (200, "unequal")])
def test_means_cover_with_few_and_many_unequal_clusters(bench, groups, sizes):
    """t with G - 1 degrees covers far less on five documents of unequal length; tokens taken for independent, a third."""
    from qmerge.quality.stats import cluster_mean

    found = bench.coverage(bench.draw_mean(groups, sizes, 0.3, False, cluster_mean), 400, 1)
    assert 0.925 <= found["coverage"] <= 0.99
    assert bench.coverage(bench.draw_mean(groups, sizes, 0.3, False, bench.naive), 400, 1)["coverage"] < 0.65


def test_retention_ratios_and_quantiles_cover(bench):
    """The numbers that a verdict rests on."""
    for draw in (bench.draw_retention(20, "unequal"), bench.draw_retention(100, "equal"), bench.draw_ratio(50, "unequal"), bench.draw_quantile(20, "equal", 0.5), bench.draw_quantile(50, "unequal", 0.9)):
        assert 0.92 <= bench.coverage(draw, 300, 2)["coverage"] <= 0.995


def test_differences_of_accuracy_cover_where_flips_are_rare_or_shared(bench):
    """Intervals of no width where nothing flipped; twins as independent items."""
    for draw in (bench.draw_delta(500, 0.01, 0.01, False), bench.draw_delta(500, 0.06, 0.03, True), bench.draw_macro(macro_share, 0.06, 0.03), bench.draw_macro(macro_bootstrap, 0.06, 0.03)):
        assert 0.92 <= bench.coverage(draw, 200, 3)["coverage"] <= 0.995


def test_mcnemar_holds_its_level_and_finds_the_stated_difference(bench):
    """`smallest_detectable` promises 80 % power at 5 %."""
    random, rounds, n = np.random.default_rng(4), 400, 1000

    def p_of(lost, won):
        d, _ = bench.flips(random, n, lost, won, False)
        return mcnemar_exact(int((d < 0).sum()), int((d > 0).sum()))

    size = smallest_difference(0.1 * n, n)
    assert np.mean([p_of(0.05, 0.05) < 0.05 for _ in range(rounds)]) <= 0.08
    assert 0.72 <= np.mean([p_of(0.05 + size / 2, 0.05 - size / 2) < 0.05 for _ in range(rounds)]) <= 0.88


def test_the_gate_finds_a_planted_regression_and_lets_a_null_one_pass(bench):
    """A gate that never fails, or fails one run in ten by chance."""
    from bench_stats_gate import gate_rates

    rows = {(r["check"], r["documents"], r["regression"]): r for r in gate_rates(80, bench.clusters_of, bench.losses, bench.correlated, bench.flips)}
    assert rows["retention", 100, "planted"]["fail"] > 0.95 and rows["retention", 100, "none"]["pass"] > 0.95
    assert rows["macro_accuracy_delta", None, "planted"]["fail"] > 0.9 and rows["macro_accuracy_delta", None, "none"]["pass"] > 0.95
    for key, row in rows.items():
        assert row["fail"] <= {"none": 0.0, "small": 0.02, "at the limit": 0.07, "planted": 1.0}[key[2]], key


def test_the_record_is_of_these_estimators(bench):
    """A page of coverage rates that the code no longer has: a few of its cells are drawn again."""
    record = json.loads(RECORD.read_text())
    stored = {json.dumps({k: v for k, v in row.items() if k not in ("coverage", "ci_low", "ci_high", "rounds", "undefined", "truth_below")}): row for row in record["coverage"]}
    cells = list(bench.cells())
    assert [json.dumps({"estimator": name, **setting}) for name, setting, _ in cells] == list(stored)
    for index in (0, 20, 30, 60):
        name, setting, draw = cells[index]
        row = stored[json.dumps({"estimator": name, **setting})]
        again = bench.coverage(draw, 100, index)
        # the same seed: the first 100 of its rounds; they lie within five of their standard errors
        if row["coverage"] is not None and again["coverage"] is not None:
            assert abs(again["coverage"] - row["coverage"]) < 5 * math.sqrt(0.95 * 0.05 / 100) + 0.02


def test_ratio_with_a_denominator_of_mixed_signs_is_finite():
    """Retention's gain is negative on some documents."""
    random = np.random.default_rng(7)
    found = cluster_ratio(random.normal(1, 1, 60), random.normal(1, 1.5, 60), np.arange(60) // 6)
    assert all(map(math.isfinite, (found.value, found.ci_low, found.ci_high)))
