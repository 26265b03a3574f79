"""Distillation: the student's distribution over the vocabulary follows the teacher's, token by token.

The teacher runs beside the student or, with `cache_teacher_states`, once per document with its hidden states on disk: H
numbers a token instead of V logits, at the price of one more product with the teacher's head. The divergence itself is
in `models/distillation_loss.py`.

Suffixes: N predictions, H width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from tempfile import TemporaryFile
from typing import Any
from weakref import finalize

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from rung.config.objective import DistillConfig
from rung.errors import CheckpointError
from rung.files import cache_folder
from rung.models.distillation_loss import DistillTargets, Distribution, distillation_loss, divergence_function
from rung.models.document_values import values_by_document
from rung.models.policy import Policy, document_key
from rung.objectives.protocol import Objective, entries_of
from rung.planning.memory import tokens_per_micro_batch
from rung.types import ON_POLICY, Example, LossTerm, PackedBatch

TeacherPrompt = Callable[[Example], NDArray[np.int32]]
"""From a document of the student to the ids that the teacher reads before its answer."""


class DistillObjective(Objective):
    """Sum over supervised tokens, each with the weight of its row."""

    config: DistillConfig

    def __init__(
        self, config: DistillConfig, teacher: Policy | None = None, teacher_prompt: TeacherPrompt | None = None
    ) -> None:
        """Without a `teacher`, the policy to imitate, only its settings can be read and nothing computed."""
        super().__init__(config)
        self.divergence, self._teacher = divergence_function(config.divergence, config.beta), teacher
        self._teacher_prompt = teacher_prompt
        self.rollout = config.rollout if config.on_policy else None
        self.on_policy_share, self.uses_rewards = config.on_policy or 1.0, False
        self.teacher_states: TeacherStateCache | None = None

    @property
    def teacher(self) -> Policy:
        """The policy to imitate. Raises `RuntimeError` where none was given."""
        if self._teacher is None:
            raise RuntimeError("a distillation without a teacher computes nothing")
        return self._teacher

    def cached_state_width(self) -> int:
        """Width of the teacher, if the config asks for its states to be cached."""
        return int(self.teacher.model.config.hidden_size) if self.config.cache_teacher_states else 0

    def open_state_cache(self) -> None:
        """Keep the teacher's states of documents of the data."""
        self.teacher_states = TeacherStateCache()

    def loss(self, policy: Policy, batch: PackedBatch) -> list[LossTerm]:
        """A term of the divergence with the cross-entropy, and one of hidden states if `cosine` is set."""
        # The teacher first: the student's activations are stored from its forward pass until the backward pass.
        teacher_NH = self._teacher_hidden_states(batch)
        hidden = policy.hidden_states(batch)
        student_NH, config = hidden[batch.loss.source], self.config
        weight_N = batch.loss.weight.to(torch.promote_types(torch.float32, student_NH.dtype))
        student = Distribution(student_NH, policy.head, policy.logit_map)
        teacher = Distribution(teacher_NH.to(student_NH.device), self.teacher.head, self.teacher.logit_map)
        # The cross-entropy is for tokens of the data; tokens that the student generated are no targets.
        is_data_N = 1.0 - batch.loss.columns.get(ON_POLICY, torch.zeros_like(weight_N)).to(weight_N.dtype)
        nats_weight_N = config.cross_entropy * is_data_N * weight_N if config.cross_entropy else None
        # T^2 keeps the gradient's size independent of the temperature (Hinton et al. 2015, section 2).
        divergence_weight_N = config.weight * config.temperature**2 * weight_N
        weights = (divergence_weight_N, batch.loss.target, nats_weight_N)
        targets = DistillTargets(self.divergence, config.temperature, *weights)
        with policy.autocast():
            total, divergence_N, logprob_N = distillation_loss(student, teacher, targets)
        terms = [LossTerm(total, "tokens", config.divergence)]
        metrics, dtype = {"divergence": divergence_N}, divergence_N.dtype
        if config.cross_entropy:
            from_data = [not _is_generated(document) for document in batch.documents]
            metrics["cross_entropy"] = -logprob_N[entries_of(batch, from_data).to(logprob_N.device)]
        if config.cosine:
            distance_N = 1.0 - F.cosine_similarity(student_NH.to(dtype), teacher.hidden_NH.to(dtype), dim=-1)
            terms.append(LossTerm(config.cosine * (distance_N * weight_N.to(dtype)).sum(), "tokens", "cosine"))
            metrics["cosine"] = distance_N.detach()
        self.batch_metrics.append(metrics)
        return terms

    def summarize(self, metrics: Mapping[str, Tensor]) -> Mapping[str, float]:
        """Means over tokens: divergence in nats at the temperature, and the other terms if active."""
        return {name: float(values.mean()) for name, values in metrics.items() if len(values)}

    @torch.no_grad()
    def _teacher_hidden_states(self, batch: PackedBatch) -> Tensor:
        """The teacher's hidden states at the predictions [N, H]."""
        documents: Sequence[Example] = batch.documents
        if self._teacher_prompt is not None:
            documents = [teacher_document(document, self._teacher_prompt(document)) for document in documents]
        # by what the teacher reads: two students' documents may be equal and the teacher's prompts not
        keys = [document_key(document) for document in documents]
        if self.teacher_states is not None and all(key in self.teacher_states for key in keys):
            return _in_batch_order([self.teacher_states[key] for key in keys], batch)
        if self._teacher_prompt is None:
            # Cached hidden states belong to the student's base.
            uncached_batch = batch.without_cached_hidden()
            with self.teacher.shared_prefix(uncached_batch.prefix):
                by_document = self._states_by_document(uncached_batch)
        else:
            budget = tokens_per_micro_batch(self.teacher.base.shape, self.teacher.device.type)
            by_document = values_by_document([self.teacher], documents, budget, self._states_by_document)
        if self.teacher_states is not None:
            for document, key, states in zip(documents, keys, by_document, strict=True):
                # A generated answer never comes again, so its states are not stored.
                if key not in self.teacher_states and not _is_generated(document):
                    self.teacher_states[key] = states
        return _in_batch_order(by_document, batch)

    def _states_by_document(self, batch: PackedBatch) -> Sequence[Tensor]:
        """The teacher's hidden states at the predictions of each document, [predictions, H] each."""
        order = torch.argsort(batch.loss.owner, stable=True)  # a packed row mixes the entries of several documents
        hidden_NH = self.teacher.hidden_states(batch)[batch.loss.source][order]
        return torch.split(hidden_NH, [document.predictions for document in batch.documents])


def teacher_document(document: Example, prompt: NDArray[np.int32]) -> Example:
    """The answer of a document behind another prompt: its ids from the first supervised one on are the same."""
    start = int(document.supervised.argmax())
    unsupervised = np.zeros(len(prompt), dtype=bool)
    return replace(
        document,
        ids=np.concatenate([prompt, document.ids[start:]]),
        supervised=np.concatenate([unsupervised, document.supervised[start:]]),
        row=-1,  # prompts of one row may differ, so its answers need not stay in one batch
    )


def _in_batch_order(states: Sequence[Tensor], batch: PackedBatch) -> Tensor:
    """States of the batch's documents [predictions, H] each, at their places in its loss index, [N, H]."""
    order = torch.argsort(batch.loss.owner, stable=True)
    by_document_NH = torch.cat(list(states)).to(batch.ids.device)
    ordered_NH = torch.empty_like(by_document_NH)
    ordered_NH[order] = by_document_NH
    return ordered_NH


def _is_generated(document: Example) -> bool:
    """Whether the policy wrote the answer of this document."""
    column = document.columns.get(ON_POLICY)
    return column is not None and bool(column.any())


class TeacherStateCache:
    """Hidden states by document, in a file without a name in Rung's cache folder."""

    def __init__(self) -> None:
        # Not the system's temporary folder, which is often memory.
        folder = cache_folder()
        folder.mkdir(parents=True, exist_ok=True)
        self.file: Any = TemporaryFile(prefix="rung-teacher-", dir=folder)
        # Closed when the cache is collected; the file has no name, so a killed process leaves nothing.
        finalize(self, self.file.close)
        self.locations: dict[int, tuple[int, np.dtype[Any], tuple[int, ...]]] = {}

    def __contains__(self, key: int) -> bool:
        return key in self.locations

    def __getitem__(self, key: int) -> Tensor:
        start, dtype, shape = self.locations[key]
        self.file.seek(start)
        return torch.from_numpy(np.fromfile(self.file, dtype=dtype, count=int(np.prod(shape))).reshape(shape))

    def __setitem__(self, key: int, states: Tensor) -> None:
        start = self.file.seek(0, 2)
        # numpy has no bfloat16.
        values = (states.float() if states.dtype is torch.bfloat16 else states).cpu().numpy()
        try:
            values.tofile(self.file)
            self.file.flush()
        except OSError as error:
            summary = f"could not write the teacher's states: {error}"
            hint = "set objective.cache_teacher_states: false"
            raise CheckpointError(summary, where=str(cache_folder()), hint=hint) from error
        self.locations[key] = start, values.dtype, values.shape
