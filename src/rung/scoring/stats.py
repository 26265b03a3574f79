"""Uncertainty of scores: 95 % intervals of one system, of the difference of two, and of a ratio.

Scores are stored per item, and everything here is a pure function of them. Items of one cluster (a filing, a document)
are not independent, so variances are those of complete clusters. An interval never has zero width: if a sample has no
spread, an exact bound replaces it, and if no bound exists it is infinite (null in JSON). That makes intervals on small
test sets wide on purpose; how often they hold the truth is a table in docs/evidence.md. The formulas are in
`intervals`; `evaluation`, `recommendation`, `agreement` and `pairwise` build on this module.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special  # type: ignore[import-untyped,unused-ignore]

from rung.results.base import Estimate
from rung.scoring.intervals import (
    ALPHA,
    SIGN_TEST_MINIMUM,
    TINY,
    Sizes,
    bounded_difference,
    bounded_mean,
    kish,
    student_ratio,
    t_quantile,
)
from rung.scoring.significance import Floats, mcnemar, sign_flips

Clusters = Sequence[Hashable] | None
"""One cluster id per item. An item with id None is its own cluster; None instead of ids means no clusters."""

Weights = ArrayLike | None
"""One positive weight per item; None: all the same."""

Z = NormalDist().inv_cdf(1 - ALPHA / 2)
POWER = 0.8
"""Probability with which a detectable difference is found (Bloom 1995; Cohen 1988)."""
POWER_Z = NormalDist().inv_cdf(POWER)
SAMPLES = 10_000
COARSE_CLUSTERS = 30
"""From here on p-values of sign flips are so fine that the level is the nominal one."""
MIN_RESAMPLED_CLUSTERS = 8
"""Below it no bootstrap interval is given: percentiles of so few clusters cover 0.5 to 0.9 (docs/evidence.md)."""


def pass_at_k(answers: int, passed: int, k: int) -> float:
    """Unbiased estimate of the probability that at least one of k answers passes (Chen et al. 2021, eq. 1).

    1 - C(n - c, k) / C(n, k) for n `answers` to one question, of which c `passed`; the mean over questions is pass@k.
    As a product of ratios, since the binomials overflow. 10 answers of which 3 passed: 0.3 for k = 1, 0.5333 for k = 2.
    Raises `ValueError` unless 0 <= c <= n and 1 <= k <= n.
    """
    if not 0 <= passed <= answers or not 1 <= k <= answers:
        raise ValueError(f"pass@{k} of {answers} answers, {passed} passed")
    if answers - passed < k:
        return 1.0
    failed = np.arange(answers - passed + 1, answers + 1, dtype=np.float64)
    return float(1.0 - np.prod(1.0 - k / failed))


def score_interval(
    scores: ArrayLike,
    clusters: Clusters = None,
    *,
    binary: bool | None = None,
    weights: Weights = None,
    seed: int = 0,
    bounded: bool | None = None,
) -> Estimate:
    """Mean score of one system with its interval. 8 of 10 is [0.4439, 0.9748]; 0 of 20 clusters is [0, 0.1684].

    Scores on [0, 1]: Clopper-Pearson at an effective number of items (`intervals.bounded_mean`), which for independent
    scores of 0 and 1 is their number. Others: Student's t on the clusters (`intervals.student_ratio`).

    `binary` True raises ValueError for other scores than 0 and 1. `bounded` says whether a score can lie outside
    [0, 1], as nats can; None where the scores themselves decide. `seed` is without effect: nothing is drawn.
    """
    values, sizes = _scores(scores), _weights(weights, scores)
    if binary and not is_binary(values):
        raise ValueError("scores said to be binary hold something else than 0 and 1")
    codes = _cluster_codes(clusters, len(values))
    table = _table_sizes(codes, sizes)
    sums = _sum_by(codes, values * sizes)
    if _is_in_unit_range(values) if bounded is None else bounded:
        mean, low, high = (float(x) for x in bounded_mean(sums, table))
        method = "clopper-pearson"
        if table.clusters < len(values) or weights is not None or not is_binary(values):
            method += ", effective number"
    else:
        mean, low, high = (float(x) for x in student_ratio(sums, table))
        method = "t" if table.clusters == len(values) and weights is None else "t on clusters"
        method = method if math.isfinite(high) else "unbounded"
    return Estimate(mean=mean, low=low, high=high, examples=len(values), clusters=table.clusters, method=method)


def paired_difference(
    first: ArrayLike,
    second: ArrayLike,
    clusters: Clusters = None,
    seed: int = 0,
    *,
    weights: Weights = None,
    ids: tuple[Sequence[Hashable], Sequence[Hashable]] | None = None,
    bounded: bool | None = None,
) -> Estimate:
    """Second minus first on the same items (Miller 2024, arXiv 2411.00640, on paired differences).

    Scores on [0, 1]: `intervals.bounded_difference`; two systems that agree on all 60 items may still differ by 0.060.
    Others: Student's t of the clusters' differences. An interval excludes zero only where the sign flips of
    `sign_flip_p_value` do too, else it is extended to zero: below `SIGN_TEST_MINIMUM` differing clusters it never does.

    `ids` are the items' names in both lists; unequal ones, or unequal lengths, raise ValueError. `bounded` as in
    `score_interval`; `seed` is that of random sign flips.
    """
    a, b = _scores(first), _scores(second)
    if len(a) != len(b) or (ids is not None and list(ids[0]) != list(ids[1])):
        raise ValueError(f"not the same items: {len(a)} and {len(b)} scores; a comparison is paired or it is none")
    gain, sizes, codes = b - a, _weights(weights, a), _cluster_codes(clusters, len(a))
    both_binary = is_binary(a) and is_binary(b)
    table = _table_sizes(codes, sizes)
    if _is_in_unit_range(np.concatenate([a, b])) if bounded is None else bounded:
        columns = (a, b, np.maximum(gain, 0.0), np.maximum(-gain, 0.0))
        scores_a, scores_b, gains, losses = (_sum_by(codes, column * sizes) for column in columns)
        interval = bounded_difference(scores_a, scores_b, gains, losses, table)
        method = "MOVER of gains and losses"
    else:
        interval = student_ratio(_sum_by(codes, gain * sizes), table)
        method = "paired t on clusters" if math.isfinite(interval[2]) else "unbounded"
    mean, low, high = (float(x) for x in interval)
    # intervals of few clusters exclude zero more often than one time in twenty; the sign test does not
    if (low > 0 or high < 0) and sign_flip_p_value(a, b, clusters, weights=weights, seed=seed) > ALPHA:
        low, high = min(low, 0.0), max(high, 0.0)
    # McNemar's test assumes independent items
    p_value = mcnemar(a, b) if both_binary and weights is None and table.clusters == len(a) else None
    fields = {"examples": len(a), "clusters": table.clusters, "method": method}
    return Estimate(mean=mean, low=low, high=high, p_value=p_value, **fields)


def ratio_interval(totals: ArrayLike, counts: ArrayLike, clusters: Clusters = None) -> Estimate:
    """Perplexity exp(sum of nats / sum of tokens) of items with `totals` nats over `counts` tokens.

    The ratio of sums, not the mean of ratios: items are weighted by length. The interval is the exponential of that by
    Student's t on the clusters' nats. 2 * log(8) nats over 2 tokens is perplexity 8.
    """
    tokens = _weights(counts, totals)
    logs = score_interval(_scores(totals) / tokens, clusters, weights=tokens, bounded=False)
    return logs.replace(mean=math.exp(logs.mean), low=math.exp(logs.low), high=_exp(logs.high))


def examples_needed(
    differences: ArrayLike,
    margin: float,
    clusters: Clusters = None,
    *,
    weights: Weights = None,
    seed_variance: float = 0.0,
    bounded: bool | None = None,
) -> int | None:
    """Items, clustered as here, that decide with 80 % power on which side of -`margin` the difference lies.

    n = (z_{0.975} + z_{0.8})^2 V / d^2 (Miller 2024, sample-size formula), where V = n * clustered error^2 and d is the
    distance of the observed mean difference from -margin, but at least half the margin: a mean that sits on it by
    chance would ask for infinitely many. `seed_variance` does not shrink with n, so it is taken from d^2 first.
    None: no number of items is enough, because the seeds scatter too much.

    For scores on [0, 1] of which fewer than `SIGN_TEST_MINIMUM` clusters differ it is at least log(0.025) /
    log(1 - margin) clusters, 72 for a margin of 0.05: with fewer the interval reaches beyond -margin even if nothing
    differs, so that the small variance of a few must not promise less.
    """
    values, sizes = _scores(differences), _weights(weights, differences)
    n, error = len(values), clustered_error(values, clusters, weights=sizes)
    sums, totals = cluster_sums(clusters, values * sizes, sizes)
    differing, least = int((np.abs(sums / totals) > TINY).sum()), 2
    is_bounded = bool(np.abs(values).max() <= 1) if bounded is None else bounded
    if is_bounded and differing < SIGN_TEST_MINIMUM:
        # without a margin no number shows that nothing differs
        if margin <= 0 and not differing:
            return None
        cluster_count = 1 if margin >= 1 else math.log(ALPHA / 2) / math.log1p(-margin) if margin > 0 else 0
        least = max(least, math.ceil(n / len(sums) * cluster_count))
    factor = (Z + POWER_Z) ** 2
    distance = max(abs(float(np.average(values, weights=sizes)) + margin), margin / 2)
    effect = distance**2 - factor * seed_variance
    return max(least, math.ceil(factor * n * error**2 / effect)) if effect > 0 else None


def detectable_difference(
    differences: ArrayLike,
    clusters: Clusters = None,
    *,
    weights: Weights = None,
    seed_variance: float = 0.0,
    seed_degrees_of_freedom: float = math.inf,
    tests: int = 1,
    bounded: bool | None = None,
) -> float | None:
    """The smallest true difference that the sign flips of these clusters find with 80 % power, in points of the metric.

    `tests` is the number of tests that Holm's correction is for: a difference counts as found at 0.05 / tests, where it
    is found whatever the other tests say. Two conditions, of which the larger difference counts:

    - (t_{1 - level / 2} + t_{0.8}) * error, t with C - 1 degrees of freedom (Bloom 1995: 2.8 standard errors where
      clusters are many), the error that of `clustered_error` times sqrt(C / (C - 1)). `level` is the largest p-value of
      C sign flips that is at most 0.05 / tests. The same of the seeds' variance, with its own degrees of freedom, is
      added in squares.
    - at least k clusters must differ, k the fewest with 2 / 2^k <= 0.05 / tests, 6 for one test: differences that C
      clusters show with 80 % probability in k or more of them, times the size of a differing cluster. That size is the
      mean of those observed and of one that differs completely; without bounds there is none to assume.

    34 clusters of which none differs: 0.223. None where no difference would be found, because 2 / 2^C > 0.05 / tests or
    because it would exceed 1, and where the spread is unknown.
    """
    values, sizes = _scores(differences), _weights(weights, differences)
    sums, totals = cluster_sums(clusters, values * sizes, sizes)
    c, sizes_of_change = len(sums), np.abs(sums / totals)
    differing = sizes_of_change > TINY
    needed = math.ceil(math.log2(2 * tests / ALPHA))
    if c < needed:
        return None
    is_bounded = bool(np.abs(values).max() <= 1) if bounded is None else bounded
    # P(at least k of C clusters differ) = I_q(k, C - k + 1), the regularized incomplete beta function
    share = float(special.betaincinv(needed, c - needed + 1, POWER))
    fewest = share * float((1.0 + sizes_of_change[differing].sum()) / (1 + differing.sum())) if is_bounded else 0.0
    if not differing.any():
        return fewest or None
    variance = clustered_error(values, clusters, weights=sizes) ** 2 * c / (c - 1)
    if variance + seed_variance <= TINY**2:
        return None
    # p-values of C sign flips are multiples of 1 / 2^(C-1)
    level = math.floor(ALPHA / tests * 2 ** (c - 1)) / 2 ** (c - 1) if c < COARSE_CLUSTERS else ALPHA / tests
    of_items = float(t_quantile(c - 1, 1 - level / 2) + t_quantile(c - 1, POWER))
    if c == needed:  # all clusters must agree in sign
        of_items = max(of_items, math.sqrt(c) * NormalDist().inv_cdf(POWER ** (1 / c)))
    of_seeds = float(t_quantile(seed_degrees_of_freedom, 1 - level / 2) + t_quantile(seed_degrees_of_freedom, POWER))
    smallest = max(fewest, math.hypot(of_items * math.sqrt(variance), of_seeds * math.sqrt(seed_variance)))
    # scores on [0, 1] cannot differ by more than 1
    return None if is_bounded and smallest > 1 else smallest


def sign_flip_p_value(
    first: ArrayLike, second: ArrayLike, clusters: Clusters = None, *, weights: Weights = None, seed: int = 0
) -> float:
    """p-value of a paired difference by flipping the signs of clusters, see `significance.sign_flips`."""
    gain = _scores(second) - _scores(first)
    (gains,) = cluster_sums(clusters, gain if weights is None else gain * _weights(weights, gain))
    # gains that cancel within a cluster leave rounding, which would count as differing
    return sign_flips(np.where(np.abs(gains) > TINY, gains, 0.0), seed)


def clustered_error(scores: ArrayLike, clusters: Clusters = None, *, weights: Weights = None) -> float:
    """Clustered standard error of a mean, sqrt(sum_c (sum_i (s_ci - mean))^2) / n (Miller 2024), in the score's points.

    With every item its own cluster it is the population standard deviation over sqrt(n).
    """
    values, sizes = _scores(scores), _weights(weights, scores)
    (residuals,) = cluster_sums(clusters, sizes * (values - np.average(values, weights=sizes)))
    return float(np.sqrt((residuals**2).sum()) / sizes.sum())


def is_binary(scores: Floats) -> bool:
    """True if only 0 and 1 occur."""
    return bool(np.isin(scores, (0.0, 1.0)).all())


def expanded_percentiles(replicates: Floats, c: int) -> tuple[float, float]:
    """95 % interval of the replicates of C clusters, widened as Student's t requires (Hesterberg 2015, section 5.3)."""
    factor = float(special.stdtrit(c - 1, 1 - ALPHA / 2)) * math.sqrt(c / (c - 1))
    tail = NormalDist().cdf(-factor)
    low, high = np.quantile(replicates, (tail, 1 - tail))
    return float(low), float(high)


def _is_in_unit_range(values: Floats) -> bool:
    return bool(values.min() >= 0 and values.max() <= 1)


def _table_sizes(codes: NDArray[np.intp], weights: Floats) -> Sizes:
    return Sizes(weights=_sum_by(codes, weights), items=kish(weights))


def _exp(logarithm: float) -> float:
    try:
        return math.exp(logarithm)
    except OverflowError:
        return math.inf


def _cluster_codes(clusters: Clusters, n: int) -> NDArray[np.intp]:
    if clusters is None:
        return np.arange(n)
    if len(clusters) != n:
        raise ValueError(f"{len(clusters)} cluster ids for {n} scores")
    # tagged keys: an item's index must not collide with a cluster id that is an integer
    codes: dict[Hashable, int] = {}
    keys = [("item", i) if c is None else ("cluster", c) for i, c in enumerate(clusters)]
    return np.array([codes.setdefault(key, len(codes)) for key in keys], dtype=np.intp)


def cluster_sums(clusters: Clusters, *columns: Floats) -> list[Floats]:
    """Sum of each column within each cluster."""
    codes = _cluster_codes(clusters, len(columns[0]))
    return [_sum_by(codes, column) for column in columns]


def _sum_by(codes: NDArray[np.intp], column: Floats) -> Floats:
    return np.bincount(codes, weights=column).astype(np.float64)


def _scores(scores: ArrayLike) -> Floats:
    values = np.asarray(scores, dtype=np.float64)
    if values.ndim != 1 or values.size == 0 or not np.isfinite(values).all():
        raise ValueError("scores must be a non-empty list of finite numbers, one an item")
    return values


def _weights(weights: Weights, scores: ArrayLike) -> Floats:
    n = len(_scores(scores))
    sizes = np.ones(n) if weights is None else _scores(weights)
    if len(sizes) != n or (sizes <= 0).any():
        raise ValueError(f"weights (or token counts) must be positive and as many as the {n} scores")
    return sizes
