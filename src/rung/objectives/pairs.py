"""Pairs of answers to compare, and the correlation of two quantities over pairs.

The documents of one data row are in one batch, so pairs are found within a batch. `objectives/preference.py` and
`objectives/reward.py` use them.
"""

from __future__ import annotations

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

    def indices(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Indices of the better and of the other answers as tensors, [P] each."""
        return torch.tensor(self.chosen, device=device), torch.tensor(self.rejected, device=device)


def answer_pairs(batch: PackedBatch) -> AnswerPairs:
    """Every pair of a row with different scores (Ouyang et al. 2022, eq. 1)."""
    rows: dict[int, list[int]] = {}
    for i, d in enumerate(batch.documents):
        rows.setdefault(d.row, []).append(i)
    score, pairs = [d.score or 0.0 for d in batch.documents], AnswerPairs([], [], [])
    for row in rows.values():
        row_pairs = [(a, b) for a in row for b in row if score[a] > score[b]]
        pairs.chosen.extend(a for a, _ in row_pairs)
        pairs.rejected.extend(b for _, b in row_pairs)
        # Divided by the number of pairs: a ranking of many answers weighs as much as one pair.
        pairs.weight.extend(batch.documents[a].weight / len(row_pairs) for a, _ in row_pairs)
    return pairs


def correlation(first: Tensor, second: Tensor) -> float:
    """Pearson correlation of two vectors in float64; 0 if one of them is nearly constant."""
    spread = first.std(correction=0) * second.std(correction=0)
    covariance = ((first - first.mean()) * (second - second.mean())).mean()
    return float(covariance / spread) if float(spread) > MIN_SPREAD else 0.0
