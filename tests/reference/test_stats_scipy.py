"""Statistics against scipy, closed forms and simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from rung.scoring.intervals import clopper_pearson
from rung.scoring.recommendation import paired_gain, rung_score
from rung.scoring.significance import holm, mcnemar, sign_flips
from rung.scoring.stats import (
    clustered_error,
    detectable_difference,
    paired_difference,
    score_interval,
    sign_flip_p_value,
)


@pytest.mark.parametrize(("successes", "n"), [(0, 1), (1, 1), (0, 20), (3, 7), (81, 263), (999, 1000)])
def test_independent_binary_scores_get_scipys_clopper_pearson(successes: int, n: int) -> None:
    expected = stats.binomtest(successes, n).proportion_ci(method="exact")
    found = score_interval([1] * successes + [0] * (n - successes))
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-12)


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [(81, 263, 0.2527, 0.3676), (15, 148, 0.0578, 0.1617), (0, 20, 0.0, 0.1684), (1, 29, 0.0009, 0.1776)],
)
def test_clopper_pearson_equals_the_published_examples(successes: int, n: int, low: float, high: float) -> None:
    # Newcombe 1998, Two-sided confidence intervals for the single proportion, table I, method 5.
    found = clopper_pearson(successes / n, n)
    assert found == pytest.approx((low, high), abs=5e-5)


def test_t_equals_scipy() -> None:
    scores = np.random.default_rng(1).beta(2, 5, size=23)
    expected = stats.t.interval(0.95, 22, loc=scores.mean(), scale=stats.sem(scores))
    found = score_interval(scores, bounded=False)
    assert (found.low, found.high) == pytest.approx(expected, rel=1e-12)
    doubled = score_interval(np.repeat(scores, 2), np.repeat(np.arange(23), 2).tolist(), bounded=False)
    assert (doubled.low, doubled.high) == pytest.approx(expected, rel=1e-12)


def korn_and_graubard(counts: np.ndarray, sizes: np.ndarray) -> tuple[float, float]:
    """Loops over clusters: the effective number of the docstring of `intervals.effective_number`, then scipy's beta."""
    n, c, p = sizes.sum(), len(sizes), counts.sum() / sizes.sum()
    by_clusters = sum((k - m * p) ** 2 for k, m in zip(counts, sizes, strict=True)) / n**2 * c / (c - 1)
    deff = by_clusters / (p * (1 - p) / (n - 1))
    fewest, rarer = n**2 / sum(m**2 for m in sizes), min(int((counts > 0).sum()), int((counts < sizes).sum()))
    rates = counts / sizes
    rarer = min(rarer, sum(abs(rate - sorted(rates)[c // 2]) > 1e-12 for rate in rates))
    deff = (rarer * deff + n / fewest) / (rarer + 1)
    few = (stats.t.ppf(0.975, n - 1) / stats.t.ppf(0.975, fewest - 1)) ** 2
    effective = min(n, max(fewest, n / deff * few))
    x = p * effective
    return stats.beta.ppf(0.025, x, effective - x + 1), stats.beta.ppf(0.975, x + 1, effective - x)


@pytest.mark.parametrize("seed", range(6))
def test_clustered_shares_equal_the_effective_number_in_loops(seed: int) -> None:
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 9, size=int(rng.integers(3, 30)))
    counts = np.maximum(1, rng.binomial(sizes, rng.beta(1, 3, size=len(sizes)))) - (rng.random(len(sizes)) < 0.4)
    scores = [float(i < k) for k, m in zip(counts, sizes, strict=True) for i in range(m)]
    found = score_interval(scores, np.repeat(np.arange(len(sizes)), sizes).tolist())
    assert (found.low, found.high) == pytest.approx(korn_and_graubard(counts, sizes), rel=1e-9)


@pytest.mark.parametrize(("gains", "losses", "n"), [(9, 1, 60), (6, 0, 50), (25, 15, 80), (20, 0, 20)])
def test_paired_shares_of_independent_items_equal_mover_by_scipy(gains: int, losses: int, n: int) -> None:
    """Zou and Donner 2008 with Clopper-Pearson of gains and losses, and the multinomial's correlation of the two."""
    ends = [stats.binomtest(k, n).proportion_ci(method="exact") for k in (gains, losses)]
    g, v = gains / n, losses / n
    half_more = [(k + 0.5) / (n + 1.5) for k in (gains, losses)]
    r = -math.sqrt(math.prod(m / (1 - m) for m in half_more))
    if 0 < gains < n and losses:
        r = min(r, -math.sqrt(g * v / ((1 - g) * (1 - v))) * n / (n - 1))
    low = (
        g
        - v
        - math.sqrt((g - ends[0].low) ** 2 + (ends[1].high - v) ** 2 - 2 * r * (g - ends[0].low) * (ends[1].high - v))
    )
    found = paired_difference([0] * gains + [1] * losses + [0] * (n - gains - losses), [1] * gains + [0] * (n - gains))
    assert found.low == pytest.approx(low, rel=1e-9)


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


@pytest.mark.parametrize("bounded", [True, False])
def test_intervals_agree_with_the_clustered_error_of_miller(bounded: bool) -> None:
    scores, ids = clustered(np.random.default_rng(2), 200, spread=0.3)
    found = score_interval(scores, ids, bounded=bounded)
    half = (found.high - found.low) / 2
    assert half / stats.t.ppf(0.975, 199) == pytest.approx(clustered_error(scores, ids), rel=0.04)
    assert clustered_error(scores, ids) > 1.3 * clustered_error(scores)  # the clusters matter in these data


@pytest.mark.parametrize("n", [2, 5, 20, 50, 200])
@pytest.mark.parametrize("share", [0.005, 0.05, 0.2, 0.5])
def test_intervals_of_independent_binary_scores_cover(n: int, share: float) -> None:
    """Exact, no simulation: the probability of every outcome whose interval holds the truth.

    Clopper-Pearson's is at least 0.95 everywhere; Wilson's falls to 0.90 on this grid.
    """
    low, high = clopper_pearson(np.arange(n + 1) / n, n)
    assert stats.binom.pmf(np.flatnonzero((low <= share) & (share <= high)), n, share).sum() >= 0.95


@pytest.mark.parametrize(
    ("gain", "loss", "atleast", "atmost"),
    [(0.2, 0.1, 0.90, 0.98), (0.05, 0.05, 0.92, 1.0), (0.04, 0.0, 0.93, 1.0), (0.0, 0.01, 0.93, 1.0)],
)
def test_the_paired_interval_covers(gain: float, loss: float, atleast: float, atmost: float) -> None:
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
    """Twelve clusters: level floor(0.05 * 2^11) / 2^11 = 102 / 2048, the largest p-value of sign flips up to 0.05."""
    gains = [0.0, 1.0, 0.0, -1.0, 1.0, 0.0] * 2
    sd, level = np.std(gains, ddof=1), 102 / 2048
    factor = stats.t.ppf(1 - level / 2, 11) + stats.t.ppf(0.8, 11)
    expected = factor * sd / math.sqrt(12)
    assert detectable_difference(gains) == pytest.approx(expected, rel=1e-12)
    doubled, ids = np.repeat(gains, 2), np.repeat(np.arange(12), 2).tolist()
    assert detectable_difference(doubled, ids) == pytest.approx(expected, rel=1e-12)  # copies inform of nothing
    of_seeds = stats.t.ppf(1 - level / 2, 3) + stats.t.ppf(0.8, 3)
    with_seeds = detectable_difference(gains, seed_variance=0.0004, seed_degrees_of_freedom=3)
    assert with_seeds == pytest.approx(math.hypot(expected, of_seeds * 0.02), rel=1e-12)
    assert detectable_difference([0.5] * 9) is None and detectable_difference([0.3, 0.5], ["a", "a"]) is None
    # six gains and losses of 1 among six: only 1.35 would be found, which no scores on [0, 1] differ by
    assert detectable_difference(gains[:6]) is None


@pytest.mark.parametrize("c", [6, 8, 12])
def test_few_clusters_find_the_detectable_difference_four_times_in_five(c: int) -> None:
    """Sign flips of normal gains; the t formula alone, 1.43 standard deviations for 6 clusters, is found 64 in 100."""
    rng, runs = np.random.default_rng(c), 400
    gains = rng.normal(size=c)
    least = detectable_difference(gains / gains.std(ddof=1), bounded=False)
    assert least is not None
    found = sum(sign_flips(rng.normal(least, 1.0, size=c)) <= 0.05 for _ in range(runs)) / runs
    assert found == pytest.approx(0.8, abs=0.06)


@pytest.mark.parametrize("ratio", [1.0, 3.0])
def test_two_training_seeds_are_covered(ratio: float) -> None:
    """Seeds that scatter `ratio` times as much as the items: one t by Welch and Satterthwaite covers 0.87 at 3."""
    rng, runs, n, hits, alarms = np.random.default_rng(int(10 * ratio)), 250, 30, 0, 0
    for _ in range(runs):
        items = rng.normal(0.0, 1.0, size=n)
        table = items + ratio / math.sqrt(n) * math.sqrt(2) * rng.normal(size=(2, 1)) + rng.normal(0, 1e-6, size=(2, n))
        score, gain = rung_score(table, in_nats=True), paired_gain(np.zeros(n), table, in_nats=True)
        hits += score.low <= 0.0 <= score.high
        alarms += gain.p_value is not None and gain.p_value <= 0.05
    assert hits / runs >= 0.94 and alarms / runs <= 0.055


def test_a_p_value_with_seeds_is_the_level_at_which_the_interval_reaches_zero() -> None:
    rng = np.random.default_rng(0)
    items = rng.normal(0.5, 1.0, size=40)
    table = np.stack([items - 0.1, items + 0.1, items + 0.3])
    p = paired_gain(np.zeros(40), table, in_nats=True).p_value
    mean, of_items = table.mean(), table.mean(axis=0).std(ddof=1) / math.sqrt(40)
    of_seeds = table.mean(axis=1).std(ddof=1) / math.sqrt(3)
    assert p is not None and p < 0.5
    half = math.hypot(stats.t.ppf(1 - p / 2, 39) * of_items, stats.t.ppf(1 - p / 2, 2) * of_seeds)
    assert half == pytest.approx(mean, rel=1e-9)
