"""Which answers of a batch are compared with which, and what is said of many comparisons."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from rung.types import PackedBatch

MIN_SPREAD = 1e-6
"""Spread of two quantities below which their correlation would be that of rounding."""


class AnswerPairs(NamedTuple):
    """Documents of the better and of the other answer, and what each pair counts: all pairs of a row its weight."""

    better: list[int]
    other: list[int]
    weight: list[float]


def answer_pairs(batch: PackedBatch) -> AnswerPairs:
    """Every pair of a row that scores tell apart (Ouyang et al. 2022, eq. 1)."""
    rows: dict[int, list[int]] = {}
    for i, document in enumerate(batch.documents):
        rows.setdefault(document.row, []).append(i)
    score = [document.score or 0.0 for document in batch.documents]
    pairs = AnswerPairs([], [], [])
    for row in rows.values():
        row_pairs = [(a, b) for a in row for b in row if score[a] > score[b]]
        pairs.better.extend(a for a, _ in row_pairs)
        pairs.other.extend(b for _, b in row_pairs)
        pairs.weight.extend(batch.documents[a].weight / len(row_pairs) for a, _ in row_pairs)
    return pairs


def correlation(first: Tensor, second: Tensor) -> float:
    """Pearson's, of two vectors in float64; 0 where one of them hardly varies."""
    spread = first.std(correction=0) * second.std(correction=0)
    covariance = ((first - first.mean()) * (second - second.mean())).mean()
    return float(covariance / spread) if float(spread) > MIN_SPREAD else 0.0
