"""Strengths of systems from comparisons in pairs: the model of Bradley and Terry (1952) with a ridge penalty.

P(i beats j) = sigmoid(theta_i - theta_j); a tie counts as half a win of each. The ridge keeps the fit finite where a
group of systems won everything against the others. Then the ridge alone says how much stronger it is (Ford 1957: the
likelihood has a maximum only if wins lead from every system to every other), so that no interval is given. Resamples
show too little where a system rarely lost, mostly tied or was compared in few clusters: the interval of its win rate is
a lower limit of the width. Pure functions of comparisons, used by `human_labels.result`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import brentq
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from rung.results.base import Estimate
from rung.scoring.significance import Floats, batch_sizes
from rung.scoring.stats import MIN_RESAMPLED_CLUSTERS, Clusters, expanded_percentiles, score_interval

RIDGE = 0.01
"""Weight of the squared strengths, that of `pairwise.RIDGE`: about a hundredth of a comparison a system."""
REFITS = 2_000
MAX_NEWTON_STEPS = 60
MAX_STEP_SIZE = 2.0
"""Limits of Newton's method. Steps in log-odds."""
MAX_LOG_ODDS = 100.0
"""Where the strength of a win rate is searched, on both sides of the fit."""


class Comparisons(NamedTuple):
    """N comparisons of S systems."""

    systems: list[str]
    first: NDArray[np.intp]
    """[N], index of the first system of each comparison."""
    second: NDArray[np.intp]
    outcomes: Floats
    """[N], from 0 to 1: 1 where the first system won, 0.5 for a tie, 0 where the second won; or a mean of votes."""


def make_comparisons(first: Sequence[str], second: Sequence[str], outcomes: ArrayLike) -> Comparisons:
    """Comparisons of systems by name. Raises `ValueError` for a system against itself and outcomes beyond 0 and 1."""
    values = np.asarray(outcomes, dtype=np.float64)
    if not len(first) == len(second) == len(values) or len(values) == 0:
        raise ValueError(f"{len(first)} and {len(second)} systems and {len(values)} outcomes")
    if any(a == b for a, b in zip(first, second, strict=True)) or not ((values >= 0) & (values <= 1)).all():
        raise ValueError("a comparison is of two systems, and its outcome lies between 0 and 1")
    systems = sorted({*first, *second})
    index = {name: i for i, name in enumerate(systems)}
    a, b = (np.array([index[name] for name in names], dtype=np.intp) for names in (first, second))
    return Comparisons(systems, a, b, values)


def unconnected_groups(comparisons: Comparisons) -> list[list[str]]:
    """Groups of systems that no chain of comparisons connects: one group where all strengths can be compared."""
    systems, n = comparisons.systems, len(comparisons.systems)
    edges = coo_array((np.ones(len(comparisons.first)), (comparisons.first, comparisons.second)), shape=(n, n))
    count, labels = connected_components(edges, directed=False)
    return [[name for name, label in zip(systems, labels, strict=True) if label == group] for group in range(count)]


def win_rates(comparisons: Comparisons, clusters: Clusters = None) -> dict[str, Estimate]:
    """Share of its comparisons that each system wins, a tie counting half."""
    rates = {}
    for i, name in enumerate(comparisons.systems):
        rows = np.flatnonzero((comparisons.first == i) | (comparisons.second == i))
        wins = np.where(comparisons.first[rows] == i, comparisons.outcomes[rows], 1.0 - comparisons.outcomes[rows])
        rates[name] = score_interval(wins, None if clusters is None else [clusters[row] for row in rows.tolist()])
    return rates


def strengths(comparisons: Comparisons, clusters: Clusters = None, seed: int = 0) -> dict[str, Estimate]:
    """Log-odds of each system against the mean of all, which sum to 0, with intervals of resampled clusters.

    An interval holds that of the win rate too (`_win_rate_ends`): 30 ties alone would have [0, 0]. Two systems with 30
    wins against 10 have +-0.549, half of log 3. Raises `ValueError` where the comparisons do not connect all systems:
    their strengths have no common zero.
    """
    if len(unconnected_groups(comparisons)) > 1:
        raise ValueError("systems that were never compared, directly or through others, have no common scale")
    systems, tables = comparisons.systems, _win_tables(comparisons, clusters)
    c, total = len(tables), tables.sum(axis=0)
    means, rates = fit_strengths(total[None])[0], win_rates(comparisons, clusters)
    low, high = np.full(len(systems), -np.inf), np.full(len(systems), np.inf)
    method = "unbounded"
    if not _has_maximum(total):
        method = "unbounded: a group of systems won or lost everything"
    elif c >= MIN_RESAMPLED_CLUSTERS:
        method = "refitted cluster bootstrap, at least the win rate's"
        ends = np.vstack([_bootstrap_ends(tables, seed), _win_rate_ends(list(rates.values()), means, total)])
        low, high = ends.min(axis=0), ends.max(axis=0)
    found = {}
    for i, name in enumerate(systems):
        bounds, n = {"low": float(low[i]), "high": float(high[i])}, rates[name].examples
        found[name] = Estimate(mean=float(means[i]), **bounds, examples=n, clusters=c, method=method)
    return found


def _bootstrap_ends(tables: Floats, seed: int) -> Floats:
    """Ends of the percentile intervals of refits, [2, S], of tables of wins by cluster [C, S, S]."""
    c, s = tables.shape[:2]
    rng, fits, flat = np.random.default_rng(seed), [], tables.reshape(c, s * s)
    for rows in batch_sizes(REFITS, max(c, s * s), 1_000_000):
        counts = rng.multinomial(c, np.full(c, 1.0 / c), size=rows)
        fits.append(fit_strengths((counts @ flat).reshape(rows, s, s)))
    return np.array([expanded_percentiles(replicates, c) for replicates in np.concatenate(fits).T]).T


def _win_rate_ends(rates: Sequence[Estimate], means: Floats, wins: Floats) -> Floats:
    """Strengths of all systems where the win rate of one is at an end of its interval, [2 S, S].

    The other systems stay as they were fitted to `wins` [S, S], and the model expects that share of the one's
    comparisons; then the mean of all is 0 again, so that one system that is hardly known moves all. 29 wins of 30
    against one other system have [0.785, 3.539], about half of the log-odds of Clopper-Pearson's ends.
    """
    s, games = len(means), wins + wins.T

    def excess(shift: float, i: int, share: float) -> float:
        return float(games[i] @ _sigmoid(means[i] + shift - means) - share * games[i].sum())

    def shift_of(i: int, share: float) -> float:
        if 0.0 < share < 1.0:
            return float(brentq(excess, -MAX_LOG_ODDS, MAX_LOG_ODDS, args=(i, share)))
        return -np.inf if share <= 0.0 else np.inf

    directions = np.eye(s) - 1.0 / s
    shifts = [(i, shift_of(i, end)) for i, rate in enumerate(rates) for end in (rate.low, rate.high)]
    return np.array([means + shift * directions[i] for i, shift in shifts])


def _has_maximum(wins: Floats) -> bool:
    """Whether the likelihood without a ridge has a maximum: the graph of wins [S, S] is strongly connected."""
    return int(connected_components(wins > 0, directed=True, connection="strong")[0]) == 1


def fit_strengths(wins: Floats) -> Floats:
    """Strengths [B, S] of B tables of wins [B, S, S] (row beats column), each summing to 0.

    The minimum of sum_ij w_ij log(1 + exp(theta_j - theta_i)) + RIDGE / 2 |theta|^2 by Newton's method; its Hessian is
    the Laplacian of the comparisons plus the ridge.
    """
    b, s = wins.shape[:2]
    theta, games = np.zeros((b, s)), wins + wins.transpose(0, 2, 1)
    ridge = RIDGE * np.eye(s)
    for _ in range(MAX_NEWTON_STEPS):
        p = _sigmoid(theta[:, :, None] - theta[:, None, :])
        gradient = (games * p - wins).sum(axis=2) + RIDGE * theta
        weights = games * p * (1.0 - p)
        hessian = ridge - weights
        hessian[:, np.arange(s), np.arange(s)] += weights.sum(axis=2)
        step = np.linalg.solve(hessian, gradient[..., None])[..., 0]
        size = np.abs(step).max(axis=1, keepdims=True)
        theta -= step * np.minimum(1.0, MAX_STEP_SIZE / np.maximum(size, 1e-300))
        if size.max() < 1e-10:
            break
    return np.asarray(theta - theta.mean(axis=1, keepdims=True))


def _sigmoid(z: Floats) -> Floats:
    return np.asarray(0.5 * (1.0 + np.tanh(0.5 * z)))


def _win_tables(comparisons: Comparisons, clusters: Clusters) -> Floats:
    """Wins of each cluster, [C, S, S]."""
    s, n = len(comparisons.systems), len(comparisons.outcomes)
    keys: Sequence[object] = range(n)
    if clusters is not None:  # tagged: an item's index must not be taken for a cluster that is an integer
        keys = [i if cluster is None else ("cluster", cluster) for i, cluster in enumerate(clusters)]
    index: dict[object, int] = {}
    codes = np.array([index.setdefault(key, len(index)) for key in keys], dtype=np.intp)
    tables = np.zeros((len(index), s, s))
    np.add.at(tables, (codes, comparisons.first, comparisons.second), comparisons.outcomes)
    np.add.at(tables, (codes, comparisons.second, comparisons.first), 1.0 - comparisons.outcomes)
    return tables
