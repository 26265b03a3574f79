"""Uncertainty of scores: 95 % intervals of one system, of the difference of two, and of a ratio.

Scores are stored per item, and everything here is a pure function of them. Items of one cluster (a filing, a document)
are not independent, so complete clusters are resampled. An interval never has zero width: if a sample has no spread, an
exact bound replaces it, and if no bound exists it is infinite (null in JSON). That makes intervals on small test sets
wide on purpose. `evaluation`, `recommendation`, `agreement` and `pairwise` build on it.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special  # type: ignore[import-untyped,unused-ignore]

from rung.results import Estimate
from rung.scoring.significance import Floats, batch_sizes, mcnemar, sign_flips

Clusters = Sequence[Hashable] | None
"""One cluster id per item. An item with id None is its own cluster; None instead of ids means no clusters."""

Weights = ArrayLike | None
"""One positive weight per item; None: all the same."""

ALPHA = 0.05
Z = NormalDist().inv_cdf(1 - ALPHA / 2)
POWER_Z = NormalDist().inv_cdf(0.8)
SAMPLES = 10_000
TINY = 1e-12  # tolerance for cluster means that are equal except for rounding
SIGN_TEST_MINIMUM = 6
"""Below six differing clusters even a unanimous sign test has p > 0.05, so no interval may exclude zero."""


def wilson(successes: float, n: float) -> Estimate:
    """Score interval of a proportion (Wilson 1927). 8 of 10 is [0.490, 0.943]; 0 of 20 is [0, 0.161].

    `n` may be an effective number, such as a number of clusters.
    """
    if not 0 <= successes <= n or n <= 0:
        raise ValueError(f"needs 0 <= successes <= n and n > 0, got {successes} of {n}")
    share = successes / n
    center = (share + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z / (1 + Z**2 / n) * math.sqrt(share * (1 - share) / n + Z**2 / (4 * n**2))
    # exactly 0 and 1 at the ends, where rounding would leave 1e-17
    low = 0.0 if successes == 0 else center - half
    high = 1.0 if successes == n else center + half
    return Estimate(mean=share, low=low, high=high, examples=int(n), clusters=int(n), method="wilson")


def t_interval(scores: ArrayLike) -> Estimate:
    """Student's interval of a mean of independent scores. 1, 2, 3, 4, 5 is 3 +- 1.963.

    Without spread (or with one item) it falls back to Wilson on the number of items, see `cluster_bootstrap`.
    """
    values = _scores(scores)
    n = len(values)
    mean = float(values.mean())
    # Student's interval would have zero width
    if np.ptp(values) == 0:
        return _interval_without_spread(values, mean, n)
    half = float(special.stdtrit(n - 1, 1 - ALPHA / 2) * values.std(ddof=1) / math.sqrt(n))
    return Estimate(mean=mean, low=mean - half, high=mean + half, examples=n, clusters=n, method="t")


def cluster_bootstrap(scores: ArrayLike, clusters: Clusters, seed: int = 0, *, weights: Weights = None) -> Estimate:
    """A (weighted) mean with its interval, clusters resampled with replacement.

    Expanded percentile interval (Hesterberg 2015, arXiv 1411.5279, section 5.3): the plain percentile is too narrow by
    about sqrt((C-1)/C) * z/t with C clusters, so wider percentiles of the replicates are taken. Not BCa: its
    acceleration is estimated from C numbers and is noise at the few dozen clusters of a usual test set.

    Where all clusters agree (all right, all wrong) the bootstrap has no width. For scores within 0 and 1 Wilson on the
    number of *clusters* takes its place: no distribution on [0, 1] with that mean varies more than a binary one.
    """
    values, sizes = _scores(scores), _weights(weights, scores)
    sums, totals = cluster_sums(clusters, values * sizes, sizes)
    mean, c = float(sums.sum() / totals.sum()), len(sums)
    # without spread between clusters every replicate is the same
    if np.ptp(sums / totals) < TINY:
        return _interval_without_spread(values, mean, c)
    low, high = expanded_percentiles(resample(sums, totals, seed), c)
    return Estimate(mean=mean, low=low, high=high, examples=len(values), clusters=c, method="cluster bootstrap")


def score_interval(
    scores: ArrayLike, clusters: Clusters = None, *, binary: bool | None = None, weights: Weights = None, seed: int = 0
) -> Estimate:
    """The right interval for one system; `binary`: None where the scores themselves decide.

    Cluster bootstrap when some cluster holds several items (or items have weights), else Wilson for binary scores,
    else t: normal-theory intervals are too narrow for shares at a few hundred items (Bowyer et al. 2025).
    """
    values = _scores(scores)
    # Wilson and t assume independent items of equal weight
    if weights is not None or _has_clusters(clusters, len(values)):
        return cluster_bootstrap(values, clusters, seed, weights=weights)
    if binary and not is_binary(values):
        raise ValueError("scores said to be binary hold something else than 0 and 1")
    if binary or (binary is None and is_binary(values)):
        return wilson(float(values.sum()), len(values))
    return t_interval(values)


def paired_difference(
    first: ArrayLike,
    second: ArrayLike,
    clusters: Clusters = None,
    seed: int = 0,
    *,
    weights: Weights = None,
    ids: tuple[Sequence[Hashable], Sequence[Hashable]] | None = None,
) -> Estimate:
    """Second minus first on the same items, clusters resampled (Miller 2024, arXiv 2411.00640, on paired differences).

    `ids` are the items' names in both lists; unequal ones, or unequal lengths, raise ValueError. Where fewer than
    `SIGN_TEST_MINIMUM` clusters differ, the interval is widened to the bound of `_discordant_bound`: two systems that
    agree on all 60 items may still differ by 0.049 (the rule of three, 3/n).
    """
    a, b = _scores(first), _scores(second)
    if len(a) != len(b) or (ids is not None and list(ids[0]) != list(ids[1])):
        raise ValueError(f"not the same items: {len(a)} and {len(b)} scores; a comparison is paired or it is none")
    gain, sizes = b - a, _weights(weights, a)
    sums, totals = cluster_sums(clusters, gain * sizes, sizes)
    mean, c, per_cluster = float(sums.sum() / totals.sum()), len(sums), sums / totals
    low, high, method = -math.inf, math.inf, "unbounded"
    if has_spread := bool(np.ptp(per_cluster) > TINY):
        low, high = expanded_percentiles(resample(sums, totals, seed), c)
        method = "paired cluster bootstrap"
    differing_count = int((np.abs(per_cluster) > TINY).sum())
    # few differing clusters: percentiles are too narrow there, and may exclude zero after five wins
    if _is_in_unit_range(np.concatenate([a, b])) and (not has_spread or differing_count < min(SIGN_TEST_MINIMUM, c)):
        floor_low, floor_high = _discordant_bound(per_cluster)
        low, high = (min(low, floor_low), max(high, floor_high)) if has_spread else (floor_low, floor_high)
        method = "exact bound on differing clusters"
    # McNemar's test assumes independent items
    mcnemar_applies = weights is None and is_binary(a) and is_binary(b) and not _has_clusters(clusters, len(a))
    p_value = mcnemar(a, b) if mcnemar_applies else None
    return Estimate(mean=mean, low=low, high=high, examples=len(a), clusters=c, method=method, p_value=p_value)


def ratio_interval(totals: ArrayLike, counts: ArrayLike, clusters: Clusters = None) -> Estimate:
    """Perplexity exp(sum of nats / sum of tokens) of items with `totals` nats over `counts` tokens.

    The ratio of sums, not the mean of ratios: items are weighted by length. The interval is the exponential of that of
    the cluster bootstrap. 2 * log(8) nats over 2 tokens is perplexity 8.
    """
    tokens = _weights(counts, totals)
    logs = cluster_bootstrap(_scores(totals) / tokens, clusters, weights=tokens)
    if logs.method != "cluster bootstrap":  # nats have no upper bound, so there is no exact bound without spread
        return logs.replace(mean=math.exp(logs.mean), low=0.0, high=math.inf, method="unbounded")
    return logs.replace(mean=math.exp(logs.mean), low=math.exp(logs.low), high=math.exp(logs.high))


def examples_needed(
    differences: ArrayLike,
    margin: float,
    clusters: Clusters = None,
    *,
    weights: Weights = None,
    seed_variance: float = 0.0,
) -> int | None:
    """Items, clustered as here, that decide with 80 % power on which side of -`margin` the difference lies.

    n = (z_{0.975} + z_{0.8})^2 V / d^2 (Miller 2024, sample-size formula), where V = n * clustered error^2 and d is the
    distance of the observed mean difference from -margin, but at least half the margin: a mean that sits on it by
    chance would ask for infinitely many. `seed_variance` does not shrink with n, so it is taken from d^2 first.
    None: no number of items is enough, because the seeds scatter too much. Without spread it is the rule of three:
    log(0.05) / log(1 - margin) clusters, 59 for a margin of 0.05.
    """
    values, sizes = _scores(differences), _weights(weights, differences)
    n, error = len(values), clustered_error(values, clusters, weights=sizes)
    if error == 0.0 and abs(values[0]) <= TINY:
        if margin <= 0:
            return None
        per_cluster = n / len(cluster_sums(clusters, sizes)[0])
        return math.ceil(per_cluster * (1 if margin >= 1 else math.log(ALPHA) / math.log1p(-margin)))
    factor = (Z + POWER_Z) ** 2
    distance = max(abs(float(np.average(values, weights=sizes)) + margin), margin / 2)
    effect = distance**2 - factor * seed_variance
    return max(2, math.ceil(factor * n * error**2 / effect)) if effect > 0 else None


def detectable_difference(
    differences: ArrayLike, clusters: Clusters = None, *, weights: Weights = None, seed_variance: float = 0.0
) -> float | None:
    """The smallest true difference that a test on these items detects with 80 % power, in points of the metric.

    (t_{0.975} + t_{0.8}) * error, t with C - 1 degrees of freedom (Bloom 1995: 2.8 standard errors where clusters are
    many), the error clustered as in `clustered_error` times sqrt(C / (C - 1)) and with the variance of the seeds.
    If no cluster differs it is the exact rule of three, 1 - 0.05^(1/C), for scores within 0 and 1. None for a single
    cluster, and if all differ equally: the spread is unknown.
    """
    values, sizes = _scores(differences), _weights(weights, differences)
    c = len(cluster_sums(clusters, sizes)[0])
    if not np.abs(values).max() > TINY:
        return float(1.0 - ALPHA ** (1.0 / c))
    variance = clustered_error(values, clusters, weights=sizes) ** 2
    if c < 2 or variance + seed_variance <= TINY**2:
        return None
    factor = float(special.stdtrit(c - 1, 1 - ALPHA / 2) + special.stdtrit(c - 1, 0.8))
    return factor * math.sqrt(variance * c / (c - 1) + seed_variance)


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


def resample(sums: Floats, sizes: Floats, seed: int) -> Floats:
    """Ratio sum(sums) / sum(sizes) of draws of clusters with replacement, shape [`SAMPLES`].

    The standard error is the standard deviation of these, not that over sqrt(`SAMPLES`).
    """
    rng, c = np.random.default_rng(seed), len(sums)
    batches = (rng.integers(c, size=(rows, c)) for rows in batch_sizes(SAMPLES, c))
    return np.concatenate([sums[draws].sum(axis=1) / sizes[draws].sum(axis=1) for draws in batches])


def is_binary(scores: Floats) -> bool:
    """True if only 0 and 1 occur."""
    return bool(np.isin(scores, (0.0, 1.0)).all())


def expanded_percentiles(replicates: Floats, c: int) -> tuple[float, float]:
    """95 % interval of the replicates of C clusters, widened as Student's t requires (Hesterberg 2015, section 5.3)."""
    factor = float(special.stdtrit(c - 1, 1 - ALPHA / 2)) * math.sqrt(c / (c - 1))
    tail = NormalDist().cdf(-factor)
    low, high = np.quantile(replicates, (tail, 1 - tail))
    return float(low), float(high)


def _interval_without_spread(values: Floats, mean: float, units: int) -> Estimate:
    sizes = {"examples": len(values), "clusters": units}
    if not _is_in_unit_range(values):
        return Estimate(mean=mean, low=-math.inf, high=math.inf, method="unbounded", **sizes)
    floor = wilson(min(mean, 1.0) * units, units)
    return floor.replace(mean=mean, method="wilson floor", **sizes)


def _is_in_unit_range(values: Floats) -> bool:
    return bool(values.min() >= 0 and values.max() <= 1)


def _discordant_bound(per_cluster: Floats) -> tuple[float, float]:
    """Bounds of a mean difference within [-1, 1] when few of the clusters differ at all.

    The difference is q (2 t - 1): a share q of clusters differs, a share t of those for the better. q is held below its
    one-sided 95 % Clopper-Pearson bound and t within its two-sided one; the corners bound the difference. With no
    differing cluster among C that is +-(1 - 0.05^(1/C)), the exact form of the rule of three.
    """
    c, better, worse = len(per_cluster), int((per_cluster > TINY).sum()), int((per_cluster < -TINY).sum())
    differing_count = better + worse
    q = 1.0 if differing_count == c else float(special.betaincinv(differing_count + 1, c - differing_count, 1 - ALPHA))
    low_t = float(special.betaincinv(better, worse + 1, ALPHA / 2)) if better else 0.0
    high_t = float(special.betaincinv(better + 1, worse, 1 - ALPHA / 2)) if worse else 1.0
    return q * (2 * low_t - 1), q * (2 * high_t - 1)


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
    return [np.bincount(codes, weights=column).astype(np.float64) for column in columns]


def _has_clusters(clusters: Clusters, n: int) -> bool:
    return bool(_cluster_codes(clusters, n).max() + 1 < n)


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
