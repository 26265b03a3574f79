"""What a method may look at before the first step: a few training documents, run through the model as it starts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from rung.engine.pack import pack
from rung.engine.step import accumulate
from rung.model.policy import Policy
from rung.objective.base import Objective
from rung.types import Example


class Sample:
    """The documents, packed within the run's micro-batch budget: memory does not follow their number."""

    def __init__(self, policy: Policy, objective: Objective, examples: Sequence[Example], budget: int) -> None:
        self.policy, self.objective = policy, objective
        self.batches = pack(examples, budget, share_prefixes=False, device=policy.device)
        self.tokenizer = policy.base.tokenizer
        self.tokens = sum(len(batch.ids) for batch in self.batches)

    def read(self) -> None:
        """Run them once, without gradient."""
        with torch.no_grad():
            for batch in self.policy.in_turn(self.batches):
                self.policy.hidden_states(batch)  # the head is no target

    def gradients(self, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
        """The gradient of one step over all of them; parameters that a run moves are left without one."""
        self.policy.model.zero_grad(set_to_none=True)
        accumulate(self.policy, self.objective, self.batches)
        found = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        self.policy.model.zero_grad(set_to_none=True)
        return found

    def keys_values(self, ids: Sequence[int]) -> Mapping[int, tuple[Tensor, Tensor]]:
        """Keys and values of these tokens in the base, by layer."""
        row = torch.tensor(list(ids), dtype=torch.long, device=self.policy.device)
        with torch.no_grad(), self.policy.method.disabled():
            return self.policy.captured(row)
