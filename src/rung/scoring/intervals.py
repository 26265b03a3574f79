"""Interval formulas on sums per cluster, for many samples at once: arrays are [..., C], C clusters in the last axis.

Scores on [0, 1] get Clopper and Pearson's interval at an effective number of items, differences of such scores combine
two of them, and scores without bounds get Student's t of the jackknife. `stats` calls these with one sample, and the
study of their coverage (`tests/reference/test_coverage.py`) with thousands: the study proves what users get.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special  # type: ignore[import-untyped,unused-ignore]

from rung.scoring.significance import Floats

ALPHA = 0.05
TINY = 1e-12
"""Tolerance for numbers that are equal except for rounding."""
PRIOR_CLUSTERS = 1.0
"""Clusters for which complete dependence counts in a design effect. Not in Korn and Graubard: without it the coverage
is 0.90 where few clusters hold the rarer outcome (docs/evidence.md), since those show no spread."""
SIGN_TEST_MINIMUM = 6
"""Below six differing clusters even a unanimous sign test has p = 2 / 2^5 > 0.05, so no interval may exclude zero."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """Clusters and items of a sample."""

    weights: Floats
    """Sum of the items' weights in each cluster, [..., C]."""
    items: Floats
    """Number of items, (sum w)^2 / sum w^2 where they are weighted (Kish 1965), [...]."""

    @property
    def clusters(self) -> int:
        """Their number."""
        return int(self.weights.shape[-1])

    @property
    def total(self) -> Floats:
        """Sum of the weights, [...]."""
        return np.asarray(self.weights.sum(axis=-1))

    @property
    def effective_clusters(self) -> Floats:
        """Number of clusters of equal size that inform as much: (sum w)^2 / sum w^2 (Kish 1965), [...]."""
        return kish(self.weights)


def clopper_pearson(share: ArrayLike, n: ArrayLike) -> tuple[Floats, Floats]:
    """Exact 95 % interval of a binomial share (Clopper and Pearson 1934). 8 of 10 is [0.4439, 0.9748].

    Quantiles of beta distributions, so that `n` and `share * n` need not be whole. 0 of n is [0, 1 - 0.025^(1/n)].
    """
    p, number = np.broadcast_arrays(np.asarray(share, dtype=np.float64), np.asarray(n, dtype=np.float64))
    successes, failures = p * number, (1.0 - p) * number
    # at the ends a quantile is not defined, and the bound is the end itself
    low = np.where(p > TINY, special.betaincinv(np.maximum(successes, TINY), failures + 1.0, ALPHA / 2), 0.0)
    high = np.where(p < 1.0 - TINY, special.betaincinv(successes + 1.0, np.maximum(failures, TINY), 1 - ALPHA / 2), 1.0)
    return low, high


def bounded_mean(sums: Floats, sizes: Sizes) -> tuple[Floats, Floats, Floats]:
    """Mean and 95 % interval of scores on [0, 1], summed by cluster: [...] each (Korn and Graubard 1998).

    Clopper-Pearson at the effective number of items of `effective_number`. With one item a cluster and scores of 0 and
    1 it is Clopper-Pearson itself.
    """
    mean = np.asarray(sums.sum(axis=-1) / sizes.total)
    return (mean, *clopper_pearson(mean, effective_number([sums], sizes)))


def effective_number(parts: list[Floats], sizes: Sizes) -> Floats:
    """Number of independent items that inform as much as these clusters, [...]; `parts` are sums per cluster [..., C].

    n / deff * (t_{n-1} / t_{E-1})^2, t the 97.5 % quantiles and E the effective clusters (Korn and Graubard 1998): deff
    is the variance by clusters over that of n independent items, summed over the parts. It is averaged with its largest
    value, n over the effective number of clusters, which counts as `PRIOR_CLUSTERS` clusters against the k clusters
    that hold the rarer outcome: where nothing differs deff is not estimable, and where one item differs it is an
    estimate from one. The
    result is at least the number of clusters (items of a cluster are no more than all alike) and at most that of the
    items, as Korn and Graubard have it: fractions that scatter less than 0 and 1 would inform more, but a sample of
    nearly equal ones says little of rare low scores.
    """
    c, n, clusters = sizes.clusters, sizes.items, sizes.effective_clusters
    if c == 1:
        return np.broadcast_to(clusters, n.shape)
    variance, binomial, deciding = np.zeros(n.shape), np.zeros(n.shape), np.zeros(n.shape)
    for sums in parts:
        mean, rates = sums.sum(axis=-1) / sizes.total, sums / sizes.weights
        residuals = sums - sizes.weights * mean[..., None]
        variance += (residuals**2).sum(axis=-1) / sizes.total**2 * c / (c - 1)
        binomial += mean * (1.0 - mean)
        deciding += _deciding_clusters(rates)
    design_effect = variance * (n - 1) / np.maximum(binomial, TINY)
    shrunk = (deciding * design_effect + PRIOR_CLUSTERS * n / clusters) / (deciding + PRIOR_CLUSTERS)
    # the effective clusters: where a few hold most of the weight, they are as good as alone
    degrees = np.maximum(clusters - 1, TINY)
    few_clusters = (t_quantile(np.maximum(n - 1, degrees)) / t_quantile(degrees)) ** 2
    return np.clip(n / np.maximum(shrunk, TINY) * few_clusters, clusters, np.maximum(n, clusters))


def _deciding_clusters(rates: Floats) -> Floats:
    """Clusters that hold the rarer outcome, [...]: those whose mean is not the most common one of 0, 1 and all others.

    Right answers where most are wrong, wrong ones where most are right. Where the scores are fractions, the clusters
    that differ from the value that most of them have: a sample of nearly equal scores says little of rare other ones.
    """
    at_ends = np.minimum((rates > TINY).sum(axis=-1), (rates < 1.0 - TINY).sum(axis=-1))
    ordered = np.sort(rates, axis=-1)
    middle = ordered[..., rates.shape[-1] // 2][..., None]
    return np.asarray(np.minimum(at_ends, (np.abs(rates - middle) > TINY).sum(axis=-1)))


def bounded_difference(
    first: Floats, second: Floats, gains: Floats, losses: Floats, sizes: Sizes
) -> tuple[Floats, Floats, Floats]:
    """Mean and 95 % interval of second minus first, scores on [0, 1] of the same items, summed by cluster; [...] each.

    The difference is the mean gain minus the mean loss (an item has one or the other), each with the interval of
    Clopper-Pearson at one effective number, combined by MOVER (Zou and Donner 2008): the distance of an end
    from the mean is the root of x^2 + y^2 - 2 r x y, x and y the distances of the ends of gain and loss, r their
    correlation. The result cannot exceed what both systems' own intervals allow: it is cut at the ends of the second
    minus the opposite ends of the first. No sign test is in it, see `stats.paired_difference`.
    """
    number = effective_number([gains, losses], sizes)
    gain, loss = gains.sum(axis=-1) / sizes.total, losses.sum(axis=-1) / sizes.total
    gain_low, gain_high = clopper_pearson(gain, number)
    loss_low, loss_high = clopper_pearson(loss, number)
    r = _gain_loss_correlation(gains, losses, number, sizes)
    low = gain - loss - _mover(gain - gain_low, loss_high - loss, r)
    high = gain - loss + _mover(gain_high - gain, loss - loss_low, r)
    _, first_low, first_high = bounded_mean(first, sizes)
    _, second_low, second_high = bounded_mean(second, sizes)
    return gain - loss, np.maximum(low, second_low - first_high), np.minimum(high, second_high - first_low)


def student_ratio(sums: Floats, sizes: Sizes) -> tuple[Floats, Floats, Floats]:
    """Mean sum(sums) / sum(weights) of scores without bounds, with its 95 % interval by Student's t; [...] each.

    The error is the jackknife's, sqrt((C - 1) / C sum_c (mean without c - mean)^2) (Miller 1974), the degrees
    of freedom are the effective clusters minus one. For equal clusters that is the t interval of their means. Infinite
    where there is one cluster or no spread. For clusters of equal or symmetric spread it covers 0.94 or more from two
    clusters on; for exponential ones, 0.88 to 0.93.
    """
    c, total = sizes.clusters, sizes.total
    mean = np.asarray(sums.sum(axis=-1) / total)
    if c == 1:
        infinite = np.full(mean.shape, np.inf)
        return mean, -infinite, infinite
    without = (sums.sum(axis=-1, keepdims=True) - sums) / (total[..., None] - sizes.weights)
    error = np.sqrt(((without - mean[..., None]) ** 2).sum(axis=-1) * (c - 1) / c)
    half = t_quantile(np.maximum(sizes.effective_clusters - 1, TINY)) * error
    half = np.where(np.ptp(sums / sizes.weights, axis=-1) > TINY, half, np.inf)
    return mean, mean - half, mean + half


def t_quantile(degrees_of_freedom: ArrayLike, level: float = 1 - ALPHA / 2) -> Floats:
    """Quantile of Student's t."""
    return np.asarray(special.stdtrit(degrees_of_freedom, level), dtype=np.float64)


def _gain_loss_correlation(gains: Floats, losses: Floats, number: Floats, sizes: Sizes) -> Floats:
    """Correlation of mean gain and mean loss, [...]: the estimate by clusters, or the multinomial's if that is lower.

    Lower is wider. Below `SIGN_TEST_MINIMUM` clusters nothing can be estimated, so it is -1, the worst. The
    multinomial's has half an item added to each of gain, loss and neither (Jeffreys), for it is 0 / 0 where all gain.
    """
    c = sizes.clusters
    if c < SIGN_TEST_MINIMUM:
        return np.full(number.shape, -1.0)
    g, v = gains.sum(axis=-1) / sizes.total, losses.sum(axis=-1) / sizes.total
    residuals = [s - sizes.weights * m[..., None] for s, m in ((gains, g), (losses, v))]
    covariance = (residuals[0] * residuals[1]).sum(axis=-1) / sizes.total**2 * c / (c - 1)
    estimate = covariance * number / np.sqrt(np.maximum(g * (1 - g) * v * (1 - v), TINY))
    g, v = ((m * number + 0.5) / (number + 1.5) for m in (g, v))
    multinomial = -np.sqrt(g * v / ((1 - g) * (1 - v)))
    return np.asarray(np.clip(np.minimum(estimate, multinomial), -1.0, 1.0))


def _mover(x: Floats, y: Floats, r: Floats) -> Floats:
    return np.asarray(np.sqrt(np.maximum(x**2 + y**2 - 2 * r * x * y, 0.0)))


def kish(weights: Floats) -> NDArray[np.float64]:
    """(sum w)^2 / sum w^2 over the last axis: the number of equal weights that inform as much (Kish 1965)."""
    return np.asarray(weights.sum(axis=-1) ** 2 / (weights**2).sum(axis=-1))
