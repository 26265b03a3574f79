"""Significance of paired differences: sign flips over clusters, McNemar's exact test, Holm's correction.

Exact or randomization tests instead of t-tests: they need no normal distribution, which binary scores of a few hundred
items do not have, and they cost milliseconds. p-values are two-sided and say nothing about the size of a difference:
that is what the intervals of `stats` are for. Used by `stats` and `recommendation`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats  # type: ignore[import-untyped,unused-ignore]

Floats = NDArray[np.float64]

MAX_ENUMERATED = 16
"""Number of differing clusters up to which all 2^C assignments of signs are enumerated."""
RANDOM_FLIPS = 10_000
"""Random assignments of signs for more clusters."""
MAX_CONVOLUTION = 50_000_000
"""Products up to which the exact distribution of integer sums is computed by convolution."""
ROUNDING = 1e-9
"""Relative tolerance for sums that should be equal, as a share of the largest possible sum."""


def sign_flips(gains: ArrayLike, seed: int = 0) -> float:
    """p-value of the hypothesis that a cluster's gain is as likely as the same loss (Fisher 1935, section 21).

    `gains` [C] are sums of paired differences, one per cluster: flipping complete clusters keeps the dependence of
    their items. The p-value is the share of sign assignments whose sum is at least as far from zero as the observed
    one. Exact for integers, such as differences of binary scores, and for at most `MAX_ENUMERATED` differing clusters;
    else from random assignments, the observed one included (Phipson and Smyth 2010). With one item per cluster and
    binary scores it is McNemar's exact test. Darwin's 15 pairs of plants give 1726 / 2^15.
    """
    values = np.asarray(gains, dtype=np.float64)
    if values.ndim != 1 or values.size == 0 or not np.isfinite(values).all():
        raise ValueError("gains must be a non-empty list of finite numbers, one a cluster")
    # a zero stays zero under either sign: it changes neither side of the comparison
    nonzero = np.abs(values[values != 0])
    if not len(nonzero):
        return 1.0
    observed, total = abs(float(values.sum())), float(nonzero.sum())
    # the observed assignment must count as at least as extreme as itself
    threshold = observed - ROUNDING * total
    if (nonzero == np.rint(nonzero)).all() and (p := _integer_p_value(nonzero.astype(np.int64), threshold)) is not None:
        return min(1.0, p)
    if len(nonzero) <= MAX_ENUMERATED:
        sums = np.zeros(1)
        for size in nonzero:
            # doubles with every cluster: 65,536 sums at most
            sums = np.concatenate([sums - size, sums + size])
        return float((np.abs(sums) >= threshold).mean())
    return _sampled_p_value(nonzero, threshold, seed)


def _integer_p_value(sizes: NDArray[np.int64], threshold: float) -> float | None:
    """P(|T| >= threshold) of T = sum of +-size, by convolving a binomial per size; None if that is too much work.

    T = 2 V - S, with V the sum of the sizes that count as gains and S the sum of all.
    """
    magnitudes, counts = np.unique(sizes, return_counts=True)
    probabilities = np.ones(1)
    for magnitude, count in zip(magnitudes.tolist(), counts.tolist(), strict=True):
        # equal sizes together are one binomial: binary scores need a single one
        distribution = np.zeros(magnitude * count + 1)
        distribution[::magnitude] = stats.binom.pmf(np.arange(count + 1), count, 0.5)
        if len(probabilities) > 1 and len(probabilities) * len(distribution) > MAX_CONVOLUTION:
            return None
        probabilities = distribution if len(probabilities) == 1 else np.convolve(probabilities, distribution)
    sums = 2 * np.arange(len(probabilities)) - (len(probabilities) - 1)
    return float(probabilities[np.abs(sums) >= threshold].sum())


def _sampled_p_value(sizes: Floats, threshold: float, seed: int) -> float:
    rng, extreme_count = np.random.default_rng(seed), 0
    for rows in batch_sizes(RANDOM_FLIPS, len(sizes)):
        signs = rng.integers(2, size=(rows, len(sizes)), dtype=np.int8) * 2.0 - 1.0
        extreme_count += int((np.abs(signs @ sizes) >= threshold).sum())
    # plus one for the observed assignment, so that p is never 0
    return (extreme_count + 1) / (RANDOM_FLIPS + 1)


def batch_sizes(total: int, width: int, limit: int = 2_000_000) -> list[int]:
    """Sizes of batches of rows of `width` numbers: at most `limit` numbers, so that memory stays at megabytes."""
    rows = max(1, limit // width)
    return [min(rows, total - start) for start in range(0, total, rows)]


def mcnemar(first: ArrayLike, second: ArrayLike) -> float:
    """p-value of the hypothesis that two systems are right equally often (McNemar 1947, exact binomial form).

    Only items that exactly one system got right count: 1 against 9 gives 0.0215. Invalid for clustered items, for which
    `sign_flips` of the clusters' sums is the same test. Raises ValueError for scores other than 0 and 1.
    """
    a, b = (np.asarray(scores, dtype=np.float64) for scores in (first, second))
    if a.shape != b.shape or a.ndim != 1 or not np.isin(np.concatenate([a, b]), (0.0, 1.0)).all():
        raise ValueError("McNemar's test needs paired scores of 0 and 1")
    gains, losses = int((b > a).sum()), int((b < a).sum())
    return float(stats.binomtest(gains, gains + losses).pvalue) if gains + losses else 1.0


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for multiple tests, in their order (Holm 1979; adjusted form of Wright 1992).

    The k-th smallest of m is multiplied by m - k + 1, and results are made monotone: rejecting those up to 0.05 has a
    family-wise error of at most 0.05 under any dependence. 0.01, 0.04, 0.03, 0.005 become 0.03, 0.06, 0.06, 0.02.
    """
    p = np.asarray(p_values, dtype=np.float64)
    if p.ndim != 1 or not ((p >= 0) & (p <= 1)).all():
        raise ValueError("p-values lie between 0 and 1")
    order = np.argsort(p, kind="stable")
    adjusted = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    corrected = np.empty(len(p))
    corrected[order] = np.minimum(adjusted, 1.0)
    return corrected.tolist()
