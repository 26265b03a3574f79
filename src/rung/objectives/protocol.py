"""The contract of an objective: counts and sums of losses, and what it needs from data, rollouts and other models.

An objective never knows the method and never divides: sums and counts are additive over micro-batches and ranks
(decision 0001), which a mean is not. Members that few objectives need have defaults. `objectives/registry.py` lists the
implementations; `training/step.py` divides.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from rung.config.objective import RolloutConfig
from rung.models.policy import Policy
from rung.types import Counts, Example, LossTerm, PackedBatch, Rollout


class Objective(Protocol):
    """Losses are sums with units; the trainer divides them by the counts of the whole step over all ranks."""

    compares_answers: bool = False
    """Whether it compares all answers of a row, which must then be in one batch."""
    min_answers: int = 1
    """Minimum number of answers in a row."""
    reads_head: bool = True
    """Whether its loss uses the model's output head."""

    rollout: RolloutConfig | None = None
    """How the policy generates the answers it learns from; None learns from those of the data."""
    on_policy_share: float = 1.0
    """Share of the rows that the policy answers; the others keep the answers of the data."""
    uses_rewards: bool = True
    """Whether generated answers get rewards; otherwise they are plain training documents."""
    config: Any
    """The objective's config."""
    batch_metrics: list[dict[str, Tensor]]
    """Values recorded by batches since the last report, by name."""

    def __init__(self, config: Any) -> None:
        self.config, self.batch_metrics = config, []

    def begin(self, policy: Policy, seed: int) -> None:
        """Called once, before anything else: create the heads of this objective for the model."""
        return

    def trainable(self) -> dict[str, nn.Parameter]:
        """Trainable parameters besides those of the method, by name: heads of the objective."""
        return {}

    def published_head(self) -> Tensor | None:
        """A head [1, H] to publish with the finished model, which outputs scores instead of tokens."""
        return None

    def count(self, batch: PackedBatch) -> Counts:
        """What this batch adds to the divisor, by unit: weights of the supervised tokens, and the documents."""
        # From the documents: the weights of the batch may be on a device, and reading them would synchronize with it.
        tokens = sum(d.weight * d.predictions for d in batch.documents)
        return Counts(tokens=float(tokens), sequences=float(batch.sequences))

    def loss(self, policy: Policy, batch: PackedBatch) -> list[LossTerm]:
        """Terms to minimize, as sums."""

    def kl_examples(self, examples: Sequence[Example]) -> list[Example]:
        """Documents to evaluate before a step over these examples, without learning from them."""
        return []

    def prepare(self, policy: Policy, batches: Iterable[PackedBatch]) -> None:
        """Evaluate the batches of `kl_examples`; called without gradient, before the batches of the step."""
        return

    def cached_state_width(self) -> int:
        """Width of hidden states that the objective can keep for each prediction from epoch to epoch; 0: none."""
        return 0

    def open_state_cache(self) -> None:
        """Keep these states from now on; called where rows come again and the disk has room for them."""
        return

    def rollout_columns(self, policy: Policy, rollout: Rollout) -> list[Mapping[str, np.ndarray]]:
        """Per-token values of the answers that are fixed before learning from them; by document, by name."""
        return [{} for _ in rollout.documents]

    def partner_policies(self) -> Sequence[Policy]:
        """Other policies trained on the same batches."""
        return ()

    def stop_reason(self) -> str | None:
        """Called before an optimizer step: the reason to skip the rest of a rollout, or None."""
        return None

    def state(self) -> dict[str, float]:
        """State for checkpoints besides parameters."""
        return {}

    def load_state(self, state: Mapping[str, float]) -> None:
        """Restore what `state` returned."""
        return

    def has_signal(self, examples: Sequence[Example]) -> bool:
        """Whether there is anything to learn from these examples; answers with equal rewards teach nothing."""
        return True

    def take_metrics(self) -> Mapping[str, float]:
        """Means over the batches since the last report, for the log; clears the record."""
        if not self.batch_metrics:
            return {}
        # Concatenated only here: until a report the tensors stay on the device, without synchronization.
        names = self.batch_metrics[0].keys()
        metrics = {name: torch.cat([batch[name] for batch in self.batch_metrics]).cpu().double() for name in names}
        self.batch_metrics.clear()
        return self.summarize(metrics)

    def summarize(self, metrics: Mapping[str, Tensor]) -> Mapping[str, float]:
        """What `take_metrics` reports of the recorded values of all batches, in float64."""
        return {}


def entries_of(batch: PackedBatch, is_chosen: Sequence[bool]) -> Tensor:
    """Indices into the loss index of the predictions of the chosen documents, on the host.

    From the documents, in whose order the entries are: a mask on the device would wait for it.
    """
    mask = np.repeat(np.asarray(is_chosen, dtype=bool), [d.predictions for d in batch.documents])
    return torch.from_numpy(np.flatnonzero(mask))
