"""Scores of classifiers against their definitions written plainly, and what their intervals hold."""

from __future__ import annotations

import numpy as np
import pytest

from rung.scoring.classification import accuracy_at_coverage, class_scores, expected_calibration_error, macro_f1


def drawn(n: int, seed: int, error: float = 0.3) -> tuple[list[str], list[str]]:
    rng = np.random.default_rng(seed)
    expected = [str(x) for x in rng.choice(["a", "b", "c", "d"], size=n, p=[0.5, 0.3, 0.15, 0.05])]
    answered = [str(rng.choice(["a", "b", "c", "d", "e"])) if rng.random() < error else e for e in expected]
    return expected, answered


def f1_of(label: str, expected: list[str], answered: list[str]) -> float:
    """From precision and recall, as textbooks write it."""
    right = sum(e == label and a == label for e, a in zip(expected, answered, strict=True))
    precision = right / answered.count(label) if label in answered else 0.0
    recall = right / expected.count(label) if label in expected else 0.0
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def test_scores_of_classes_and_macro_f1() -> None:
    expected, answered = drawn(300, 1)
    scores = {score.label: score for score in class_scores(expected, answered)}
    assert list(scores) == sorted(scores, key=lambda label: -expected.count(label))
    for label in "abcde":
        assert scores[label].f1 == pytest.approx(f1_of(label, expected, answered), abs=1e-12)
        assert scores[label].examples == expected.count(label)
    found = macro_f1(expected, answered)
    assert found.mean == pytest.approx(np.mean([f1_of(label, expected, answered) for label in "abcde"]), abs=1e-12)
    assert found.low < found.mean < found.high and (found.examples, found.clusters) == (300, 300)


def test_the_interval_of_macro_f1_knows_clusters_and_holds_the_truth() -> None:
    expected, answered = drawn(200, 2)
    alone = macro_f1(expected, answered)
    tripled = macro_f1(expected * 3, answered * 3, [i % 200 for i in range(600)])
    assert (tripled.mean, tripled.clusters) == (pytest.approx(alone.mean), 200)
    assert tripled.high - tripled.low == pytest.approx(alone.high - alone.low, rel=0.1)
    truth = macro_f1(*drawn(60_000, 3), clusters=[0] * 60_000).mean  # of a sample so large that it hardly varies
    held = [truth_in(macro_f1(*drawn(250, 100 + seed)), truth) for seed in range(60)]
    assert 0.85 <= np.mean(held) <= 1.0
    few = macro_f1(["a", "b"], ["a", "b"], [1, 1])
    assert (few.mean, few.low, few.high, few.method) == (1.0, 0.0, 1.0, "unbounded")


def truth_in(estimate: object, truth: float) -> bool:
    return bool(estimate.low <= truth <= estimate.high)  # type: ignore[attr-defined]


def test_calibration_and_coverage() -> None:
    """Guo et al. 2017, eq. 3: two bins, of 0.9 with half right and of 0.3 with all right."""
    confidence, right = [0.9] * 4 + [0.3] * 2, [1, 1, 0, 0, 1, 1]
    assert expected_calibration_error(confidence, right) == pytest.approx((4 * 0.4 + 2 * 0.7) / 6)
    assert expected_calibration_error([1.0, 1.0], [1, 1]) == 0.0
    assert accuracy_at_coverage(confidence, right) == {0.5: 2 / 3, 0.8: 0.6, 0.9: 0.6, 1.0: 4 / 6}
    rng = np.random.default_rng(0)
    p = rng.random(20_000)
    assert expected_calibration_error(p, rng.random(20_000) < p) < 0.02  # what is calibrated
