"""How often intervals hold the truth and tests find what is not there: simulation over clusters, rates, correlations.

`python tests/coverage_study.py` prints the tables of docs/evidence.md; `tests/reference/test_coverage.py` judges them.
The samples of a cell are drawn and judged at once, by the functions of `rung.scoring.intervals` that users' scores go
through. Rates of clusters are beta or Dirichlet distributed, which makes the correlation of two items of a cluster
exactly `rho`; at 1 a cluster is all alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import product

import numpy as np
from scipy import special

from rung.scoring.intervals import Sizes, bounded_difference, bounded_mean, student_ratio
from rung.scoring.significance import sign_flips

LEAST_COVERAGE, MOST_ALARMS = 0.94, 0.055
"""What intervals of 95 % must keep everywhere, and where nothing differs."""
CLUSTERS = (2, 3, 4, 5, 6, 8, 12, 20, 34, 40)
RATES = (0.005, 0.02, 0.05, 0.1, 0.2, 0.35, 0.5)
CORRELATIONS = (0.0, 0.05, 0.2, 0.5, 0.8, 1.0)
ITEMS = ("one", "six", "1 to 11", "25", "pareto")
"""Items of a cluster; `pareto`: 1 to 200 with tail 1, so that a few clusters hold most items."""
FRACTIONS = {
    "nearly all 0.9": lambda rng, shape: np.where(rng.random(shape) < 0.02, 0.0, 0.9),
    "0.8 to 1, rarely 0": lambda rng, shape: np.where(rng.random(shape) < 0.02, 0.0, rng.uniform(0.8, 1.0, shape)),
    "beta(2, 2)": lambda rng, shape: rng.beta(2.0, 2.0, shape),
    "beta(0.3, 0.3)": lambda rng, shape: rng.beta(0.3, 0.3, shape),
}
"""Laws of independent scores that are fractions, such as token F1."""
FRACTION_MEANS = {"nearly all 0.9": 0.882, "0.8 to 1, rarely 0": 0.882, "beta(2, 2)": 0.5, "beta(0.3, 0.3)": 0.5}
CHANGES = {
    "none is better": lambda p: (p, p, 0.0),
    "none, a third changes": lambda p: (p / 3, p / 3, p / 3),
    "gains alone": lambda p: (p, 0.0, 0.0),
    "twice the gains": lambda p: (p, p / 2, 0.0),
    "half right before": lambda p: (p / 2, p / 10, 0.4),
}
"""Shares of items gained, lost, and right in both systems."""


@dataclass(frozen=True)
class Cell:
    """A place of the simulation."""

    clusters: int
    rate: float
    rho: float
    items: str = "six"
    change: str = ""
    """Of a difference."""


@dataclass(frozen=True)
class Measured:
    """Shares of the samples of a cell."""

    coverage: float
    width: float
    excludes_zero: float = 0.0
    """Of a difference: intervals without zero."""
    significant: float = 0.0
    """Of a difference: p-values of sign flips up to 0.05."""


def score_cells() -> Iterator[Cell]:
    """For one system."""
    for c, rate in product(CLUSTERS, RATES):
        yield Cell(c, rate, 0.0, "one")
        yield from (Cell(c, rate, rho, items) for rho, items in product(CORRELATIONS, ITEMS[1:]))


def change_cells() -> Iterator[Cell]:
    """For a difference."""
    for c, rate, change in product((2, 3, 5, 6, 8, 12, 20, 40), (0.005, 0.02, 0.1, 0.3, 0.5), CHANGES):
        yield Cell(c, rate, 0.0, "one", change)
        for rho, items in product((0.0, 0.2, 0.5, 1.0), ITEMS[1:3]):
            yield Cell(c, rate, rho, items, change)


def measure_score(cell: Cell, samples: int, rng: np.random.Generator, seeds: int = 1) -> Measured:
    """Coverage of `bounded_mean`; with several training `seeds` an item's score is the mean of as many answers."""
    weights = draw_sizes(cell, samples, rng)
    sums = draw(weights * seeds, (cell.rate, 1 - cell.rate), cell.rho, rng)[0] / seeds
    _, low, high = bounded_mean(sums, sizes_of(weights))
    return Measured(float(((low <= cell.rate) & (cell.rate <= high)).mean()), float((high - low).mean()))


def measure_fractions(law: str, items: int, samples: int, rng: np.random.Generator) -> float:
    """Coverage of `bounded_mean` for independent fractions."""
    scores = FRACTIONS[law](rng, (samples, items))
    _, low, high = bounded_mean(scores, sizes_of(np.ones((samples, items))))
    mean = FRACTION_MEANS[law]
    return float(((low <= mean) & (mean <= high)).mean())


def measure_change(cell: Cell, samples: int, rng: np.random.Generator) -> Measured:
    """Coverage of `bounded_difference` with the sign test of `stats.paired_difference`, and false or true alarms."""
    gained, lost, both = CHANGES[cell.change](cell.rate)
    weights = draw_sizes(cell, samples, rng)
    both = max(0.0, min(both, 1.0 - gained - lost))
    shares = (gained, lost, both, max(0.0, 1.0 - gained - lost - both))
    gains, losses, right, _ = draw(weights, shares, cell.rho, rng)
    interval = bounded_difference(losses + right, gains + right, gains, losses, sizes_of(weights))
    p = np.array([p_value(row) for row in gains - losses])
    return judge_difference(interval, p, gained - lost)


def judge_difference(interval: tuple[np.ndarray, np.ndarray, np.ndarray], p: np.ndarray, truth: float) -> Measured:
    """An interval excludes zero only where p is at most 0.05, as in `stats.paired_difference`."""
    _, low, high = interval
    low, high = (np.where(p > 0.05, limit(end, 0.0), end) for limit, end in ((np.minimum, low), (np.maximum, high)))
    held = (low <= truth + 1e-12) & (truth - 1e-12 <= high)
    width = float(np.minimum(high - low, 2.0).mean())
    alarms = float(((low > 0) | (high < 0)).mean())
    return Measured(float(held.mean()), width, alarms, float((p <= 0.05).mean()))


def measure_ratio(
    clusters: int, rho: float, samples: int, rng: np.random.Generator, *, change: float | None = None
) -> Measured:
    """Coverage for nats of 1 to 11 items a cluster, 5 to 49 tokens each, in normal clusters; or for their change."""
    tokens, nats = np.zeros((samples, clusters)), np.zeros((samples, clusters))
    truth = 2.0 if change is None else change
    count, effect = rng.integers(1, 12, size=tokens.shape), np.sqrt(rho) * rng.normal(size=tokens.shape)
    for i in range(11):
        length = rng.integers(5, 50, size=tokens.shape) * (i < count)
        tokens += length
        nats += length * (truth + 0.5 * (effect + np.sqrt(1 - rho) * rng.normal(size=tokens.shape)))
    interval = student_ratio(nats, Sizes(tokens, np.asarray(count.sum(axis=1), dtype=float)))
    p = np.zeros(samples) if change is None else np.array([sign_flips(row) for row in nats])
    return judge_difference(interval, p, truth)


def draw_sizes(cell: Cell, samples: int, rng: np.random.Generator) -> np.ndarray:
    """Number of items of each cluster, [samples, C]."""
    shape = (samples, cell.clusters)
    if cell.items == "1 to 11":
        return rng.integers(1, 12, size=shape).astype(float)
    if cell.items == "pareto":
        return np.minimum(np.floor(1.0 / rng.random(shape)), 200.0)
    return np.full(shape, {"one": 1.0, "six": 6.0, "25": 25.0}[cell.items])


def sizes_of(weights: np.ndarray) -> Sizes:
    """Items of equal weight."""
    return Sizes(weights, np.asarray(weights.sum(axis=-1)))


def draw(counts: np.ndarray, shares: tuple[float, ...], rho: float, rng: np.random.Generator) -> list[np.ndarray]:
    """Numbers of items of each category in each cluster, Dirichlet-multinomial, one array a category."""
    rates = np.broadcast_to(np.array(shares), (*counts.shape, len(shares)))
    if rho == 1.0:
        rates = np.eye(len(shares))[rng.choice(len(shares), p=shares, size=counts.shape)]
    elif rho > 0.0:
        alpha = np.array(shares) * (1 - rho) / rho
        # logarithms of gammas: small shapes underflow (Marsaglia and Tsang 2000, section 6)
        with np.errstate(divide="ignore"):
            logs = np.log(rng.standard_gamma(alpha + 1, size=rates.shape)) + np.log(rng.random(rates.shape)) / alpha
        rates = special.softmax(np.where(alpha > 0, logs, -np.inf), axis=-1)
    left, rest, categories = counts.astype(int), np.ones(counts.shape), []
    for k in range(len(shares) - 1):
        share = np.clip(rates[..., k] / np.maximum(rest, 1e-300), 0.0, 1.0)
        categories.append(rng.binomial(left, share).astype(float))
        left, rest = left - categories[-1].astype(int), rest - rates[..., k]
    return [*categories, left.astype(float)]


def p_value(gains: np.ndarray) -> float:
    """Of sign flips of whole numbers: the same as `significance.sign_flips`, kept for samples alike but for order."""
    magnitudes = np.sort(np.abs(gains[gains != 0])).astype(int)
    return _tail(tuple(magnitudes.tolist()))[round(abs(float(gains.sum())))]


@lru_cache(maxsize=200_000)
def _tail(magnitudes: tuple[int, ...]) -> np.ndarray:
    """P(|sum of +-magnitudes| >= t) for t = 0, 1, ..., one cluster after the other."""
    distribution = np.ones(1)
    for step in magnitudes:
        sides = np.zeros(len(distribution) + 2 * step)
        sides[: len(distribution)] += distribution / 2
        sides[2 * step :] += distribution / 2
        distribution = sides
    middle = (len(distribution) - 1) // 2
    both_sides = distribution[middle:] + distribution[middle::-1]
    both_sides[0] /= 2
    return np.cumsum(both_sides[::-1])[::-1]


Measure = Callable[[Cell, int, np.random.Generator], Measured]


def measure(cells: Iterable[Cell], measure_cell: Measure, samples: int, seed: int = 0) -> dict[Cell, Measured]:
    """Every cell; those within two standard errors of a limit again with ten times as many new samples.

    The limits are a coverage of 0.94 and, where nothing differs, 0.055 intervals without zero. Of thousands of cells
    some lie beyond a limit by chance alone: what counts is the second look, whose error is a third.
    """
    rng, result = np.random.default_rng(seed), {}
    for cell in cells:
        found = measure_cell(cell, samples, rng)
        margin = 2 * np.sqrt(0.05 * 0.95 / samples)
        alarms = max(found.excludes_zero, found.significant) if cell.change.startswith("none") else 0.0
        if found.coverage < LEAST_COVERAGE + margin or alarms > MOST_ALARMS - margin:
            found = measure_cell(cell, 10 * samples, rng)
        result[cell] = found
    return result


def rows_by_clusters(measured: dict[Cell, Measured]) -> dict[int, str]:
    """One text for each number of clusters."""
    counts = sorted({cell.clusters for cell in measured})
    return {c: _coverage_text([(cell, m) for cell, m in measured.items() if cell.clusters == c]) for c in counts}


def main() -> None:
    """Prints the tables."""
    print("| clusters | cells | least coverage, at | mean coverage |\n|---|---|---|---|")
    scores = measure(score_cells(), measure_score, 4_000)
    for c, row in rows_by_clusters(scores).items():
        print(f"| {c} | {row} |", flush=True)
    print("\n| clusters | cells | least coverage, at | mean coverage | most false alarms: interval, p-value |")
    print("|---|---|---|---|---|")
    changes = measure(change_cells(), measure_change, 2_000)
    for c, row in rows_by_clusters(changes).items():
        nothing = [m for cell, m in changes.items() if cell.clusters == c and cell.change.startswith("none")]
        alarms = f"{max(m.excludes_zero for m in nothing):.3f}, {max(m.significant for m in nothing):.3f}"
        print(f"| {c} | {row} | {alarms} |", flush=True)
    print("\n| clusters | rate | correlation | power: interval, p-value |\n|---|---|---|---|")
    for cell, m in changes.items():
        if cell.change in ("gains alone", "half right before") and (cell.items, cell.clusters) in (
            ("six", 12),
            ("six", 40),
        ):
            if cell.rho in (0.0, 0.5) and cell.rate in (0.1, 0.3):
                power = f"{m.excludes_zero:.2f}, {m.significant:.2f}"
                print(f"| {cell.clusters} | {cell.change} {cell.rate} | {cell.rho} | {power} |")
    print("\n| clusters | coverage of a ratio | of a change of nats | false alarms |\n|---|---|---|---|")
    rng = np.random.default_rng(1)
    for c in CLUSTERS:
        ratios = [measure_ratio(c, rho, 10_000, rng) for rho in (0.0, 0.5, 1.0)]
        cells = [f"{min(m.coverage for m in ratios):.3f}"]
        if c <= 12:  # more clusters take random flips, a hundred times as long
            nothing = [measure_ratio(c, rho, 2_000, rng, change=0.0) for rho in (0.0, 1.0)]
            cells += [f"{min(m.coverage for m in nothing):.3f}", f"{max(m.excludes_zero for m in nothing):.3f}"]
        print(f"| {c} | {' | '.join(cells)} |", flush=True)


def _coverage_text(measured: list[tuple[Cell, Measured]]) -> str:
    cell, least = min(measured, key=lambda pair: pair[1].coverage)
    place = ", ".join(
        filter(None, (f"rate {cell.rate}", f"correlation {cell.rho}", f"items {cell.items}", cell.change))
    )
    return f"{len(measured)} | {least.coverage:.3f}, {place} | {np.mean([m.coverage for _, m in measured]):.3f}"


if __name__ == "__main__":
    main()
