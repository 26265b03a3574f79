"""Whether a paired difference is more than chance: sign flips over clusters, McNemar's exact test, Holm's correction.

p-values are two-sided. None of them says how large a difference is: that is what intervals are for.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats  # type: ignore[import-untyped,unused-ignore]

Floats = NDArray[np.float64]

ENUMERATED = 16
"""Clusters that differ up to which all 2^C assignments of signs are looked at."""
FLIPS = 10_000
"""Random assignments of signs where there are more."""
CONVOLVED = 50_000_000
"""Products up to which the distribution of whole numbers is worked out."""
ROUNDING = 1e-9
"""Sums that should be equal differ by this share of the largest possible sum at most."""


def sign_flips(gains: ArrayLike, seed: int = 0) -> float:
    """p-value of the hypothesis that a cluster's gain is as likely as the same loss (Fisher 1935, section 21).

    `gains` [C] are sums of paired differences, one a cluster: flipping whole clusters keeps what their items have in
    common. The share of assignments of signs whose sum is at least as far from zero as the one observed. Exact for
    whole numbers, as differences of binary scores are, and where at most `ENUMERATED` clusters differ; else from
    random assignments, the observed one counted among them (Phipson and Smyth 2010). With one item a cluster and
    binary scores it is McNemar's exact test. Darwin's 15 pairs of plants give 1726 / 2^15.
    """
    values = np.asarray(gains, dtype=np.float64)
    if values.ndim != 1 or values.size == 0 or not np.isfinite(values).all():
        raise ValueError("gains must be a non-empty list of finite numbers, one a cluster")
    moved = np.abs(values[values != 0])
    if not len(moved):
        return 1.0
    observed, reach = abs(float(values.sum())), float(moved.sum())
    least = observed - ROUNDING * reach
    if (moved == np.rint(moved)).all() and (p := _of_whole_numbers(moved.astype(np.int64), least)) is not None:
        return min(1.0, p)
    if len(moved) <= ENUMERATED:
        sums = np.zeros(1)
        for size in moved:
            sums = np.concatenate([sums - size, sums + size])
        return float((np.abs(sums) >= least).mean())
    return _sampled(moved, least, seed)


def _of_whole_numbers(sizes: NDArray[np.int64], least: float) -> float | None:
    """P(|T| >= least) of T = sum of +-size, by convolving a binomial distribution for each size; None: too much work.

    T = 2 V - S, with V the sum of the sizes that count as gains and S the sum of all.
    """
    magnitudes, counts = np.unique(sizes, return_counts=True)
    chances = np.ones(1)
    for magnitude, count in zip(magnitudes.tolist(), counts.tolist(), strict=True):
        own = np.zeros(magnitude * count + 1)
        own[::magnitude] = stats.binom.pmf(np.arange(count + 1), count, 0.5)
        if len(chances) > 1 and len(chances) * len(own) > CONVOLVED:
            return None
        chances = own if len(chances) == 1 else np.convolve(chances, own)
    sums = 2 * np.arange(len(chances)) - (len(chances) - 1)
    return float(chances[np.abs(sums) >= least].sum())


def _sampled(sizes: Floats, least: float, seed: int) -> float:
    rng, rows, beyond = np.random.default_rng(seed), max(1, 2_000_000 // len(sizes)), 0
    for start in range(0, FLIPS, rows):
        signs = rng.integers(2, size=(min(rows, FLIPS - start), len(sizes)), dtype=np.int8) * 2.0 - 1.0
        beyond += int((np.abs(signs @ sizes) >= least).sum())
    return (beyond + 1) / (FLIPS + 1)


def mcnemar(first: ArrayLike, second: ArrayLike) -> float:
    """p-value that two systems are right equally often (McNemar 1947, exact binomial form).

    Only items that one got right and the other wrong count: 1 against 9 gives 0.0215. Invalid for clustered items:
    `sign_flips` of the clusters' sums is the same test for those. Raises ValueError for other scores than 0 and 1.
    """
    a, b = (np.asarray(scores, dtype=np.float64) for scores in (first, second))
    if a.shape != b.shape or a.ndim != 1 or not np.isin(np.concatenate([a, b]), (0.0, 1.0)).all():
        raise ValueError("McNemar's test needs paired scores of 0 and 1")
    gained, lost = int((b > a).sum()), int((b < a).sum())
    return float(stats.binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for being several, in the order given (Holm 1979; adjusted form of Wright 1992).

    The k-th smallest of m is multiplied by m - k + 1 and never lies below a smaller one's: rejecting what is at most
    0.05 errs in any of them with probability at most 0.05, whatever depends on what. 0.01, 0.04, 0.03, 0.005 become
    0.03, 0.06, 0.06, 0.02.
    """
    p = np.asarray(p_values, dtype=np.float64)
    if p.ndim != 1 or not ((p >= 0) & (p <= 1)).all():
        raise ValueError("p-values lie between 0 and 1")
    order = np.argsort(p, kind="stable")
    raised = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    corrected = np.empty(len(p))
    corrected[order] = np.minimum(raised, 1.0)
    return [float(x) for x in corrected]
