"""The model as objectives see it: log-probabilities of a packed batch, with the method on, or off for the reference."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor, nn

from rung.errors import PlanError
from rung.model.head import LogitMap, token_logprobs
from rung.model.load import Base
from rung.types import PackedBatch


class Switchable(Protocol):
    """The part of a method that a policy needs."""

    def disabled(self) -> AbstractContextManager[None]:
        """The base alone, inside the context."""
        ...


class Policy:
    """A base with a method attached. Suffixes as in `rung.types`."""

    def __init__(self, base: Base, method: Switchable) -> None:
        self.base = base
        self.method = method
        self.model = base.model
        self.logit_map = LogitMap.of(base.model.config)

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        device: torch.device = next(self.model.parameters()).device
        return device

    @property
    def head(self) -> nn.Module:
        """The model's output layer."""
        head: nn.Module | None = self.model.get_output_embeddings()
        if head is None:
            raise PlanError("this model has no output head", where="model.name", given=self.base.name)
        return head

    def autocast(self) -> AbstractContextManager[object]:
        """Products in bfloat16 where that is the base's compute type; parameters that move stay in float32."""
        low = self.base.compute_dtype is torch.bfloat16
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=low)

    def hidden_states(self, batch: PackedBatch) -> Tensor:
        """Last hidden state of every token, [T, H], after the final norm."""
        trunk = getattr(self.model, self.model.base_model_prefix)
        with self.autocast():
            out = trunk(
                input_ids=batch.ids[None],
                position_ids=batch.positions[None],
                # A mask of four dimensions is passed through untouched: the segments say who sees whom.
                attention_mask=torch.ones(1, 1, 1, 1, dtype=torch.bool, device=batch.ids.device),
                segments=batch.segments,
                use_cache=False,
            )
        hidden: Tensor = out.last_hidden_state[0]
        return hidden

    def logprobs(self, batch: PackedBatch) -> Tensor:
        """Log-probability in nats of each entry of the loss index, [N]."""
        hidden = self.hidden_states(batch)
        with self.autocast():
            return token_logprobs(hidden[batch.loss.source], self.head, batch.loss.target, self.logit_map)

    def reference_logprobs(self, batch: PackedBatch) -> Tensor:
        """The same from the base alone, without gradient."""
        with torch.no_grad(), self.method.disabled():
            return self.logprobs(batch)

    def logits(self, batch: PackedBatch) -> Tensor:
        """All logits [T, V]: for probes on short batches only."""
        hidden = self.hidden_states(batch)
        with self.autocast():
            return self.logit_map.apply_(self.head(hidden).clone())
