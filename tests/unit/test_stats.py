"""Statistics in the corners: no spread, one item, few clusters, two seeds; and the verdict on a ladder."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from itertools import combinations

import numpy as np
import pytest
from scipy import stats

from rung.results.ladder import Verdict
from rung.scoring.recommendation import paired_gain, recommend, rung_score
from rung.scoring.significance import holm, mcnemar
from rung.scoring.stats import (
    clustered_error,
    detectable_difference,
    examples_needed,
    paired_difference,
    pass_at_k,
    ratio_interval,
    score_interval,
    sign_flip_p_value,
)


def bounds(estimate: object) -> tuple[float, float]:
    return estimate.low, estimate.high  # type: ignore[attr-defined]


# --- one system ---


def test_known_values() -> None:
    assert bounds(score_interval([1] * 8 + [0] * 2)) == pytest.approx((0.4439, 0.9748), abs=5e-5)
    assert bounds(score_interval([1, 2, 3, 4, 5])) == pytest.approx((3 - 1.963, 3 + 1.963), abs=5e-4)
    assert clustered_error([0, 1, 0, 1], ["a", "a", "b", "b"]) == 0.0
    assert clustered_error([0, 0, 1, 1], ["a", "a", "b", "b"]) == pytest.approx(math.sqrt(2) / 4)
    assert mcnemar([1] * 9 + [0], [0] * 9 + [1]) == pytest.approx(0.0215, abs=5e-5)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_clusters_that_agree_count_as_one_item_each(share: float) -> None:
    """All wrong or all right in 10 clusters is Clopper-Pearson's 0 or 10 of 10: 1 - 0.025^(1/10) = 0.3085 wide."""
    found = score_interval([share] * 40, [i // 4 for i in range(40)], binary=True)
    assert found.method == "clopper-pearson, effective number"
    assert bounds(found) == bounds(score_interval([share] * 10))
    assert found.high - found.low == pytest.approx(0.3085, abs=5e-5)
    assert (found.examples, found.clusters) == (40, 10)


@pytest.mark.parametrize("score", [0.0, 1.0, 0.4])
def test_one_item_is_never_certain(score: float) -> None:
    for found in (score_interval([score]), score_interval([score], ["a"]), score_interval([score], bounded=False)):
        assert found.low <= score <= found.high
        assert found.high - found.low > 0.7


def test_without_spread_and_bounds_nothing_is_known_and_json_says_null() -> None:
    found = score_interval([3.0, 3.0])
    assert bounds(found) == (-math.inf, math.inf) and found.method == "unbounded"
    assert found.to_json()["low"] is None
    assert json.loads(json.dumps(found.to_json(), allow_nan=False))["mean"] == 3.0


def test_the_method_follows_the_data() -> None:
    scores = [0.0, 1.0, 1.0, 0.0, 1.0]
    assert score_interval(scores, binary=True).method == "clopper-pearson"
    assert score_interval([0.1, 0.5, 0.2], binary=False).method == "clopper-pearson, effective number"
    assert score_interval([0.1, 1.5, 0.2], binary=False).method == "t"
    assert score_interval([0.1, 0.5, 0.2], bounded=False).method == "t"
    assert score_interval([0.1, 1.5, 0.2], list("aab")).method == "t on clusters"
    assert score_interval(scores, list("abcde"), binary=True).method == "clopper-pearson"
    assert score_interval(scores, list("aabcd"), binary=True).method == "clopper-pearson, effective number"
    assert score_interval(scores, ["a", None, None, None, None], binary=True).clusters == 5
    with pytest.raises(ValueError, match="binary"):
        score_interval([0.5, 1.0], binary=True)


@pytest.mark.parametrize("bounded", [True, False])
def test_names_and_order_of_clusters_do_not_matter(bounded: bool) -> None:
    scores, ids = np.random.default_rng(0).random(30), [i // 3 for i in range(30)]
    one = score_interval(scores, ids, bounded=bounded)
    assert one == score_interval(scores, [f"filing {i}" for i in ids], bounded=bounded)
    other_way = score_interval(scores[::-1], ids[::-1], bounded=bounded)
    assert bounds(one) == pytest.approx(bounds(other_way), rel=1e-12)


def test_weights_count_an_item_many_times() -> None:
    weighted = score_interval([0.2, 0.8, 0.5], weights=[1, 3, 2], bounded=False)
    repeated = score_interval([0.2, 0.8, 0.8, 0.8, 0.5, 0.5], list("abbbcc"), bounded=False)
    assert (weighted.mean, *bounds(weighted)) == pytest.approx((repeated.mean, *bounds(repeated)))


@pytest.mark.parametrize("bad", [[], [math.nan], [[0.0, 1.0]], [math.inf, 1.0]])
def test_scores_that_are_none_are_refused(bad: list[float]) -> None:
    with pytest.raises(ValueError, match="finite"):
        score_interval(bad)


@pytest.mark.parametrize(
    "call",
    [
        lambda: score_interval([0.0, 1.0], ["a"]),
        lambda: score_interval([0.0, 1.0], weights=[1.0, 0.0]),
        lambda: ratio_interval([1.0, 2.0], [3, 0]),
        lambda: mcnemar([0.5, 1.0], [1.0, 1.0]),
        lambda: paired_difference([0.0, 1.0], [1.0]),
        lambda: paired_difference([0.0, 1.0], [1.0, 0.0], ids=(["a", "b"], ["b", "a"])),
    ],
)
def test_wrong_shapes_are_refused(call: Callable[[], object]) -> None:
    with pytest.raises(ValueError):
        call()


def test_perplexity_is_the_ratio_of_sums() -> None:
    found = ratio_interval([math.log(2) * 10, math.log(8) * 90], [10, 90])
    assert found.mean == pytest.approx(math.exp((math.log(2) * 10 + math.log(8) * 90) / 100))
    rng = np.random.default_rng(0)
    tokens = rng.integers(5, 50, size=300)
    found = ratio_interval(tokens * rng.normal(2.0, 0.3, size=300), tokens)
    assert found.low < math.exp(2.0) < found.high
    assert math.log(found.high / found.low) == pytest.approx(2 * 1.96 * 0.3 / math.sqrt(300), rel=0.25)
    assert bounds(ratio_interval([0.5, 1.0], [1, 2])) == (0.0, math.inf)


# --- two systems ---


def test_the_difference_is_second_minus_first_and_pairing_narrows_it() -> None:
    rng = np.random.default_rng(0)
    first = rng.random(200)
    second = first + 0.05 + rng.normal(0, 0.01, size=200)
    found = paired_difference(first, second)
    assert found.mean == pytest.approx(0.05, abs=0.002)
    assert 0.045 < found.low < found.mean < found.high < 0.055
    flipped = paired_difference(second, first)
    assert bounds(flipped) == pytest.approx((-found.high, -found.low), abs=5e-4)


def test_two_systems_that_agree_everywhere_may_still_differ() -> None:
    """The bound is 1 - 0.025^(1/n), 0.060 for 60 items, each end missing with probability 0.025.

    Not the rule of three, 1 - 0.05^(1/n): a true gain just beyond that is missed with probability 0.05 where nothing
    differs, and again where more differ than expected. For 29 items and a gain of 0.1 both together are 0.065.
    """
    scores = [0.0, 1.0] * 30
    found = paired_difference(scores, scores)
    assert bounds(found) == pytest.approx((-(1 - 0.025 ** (1 / 60)), 1 - 0.025 ** (1 / 60)))
    assert found.p_value == 1.0
    blocks = [float(i // 6 % 2) for i in range(60)]
    clustered = paired_difference(blocks, blocks, [i // 6 for i in range(60)])
    assert clustered.high == pytest.approx(1 - 0.025 ** (1 / 10))
    assert clustered.p_value is None


def test_five_wins_and_no_loss_do_not_exclude_zero_but_six_do() -> None:
    first = np.zeros(50)
    for wins, excludes in ((1, False), (5, False), (6, True)):
        second = np.r_[np.ones(wins), np.zeros(50 - wins)]
        assert (paired_difference(first, second).low > 0) is excludes
        assert (mcnemar(first, second) < 0.05) is excludes


def test_a_constant_gain_is_not_certain() -> None:
    found = paired_difference([0.0] * 20, [1.0] * 20)
    assert found.mean == found.high == 1.0
    # Clopper-Pearson at 20 of 20, 0.832, bounds the gain, and its complement the loss; fully opposed they give 0.663
    assert 2 * 0.025 ** (1 / 20) - 1 < found.low < 0.025 ** (1 / 20)
    assert bounds(paired_difference([2.0, 3.0], [3.0, 4.0])) == (-math.inf, math.inf)


# --- how many items ---


def test_examples_needed_is_the_formula() -> None:
    differences = np.random.default_rng(0).normal(-0.01, 0.2, size=500)
    expected = (1.959964 + 0.841621) ** 2 * differences.var() / (differences.mean() + 0.05) ** 2
    assert examples_needed(differences, 0.05) == math.ceil(expected)
    ids = [i // 5 for i in range(500)]
    effect = (clustered_error(differences, ids) / clustered_error(differences)) ** 2
    assert examples_needed(differences, 0.05, ids) == pytest.approx(expected * effect, abs=1)
    assert (examples_needed(differences, 0.05, seed_variance=1e-4) or 0) > expected
    assert examples_needed(differences, 0.05, seed_variance=1.0) is None
    on_the_margin = differences - differences.mean() - 0.05
    assert examples_needed(on_the_margin, 0.05) == math.ceil(7.8489 * differences.var() / 0.025**2)


def test_examples_needed_is_never_less_than_the_interval_takes_where_nothing_differs() -> None:
    """log(0.025) / log(0.95) = 71.9 items: with 72 the interval of two equal systems lies within 0.05.

    59, which the rule of three gives, would leave its end at -0.061.
    """
    assert examples_needed([0.0] * 10, 0.05) == 72
    assert examples_needed([0.0] * 10, 0.05, [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]) == 144
    assert examples_needed([0.0] * 10, 0.0) is None
    zeros = np.zeros(72)
    assert paired_difference(zeros, zeros).low >= -0.05 > paired_difference(zeros[1:], zeros[1:]).low
    # one gain in 40 is less evidence than none: it asked for 41 items before
    assert examples_needed([1.0] + [0.0] * 39, 0.05) == 72


# --- few clusters, and scores near 0 and 1 ---


@pytest.mark.parametrize("c", [1, 2, 3, 4, 5])
def test_below_six_clusters_no_interval_excludes_zero(c: int) -> None:
    """False positives were 32, 19, 8 and 6 % at 2 to 5 clusters: a unanimous sign test has p = 2 / 2^5 at best."""
    rng = np.random.default_rng(c)
    ids = np.repeat(np.arange(c), 6).tolist()
    for run in range(40):
        first, second = ((rng.random(6 * c) < np.repeat(rng.random(c), 6)).astype(float) for _ in range(2))
        assert not paired_difference(first, second, ids, run).excludes_zero
        nats = rng.normal(2.0, 0.5, size=6 * c)
        assert not paired_difference(nats, nats + rng.normal(size=6 * c), ids, run).excludes_zero
    assert not paired_difference([0.0] * c, [1.0] * c).excludes_zero


@pytest.mark.parametrize("c", [2, 3, 4, 5])
def test_intervals_of_few_clusters_cover(c: int) -> None:
    """Percentile bootstraps of 2 to 5 clusters cover 0.52, 0.75, 0.89 and 0.90 of their own means."""
    rng, runs = np.random.default_rng(c), 200
    ids, hits, nats_hits = np.repeat(np.arange(c), 6).tolist(), 0, 0
    for _ in range(runs):
        rates = rng.beta(0.5, 0.5, size=c)
        found = score_interval((rng.random(6 * c) < np.repeat(rates, 6)).astype(float), ids)
        hits += found.low <= 0.5 <= found.high
        nats = np.repeat(rng.normal(2.0, 0.5, size=c), 6) + rng.normal(0.0, 0.1, size=6 * c)
        perplexity = ratio_interval(nats * 10, np.full(6 * c, 10), ids)
        nats_hits += perplexity.low <= math.exp(2.0) <= perplexity.high
    # 0.95 of 200 within three standard errors
    assert hits / runs >= 0.904 and nats_hits / runs >= 0.904


FILINGS = [i % 34 for i in range(184)]
"""184 questions of 34 filings, as in the demo."""


@pytest.mark.parametrize("right", range(1, 25))
def test_one_right_answer_never_makes_an_interval_narrower_than_that_of_independent_items(right: int) -> None:
    """1 of 184 in 34 clusters ended at 0.017 before and at 0.10 without it; 184 independent items end at 0.030."""
    scores = [1.0] * right + [0.0] * (184 - right)
    clustered, independent = score_interval(scores, FILINGS), score_interval(scores)
    assert clustered.low <= independent.low + 1e-12 and clustered.high >= independent.high - 1e-12
    if right == 1:
        assert independent.high == pytest.approx(0.030, abs=5e-4) and 0.03 < clustered.high < 0.104
    wrong = score_interval([1 - s for s in scores], FILINGS)
    assert bounds(wrong) == pytest.approx((1 - clustered.high, 1 - clustered.low), abs=1e-9)


def test_a_ladder_does_not_contradict_itself() -> None:
    """No right answer and five: the gain ended at 0.28 where the better score itself ended at 0.05."""
    none, five = np.zeros(184), np.r_[np.ones(5), np.zeros(179)]
    gain, lower, upper = paired_difference(none, five, FILINGS), *(score_interval(s, FILINGS) for s in (none, five))
    assert gain.high <= upper.high and gain.low >= upper.low - lower.high
    assert gain.low < 0 < gain.high < 0.08


@pytest.mark.parametrize("seed", range(30))
def test_no_gain_exceeds_what_both_scores_allow(seed: int) -> None:
    """Second high minus first low, and the reverse, where no sign test extends the interval to zero."""
    rng = np.random.default_rng(seed)
    c, rate = int(rng.integers(2, 40)), float(rng.choice([0.01, 0.05, 0.5, 0.97]))
    ids = rng.integers(c, size=5 * c).tolist()
    first, second = ((rng.random(5 * c) < rate).astype(float) for _ in range(2))
    if seed % 2:
        first, second = (np.clip(s + rng.choice([0, 0.1, -0.2], size=5 * c), 0, 1) for s in (first, second))
    gain, a, b = paired_difference(first, second, ids), score_interval(first, ids), score_interval(second, ids)
    assert gain.low >= min(0.0, b.low - a.high) - 1e-12
    assert gain.high <= max(0.0, b.high - a.low) + 1e-12
    assert gain.low <= gain.mean <= gain.high and abs(gain.mean - (b.mean - a.mean)) < 1e-12


# --- what a test would find ---


def test_where_nothing_differs_the_detectable_difference_is_what_the_sign_test_finds() -> None:
    """34 clusters: six must differ, all alike; P(Bin(34, q) >= 6) = 0.8 at q = 0.223. The rule of three said 0.084."""
    least = detectable_difference([0.0] * 34)
    assert least == pytest.approx(0.223, abs=5e-4)
    assert stats.binom.sf(5, 34, least) == pytest.approx(0.8, abs=1e-9)
    # one item that differs makes no smaller difference detectable than six clusters of its kind
    one = detectable_difference([1.0] + [0.0] * 33)
    assert one is not None and one == pytest.approx(0.223, abs=5e-4)
    assert detectable_difference([0.0] * 5) is None
    assert detectable_difference([0.0] * 34, bounded=False) is None


def test_a_ladder_tells_differences_that_are_found_after_holms_correction() -> None:
    """Four steps are each tested at 0.05 / 4, where the sign test needs 8 clusters: 0.286 instead of 0.223."""
    rungs = [(str(i), np.zeros(34)) for i in range(4)] + [("best", np.r_[np.ones(20), np.zeros(14)])]
    steps = recommend(rungs, margin=0.05).steps
    assert steps[0].detectable == pytest.approx(0.2865, abs=5e-4)
    assert stats.binom.sf(7, 34, steps[0].detectable) == pytest.approx(0.8, abs=1e-9)
    two = recommend(rungs[3:], margin=0.05).steps
    assert two[0].detectable is not None and two[0].detectable < steps[3].detectable  # type: ignore[operator]


# --- the verdict ---


def ladder(n: int = 400, **shares: float) -> list[tuple[str, np.ndarray]]:
    """Rungs that are right on nested sets of items."""
    return [(name, (np.arange(n) < share * n).astype(float)) for name, share in shares.items()]


def reasons(found: Verdict) -> dict[str, str]:
    return {rung.name: rung.reason for rung in found.rungs}


def test_the_lowest_rung_within_the_margin_is_recommended() -> None:
    found = recommend(ladder(zero=0.3, few=0.79, lora=0.8), margin=0.05)
    assert reasons(found) == {"zero": "worse", "few": "within margin", "lora": "best"}
    assert (found.recommended, found.safe, found.best, found.examples_needed) == ("few", "few", "lora", None)
    assert found.text.startswith("few is enough: 0.790 [")
    assert [rung.enough for rung in found.rungs] == [False, True, True]


def test_the_best_is_recommended_when_all_below_are_worse() -> None:
    found = recommend(ladder(zero=0.1, lora=0.8), margin=0.05)
    assert found.recommended == "lora"
    assert bounds(found.rungs[1].difference) == (0.0, 0.0)
    assert found.rungs[0].difference.mean == pytest.approx(-0.7)


def test_a_small_test_set_cannot_tell_and_says_how_many_would() -> None:
    rng = np.random.default_rng(0)
    few, lora = (rng.random(40) < 0.76).astype(float), (rng.random(40) < 0.8).astype(float)
    found = recommend([("zero", np.zeros(40)), ("few", few), ("lora", lora)], margin=0.05)
    assert reasons(found)["few"] == "cannot tell"
    assert found.recommended is None
    assert found.safe == "lora"
    assert found.examples_needed is not None
    assert found.examples_needed > 40
    assert f"needs about {found.examples_needed} examples (has 40)" in found.text
    assert json.loads(json.dumps(found.to_json(), allow_nan=False))["rungs"][1]["enough"] is False


def test_the_target_counts_only_when_the_lower_end_reaches_it() -> None:
    rungs = ladder(zero=0.62, lora=0.9)
    assert recommend(rungs, margin=0.05, target=0.5).recommended == "zero"
    assert reasons(recommend(rungs, margin=0.05, target=0.5))["zero"] == "reaches target"
    assert recommend(rungs, margin=0.05, target=0.61).recommended == "lora"
    unreached = recommend(rungs, margin=0.05, target=0.95)
    assert unreached.recommended == "lora"
    assert "No rung is sure to reach the target 0.95" in unreached.text


def test_lower_is_better_turns_everything_round() -> None:
    rng = np.random.default_rng(0)
    base = rng.normal(2.0, 0.3, size=300)
    rungs = [("zero", base + 0.5), ("few", base + 0.01 + rng.normal(0, 0.02, 300)), ("lora", base)]
    found = recommend(rungs, margin=0.05, in_nats=True, weights=rng.integers(5, 30, size=300))
    assert reasons(found) == {"zero": "cannot tell", "few": "within margin", "lora": "best"}  # zero: no spread at all
    rungs[0] = ("zero", base + 0.5 + rng.normal(0, 0.02, 300))
    found = recommend(rungs, margin=0.05, in_nats=True)
    assert reasons(found) == {"zero": "worse", "few": "within margin", "lora": "best"}
    assert recommend(rungs, margin=0.05, in_nats=True, target=3.0).recommended == "zero"


def test_the_spread_between_training_seeds_widens_the_interval() -> None:
    (_, few), (_, lora) = ladder(few=0.79, lora=0.8)
    agreeing = np.stack([lora, lora])
    apart = np.stack([lora, *(v for _, v in ladder(worse=0.6))])
    same = recommend([("few", few), ("lora", agreeing)], margin=0.05)
    assert same.rungs[1].score == recommend([("few", few), ("lora", lora)], margin=0.05).rungs[1].score
    wide = recommend([("few", few), ("lora", apart)], margin=0.05)
    # Means 0.8 and 0.6: s^2 / S = 0.01, so one standard error of 0.1 with about one degree of freedom.
    assert wide.rungs[1].score.high - wide.rungs[1].score.mean > 10 * 0.1
    assert wide.rungs[1].score.method.endswith("training seeds")
    assert reasons(wide) == {"few": "best", "lora": "cannot tell"}
    assert wide.recommended == "few"


def test_seeds_that_scatter_beyond_the_margin_ask_for_seeds() -> None:
    rungs = ladder(few=0.7, one=0.98, two=0.6)
    found = recommend([rungs[0], ("lora", np.stack([rungs[1][1], rungs[2][1]]))], margin=0.05)
    assert found.recommended is None
    assert found.examples_needed is None
    assert "more training seeds" in found.text


def test_a_tie_goes_to_the_lower_rung_and_an_empty_ladder_is_refused() -> None:
    assert recommend(ladder(zero=0.8, lora=0.8), margin=0.05).best == "zero"
    with pytest.raises(ValueError):
        recommend([], margin=0.05)
    with pytest.raises(ValueError):
        recommend(ladder(zero=0.8), margin=-0.1)


def test_one_rung_and_one_step_up_count_the_seeds_as_the_verdict_does() -> None:
    rungs = ladder(few=0.7, one=0.9, two=0.8)
    few, lora = rungs[0][1], np.stack([rungs[1][1], rungs[2][1]])
    judged = recommend([("few", few), ("lora", lora)], margin=0.05)
    assert rung_score(lora) == judged.rungs[1].score
    step = paired_gain(few, lora)
    assert step.mean == pytest.approx(0.15)
    assert bounds(step) == pytest.approx([-b for b in bounds(judged.rungs[0].difference)][::-1], abs=5e-3)


def test_a_ladder_without_a_single_right_answer_recommends_nothing() -> None:
    found = recommend([("zero_shot", np.zeros(20)), ("lora", np.zeros(20))], 0.05)
    assert found.recommended is None
    assert found.text.startswith("No rung scores at all")


# --- the steps ---


def test_steps_carry_raw_and_corrected_p_values_and_what_would_have_shown() -> None:
    rng = np.random.default_rng(0)
    low = (rng.random(120) < 0.4).astype(float)
    same = np.where(rng.random(120) < 0.06, 1 - low, low)
    high = np.maximum(same, rng.random(120) < 0.5)
    ids = [i // 3 for i in range(120)]
    found = recommend([("zero", low), ("few", same), ("lora", high)], margin=0.05, clusters=ids)
    first, second = found.steps
    assert (first.lower, first.upper, second.lower, second.upper) == ("zero", "few", "few", "lora")
    assert first.difference.p_value == sign_flip_p_value(
        low, same, ids
    ) and second.difference.p_value == sign_flip_p_value(same, high, ids)
    assert [first.p_holm, second.p_holm] == holm([first.difference.p_value, second.difference.p_value])
    assert (first.differs, second.differs) == (False, True)
    assert first.detectable == detectable_difference(same - low, ids, tests=2)
    said = f"No sure difference between few and zero (p = {first.p_holm:.2g}, smallest that would show: "
    assert found.text.endswith(f"{said}{first.detectable:.2g}).")
    told = json.loads(json.dumps(found.to_json(), allow_nan=False))["steps"]
    assert told[1]["differs"] is True and told[1]["difference"]["p_value"] < told[1]["p_holm"]


def test_a_p_value_counts_the_training_seeds() -> None:
    (_, few), (_, one), (_, two) = ladder(few=0.7, one=0.9, two=0.8)
    sure, unsure = paired_gain(few, np.stack([one, one])), paired_gain(few, np.stack([one, two]))
    assert sure.p_value is not None and sure.p_value < 1e-9
    # Means 0.9 and 0.8: one standard error of 0.05 beside that of the items, with about one degree of freedom.
    assert unsure.p_value is not None and 0.1 < unsure.p_value < 0.4
    assert (unsure.low < 0 < unsure.high) == (unsure.p_value > 0.05)


def test_without_a_second_rung_there_is_no_step_and_nats_are_told_as_perplexity() -> None:
    assert recommend(ladder(zero=0.8), margin=0.05).steps == ()
    rng = np.random.default_rng(0)
    base = rng.normal(2.0, 0.3, size=300)
    found = recommend([("a", base), ("b", base + rng.normal(0, 0.02, 300))], margin=0.05, in_nats=True)
    assert f"smallest that would show: {math.expm1(found.steps[0].detectable):.1%})" in found.text


@pytest.mark.parametrize("answers", range(1, 8))
def test_pass_at_k_is_the_share_of_subsets_with_a_passed_answer(answers: int) -> None:
    """Every subset of k of the n answers, counted one by one (Chen et al. 2021, eq. 1)."""
    for passed in range(answers + 1):
        for k in range(1, answers + 1):
            subsets = list(combinations([True] * passed + [False] * (answers - passed), k))
            share = sum(map(any, subsets)) / len(subsets)
            assert pass_at_k(answers, passed, k) == pytest.approx(share, rel=1e-12, abs=1e-15)


def test_pass_at_k_of_many_answers_neither_overflows_nor_is_the_biased_power() -> None:
    exact = 1 - math.comb(9_990, 100) / math.comb(10_000, 100)
    assert pass_at_k(10_000, 10, 100) == pytest.approx(exact, rel=1e-10)
    assert pass_at_k(10, 3, 2) == pytest.approx(8 / 15) and pass_at_k(10, 3, 2) != pytest.approx(1 - 0.7**2)
    for answers, passed, k in ((0, 0, 1), (5, 6, 1), (5, -1, 1), (5, 1, 0), (5, 1, 6)):
        with pytest.raises(ValueError, match="pass@"):
            pass_at_k(answers, passed, k)
