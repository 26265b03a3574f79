"""Supervised fine-tuning: the negative log-likelihood of the supervised tokens.

The divisor is the sum of the token weights of the whole step, so a token weighs the same however the step is divided
into micro-batches; a mean over documents would favor short ones. `objectives/preference.py` uses `nll` as well.
"""

from __future__ import annotations

from torch import Tensor

from rung.models.policy import Policy
from rung.objectives.protocol import Objective
from rung.types import LossTerm, PackedBatch


def nll(logprobs_N: Tensor, weight_N: Tensor) -> Tensor:
    """Weighted sum of -log p in nats. A uniform guess over V tokens with weight 1 gives N log V."""
    return -(logprobs_N * weight_N.to(logprobs_N.dtype)).sum()


class SftObjective(Objective):
    """Sum of weighted token losses; the divisor is the sum of the weights: a row of weight 2 counts as two."""

    def loss(self, policy: Policy, batch: PackedBatch) -> list[LossTerm]:
        """One term, in nats."""
        return [LossTerm(nll(policy.logprobs(batch), batch.loss.weight), unit="tokens")]
