"""Which answers of a batch are compared with which, and what is said of many comparisons."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from rung.types import PackedBatch

ROUNDING = 1e-6
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
    found = AnswerPairs([], [], [])
    for row in rows.values():
        own = [(a, b) for a in row for b in row if score[a] > score[b]]
        found.better.extend(a for a, _ in own)
        found.other.extend(b for _, b in own)
        found.weight.extend(batch.documents[a].weight / len(own) for a, _ in own)
    return found


def correlation(first: Tensor, second: Tensor) -> float:
    """Pearson's, of two vectors in float64; 0 where one of them hardly varies."""
    spread = first.std(correction=0) * second.std(correction=0)
    covariance = ((first - first.mean()) * (second - second.mean())).mean()
    return float(covariance / spread) if float(spread) > ROUNDING else 0.0
