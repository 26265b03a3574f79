"""The contract of an objective. An objective never knows the method and never divides."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from rung.config.objective import RolloutConfig
from rung.models.policy import Policy
from rung.types import Counts, Example, LossTerm, PackedBatch, Rollout


class Objective(Protocol):
    """Sums with units; the engine divides them by the counts of the whole window and of all ranks."""

    compares_answers: bool = False
    """Whether it looks at all answers of a row at once."""
    min_answers: int = 1
    """Answers that a row must have."""
    reads_head: bool = True
    """Whether its loss comes out of the model's own output head."""

    rollout: RolloutConfig | None = None
    """How the policy makes the answers that it learns from; None learns from those of the data."""
    on_policy_share: float = 1.0
    """Of the rows, those that the policy answers itself; below 1 the others keep the answers of the data."""
    uses_rewards: bool = True
    """Whether its own answers are worth something; else they are learned from as they are."""
    batch_metrics: list[dict[str, Tensor]] = []
    """What batches left behind for the report, by name."""

    def begin(self, policy: Policy, seed: int) -> None:
        """Called once, before anything else: make the heads it owns for this model."""
        return

    def trainable(self) -> dict[str, nn.Parameter]:
        """What moves besides the method's own, by name: the heads it owns."""
        return {}

    def published_head(self) -> Tensor | None:
        """A head [1, H] that belongs to the finished model: what it answers with instead of tokens."""
        return None

    def count(self, batch: PackedBatch) -> Counts:
        """What this batch adds to the divisor."""
        ...

    def loss(self, policy: Policy, batch: PackedBatch) -> list[LossTerm]:
        """Terms to be minimized, as sums."""
        ...

    def kl_examples(self, examples: Sequence[Example]) -> list[Example]:
        """Documents that a step over these must read first, without learning from them."""
        return []

    def prepare(self, policy: Policy, batches: Iterable[PackedBatch]) -> None:
        """Read them; called without gradient, before the batches of the step."""
        return

    def rollout_columns(self, policy: Policy, rollout: Rollout) -> list[Mapping[str, np.ndarray]]:
        """What is known of each token of the answers before they are learned from; by document, by name."""
        return [{} for _ in rollout.documents]

    def partner_policies(self) -> Sequence[Policy]:
        """Other policies that learn from the same batches."""
        return ()

    def stop_reason(self) -> str | None:
        """Asked before an optimizer step: why the rest of a rollout is left, if it is."""
        return None

    def state(self) -> dict[str, float]:
        """What it learned besides parameters, for checkpoints."""
        return {}

    def load_state(self, state: Mapping[str, float]) -> None:
        """Take up what `state` gave."""
        return

    def has_signal(self, examples: Sequence[Example]) -> bool:
        """Whether there is anything to learn from these: answers that are all worth the same teach nothing."""
        return True

    def take_metrics(self) -> Mapping[str, float]:
        """Means over the batches seen since the last report, for the log; then it forgets them."""
        return {}


def take_batch_metrics(batches: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """What batches left behind, one after the other in float64, by name; then it is forgotten."""
    metrics = {name: torch.cat([batch[name] for batch in batches]).double() for name in batches[0]}
    batches.clear()
    return metrics
