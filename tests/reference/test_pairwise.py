"""Verdicts on pairs: both orders, position, length, and a judge against people."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from scipy import optimize, special

from rung.scoring.agreement import krippendorff_alpha
from rung.scoring.pairwise import (
    RIDGE,
    PairVerdicts,
    check_judge,
    fit_logistic,
    length_controlled,
    majority,
    summarize_preferences,
)
from rung.scoring.stats import score_interval


def test_only_a_preference_that_holds_in_both_orders_counts() -> None:
    assert PairVerdicts("first", "first").outcome == "first"
    assert PairVerdicts("first", "second").outcome == "tie"  # whatever is shown first wins
    assert PairVerdicts("tie", "second").outcome == "tie"
    assert PairVerdicts("second", None).outcome is None


def test_counts_and_shares_by_hand() -> None:
    verdicts = [
        PairVerdicts("first", "first"),
        PairVerdicts("second", "second"),
        PairVerdicts("first", "second"),  # position alone: both verdicts are for the one shown first
        PairVerdicts("tie", "tie"),
        PairVerdicts("first", None),
    ]
    found = summarize_preferences(verdicts, [(10, 5), (7, 9), (3, 3), (1, 2), (4, 4)], list("abcde"))
    assert (found.pairs, found.unreadable, found.wins, found.ties, found.losses) == (5, 1, 1, 2, 1)
    assert found.win_rate == score_interval([1.0, 0.0, 0.5, 0.5], list("abcd"), binary=False)
    assert found.consistent is not None and found.consistent.mean == 0.75
    assert found.shown_first is not None and found.shown_first.mean == pytest.approx(4 / 6)
    assert found.shown_first.clusters == 3  # two verdicts on one pair are no two pairs
    assert found.longer is not None and (found.longer.mean, found.longer.examples) == (1.0, 2)
    assert found.characters == (5.0, 4.6)
    assert json.loads(json.dumps(found.to_json(), allow_nan=False))["win_rate"]["mean"] == 0.5
    nothing = summarize_preferences([PairVerdicts(None, None)], [(1, 2)], ["a"])
    assert nothing.win_rate is nothing.length_controlled is nothing.longer is None and nothing.unreadable == 1


def by_scipy(x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> np.ndarray:
    def loss(beta: np.ndarray) -> float:
        z = beta[0] + beta[1] * x
        return float((weights * (np.logaddexp(0, z) - y * z)).sum() + RIDGE / 2 * (beta**2).sum())

    return np.asarray(optimize.minimize(loss, np.zeros(2), method="BFGS", options={"gtol": 1e-9}).x)


@pytest.mark.parametrize("slope", [0.0, 1.5, 30.0])  # the last: length decides everything
def test_the_regression_finds_scipys_minimum(slope: float) -> None:
    rng = np.random.default_rng(1)
    x = np.tanh(rng.normal(size=60))
    y = np.where(rng.random(60) < 0.2, 0.5, (rng.random(60) < special.expit(0.3 + slope * x)).astype(float))
    weights = rng.integers(0, 4, size=(3, 60)).astype(float)
    found = fit_logistic(x, y, weights)
    for own, row in zip(found, weights, strict=True):
        assert own == pytest.approx(by_scipy(x, y, row), abs=1e-5)


def test_length_control_finds_the_rate_that_length_hid() -> None:
    rng = np.random.default_rng(2)
    apart = rng.normal(120, 80, size=4_000)  # the first answers are longer, and the judge likes that
    x = np.tanh(apart / apart.std(ddof=1))
    y = (rng.random(4_000) < special.expit(-0.5 + 1.8 * x)).astype(float)
    found = length_controlled(y, apart, None)
    assert y.mean() > 0.6
    assert found.low < special.expit(-0.5) < found.high < 0.5
    assert found.high - found.low < 0.15


def test_the_length_controlled_interval_covers() -> None:
    rng, hits, runs = np.random.default_rng(3), 0, 120
    for run in range(runs):
        apart = rng.normal(1.0, 1.0, size=150)
        y = (rng.random(150) < special.expit(0.4 + np.tanh(apart / apart.std(ddof=1)))).astype(float)
        found = length_controlled(y, apart, None, seed=run)
        hits += found.low <= special.expit(0.4) <= found.high
    assert 0.9 <= hits / runs <= 1.0


def test_below_eight_clusters_length_control_gives_no_bound() -> None:
    """Percentiles of refits on so few clusters cover 0.5 to 0.9; of one loss in 40 the raw rate's interval is wider."""
    apart = [float(i) for i in range(28)]
    few = length_controlled([1.0, 0.0, 1.0, 1.0] * 7, apart, [str(i // 4) for i in range(28)])
    assert (few.low, few.high, few.method) == (0.0, 1.0, "unbounded")
    outcomes = [0.0] + [1.0] * 39
    rare, raw = length_controlled(outcomes, list(range(40)), None), score_interval(outcomes)
    assert rare.mean - rare.low >= raw.mean - raw.low - 1e-12


def test_length_control_without_anything_to_control() -> None:
    assert length_controlled([1.0] * 20, range(20), None) == score_interval([1.0] * 20, binary=True)
    assert length_controlled([1.0, 0.0, 0.5], [4, 4, 4], None).mean == 0.5
    with pytest.raises(ValueError, match="differences of length"):
        length_controlled([1.0], [], None)


def test_a_majority_is_more_than_half_of_those_who_spoke() -> None:
    assert majority(["first", "first", "tie"]) == "first" and majority(["tie"]) == "tie"
    assert majority(["first", "second", None]) is None and majority([None]) is None
    assert majority(["second", None]) == "second"


def test_a_judge_is_trusted_by_the_lower_end_of_its_kappa() -> None:
    people = [["first", "first", "tie"], ["second", "second", "second"]] * 40 + [["first", "second", "tie"]] * 3
    ids = [str(i) for i in range(len(people))]
    good = (
        [PairVerdicts(m, m) for m in ("first", "second")] * 40
        + [PairVerdicts("tie", "tie")] * 2
        + [PairVerdicts(None, "tie")]
    )
    found = check_judge(good, people, ids, 0.4)
    assert found.trusted and found.pairs == 80 and found.undecided == 3 and found.unreadable == 1
    assert found.kappa is not None and found.kappa.mean == 1.0 and found.kappa.low > 0.85
    assert found.people == krippendorff_alpha(people, ids)
    position = [PairVerdicts("first", "second")] * 83  # a tie every time
    poor = check_judge(position, people, ids, 0.4)
    assert not poor.trusted and poor.kappa is not None and poor.kappa.mean == 0.0
    assert "does not reach 0.4" in poor.reason and "does not" not in found.reason
    few = check_judge(good[:4], [labels[:1] for labels in people[:4]], ids[:4], 0.4)
    assert few.kappa is not None and few.kappa.mean == 1.0 and not few.trusted  # four pairs prove nothing
    assert few.people is None
    none = check_judge([PairVerdicts(None, None)], [["tie"]], ["a"], 0.4)
    assert not none.trusted and none.kappa is None and math.isclose(none.unreadable, 1)


def test_real_judges_of_pandalm(real_data: Path) -> None:
    """PandaLM-7B agrees with the majority on 66.77 % of its own test set, as its authors publish."""
    name = {0: "tie", 1: "first", 2: "second"}
    folder = real_data / "pandalm"
    rows = json.loads((folder / "testset-v1.json").read_text())
    people = [[name[row[f"annotator{k}"]] for k in (1, 2, 3)] for row in rows]
    said = [name.get(row["pandalm_result"]) for row in json.loads((folder / "pandalm-7b-testset-v1.json").read_text())]
    found = check_judge([PairVerdicts(x, x) for x in said], people, [row["instruction"] for row in rows], 0.4)  # type: ignore[arg-type]
    assert found.agreement is not None and round(found.agreement.mean, 4) == 0.6677
    assert found.kappa is not None and found.kappa.low < 0.4 < found.kappa.mean < 0.5 and not found.trusted
    assert found.people is not None and round(found.people.mean, 3) == 0.864
