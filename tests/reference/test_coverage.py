"""Coverage and false alarms of the intervals: a short version here, the whole study under `make soak`."""

from __future__ import annotations

import numpy as np
import pytest

from coverage_study import (
    CHANGES,
    CLUSTERS,
    FRACTIONS,
    LEAST_COVERAGE,
    MOST_ALARMS,
    Cell,
    change_cells,
    draw,
    draw_sizes,
    measure,
    measure_change,
    measure_fractions,
    measure_ratio,
    measure_score,
    p_value,
    score_cells,
    sizes_of,
)
from rung.scoring.intervals import bounded_difference, bounded_mean
from rung.scoring.significance import sign_flips
from rung.scoring.stats import paired_difference, score_interval

FEW = [Cell(2, 0.2, 0.5), Cell(5, 0.1, 1.0, "1 to 11"), Cell(20, 0.05, 0.5), Cell(20, 0.5, 1.0), Cell(40, 0.1, 0.5)]
"""Where percentiles, or a design effect without a prior, cover 0.5 to 0.9."""


@pytest.mark.parametrize("cell", FEW, ids=str)
def test_scores_of_one_system_are_covered(cell: Cell) -> None:
    assert measure([cell], measure_score, 1_500)[cell].coverage >= LEAST_COVERAGE


@pytest.mark.parametrize("clusters", [10, 40])
def test_few_clusters_with_most_of_the_items_are_covered(clusters: int) -> None:
    """0.88 to 0.91 with the degrees of freedom of all clusters."""
    cell = Cell(clusters, 0.5, 0.5, "pareto")
    assert measure([cell], measure_score, 1_500)[cell].coverage >= LEAST_COVERAGE


@pytest.mark.parametrize("items", [20, 60, 200])
@pytest.mark.parametrize("law", FRACTIONS)
def test_scores_that_are_fractions_are_covered(law: str, items: int) -> None:
    """0.68 where nearly all are one: their small scatter counted as many items, and says nothing of rare low ones."""
    assert measure_fractions(law, items, 4_000, np.random.default_rng(items)) >= LEAST_COVERAGE


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("clusters", [3, 20])
def test_differences_are_covered_and_not_invented(clusters: int, change: str) -> None:
    cell = Cell(clusters, 0.3, 0.2, "1 to 11", change)
    found = measure([cell], measure_change, 500)[cell]
    assert found.coverage >= LEAST_COVERAGE
    if change.startswith("none"):
        assert found.excludes_zero <= MOST_ALARMS and found.significant <= MOST_ALARMS
    assert clusters >= 6 or found.excludes_zero == 0.0


@pytest.mark.parametrize("clusters", [3, 10])
def test_ratios_of_normal_clusters_are_covered(clusters: int) -> None:
    assert measure_ratio(clusters, 0.5, 20_000, np.random.default_rng(clusters)).coverage >= LEAST_COVERAGE


def test_the_study_judges_what_users_get() -> None:
    """Its samples, as lists of items, through `score_interval`, `paired_difference` and `sign_flips`."""
    rng = np.random.default_rng(0)
    for cell in (Cell(4, 0.3, 0.5), Cell(12, 0.3, 0.2, "1 to 11")):
        weights = draw_sizes(cell, 1, rng)
        gains, losses, right, wrong = draw(weights, (0.3, 0.1, 0.3, 0.3), cell.rho, rng)
        ids, first, second = [], [], []
        for c in range(cell.clusters):
            for number, a, b in ((gains, 0, 1), (losses, 1, 0), (right, 1, 1), (wrong, 0, 0)):
                count = int(number[0, c])
                ids, first, second = ids + [c] * count, first + [a] * count, second + [b] * count
        assert p_value((gains - losses)[0]) == pytest.approx(sign_flips((gains - losses)[0]), rel=1e-9)
        found, table = score_interval(second, ids), sizes_of(weights)
        before, after = losses + right, gains + right
        vectors = [*bounded_mean(after, table), *bounded_difference(before, after, gains, losses, table)]
        mean, low, high, gain, least, most = (float(v[0]) for v in vectors)
        assert (found.mean, found.low, found.high) == pytest.approx((mean, low, high), rel=1e-12)
        difference = paired_difference(first, second, ids)
        if p_value((gains - losses)[0]) > 0.05:
            least, most = min(least, 0.0), max(most, 0.0)
        assert (difference.mean, difference.low, difference.high) == pytest.approx((gain, least, most), rel=1e-12)


@pytest.mark.soak
def test_the_whole_study_of_scores() -> None:
    measured = measure(score_cells(), measure_score, 4_000)
    below = {cell: m.coverage for cell, m in measured.items() if m.coverage < LEAST_COVERAGE}
    assert not below


@pytest.mark.soak
@pytest.mark.parametrize("seeds", [2, 3])
def test_the_whole_study_of_scores_over_training_seeds(seeds: int) -> None:
    def measure_mean(cell: Cell, samples: int, rng: np.random.Generator) -> object:
        return measure_score(cell, samples, rng, seeds)

    measured = measure(score_cells(), measure_mean, 1_000)  # type: ignore[arg-type]
    below = {cell: m.coverage for cell, m in measured.items() if m.coverage < LEAST_COVERAGE}
    assert not below


@pytest.mark.soak
def test_the_whole_study_of_differences() -> None:
    measured = measure(change_cells(), measure_change, 2_000)
    below = {cell: m.coverage for cell, m in measured.items() if m.coverage < LEAST_COVERAGE}
    nothing = {cell: m for cell, m in measured.items() if cell.change.startswith("none")}
    alarms = {c: m for c, m in nothing.items() if max(m.excludes_zero, m.significant) > MOST_ALARMS}
    assert not below and not alarms


@pytest.mark.soak
def test_the_whole_study_of_ratios() -> None:
    rng = np.random.default_rng(1)
    for clusters in CLUSTERS:
        for rho in (0.0, 0.5, 1.0):
            assert measure_ratio(clusters, rho, 40_000, rng).coverage >= LEAST_COVERAGE
