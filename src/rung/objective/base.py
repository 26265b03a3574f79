"""The contract of an objective. An objective never knows the method and never divides."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

from rung.model.policy import Policy
from rung.types import Counts, Example, LossTerm, PackedBatch


class Objective(Protocol):
    """Sums with units; the engine divides them by the counts of the whole window and of all ranks."""

    compares: bool = False
    """Whether it looks at all answers of a row at once."""
    at_least: int = 1
    """Answers that a row must have."""

    def count(self, batch: PackedBatch) -> Counts:
        """What this batch adds to the divisor."""
        ...

    def loss(self, policy: Policy, batch: PackedBatch) -> list[LossTerm]:
        """Terms to be minimised, as sums."""
        ...

    def beside(self, examples: Sequence[Example]) -> list[Example]:
        """Documents that a step over these must read first, without learning from them."""
        return []

    def prepare(self, policy: Policy, batches: Iterable[PackedBatch]) -> None:
        """Read them; called without gradient, before the batches of the step."""
        return

    def report(self) -> Mapping[str, float]:
        """Means over the batches seen since the last report, for the log; then it forgets them."""
        return {}
