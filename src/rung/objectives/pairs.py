"""Pairs of answers to compare, their soft labels, and the correlation of two quantities over pairs.

The documents of one data row are in one batch, so pairs are found within a batch. `objectives/preference.py` and
`objectives/reward.py` use them. Suffixes: D documents of a batch, P pairs.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import compress
from typing import NamedTuple

import torch
from torch import Tensor

from rung.types import PackedBatch

MIN_SPREAD = 1e-6
"""Product of standard deviations below which a correlation would only measure rounding."""


class AnswerPairs(NamedTuple):
    """Indices of the better and the other answer of each pair, and pair weights that sum to the row's weight."""

    chosen: list[int]
    rejected: list[int]
    weight: list[float]
    probability: list[float]
    """Probability that `chosen` is really the better answer: 1 without a soft label."""

    def indices(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Indices of the better and of the other answers as tensors, [P] each."""
        return torch.tensor(self.chosen, device=device), torch.tensor(self.rejected, device=device)

    def soft_labels(self, like: Tensor) -> Tensor | None:
        """The probabilities [P] as a tensor of the type and device of another; None if all pairs are certain."""
        # None and not ones: most data have no soft labels, and their loss should cost and be what it was
        return None if all(p == 1.0 for p in self.probability) else like.new_tensor(self.probability)

    def win_probabilities(self, documents: int) -> list[float]:
        """Probability of each document that no other answer of its row beats it, [D]: 1 for the best, 0 for others.

        Of a pair with a soft label each answer has its own probability. 0 for a document of no pair.
        """
        wins: dict[int, float] = {}
        for a, b, p in zip(self.chosen, self.rejected, self.probability, strict=True):
            wins[a], wins[b] = wins.get(a, 1.0) * p, wins.get(b, 1.0) * (1.0 - p)
        return [wins.get(i, 0.0) for i in range(documents)]

    def of_preferred(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Values [P] by name, of the pairs whose label prefers an answer; empty without such a pair.

        A probability of 0.5 prefers neither: nothing can be right or wrong about such a pair.
        """
        is_preferred = [p != 0.5 for p in self.probability]
        if all(is_preferred):
            return dict(values) if is_preferred else {}
        kept = list(compress(range(len(is_preferred)), is_preferred))
        return {name: value[torch.tensor(kept, device=value.device)] for name, value in values.items()} if kept else {}


def answer_pairs(batch: PackedBatch) -> AnswerPairs:
    """Every pair of a row with different scores (Ouyang et al. 2022, eq. 1)."""
    rows: dict[int, list[int]] = {}
    for i, d in enumerate(batch.documents):
        rows.setdefault(d.row, []).append(i)
    score, pairs = [d.score or 0.0 for d in batch.documents], AnswerPairs([], [], [], [])
    for row in rows.values():
        row_pairs = [(a, b) for a in row for b in row if score[a] > score[b]]
        pairs.chosen.extend(a for a, _ in row_pairs)
        pairs.rejected.extend(b for _, b in row_pairs)
        # Divided by the number of pairs: a ranking of many answers weighs as much as one pair.
        pairs.weight.extend(batch.documents[a].weight / len(row_pairs) for a, _ in row_pairs)
        # The reader has exchanged the answers of labels below 0.5, so this is at least 0.5.
        probabilities = (batch.documents[a].probability for a, _ in row_pairs)
        pairs.probability.extend(1.0 if p is None else p for p in probabilities)
    return pairs


def soft_label_loss(right_P: Tensor, wrong_P: Tensor, probability_P: Tensor) -> Tensor:
    """The expected loss of a pair over its label, p l(+) + (1 - p) l(-), in nats [P] (Mitchell 2023, eq. 3).

    l(+) is the loss of the pair as it is and l(-) that of the pair with its answers exchanged; p = 1 gives l(+). Of
    log-sigmoid losses this is the cross-entropy with soft targets (Bai et al. 2022, arXiv 2212.08073, section 4.1).
    """
    return probability_P * right_P + (1.0 - probability_P) * wrong_P


def correlation(first: Tensor, second: Tensor) -> float:
    """Pearson correlation of two vectors in float64; 0 if one of them is nearly constant."""
    spread = first.std(correction=0) * second.std(correction=0)
    covariance = ((first - first.mean()) * (second - second.mean())).mean()
    return float(covariance / spread) if float(spread) > MIN_SPREAD else 0.0
