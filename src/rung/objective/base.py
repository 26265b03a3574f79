"""The contract of an objective. An objective never knows the method and never divides."""

from __future__ import annotations

from typing import Protocol

from rung.model.policy import Policy
from rung.types import Counts, LossTerm, PackedBatch


class Objective(Protocol):
    """Sums with units; the engine divides them by the counts of the whole window and of all ranks."""

    def count(self, batch: PackedBatch) -> Counts:
        """What this batch adds to the divisor."""
        ...

    def loss(self, policy: Policy, batch: PackedBatch) -> list[LossTerm]:
        """Terms to be minimised, as sums."""
        ...
