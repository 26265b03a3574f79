"""Health of a reward model: accuracy on held-out pairs, calibration, and whether it mostly measures length.

A policy trained on a bad reward model gets worse while its reward rises, so PPO and GRPO refuse an unhealthy one. The
checks need only held-out pairs that are scored once; they find constant, inverted and length-driven scores, not subtler
flaws. `runs.train` and `commands.evaluate` call `score_reward_model`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.stats import spearmanr

from rung.models.document_values import values_by_document
from rung.models.packing import pack_lazily
from rung.models.policy import Policy
from rung.objectives.pairs import answer_pairs
from rung.objectives.reward import RewardObjective
from rung.results.base import Estimate
from rung.results.evaluation import RewardModelHealth
from rung.scoring.stats import score_interval
from rung.types import Example

BINS = 10
"""Bins of equal numbers of pairs, in which predicted and observed accuracy are compared."""
MIN_SPREAD = 1e-4
"""Standard deviation of the scores up to which a reward model counts as constant."""
SCORING_TOKENS = 4096
"""Tokens of a batch in which answers are scored; a longer answer is a batch of its own."""
LENGTH_CORRELATION_LIMIT = 0.7
"""Rank correlation with length above which a reward model mostly measures length."""
Verdict = Literal["healthy", "length", "unproven", "broken"]


@dataclass(frozen=True)
class RewardScorer:
    """A reward model that scores answers."""

    policy: Policy
    objective: RewardObjective

    def __call__(self, documents: Sequence[Example], budget: int = SCORING_TOKENS) -> list[float]:
        """Score of each document (prompt and answer, ending in its stop)."""
        scores = self.objective.scores
        return values_by_document([self.policy], documents, budget, lambda batch: scores(self.policy, batch).tolist())


@torch.no_grad()
def score_reward_model(
    policy: Policy, objective: RewardObjective, examples: Iterable[Example], budget: int
) -> RewardModelHealth:
    """Score held-out answers, grouped by row, and assess the scores."""
    differences, length_differences, clusters, probabilities = [], [], [], list[float]()
    scores, lengths = list[float](), list[int]()
    # in slices: a preference set may be larger than memory
    batches = pack_lazily(examples, budget, device=policy.device, boundary=policy.rope_boundary)
    for batch in policy.iterate_batches(batches):
        pairs, batch_scores = answer_pairs(batch), objective.scores(policy, batch).tolist()
        tokens = [int(d.supervised.sum()) for d in batch.documents]
        probabilities += pairs.probability
        for a, b in zip(pairs.chosen, pairs.rejected, strict=True):
            differences.append(batch_scores[a] - batch_scores[b])
            length_differences.append(tokens[a] - tokens[b])
            first = batch.documents[a]
            clusters.append(first.group if first.group is not None else str(first.source))
        scores += batch_scores
        lengths += tokens
    return reward_model_health(differences, length_differences, clusters, scores, lengths, probabilities)


def reward_model_health(
    differences: ArrayLike,
    length_differences: ArrayLike,
    clusters: list[str],
    scores: ArrayLike,
    lengths: ArrayLike,
    probabilities: ArrayLike | None = None,
) -> RewardModelHealth:
    """Health from score and length differences of pairs [P], better minus other, and all scores and lengths [D].

    `probabilities` [P] are those of the soft labels, from 0.5 to 1; None: all labels are certain. A pair of 0.5 has no
    better answer: it counts for the calibration alone.
    """
    d, n, r, t = (np.asarray(x, dtype=np.float64) for x in (differences, length_differences, scores, lengths))
    p = np.ones(len(d)) if probabilities is None else np.asarray(probabilities, dtype=np.float64)
    has_better = p != 0.5
    accuracy = _accuracy(d[has_better], [c for c, kept in zip(clusters, has_better, strict=True) if kept])
    spread = float(r.std())
    # one NaN makes every statistic NaN; the verdict below names it
    is_finite = bool(np.isfinite(r).all())
    # spearmanr warns and returns NaN for constant input
    varies = is_finite and spread > MIN_SPREAD and float(t.std()) > 0
    length_correlation = float(spearmanr(r, t).statistic) if varies else 0.0
    longer = float(_correct_shares(n[has_better]).mean()) if has_better.any() else 0.5
    verdict, reason = _verdict(accuracy, longer, length_correlation, spread if is_finite else float("nan"))
    error = calibration_error(d, p)
    return RewardModelHealth(
        pairs=int(has_better.sum()),
        accuracy=accuracy,
        longer=longer,
        calibration_error=error,
        length_correlation=length_correlation,
        spread=spread,
        verdict=verdict,
        reason=reason,
    )


def calibration_error(differences: NDArray[np.float64], probabilities: NDArray[np.float64] | float = 1.0) -> float:
    """Expected calibration error over bins of equal size, from score differences of pairs [P].

    The label of a pair is right with probability p: scores that agree with it are right with p, others with 1 - p.
    Scores that predict exactly these probabilities have an error of 0.
    """
    correct = _correct_shares(differences)
    observed = correct * probabilities + (1.0 - correct) * (1.0 - np.asarray(probabilities))
    confidence = 1.0 / (1.0 + np.exp(-np.abs(differences)))
    # bins of equal numbers: with equal widths most bins would be nearly empty
    order = np.argsort(confidence, kind="stable")
    bins = np.array_split(order, min(BINS, len(order)))
    gaps = [abs(float(confidence[p].mean() - observed[p].mean())) * len(p) for p in bins]
    return float(sum(gaps) / len(order))


def _accuracy(differences: NDArray[np.float64], clusters: list[str]) -> Estimate:
    """Share of pairs [P] whose better answer scores higher, with its interval; without pairs it may be anything."""
    if not clusters:
        return Estimate(mean=0.5, low=0.0, high=1.0, method="no pair with a better answer")
    return score_interval(_correct_shares(differences), clusters)


def _correct_shares(differences: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.where(differences == 0, 0.5, (differences > 0).astype(np.float64))


def _verdict(
    accuracy: Estimate, accuracy_by_length: float, length_correlation: float, spread: float
) -> tuple[Verdict, str]:
    # `not >` and not `<=`: NaN is broken too
    if not spread > MIN_SPREAD:
        return "broken", f"its scores do not differ (standard deviation {spread:.1e})"
    if accuracy.high < 0.5:
        return "broken", "it prefers the worse answers"
    if accuracy.low <= 0.5:
        return "unproven", f"these pairs do not tell it from guessing: accuracy {accuracy.mean:.2f}"
    # in both directions: a model may also prefer the shorter answer
    by_length = max(accuracy_by_length, 1.0 - accuracy_by_length)
    if abs(length_correlation) > LENGTH_CORRELATION_LIMIT and accuracy.low <= by_length:
        correlation = f"rank correlation {length_correlation:+.2f}"
        return "length", f"it mostly measures length ({correlation}), and is no better than that"
    return "healthy", "better than guessing beyond doubt"
