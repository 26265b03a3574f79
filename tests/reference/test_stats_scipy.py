"""Statistics against scipy, closed forms and simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from rung.scoring.significance import holm, mcnemar, sign_flips
from rung.scoring.stats import (
    cluster_bootstrap,
    clustered_error,
    detectable_difference,
    paired_difference,
    resample,
    sign_flip_p_value,
    t_interval,
    wilson,
)


@pytest.mark.parametrize(("successes", "n"), [(0, 1), (1, 1), (0, 20), (3, 7), (81, 263), (999, 1000)])
def test_wilson_equals_scipy(successes: int, n: int) -> None:
    expected = stats.binomtest(successes, n).proportion_ci(method="wilson")
    found = wilson(successes, n)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-12)


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_equals_the_published_examples(successes: int, n: int, low: float, high: float) -> None:
    # Newcombe 1998, Two-sided confidence intervals for the single proportion, table I, method 3.
    found = wilson(successes, n)
    assert (found.low, found.high) == pytest.approx((low, high), abs=5e-5)


def test_t_equals_scipy() -> None:
    scores = np.random.default_rng(1).beta(2, 5, size=23)
    expected = stats.t.interval(0.95, 22, loc=scores.mean(), scale=stats.sem(scores))
    found = t_interval(scores)
    assert (found.low, found.high) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("gained", "lost"), [(9, 1), (1, 9), (5, 5), (25, 15), (86, 150), (3, 0)])
def test_mcnemar_equals_the_binomial_sum(gained: int, lost: int) -> None:
    first = [0] * gained + [1] * lost + [1, 0]
    second = [1] * gained + [0] * lost + [1, 0]
    n, few = gained + lost, min(gained, lost)
    tail = sum(math.comb(n, k) for k in range(few + 1)) / 2**n
    assert mcnemar(first, second) == pytest.approx(min(1.0, 2 * tail), rel=1e-9)


def clustered(rng: np.random.Generator, clusters: int, spread: float) -> tuple[np.ndarray, list[int]]:
    """Binary scores in clusters of 1 to 9 items whose rate scatters around 0.6."""
    sizes = rng.integers(1, 10, size=clusters)
    rates = np.clip(rng.normal(0.6, spread, size=clusters), 0, 1)
    ids = [c for c, size in enumerate(sizes) for _ in range(size)]
    return (rng.random(len(ids)) < rates[ids]).astype(float), ids


def test_the_bootstrap_agrees_with_the_clustered_error_of_miller() -> None:
    scores, ids = clustered(np.random.default_rng(2), 200, spread=0.3)
    found = cluster_bootstrap(scores, ids)
    half = (found.high - found.low) / 2
    assert half / stats.t.ppf(0.975, 199) == pytest.approx(clustered_error(scores, ids), rel=0.04)
    assert clustered_error(scores, ids) > 1.3 * clustered_error(scores)  # the clusters matter in these data


def test_the_bootstrap_error_is_the_spread_of_the_replicates(monkeypatch: pytest.MonkeyPatch) -> None:
    # lighteval at HEAD 2026-05-05 divides it by sqrt(replicates) again: 32 times too small at 1,000.
    scores = np.random.default_rng(3).random(400)
    with monkeypatch.context() as fewer:
        fewer.setattr("rung.scoring.stats.SAMPLES", 1_000)
        replicates = resample(scores, np.ones(400), seed=0)
    assert replicates.shape == (1_000,)
    assert replicates.std() == pytest.approx(scores.std() / 20, rel=0.08)
    found = cluster_bootstrap(scores, None)
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * scores.std() / 20, rel=0.05)


def test_equal_clusters_without_correlation_give_the_t_interval() -> None:
    scores = np.random.default_rng(4).normal(size=15)
    bootstrap, t = cluster_bootstrap(scores, None), t_interval(scores)
    assert bootstrap.high - bootstrap.low == pytest.approx(t.high - t.low, rel=0.1)
    plain = np.quantile(resample(scores, np.ones(15), 0), [0.025, 0.975])
    assert np.ptp(plain) < 0.92 * (t.high - t.low)  # what the expanded percentiles repair


@pytest.mark.parametrize("n", [20, 50, 200])
@pytest.mark.parametrize("share", [0.05, 0.2, 0.5])
def test_wilson_covers(n: int, share: float) -> None:
    # Exact, no simulation: the probability of every outcome whose interval holds the truth.
    intervals = [wilson(k, n) for k in range(n + 1)]
    covered = sum(stats.binom.pmf(k, n, share) for k, i in enumerate(intervals) if i.low <= share <= i.high)
    assert 0.90 <= covered <= 0.98


@pytest.mark.parametrize("clusters", [10, 40])
def test_the_cluster_bootstrap_covers_where_wilson_does_not(clusters: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rung.scoring.stats.SAMPLES", 1_000)
    rng, runs, hits, wilson_hits = np.random.default_rng(5), 300, 0, 0
    truth = np.clip(rng.normal(0.6, 0.4, size=10**6), 0, 1).mean()
    for run in range(runs):
        scores, ids = clustered(rng, clusters, spread=0.4)
        found = cluster_bootstrap(scores, ids, run)
        naive = wilson(scores.sum(), len(scores))
        hits += found.low <= truth <= found.high
        wilson_hits += naive.low <= truth <= naive.high
    assert 0.90 <= hits / runs <= 0.98
    assert wilson_hits / runs < 0.90


@pytest.mark.parametrize(
    ("gain", "loss", "atleast", "atmost"),
    [(0.2, 0.1, 0.90, 0.98), (0.05, 0.05, 0.92, 1.0), (0.04, 0.0, 0.93, 1.0), (0.0, 0.01, 0.93, 1.0)],
)
def test_the_paired_interval_covers(
    gain: float, loss: float, atleast: float, atmost: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rung.scoring.stats.SAMPLES", 1_000)
    rng, runs, hits = np.random.default_rng(6), 400, 0
    for run in range(runs):
        draw = rng.random(60)
        first, second = (draw < 0.5 + loss), (draw < 0.5)  # rows that the second loses ...
        second = second | (draw > 1 - gain)  # ... and rows that it gains
        found = paired_difference(first.astype(float), second.astype(float), seed=run)
        hits += found.low <= gain - loss <= found.high
    assert atleast <= hits / runs <= atmost


# --- tests of a difference ---

DARWIN = (49, -67, 8, 16, 6, 23, 28, 41, 14, 29, 56, 24, 75, 60, -48)
"""Cross-fertilised minus self-fertilised maize, eighths of an inch (Fisher 1935, section 21)."""


def test_sign_flips_equal_fishers_count_of_darwins_plants() -> None:
    assert sign_flips(DARWIN) == pytest.approx(1726 / 2**15, rel=1e-12)  # whole numbers, by convolution
    assert sign_flips(np.array(DARWIN) / 8) == pytest.approx(1726 / 2**15, rel=1e-12)  # all assignments one by one


@pytest.mark.parametrize("seed", range(5))
def test_sign_flips_equal_scipys_permutation_test(seed: int) -> None:
    gains = np.random.default_rng(seed).normal(0.4, 1.0, size=11)
    expected = stats.permutation_test(
        (gains,), lambda x, axis: x.sum(axis=axis), permutation_type="samples", n_resamples=np.inf
    )
    assert sign_flips(gains) == pytest.approx(expected.pvalue, abs=1e-12)
    whole = np.rint(3 * gains)
    expected = stats.permutation_test(
        (whole,), lambda x, axis: x.sum(axis=axis), permutation_type="samples", n_resamples=np.inf
    )
    assert sign_flips(whole) == pytest.approx(expected.pvalue, abs=1e-12)


def test_sampled_sign_flips_agree_with_the_exact_ones() -> None:
    whole = np.random.default_rng(0).integers(-3, 5, size=60).astype(float)
    exact, sampled = sign_flips(whole), sign_flips(whole * np.pi)  # the same test, but no whole numbers any more
    assert 0.001 < exact < 0.2
    assert sampled == pytest.approx(exact, abs=4 * math.sqrt(exact / 10_000))
    assert sign_flips(np.full(100, np.pi)) == 1 / 10_001  # never 0: the observed assignment is one of them


@pytest.mark.parametrize(("gained", "lost"), [(9, 1), (25, 15), (86, 150), (3, 0), (4, 4), (0, 0)])
def test_sign_flips_of_single_items_are_mcnemars_test(gained: int, lost: int) -> None:
    first, second = [0] * gained + [1] * lost + [1], [1] * gained + [0] * lost + [1]
    assert sign_flip_p_value(first, second) == pytest.approx(mcnemar(first, second), rel=1e-9)


def test_flipping_clusters_keeps_its_level_where_mcnemar_does_not() -> None:
    rng, runs, by_cluster, by_item = np.random.default_rng(8), 400, 0, 0
    ids = [c for c in range(30) for _ in range(6)]
    for _ in range(runs):  # no system is better, but each cluster suits one of them
        suits = np.repeat(rng.random(30) < 0.5, 6)
        apart = rng.random(180) < 0.4
        first, second = (apart & ~suits).astype(float), (apart & suits).astype(float)
        by_cluster += sign_flip_p_value(first, second, ids) <= 0.05
        by_item += mcnemar(first, second) <= 0.05
    assert by_cluster / runs <= 0.07
    assert by_item / runs > 0.2


def test_holm_equals_worked_examples_and_a_search_for_the_level() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == [] and holm([0.2]) == [0.2] and holm([0.7, 0.6]) == [1.0, 1.0]
    p = np.random.default_rng(3).beta(0.4, 3, size=7)

    def rejected(level: float) -> set[int]:
        """Holm's own procedure: step down while p_(k) <= level / (m - k + 1)."""
        found = set()
        for k, i in enumerate(np.argsort(p)):
            if p[i] > level / (len(p) - k):
                break
            found.add(int(i))
        return found

    for i, corrected in enumerate(holm(list(p))):
        if corrected < 1.0:
            assert i in rejected(corrected + 1e-9) and i not in rejected(corrected - 1e-9)


def test_the_detectable_difference_is_found_four_times_in_five() -> None:
    rng, found, runs, n = np.random.default_rng(9), 0, 1_000, 80
    gains = rng.normal(size=n)
    least = detectable_difference(0.3 * gains / gains.std(ddof=1))
    assert least is not None
    for _ in range(runs):
        found += stats.ttest_1samp(rng.normal(least, 0.3, size=n), 0.0).pvalue <= 0.05
    assert found / runs == pytest.approx(0.8, abs=0.04)


def test_the_detectable_difference_by_hand() -> None:
    gains = [0.0, 1.0, 0.0, -1.0, 1.0, 0.0]
    sd = np.std(gains, ddof=1)
    expected = (stats.t.ppf(0.975, 5) + stats.t.ppf(0.8, 5)) * sd / math.sqrt(6)
    assert detectable_difference(gains) == pytest.approx(expected, rel=1e-12)
    doubled, ids = np.repeat(gains, 2), np.repeat(np.arange(6), 2).tolist()
    assert detectable_difference(doubled, ids) == pytest.approx(expected, rel=1e-12)  # copies inform of nothing
    with_seeds = detectable_difference(gains, seed_variance=0.04)
    assert with_seeds == pytest.approx(math.hypot(expected, expected / (sd / math.sqrt(6)) * 0.2), rel=1e-12)
    assert detectable_difference([0.0] * 59) == pytest.approx(1 - 0.05 ** (1 / 59))
    assert detectable_difference([0.5] * 9) is None and detectable_difference([0.3, 0.5], ["a", "a"]) is None
