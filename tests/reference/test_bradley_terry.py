"""The Bradley-Terry model against the penalized likelihood written down plainly, and what its intervals hold."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest
from scipy.optimize import minimize, minimize_scalar
from scipy.stats import binom, binomtest

from rung.scoring import bradley_terry
from rung.scoring.bradley_terry import RIDGE, make_comparisons, strengths, unconnected_groups, win_rates

NAMES = ["a", "b", "c", "d"]
TRUE = np.array([0.9, 0.2, -0.3, -0.8])


def played(games: int, seed: int, ties: float = 0.2) -> tuple[list[str], list[str], list[float]]:
    """Outcomes drawn from known strengths, a share of them ties."""
    rng = np.random.default_rng(seed)
    first, second, outcomes = [], [], []
    for i, k in combinations(range(len(NAMES)), 2):
        for _ in range(games):
            p = 1 / (1 + math.exp(TRUE[k] - TRUE[i]))
            first.append(NAMES[i])
            second.append(NAMES[k])
            outcomes.append(0.5 if rng.random() < ties else float(rng.random() < p))
    return first, second, outcomes


def penalized(theta: np.ndarray, first: list[str], second: list[str], outcomes: list[float]) -> float:
    total = 0.5 * RIDGE * float((theta**2).sum())
    for a, b, y in zip(first, second, outcomes, strict=True):
        z = theta[NAMES.index(a)] - theta[NAMES.index(b)]
        total -= y * -math.log1p(math.exp(-z)) + (1 - y) * -math.log1p(math.exp(z))
    return total


def test_strengths_are_the_minimum_of_the_penalized_likelihood() -> None:
    first, second, outcomes = played(12, seed=1)
    found = strengths(make_comparisons(first, second, outcomes))
    best = minimize(penalized, np.zeros(4), args=(first, second, outcomes), tol=1e-12).x
    assert [found[name].mean for name in NAMES] == pytest.approx(list(best - best.mean()), abs=1e-6)
    assert sum(e.mean for e in found.values()) == pytest.approx(0.0, abs=1e-12)


def test_two_systems_have_half_of_the_log_odds_of_wins() -> None:
    found = strengths(make_comparisons(["a"] * 40, ["b"] * 40, [1.0] * 30 + [0.0] * 10))
    assert found["a"].mean == pytest.approx(0.5 * math.log(3), abs=1e-3) and found["b"].mean == -found["a"].mean
    assert 0 < found["a"].low < found["a"].mean < found["a"].high < 1.5
    tied = strengths(make_comparisons(["a"] * 40, ["b"] * 40, [1.0] * 30 + [0.5] * 10))
    assert tied["a"].mean == pytest.approx(0.5 * math.log(7), abs=5e-3)  # a tie is half a win of each


def test_sides_and_names_do_not_matter() -> None:
    first, second, outcomes = played(10, seed=2)
    clusters = [f"item {i % 17}" for i in range(len(first))]
    found = strengths(make_comparisons(first, second, outcomes), clusters)
    swapped = strengths(make_comparisons(second, first, [1 - y for y in outcomes]), clusters)
    for name in NAMES:
        assert found[name].mean == pytest.approx(swapped[name].mean, abs=1e-9)
        assert (found[name].low, found[name].high) == pytest.approx((swapped[name].low, swapped[name].high), abs=1e-9)


def test_intervals_hold_the_truth() -> None:
    """In 60 samples of 90 items with all six pairs each: 95 % of the intervals should, and 90 % at least do here."""
    held, expected = 0, TRUE - TRUE.mean()
    for seed in range(60):
        first, second, outcomes = played(90, seed, ties=0.0)
        clusters = [i % 90 for i in range(len(first))]
        found = strengths(make_comparisons(first, second, outcomes), clusters, seed=seed)
        held += sum(found[n].low <= t <= found[n].high for n, t in zip(NAMES, expected, strict=True))
    assert 0.90 <= held / 240 <= 0.995


def test_who_won_everything_has_no_interval() -> None:
    """The likelihood has no maximum then: what the ridge says of the size means nothing."""
    comparisons = make_comparisons(["a"] * 30 + ["b"] * 30, ["b"] * 30 + ["c"] * 30, [1.0] * 30 + [1.0, 0.0] * 15)
    found = strengths(comparisons)
    assert all(
        math.isinf(e.low) and math.isinf(e.high) and "won or lost everything" in e.method for e in found.values()
    )
    rates = win_rates(comparisons)
    assert rates["a"].mean == 1.0 and 0.8 < rates["a"].low < 1.0
    few = strengths(make_comparisons(["a"] * 4, ["b"] * 4, [1.0, 0.0, 1.0, 1.0]))
    assert few["a"].method == "unbounded" and math.isinf(few["a"].high)


def test_systems_that_were_never_compared_have_no_common_scale() -> None:
    comparisons = make_comparisons(["a", "c"], ["b", "d"], [1.0, 0.0])
    assert unconnected_groups(comparisons) == [["a", "b"], ["c", "d"]]
    with pytest.raises(ValueError, match="no common scale"):
        strengths(comparisons)
    for first, second, outcomes in ((["a"], ["a"], [1.0]), (["a"], ["b"], [2.0]), ([], [], []), (["a"], ["b"], [1, 0])):
        with pytest.raises(ValueError, match="comparison|outcomes"):
            make_comparisons(first, second, outcomes)


def test_without_ties_the_strengths_would_be_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """The oracle above sees a fit that drops ties."""
    first, second, outcomes = played(12, seed=1, ties=0.5)
    true = strengths(make_comparisons(first, second, outcomes))
    kept = [i for i, y in enumerate(outcomes) if y != 0.5]
    parts = [[values[i] for i in kept] for values in (first, second, outcomes)]
    dropped = strengths(make_comparisons(*parts))
    assert max(abs(true[name].mean - dropped[name].mean) for name in NAMES) > 0.05
    monkeypatch.setattr(bradley_terry, "MAX_NEWTON_STEPS", 1)
    stopped = strengths(make_comparisons(first, second, outcomes))
    assert max(abs(true[name].mean - stopped[name].mean) for name in NAMES) > 1e-4


def test_an_interval_holds_that_of_the_win_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a ridge half of the log-odds of Clopper-Pearson's ends, which reach further down than resamples do."""
    monkeypatch.setattr(bradley_terry, "RIDGE", 1e-9)
    total = np.array([[0.0, 29.0], [1.0, 0.0]])
    rates = win_rates(make_comparisons(["a"] * 30, ["b"] * 30, [1.0] * 29 + [0.0]))
    found = bradley_terry._win_rate_ends(list(rates.values()), bradley_terry.fit_strengths(total[None])[0], total)
    exact = binomtest(29, 30).proportion_ci(method="exact")
    ends = [0.5 * math.log(p / (1 - p)) for p in (exact.low, exact.high)]
    assert found[:2, 0] == pytest.approx(ends, abs=1e-6)
    assert found.sum(axis=1) == pytest.approx(np.zeros(4), abs=1e-9)


def test_the_strength_of_a_win_rate_is_the_likelihoods_own() -> None:
    """The likelihood of one system's strength, the others fixed, has its maximum where the model expects the share."""
    first, second, outcomes = played(12, seed=3)
    comparisons = make_comparisons(first, second, outcomes)
    total = bradley_terry._win_tables(comparisons, None).sum(axis=0)
    rates, means = list(win_rates(comparisons).values()), bradley_terry.fit_strengths(total[None])[0]
    for i, rate in enumerate(rates):
        others = [means[k] for k in range(4) if k != i for _ in range(12)]
        for row, share in zip(
            bradley_terry._win_rate_ends(rates, means, total)[2 * i : 2 * i + 2], (rate.low, rate.high), strict=True
        ):

            def loss(x: float, share: float = share, others: list[float] = others) -> float:
                return sum(math.log1p(math.exp(x - other)) - share * (x - other) for other in others)

            theta = means.copy()
            theta[i] = minimize_scalar(loss, bounds=(-9, 9), method="bounded", options={"xatol": 1e-10}).x
            assert row == pytest.approx(theta - theta.mean(), abs=1e-5)


def test_errors_add_up_along_a_chain() -> None:
    """a-b, b-c, c-d: resamples know that the opponents of a system are uncertain too, and its win rate does not."""
    first, second = ["a"] * 60 + ["b"] * 60 + ["c"] * 60, ["b"] * 60 + ["c"] * 60 + ["d"] * 60
    comparisons = make_comparisons(first, second, [1.0, 0.0, 1.0] * 60)
    total = bradley_terry._win_tables(comparisons, None).sum(axis=0)
    means, rates = bradley_terry.fit_strengths(total[None])[0], win_rates(comparisons)
    ends = bradley_terry._win_rate_ends(list(rates.values()), means, total)
    found = strengths(comparisons)
    for name in ("a", "d"):
        i = comparisons.systems.index(name)
        assert found[name].high - found[name].low > 1.1 * float(np.ptp(ends[:, i]))


def test_rare_losses_are_covered() -> None:
    """Exact: all 31 counts of wins of 30. Percentiles alone cover 0.87 where a system wins 0.9 of its comparisons."""
    wins = range(31)
    found = [strengths(make_comparisons(["a"] * 30, ["b"] * 30, [1.0] * k + [0.0] * (30 - k)))["a"] for k in wins]
    for p in np.linspace(0.5, 0.99, 50):
        truth = 0.5 * math.log(p / (1 - p))
        held = [e.low <= truth <= e.high for e in found]
        assert binom.pmf(wins, 30, p)[held].sum() > 0.95


def test_ties_are_not_known_for_certain() -> None:
    """30 ties resampled are 30 ties; three of them say little of a system, and so of the mean of all."""
    ties = strengths(make_comparisons(["a"] * 30, ["b"] * 30, [0.5] * 30))
    assert ties["a"].mean == pytest.approx(0.0, abs=1e-9) and ties["a"].low < -0.3 and ties["a"].high > 0.3
    first, second = ["a"] * 200 + ["c"] * 3, ["b"] * 200 + ["a"] * 3
    found = strengths(make_comparisons(first, second, [1.0, 1.0, 0.0, 0.0] * 50 + [0.5] * 3))
    assert found["c"].low < -1.5 and found["c"].high > 1.5
    assert found["b"].low < -0.7 and found["b"].high > 0.7
    assert "win rate" in found["c"].method


def test_who_always_takes_the_left_answer_prefers_no_system() -> None:
    """Every pair in both orders: all win half."""
    orders = [(a, b) for pair in combinations(NAMES, 2) for a, b in (pair, pair[::-1])] * 10
    comparisons = make_comparisons([a for a, _ in orders], [b for _, b in orders], [1.0] * len(orders))
    assert [rate.mean for rate in win_rates(comparisons).values()] == [0.5] * 4
    found = strengths(comparisons)
    assert all(e.mean == pytest.approx(0.0, abs=1e-9) and e.low < -0.1 and e.high > 0.1 for e in found.values())


def test_the_order_of_the_systems_does_not_matter() -> None:
    """Other names put the systems in another order."""
    first, second, outcomes = played(10, seed=2)
    renamed = {"a": "z", "b": "c", "c": "y", "d": "b"}
    found = strengths(make_comparisons(first, second, outcomes))
    other = strengths(make_comparisons([renamed[x] for x in first], [renamed[x] for x in second], outcomes))
    for name in NAMES:
        a, b = found[name], other[renamed[name]]
        assert (a.mean, a.low, a.high) == pytest.approx((b.mean, b.low, b.high), abs=1e-9)
