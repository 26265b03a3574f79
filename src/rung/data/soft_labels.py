"""Soft labels of pairs: the probability that the chosen answer is really the better one.

Votes and judges are rarely unanimous; their share is a better target than a label that says it is certain (Bai et al.
2022, arXiv 2212.08073, section 4.1). Everything behind the reader takes the first answer of a row for the best, so a
pair whose label prefers the other answer is exchanged here, once, and counted: the loss of a pair is symmetric.
`conversations` calls `with_probability`, `formats` counts the labels of a source.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from rung.data.messages import number_of, short_repr
from rung.errors import DataError
from rung.types import Candidate


def with_probability(candidates: list[Candidate], value: object) -> tuple[list[Candidate], float | None]:
    """The answers of a row, best first, with the probability that the first is better, from 0.5 to 1.

    `value` is the probability of the first answer, 0 to 1. Below 0.5 the answers are exchanged and their scores are
    not: (p, a, b) and (1 - p, b, a) are the same pair. None where the value is empty: the order is certain. 0.8 gives
    0.8; 0.2 gives the other answer first, with 0.8.

    Raises:
        DataError: the value is no number from 0 to 1, or the row does not compare two answers.
    """
    if value is None or value == "":
        return candidates, None
    probability = number_of(value)
    if not 0.0 <= probability <= 1.0:  # false for NaN
        raise DataError(f"probability is {short_repr(value)}, not a number between 0 and 1")
    if len(candidates) != 2:
        raise DataError(f"probability is that of a pair, and this row compares {len(candidates)} answers")
    if probability >= 0.5:
        return candidates, probability
    first, second = candidates
    return [replace(second, score=first.score), replace(first, score=second.score)], 1.0 - probability


@dataclass(slots=True)
class SoftLabels:
    """Counts of the soft labels of a source, as the file has them."""

    rows: int = 0
    """Rows with a probability."""
    total: float = 0.0
    """Sum of the probabilities."""
    exchanged: int = 0
    """Rows with a probability below 0.5, whose answers were exchanged."""

    def add(self, value: object) -> None:
        """Count the probability of a row that is kept."""
        probability = number_of(value)
        self.rows += 1
        self.total += probability
        self.exchanged += probability < 0.5

    @property
    def mean(self) -> float:
        """Mean of the probabilities in the file; NaN without one."""
        return self.total / self.rows if self.rows else float("nan")

    @staticmethod
    def sum(parts: Iterable[SoftLabels]) -> SoftLabels:
        """The counts of several sources."""
        counted = SoftLabels()
        for part in parts:
            counted.rows, counted.total = counted.rows + part.rows, counted.total + part.total
            counted.exchanged += part.exchanged
        return counted

    def to_json(self) -> dict[str, Any] | None:
        """Rows, mean and exchanged rows; None without a row."""
        return {"rows": self.rows, "mean": self.mean, "exchanged": self.exchanged} if self.rows else None

    def notes(self, column: str, rows: int) -> tuple[str, ...]:
        """What was assumed and exchanged, as sentences; `rows` is the number of rows that are kept."""
        missing = f"rows without a value in {column!r}, whose better answer is certain: {rows - self.rows} of {rows}"
        exchanged = (
            f"rows with a value below 0.5 in {column!r}, whose rejected answer is taken as the better one: "
            f"{self.exchanged} of {rows}"
        )
        return (*([missing] if self.rows < rows else ()), *([exchanged] if self.exchanged else ()))
