"""What a reward model is worth: how often it puts the better answer above the other, and what it goes by."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.stats import spearmanr

from rung.models.policy import Policy
from rung.models.tree_attention import has_flat_kernel
from rung.objectives.pairs import answer_pairs
from rung.objectives.reward import RewardObjective
from rung.scoring.stats import Interval, score_interval
from rung.training.packing import pack_in_slices
from rung.training.step import values_by_document
from rung.types import Example

BINS = 10
"""Of equal numbers of pairs, in which promised and kept accuracy are compared."""
SPREAD = 1e-4
"""Standard deviation of the scores below which a reward model says the same of everything."""
MOSTLY = 0.7
"""Rank correlation with length from which on a reward model mostly measures length."""
Verdict = Literal["healthy", "length", "unproven", "broken"]


@dataclass(frozen=True, slots=True)
class RewardModelHealth:
    """Of held-out pairs."""

    pairs: int
    accuracy: Interval
    """Share of pairs whose better answer scores higher; a tie counts half."""
    longer: float
    """Share of pairs that always taking the longer answer would get right; equal lengths count half."""
    calibration_error: float
    """Mean distance of promised and kept accuracy over bins (Naeini et al. 2015): sigmoid(|r_w - r_l|) is promised."""
    length_correlation: float
    """Rank correlation of score and answer length over all answers (Spearman's)."""
    spread: float
    """Standard deviation of the scores."""
    verdict: Verdict
    reason: str

    def to_json(self) -> dict[str, Any]:
        """For `run.json`."""
        return {**asdict(self), "accuracy": self.accuracy.to_json()}

    def __str__(self) -> str:
        a = self.accuracy
        return (
            f"reward model: {self.verdict} ({self.reason}); {a.mean:.2f} [{a.low:.2f}, {a.high:.2f}] of {self.pairs}"
            f" held-out pairs right, {self.longer:.2f} by length alone, calibration error {self.calibration_error:.2f},"
            f" rank correlation with length {self.length_correlation:+.2f}"
        )


@dataclass(frozen=True)
class RewardScorer:
    """A reward model that scores answers as they are made."""

    policy: Policy
    objective: RewardObjective

    def __call__(self, documents: Sequence[Example], budget: int) -> list[float]:
        """Of each document: prompt and answer, its stop the last token."""
        scores = self.objective.scores
        return values_by_document([self.policy], documents, budget, lambda batch: scores(self.policy, batch).tolist())


@torch.no_grad()
def score_reward_model(
    policy: Policy, objective: RewardObjective, examples: Iterable[Example], budget: int
) -> RewardModelHealth:
    """Score held-out answers, which stand row by row, and judge the scores."""
    differences, longer, clusters = [], [], []
    scores: list[float] = []
    lengths: list[int] = []
    trees = not has_flat_kernel(policy.device)
    batches = pack_in_slices(examples, budget, share_prefixes=trees, device=policy.device)
    for batch in policy.iterate_batches(batches):
        found, own = answer_pairs(batch), objective.scores(policy, batch).tolist()
        tokens = [int(d.supervised.sum()) for d in batch.documents]
        for a, b in zip(found.chosen, found.rejected, strict=True):
            differences.append(own[a] - own[b])
            longer.append(tokens[a] - tokens[b])
            first = batch.documents[a]
            clusters.append(first.group if first.group is not None else str(first.source))
        scores += own
        lengths += tokens
    return reward_model_health(differences, longer, clusters, scores, lengths)


def reward_model_health(
    differences: ArrayLike, longer: ArrayLike, clusters: Sequence[str], scores: ArrayLike, lengths: ArrayLike
) -> RewardModelHealth:
    """Health from score differences of pairs [P], how much longer the better answers are [P], and all answers [D]."""
    d, n, r, t = (np.asarray(x, dtype=np.float64) for x in (differences, longer, scores, lengths))
    right = _shares(d)
    accuracy = score_interval(right, clusters, binary=bool(np.isin(right, (0.0, 1.0)).all()))
    spread = float(r.std())
    finite = bool(np.isfinite(r).all())
    varies = finite and spread > SPREAD and float(t.std()) > 0
    by_length = float(spearmanr(r, t).statistic) if varies else 0.0
    known = float(_shares(n).mean())
    verdict, reason = _verdict(accuracy, known, by_length, spread if finite else float("nan"))
    return RewardModelHealth(len(d), accuracy, known, calibration_error(d), by_length, spread, verdict, reason)


def calibration_error(differences: NDArray[np.float64]) -> float:
    """Expected calibration error over bins of equal numbers."""
    confidence = 1.0 / (1.0 + np.exp(-np.abs(differences)))
    order = np.argsort(confidence, kind="stable")
    parts = np.array_split(order, min(BINS, len(order)))
    gaps = [abs(float(confidence[p].mean() - _shares(differences[p]).mean())) * len(p) for p in parts]
    return float(sum(gaps) / len(order))


def _shares(differences: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.where(differences == 0, 0.5, (differences > 0).astype(np.float64))


def _verdict(accuracy: Interval, longer: float, by_length: float, spread: float) -> tuple[Verdict, str]:
    if not spread > SPREAD:
        return "broken", f"its scores do not differ (standard deviation {spread:.1e})"
    if accuracy.high < 0.5:
        return "broken", "it prefers the worse answers"
    if accuracy.low <= 0.5:
        return "unproven", f"these pairs do not tell it from guessing: accuracy {accuracy.mean:.2f}"
    if abs(by_length) > MOSTLY and accuracy.low <= max(longer, 1.0 - longer):
        return "length", f"it mostly measures length (rank correlation {by_length:+.2f}), and is no better than that"
    return "healthy", "better than guessing beyond doubt"
