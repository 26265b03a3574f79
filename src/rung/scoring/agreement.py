"""Inter-rater agreement beyond chance for nominal labels, with 95 % intervals (people, or a judge and people).

Every statistic is a function of counts that add up over items, so the cluster bootstrap resamples counts and recomputes
the statistic, chance included, for all replicates at once. Raw agreement is reported too: where one label is rare,
kappa and alpha are low however often two raters agree. Used by `pairwise.check_judge`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from numbers import Real

import numpy as np
from numpy.typing import NDArray

from rung.results.base import Estimate
from rung.scoring.intervals import TINY, Sizes, bounded_mean, kish, t_quantile
from rung.scoring.significance import Floats, batch_sizes
from rung.scoring.stats import (
    MIN_RESAMPLED_CLUSTERS,
    SAMPLES,
    Clusters,
    cluster_sums,
    expanded_percentiles,
)

Label = Hashable | None
"""Label of an item by a rater; None if missing."""
Ratings = Sequence[Sequence[Label]]
"""One list per item, one entry per rater, raters in the same order."""
CountTable = NDArray[np.float64]
"""[..., K, K]: how often label c occurred together with label k, summed over items."""


def percent_agreement(ratings: Ratings, clusters: Clusters = None) -> Estimate:
    """Share of pairs of raters with the same label, of all pairs that rated an item, each pair counting once."""
    return _interval(_pair_counts(ratings), clusters, lambda table: np.zeros(table.shape[:-2]))


def cohen_kappa(
    first: Sequence[Label], second: Sequence[Label], clusters: Clusters = None, *, is_scale: bool = False
) -> Estimate:
    """Cohen's kappa of two raters (Cohen 1960, eq. 1): (p_o - p_e) / (1 - p_e), chance from each rater's own shares.

    Items without a label by one of them are ignored. 20 yes-yes, 15 no-no, 5 and 10 disagreements give 0.4. NaN where
    both used one label only. `is_scale`: labels are numbers, and a disagreement counts by its squared distance (Cohen
    1968, quadratic weights); other labels raise ValueError.
    """
    if len(first) != len(second):
        raise ValueError(f"{len(first)} and {len(second)} labels: two raters rate the same items")
    codes = _codes(list(zip(first, second, strict=True)), is_scale)
    both_rated: NDArray[np.bool_] = np.all(codes >= 0, axis=1)
    k = int(codes.max(initial=0)) + 1
    # one-hot per item: the tables add up to the confusion matrix
    tables = np.zeros((int(both_rated.sum()), k, k))
    tables[np.arange(len(tables)), codes[both_rated, 0], codes[both_rated, 1]] = 1.0

    weights = _scale_weights(list(zip(first, second, strict=True))) if is_scale else None

    def chance(table: CountTable) -> Floats:
        rows, columns, n = table.sum(axis=-1), table.sum(axis=-2), table.sum(axis=(-1, -2))
        if weights is not None:
            return np.asarray(((rows @ weights) * columns).sum(axis=-1) / n**2)
        return np.asarray((rows * columns).sum(axis=-1) / n**2)

    return _interval(tables, _filter_clusters(clusters, both_rated), chance, weights)


def fleiss_kappa(ratings: Ratings, clusters: Clusters = None) -> Estimate:
    """Fleiss' kappa of several raters (Fleiss 1971, eqs. 1-7), chance from the label shares of all raters together.

    Every item needs the same number of ratings, by any raters. Raises ValueError otherwise.
    """
    counts = {sum(label is not None for label in item) for item in ratings}
    if len(counts) != 1 or min(counts) < 2:
        raise ValueError("Fleiss' kappa needs equally many ratings an item, at least 2; Krippendorff's alpha does not")

    def chance(table: CountTable) -> Floats:
        shares: Floats = table.sum(axis=-1) / table.sum(axis=(-1, -2))[..., None]
        return np.asarray((shares**2).sum(axis=-1))

    return _interval(_pair_counts(ratings), clusters, chance)


def krippendorff_alpha(ratings: Ratings, clusters: Clusters = None, *, is_scale: bool = False) -> Estimate:
    """Krippendorff's alpha for labels without an order (Krippendorff 2011, "Computing", part C): 1 - D_o / D_e.

    Ratings may be missing; an item with one rating is ignored. D_e is chance without replacement, so alpha exceeds
    Fleiss' kappa by an amount that shrinks with the number of ratings. `is_scale`: labels are numbers, and a
    disagreement counts by its squared distance (the interval metric of part D); other labels raise ValueError.
    """
    weights = _scale_weights(ratings) if is_scale else None

    def chance(table: CountTable) -> Floats:
        label_counts: Floats = table.sum(axis=-1)
        n = label_counts.sum(axis=-1)
        if weights is not None:  # a label agrees with itself completely, so its own diagonal loses n_c
            return np.asarray((((label_counts @ weights) * label_counts).sum(axis=-1) - n) / (n * (n - 1.0)))
        return np.asarray((label_counts * (label_counts - 1.0)).sum(axis=-1) / (n * (n - 1.0)))

    # Coincidences: an item with m ratings counts m of them, spread over its m (m - 1) ordered pairs.
    tables = _pair_counts(ratings, is_scale)
    m = np.array([sum(label is not None for label in item) for item in ratings], dtype=np.float64)
    return _interval(tables / np.maximum(m - 1.0, 1.0)[:, None, None], clusters, chance, weights)


def _chance_corrected(agreement: Floats | float, chance: Floats | float) -> Floats:
    """(agreement - chance) / (1 - chance); NaN where chance is 1."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray((np.asarray(agreement) - chance) / (1.0 - np.asarray(chance)))


def _agreement_sum(table: CountTable, weights: Floats | None) -> Floats:
    """Pairs of ratings that agree; with weights [K, K] each pair counts by how near its labels are."""
    if weights is None:
        return np.asarray(np.trace(table, axis1=-2, axis2=-1))
    return np.asarray((table * weights).sum(axis=(-1, -2)))


def _agreement_share(table: CountTable, weights: Floats | None) -> Floats:
    return np.asarray(_agreement_sum(table, weights) / table.sum(axis=(-1, -2)))


def _interval(
    tables: CountTable, clusters: Clusters, chance: Callable[[CountTable], Floats], weights: Floats | None = None
) -> Estimate:
    """Chance-corrected agreement of all items with its interval.

    Of raw agreement that is `intervals.bounded_mean`. Else it is that of the statistic over clusters, chance included
    (`_chance_included`). Where fewer than `MIN_RESAMPLED_CLUSTERS` clusters hold the rarer of agreement and
    disagreement that one is too narrow, and the union with the first, at the observed chance, takes its place; where no
    cluster does, the first alone.
    """
    is_rated = tables.sum(axis=(1, 2)) > 0
    if not is_rated.any():
        raise ValueError("no item was rated by two")
    k, kept = tables.shape[-1], tables[is_rated]
    # summed by cluster first: a replicate is then one matrix product instead of a pass over the items
    sums = np.stack(cluster_sums(_filter_clusters(clusters, is_rated), *kept.reshape(-1, k * k).T), axis=1)
    n, c, total_table = int(is_rated.sum()), len(sums), sums.sum(axis=0).reshape(k, k)
    agreement, chance_agreement = float(_agreement_share(total_table, weights)), float(chance(total_table))
    if 1.0 - chance_agreement < TINY:
        method = "undefined: only one label occurs"
        return Estimate(mean=math.nan, low=-math.inf, high=math.inf, examples=n, clusters=c, method=method)
    value = float(_chance_corrected(agreement, chance_agreement))
    by_cluster = sums.reshape(c, k, k)
    sizes = Sizes(by_cluster.sum(axis=(1, 2)), kish(kept.sum(axis=(1, 2))))
    _, *ends = bounded_mean(_agreement_sum(by_cluster, weights), sizes)
    low, high = (float(_chance_corrected(float(end), chance_agreement)) for end in ends)
    method, shares = "clopper-pearson, chance as it was", _agreement_share(by_cluster, weights)
    if chance_agreement > 0 and np.ptp(shares) > TINY:
        own_low, own_high, method = _chance_included(sums, value, chance_agreement, chance, weights)
        is_extreme = min((shares > TINY).sum(), (shares < 1 - TINY).sum()) < MIN_RESAMPLED_CLUSTERS
        low, high = (min(low, own_low), max(high, own_high)) if is_extreme else (own_low, own_high)
    return Estimate(mean=value, low=low, high=high, examples=n, clusters=c, method=method)


def _chance_included(
    sums: Floats,
    value: float,
    chance_agreement: float,
    chance: Callable[[CountTable], Floats],
    weights: Floats | None,
) -> tuple[float, float, str]:
    """Ends of the statistic's own interval and its method; `sums` are the tables of the clusters, [C, K * K].

    Clusters resampled, expanded percentiles; below `MIN_RESAMPLED_CLUSTERS` Student's t of the jackknife, within -1
    and 1. A replicate with only one label counts as 0, nothing beyond chance.
    """
    c, k = len(sums), math.isqrt(sums.shape[1])
    if c < MIN_RESAMPLED_CLUSTERS:
        without = (sums.sum(axis=0) - sums).reshape(c, k, k)
        values = np.nan_to_num(_chance_corrected(_agreement_share(without, weights), chance(without)), nan=0.0)
        half = float(t_quantile(c - 1)) * math.sqrt(float(((values - value) ** 2).sum()) * (c - 1) / c)
        return max(value - half, -1.0), min(value + half, 1.0), "t on clusters"
    rng, replicates, agreements = np.random.default_rng(0), [], []
    for rows in batch_sizes(SAMPLES, c):
        resampled_tables = (rng.multinomial(c, np.full(c, 1.0 / c), size=rows) @ sums).reshape(rows, k, k)
        agreements.append(_agreement_share(resampled_tables, weights))
        replicates.append(np.nan_to_num(_chance_corrected(agreements[-1], chance(resampled_tables)), nan=0.0))
    values, method = np.concatenate(replicates), "cluster bootstrap"
    if np.ptp(values) < TINY:  # a rater with one label for everything has kappa 0 in every resample
        values = _chance_corrected(np.concatenate(agreements), chance_agreement)
        method = "cluster bootstrap, chance as it was"
    return (*expanded_percentiles(values, c), method)


def _pair_counts(ratings: Ratings, is_scale: bool = False) -> CountTable:
    """Ordered pairs of ratings of each item by different raters, [N, K, K], symmetric."""
    codes = _codes(ratings, is_scale)
    k = int(codes.max(initial=0)) + 1
    label_counts = np.zeros((len(codes), k))
    for column in codes.T:
        is_rated = column >= 0
        label_counts[is_rated, column[is_rated]] += 1.0
    tables: CountTable = label_counts[:, :, None] * label_counts[:, None, :]
    # n_k^2 counts a rating with itself; n_k (n_k - 1) does not
    tables[:, np.arange(k), np.arange(k)] -= label_counts
    return tables


def _scale_labels(ratings: Ratings) -> list[float]:
    """The numbers that occur, in order. Raises ValueError for a label that is not a finite number."""
    numbers: set[float] = set()
    for label in (label for item in ratings for label in item if label is not None):
        if not isinstance(label, Real) or not math.isfinite(label):
            raise ValueError(f"labels on a scale are numbers, and one is {label!r}")
        numbers.add(float(label))
    return sorted(numbers)


def _scale_weights(ratings: Ratings) -> Floats:
    """Agreement of two numbers on the scale, [K, K]: 1 for equal ones, 0 for those that are farthest apart.

    The farthest of items that two rated: a number that occurs only in others must not stretch the scale.
    """
    labels = np.array(_scale_labels(ratings))
    compared = _scale_labels([item for item in ratings if sum(label is not None for label in item) > 1])
    longest = (compared[-1] - compared[0]) ** 2 if compared else 0.0
    return np.asarray(1.0 - (labels[:, None] - labels[None, :]) ** 2 / (longest or 1.0))


def _codes(ratings: Ratings, is_scale: bool = False) -> NDArray[np.intp]:
    """Labels as integers, -1 for missing, [items, raters]: in the order of occurrence, or in that of the numbers."""
    if len(ratings) == 0 or len({len(item) for item in ratings}) != 1:
        raise ValueError("ratings are one list an item, each with an entry a rater (None for nothing said)")
    codes: dict[Hashable, int] = {}
    if is_scale:
        codes = {label: code for code, label in enumerate(_scale_labels(ratings))}
    rows = [[-1 if x is None else codes.setdefault(x, len(codes)) for x in item] for item in ratings]
    return np.array(rows, dtype=np.intp).reshape(len(rows), -1)


def _filter_clusters(clusters: Clusters, mask: NDArray[np.bool_]) -> Clusters:
    if clusters is None:
        return None
    if len(clusters) != len(mask):
        raise ValueError(f"{len(clusters)} cluster ids for {len(mask)} items")
    return [cluster for cluster, keep in zip(clusters, mask.tolist(), strict=True) if keep]
