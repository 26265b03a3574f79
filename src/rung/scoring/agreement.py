"""How far people, or a judge and people, agree beyond chance: on labels without an order, with intervals of 95 %.

Every statistic here is a function of counts that add up over items, so a bootstrap over clusters resamples the counts
and works out the statistic anew, chance included. Raw agreement stands beside it: where one label is rare, kappa and
alpha are low however often two raters agree.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence

import numpy as np
from numpy.typing import NDArray

from rung.scoring.significance import Floats
from rung.scoring.stats import SAMPLES, TINY, Clusters, Interval, cluster_sums, expanded_percentiles, wilson

Label = Hashable | None
"""What a rater said of an item; None where nothing."""
Ratings = Sequence[Sequence[Label]]
"""One list an item, one entry a rater, the raters in the same order."""
CountTable = NDArray[np.float64]
"""[..., K, K]: how often label c stood beside label k, summed over items."""


def percent_agreement(ratings: Ratings, clusters: Clusters = None, seed: int = 0) -> Interval:
    """Share of pairs of raters who said the same, of all pairs that rated an item, each pair counting once."""
    return _interval(_pair_counts(ratings), clusters, seed, lambda table: np.zeros(table.shape[:-2]))


def cohen_kappa(first: Sequence[Label], second: Sequence[Label], clusters: Clusters = None, seed: int = 0) -> Interval:
    """Cohen's kappa of two raters (Cohen 1960, eq. 1): (p_o - p_e) / (1 - p_e), chance from each rater's own shares.

    Items that one of them left out are left out. 20 yes-yes, 15 no-no, 5 and 10 apart give 0.4. Not a number where
    both said one and the same label throughout.
    """
    if len(first) != len(second):
        raise ValueError(f"{len(first)} and {len(second)} labels: two raters rate the same items")
    codes = _codes(list(zip(first, second, strict=True)))
    kept: NDArray[np.bool_] = np.all(codes >= 0, axis=1)
    k = int(codes.max(initial=0)) + 1
    tables = np.zeros((int(kept.sum()), k, k))
    tables[np.arange(len(tables)), codes[kept, 0], codes[kept, 1]] = 1.0

    def chance(table: CountTable) -> Floats:
        both: Floats = (table.sum(axis=-1) * table.sum(axis=-2)).sum(axis=-1)
        return np.asarray(both / table.sum(axis=(-1, -2)) ** 2)

    return _interval(tables, _filter_clusters(clusters, kept), seed, chance)


def fleiss_kappa(ratings: Ratings, clusters: Clusters = None, seed: int = 0) -> Interval:
    """Fleiss' kappa of several raters (Fleiss 1971, eqs. 1-7), chance from the shares of all raters together.

    Every item needs as many ratings as any other, by whomever. Raises ValueError where it has not.
    """
    counts = {sum(label is not None for label in item) for item in ratings}
    if len(counts) != 1 or min(counts) < 2:
        raise ValueError("Fleiss' kappa needs equally many ratings an item, at least 2; Krippendorff's alpha does not")

    def chance(table: CountTable) -> Floats:
        shares: Floats = table.sum(axis=-1) / table.sum(axis=(-1, -2))[..., None]
        return np.asarray((shares**2).sum(axis=-1))

    return _interval(_pair_counts(ratings), clusters, seed, chance)


def krippendorff_alpha(ratings: Ratings, clusters: Clusters = None, seed: int = 0) -> Interval:
    """Krippendorff's alpha for labels without an order (Krippendorff 2011, "Computing", part C): 1 - D_o / D_e.

    Raters may leave items out; an item with one rating tells nothing and is left out. D_e is chance without
    replacement, so alpha lies above Fleiss' kappa by an amount that shrinks with the number of ratings.
    """

    def chance(table: CountTable) -> Floats:
        of_label: Floats = table.sum(axis=-1)
        n = of_label.sum(axis=-1)
        return np.asarray((of_label * (of_label - 1.0)).sum(axis=-1) / (n * (n - 1.0)))

    # Coincidences: an item with m ratings counts m of them, spread over its m (m - 1) ordered pairs.
    tables = _pair_counts(ratings)
    m = np.array([sum(label is not None for label in item) for item in ratings], dtype=np.float64)
    return _interval(tables / np.maximum(m - 1.0, 1.0)[:, None, None], clusters, seed, chance)


def _chance_corrected(agreed: Floats | float, chance: Floats | float) -> Floats:
    """Agreement beyond chance, of what there is beyond chance; not a number where there is nothing beyond."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray((np.asarray(agreed) - chance) / (1.0 - np.asarray(chance)))


def _agreement_share(table: CountTable) -> Floats:
    return np.asarray(np.trace(table, axis1=-2, axis2=-1) / table.sum(axis=(-1, -2)))


def _interval(tables: CountTable, clusters: Clusters, seed: int, chance: Callable[[CountTable], Floats]) -> Interval:
    """Agreement beyond chance of all items, clusters resampled.

    Where the resampling has no spread (all agree throughout) Wilson's bounds of the raw agreement on the number of
    clusters take its place, chance as it was. A replicate in which only one label occurs shows nothing beyond chance.
    """
    rated = tables.sum(axis=(1, 2)) > 0
    if not rated.any():
        raise ValueError("no item was rated by two")
    k = tables.shape[-1]
    sums = np.stack(cluster_sums(_filter_clusters(clusters, rated), *tables[rated].reshape(-1, k * k).T), axis=1)
    n, c, whole = int(rated.sum()), len(sums), sums.sum(axis=0).reshape(k, k)
    agreed, by_chance = float(_agreement_share(whole)), float(chance(whole))
    if 1.0 - by_chance < TINY:
        return Interval(math.nan, -math.inf, math.inf, n, c, "undefined: only one label occurs")
    value = float(_chance_corrected(agreed, by_chance))
    if np.ptp(_agreement_share(sums.reshape(c, k, k))) < TINY:
        floor = wilson(min(agreed, 1.0) * c, c)
        low, high = (float(_chance_corrected(bound, by_chance)) for bound in (floor.low, floor.high))
        return Interval(value, low, high, n, c, "wilson floor")
    rng, values, agreements = np.random.default_rng(seed), [], []
    for rows in _slices(SAMPLES, max(1, 2_000_000 // c)):
        drawn = (rng.multinomial(c, np.full(c, 1.0 / c), size=rows) @ sums).reshape(rows, k, k)
        agreements.append(_agreement_share(drawn))
        values.append(np.nan_to_num(_chance_corrected(agreements[-1], chance(drawn)), nan=0.0))
    replicates, method = np.concatenate(values), "cluster bootstrap"
    if np.ptp(replicates) < TINY:  # who says the same of everything has kappa 0 in every resample
        replicates, method = (
            _chance_corrected(np.concatenate(agreements), by_chance),
            "cluster bootstrap, chance as it was",
        )
    low, high = expanded_percentiles(replicates, c)
    return Interval(value, low, high, n, c, method)


def _slices(total: int, size: int) -> list[int]:
    return [min(size, total - start) for start in range(0, total, size)]


def _pair_counts(ratings: Ratings) -> CountTable:
    """Ordered pairs of ratings of each item, [N, K, K]: symmetric, by different raters."""
    codes = _codes(ratings)
    k = int(codes.max(initial=0)) + 1
    ones = np.zeros((len(codes), k))
    for column in codes.T:
        given = column >= 0
        ones[given, column[given]] += 1.0
    tables: CountTable = ones[:, :, None] * ones[:, None, :]
    tables[:, np.arange(k), np.arange(k)] -= ones
    return tables


def _codes(ratings: Ratings) -> NDArray[np.intp]:
    """Labels as numbers in the order they occur, -1 for none, [items, raters]."""
    if len(ratings) == 0 or len({len(item) for item in ratings}) != 1:
        raise ValueError("ratings are one list an item, each with an entry a rater (None for nothing said)")
    known: dict[Hashable, int] = {}
    rows = [[-1 if x is None else known.setdefault(x, len(known)) for x in item] for item in ratings]
    return np.array(rows, dtype=np.intp).reshape(len(rows), -1)


def _filter_clusters(clusters: Clusters, kept: NDArray[np.bool_]) -> Clusters:
    if clusters is None:
        return None
    if len(clusters) != len(kept):
        raise ValueError(f"{len(clusters)} cluster ids for {len(kept)} items")
    return [cluster for cluster, own in zip(clusters, kept.tolist(), strict=True) if own]
