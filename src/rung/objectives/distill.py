"""Distillation: the student's distribution over the vocabulary follows the teacher's, token by token.

Suffixes: N predictions, H width.
"""

from __future__ import annotations

from collections.abc import Mapping
from tempfile import TemporaryFile
from typing import Any
from weakref import finalize

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from rung.config.objective import DistillConfig
from rung.models.distillation_loss import (
    DistillTargets,
    Distribution,
    Divergence,
    distillation_loss,
    forward_kl,
    jensen_shannon,
    reverse_kl,
)
from rung.models.policy import Policy, document_key
from rung.objectives.protocol import Objective, take_seen
from rung.types import ON_POLICY, Counts, LossTerm, PackedBatch


def divergence_function(config: DistillConfig) -> Divergence:
    """The divergence of a config."""
    if config.divergence == "jsd":
        return jensen_shannon(config.beta)
    return forward_kl if config.divergence == "forward" else reverse_kl


class DistillObjective(Objective):
    """Sum over supervised tokens, each with the weight of its row."""

    teacher: Policy
    """What is followed; set before `begin`."""

    def __init__(self, config: DistillConfig) -> None:
        self.config, self.between = config, divergence_function(config)
        self.rollout = config.rollout if config.on_policy else None
        self.share, self.judged = config.on_policy or 1.0, False
        self.states: TeacherStateCache | None = None
        self.seen: list[dict[str, Tensor]] = []

    def begin(self, policy: Policy, seed: int) -> None:
        """Room for what the teacher gives."""
        if self.config.cache_teacher_states:
            self.states = TeacherStateCache()

    def count(self, batch: PackedBatch) -> Counts:
        """Weights of the supervised tokens."""
        tokens = sum(d.weight * d.predictions for d in batch.documents)
        return Counts(tokens=float(tokens), sequences=float(batch.sequences))

    def loss(self, policy: Policy, batch: PackedBatch) -> list[LossTerm]:
        """A term of the divergence with the data's own tokens, and one of hidden states where they are asked for."""
        theirs = self._teacher_hidden_states(batch)
        hidden = policy.hidden_states(batch)
        own, config = hidden[batch.loss.source], self.config
        weight_N = batch.loss.weight.to(torch.promote_types(torch.float32, own.dtype))
        student = Distribution(own, policy.head, policy.logit_map)
        teacher = Distribution(theirs.to(own.device), self.teacher.head, self.teacher.logit_map)
        of_data = 1.0 - batch.loss.columns.get(ON_POLICY, torch.zeros_like(weight_N)).to(weight_N.dtype)
        goal = DistillTargets(
            self.between,
            config.temperature,
            config.weight * config.temperature**2 * weight_N,
            batch.loss.target,
            config.cross_entropy * of_data * weight_N if config.cross_entropy else None,
        )
        with policy.autocast():
            total, apart_N, logprob_N = distillation_loss(student, teacher, goal)
        terms = [LossTerm(total, "tokens", config.divergence)]
        self.seen.append({"divergence": apart_N})
        if config.cross_entropy:
            self.seen[-1]["cross_entropy"] = -logprob_N[of_data > 0]
        if config.cosine:
            away_N = 1.0 - F.cosine_similarity(own.to(apart_N.dtype), teacher.hidden_NH.to(apart_N.dtype), dim=-1)
            terms.append(LossTerm(config.cosine * (away_N * weight_N.to(away_N.dtype)).sum(), "tokens", "cosine"))
            self.seen[-1]["cosine"] = away_N.detach()
        return terms

    def take_metrics(self) -> Mapping[str, float]:
        """Means over tokens: divergence in nats at the temperature, and of the other terms where they are on."""
        if not self.seen:
            return {}
        found = take_seen(self.seen)
        return {name: float(values.mean()) for name, values in found.items() if len(values)}

    @torch.no_grad()
    def _teacher_hidden_states(self, batch: PackedBatch) -> Tensor:
        """The teacher's hidden states at the predictions [N, H]."""
        keys = [document_key(document) for document in batch.documents]
        if self.states is not None and all(key in self.states for key in keys):
            order = torch.argsort(batch.loss.owner, stable=True)
            found = torch.cat([self.states[key] for key in keys]).to(batch.ids.device)
            placed = torch.empty_like(found)
            placed[order] = found
            return placed
        alone = batch.without_cached_hidden()
        with self.teacher.shared_prefix(alone.prefix):
            hidden = self.teacher.hidden_states(alone)[batch.loss.source]
        if self.states is not None:
            for i, key in enumerate(keys):
                written = batch.documents[i].columns.get(ON_POLICY)
                if key not in self.states and (written is None or not written.any()):  # its own never comes again
                    self.states[key] = hidden[batch.loss.owner == i]
        return hidden


class TeacherStateCache:
    """Hidden states by document, in a file that goes when the run does."""

    def __init__(self) -> None:
        self.file: Any = TemporaryFile(prefix="rung-teacher-")
        finalize(self, self.file.close)
        self.places: dict[int, tuple[int, np.dtype[Any], tuple[int, ...]]] = {}

    def __contains__(self, key: int) -> bool:
        return key in self.places

    def __getitem__(self, key: int) -> Tensor:
        start, dtype, shape = self.places[key]
        self.file.seek(start)
        return torch.from_numpy(np.fromfile(self.file, dtype=dtype, count=int(np.prod(shape))).reshape(shape))

    def __setitem__(self, key: int, states: Tensor) -> None:
        start = self.file.seek(0, 2)
        values = (states.float() if states.dtype is torch.bfloat16 else states).cpu().numpy()
        values.tofile(self.file)
        self.file.flush()
        self.places[key] = start, values.dtype, values.shape
