"""The error bars are what they say: closed forms, scipy, and coverage on correlated data."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats as scipy_stats

from qmerge.quality.stats import (
    cluster_mean,
    cluster_quantiles,
    cluster_ratio,
    holm,
    mcnemar_exact,
    retention,
    root,
    safe_exp,
    smallest_difference,
    transform,
    wilson,
)


def test_single_token_clusters_are_the_t_interval():
    """With one token per cluster the estimator must reduce to the textbook interval."""
    x = np.random.default_rng(0).normal(3, 2, 40)
    low, high = scipy_stats.t.interval(0.95, 39, x.mean(), x.std(ddof=1) / math.sqrt(40))
    found = cluster_mean(x, np.arange(40), "nats")
    assert found.value == pytest.approx(x.mean()) and (found.ci_low, found.ci_high) == pytest.approx((low, high))
    assert (found.n, found.unit) == (40, "nats")


def test_equal_clusters_are_the_t_interval_of_their_means():
    """Repeating each value inside its cluster adds no information and must not narrow the interval."""
    x = np.random.default_rng(1).normal(size=20)
    once, often = cluster_mean(x, np.arange(20)), cluster_mean(np.repeat(x, 50), np.repeat(np.arange(20), 50))
    assert (often.ci_low, often.ci_high) == pytest.approx((once.ci_low, once.ci_high))


def test_coverage_is_95_percent_on_correlated_tokens():
    """Token-independent errors would cover about half of the time here."""
    random = np.random.default_rng(2)
    clusters, hits, naive = np.repeat(np.arange(40), 25), 0, 0
    for _ in range(600):
        x = np.repeat(random.normal(size=40), 25) + random.normal(size=1000)
        found = cluster_mean(x, clusters)
        hits += found.ci_low <= 0.0 <= found.ci_high
        naive += abs(x.mean()) <= 1.96 * x.std() / math.sqrt(1000)
    assert 0.925 <= hits / 600 <= 0.975
    assert naive / 600 < 0.7


def test_ratio_covers_its_true_value():
    """Retention is a ratio of two correlated means: its interval needs their covariance."""
    random, hits = np.random.default_rng(3), 0
    clusters = np.repeat(np.arange(50), 4)
    for _ in range(500):
        den = 1.0 + 0.5 * np.repeat(random.normal(size=50), 4) + 0.5 * random.normal(size=200)
        found = cluster_ratio(0.8 * den + 0.2 * random.normal(size=200), den, clusters)
        hits += found.ci_low <= 0.8 <= found.ci_high
    assert 0.92 <= hits / 500 <= 0.98


def test_one_cluster_has_no_interval():
    """An interval from one window would be invented."""
    found = cluster_mean(np.array([1.0, 2.0]), np.array([7, 7]))
    assert (found.value, found.ci_low, found.ci_high) == (1.5, None, None) and "cluster" in found.note
    assert cluster_quantiles(np.array([1.0, 2.0]), np.array([7, 7]), [0.5])[0].ci_low is None
    assert cluster_mean(np.zeros(0), np.zeros(0, int)).value is None


def test_transform_maps_the_ends():
    """Perplexity's interval is the exponential of the NLL's, not ± around it."""
    nll = cluster_mean(np.random.default_rng(4).normal(2, 1, 30), np.arange(30))
    ppl = transform(nll, safe_exp, "perplexity")
    assert (ppl.value, ppl.ci_low, ppl.ci_high) == pytest.approx(tuple(map(math.exp, (nll.value, nll.ci_low, nll.ci_high))))
    assert root(-1e-9) == 0.0 and safe_exp(1e6) == math.inf


def test_quantiles_are_values_of_the_sample_and_know_clusters():
    """An interval that holds no point, or one that takes tokens of a document for independent."""
    random = np.random.default_rng(5)
    x, clusters = np.repeat(random.exponential(size=60), 10) * random.uniform(0.5, 1.5, 600), np.repeat(np.arange(60), 10)
    found = cluster_quantiles(x, clusters, [0.5, 0.9])
    assert all(m.ci_low <= m.value <= m.ci_high for m in found) and {m.value for m in found} < set(x)
    assert found[0].value == pytest.approx(np.quantile(x, 0.5, method="inverted_cdf"))
    shuffled = cluster_quantiles(x, random.permutation(600), [0.5])[0]
    assert found[0].ci_high - found[0].ci_low > shuffled.ci_high - shuffled.ci_low


def test_a_quantile_beyond_the_sample_has_no_interval():
    """p99.9 of a thousand tokens: a bootstrap's interval ends at the sample's largest value and covered a third of the time."""
    random = np.random.default_rng(6)
    found = cluster_quantiles(random.normal(size=1000), np.repeat(np.arange(10), 100), [0.5, 0.999])
    assert found[0].ci_high is not None and found[1].ci_low is None and "too few" in found[1].note


def test_retention_known_and_undefined():
    """Where the adapter does not help, a ratio to noise must not be printed as a share."""
    random, clusters = np.random.default_rng(6), np.repeat(np.arange(50), 20)
    separate = random.normal(2, 0.5, 1000)
    base = separate + 0.5 + 0.1 * random.normal(size=1000)
    kept = retention(base, separate, separate + 0.1 * (base - separate), clusters)
    assert kept.value == pytest.approx(0.9) and kept.ci_low <= kept.value <= kept.ci_high
    none = retention(separate + 0.3 * random.normal(size=1000), separate, separate, clusters)
    assert none.value is None and "3 standard errors" in none.note
    assert retention(base, separate, base, np.zeros(1000, int)).value is None


def test_mcnemar_is_the_binomial_test():
    """The exact test, not the chi-square that fails on few flips."""
    for b, c in ((0, 0), (5, 0), (3, 9), (7, 7), (20, 41)):
        expected = 1.0 if b + c == 0 else scipy_stats.binomtest(b, b + c, 0.5).pvalue
        assert mcnemar_exact(b, c) == pytest.approx(expected)


def test_wilson_holm_and_detectable_difference():
    """Intervals at 0 and 1 stay inside, adjusted p-values follow Holm, no flips show nothing."""
    interval = scipy_stats.binomtest(7, 10).proportion_ci(method="wilson")
    assert (wilson(7, 10).ci_low, wilson(7, 10).ci_high) == pytest.approx((interval.low, interval.high))
    assert wilson(10, 10).ci_high == pytest.approx(1.0) and wilson(0, 0).value is None
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert smallest_difference(50, 1000) == pytest.approx(2.8016 * math.sqrt(50) / 1000, rel=1e-3)
