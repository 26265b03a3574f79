"""Rollouts: the policy answers prompts, a reward function scores the answers, and the results are training documents.

A rollout is a function of weights, seed and number alone, so nothing of it is saved: checkpoints are written between
rollouts, and a kill loses at most the steps of one (decision 0018). The documents go through the same packing and steps
as data. `Trainer` asks `RolloutSource` for the documents of each step.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import compress
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rung.config.objective import RolloutConfig
from rung.console import print_status
from rung.models.document_values import token_values_by_document
from rung.models.generate import GeneratedAnswer, Sampling, generate_by_task
from rung.models.policy import Policy
from rung.objectives.protocol import Objective
from rung.training.gates import compare_logprobs
from rung.training.run_folder import Gate
from rung.training.server_gate import DrawnAnswers, check_sampler, differs_by_rounding
from rung.training.server_sampler import ServerSampler
from rung.types import ON_POLICY, SAMPLER_LOGRATIO, Example, PackedBatch, Rollout

BatchValues = Callable[[PackedBatch], Tensor]
"""A number for each prediction of a batch."""
RewardFunction = Callable[[Sequence[Example], Sequence[GeneratedAnswer]], Sequence[float]]
"""Rewards of answers. Each document is a prompt followed by its answer; its `row` is the number of the prompt."""


@dataclass
class RolloutSource:
    """Generates the answers to each window of prompts and serves them as documents, step by step."""

    policy: Policy
    objective: Objective
    config: RolloutConfig
    stop_ids: Sequence[int]
    train: RewardFunction | None
    """Reward of training answers; None where answers have no reward of their own (on-policy distillation)."""
    validation: RewardFunction | None
    seed: int
    budget: int
    sampler: ServerSampler | None = None
    """Draws the answers on a server; None: this process does."""
    documents: list[Example] = field(default_factory=list)
    """Documents of the current rollout, with the columns that the objective reads."""
    gate: Gate | None = None
    """Result of the check of a rollout, until the trainer has recorded it: of the first one, or one that failed."""
    is_decoder_checked: bool = False

    @contextmanager
    def sampling(self) -> Iterator[None]:
        """Inside, policy and reference use the sampling temperature: losses are of the distribution that is sampled."""
        if self.train is None:
            yield  # without rewards no ratio is formed; distillation has a temperature of its own in its loss
            return
        policies = [policy for policy in (self.policy, self.policy.reference) if policy is not None]
        previous_maps = [policy.logit_map for policy in policies]
        for policy in policies:
            policy.logit_map = replace(policy.logit_map, temperature=self.config.temperature)
        try:
            yield
        finally:
            for policy, logit_map in zip(policies, previous_maps, strict=True):
                policy.logit_map = logit_map

    def documents_for_step(self, prompts: Sequence[Example], step: int) -> tuple[list[Example], dict[str, Any]]:
        """Documents of an optimizer step and timing metrics; `prompts` are those of the whole rollout."""
        rollout_number, step_in_rollout = divmod(step, self.config.steps)
        metrics = self._generate_rollout(prompts, rollout_number) if step_in_rollout == 0 else {}
        if not self.documents:
            raise RuntimeError("a run goes on at the first step of a rollout")
        epoch, minibatch = divmod(step_in_rollout, self.config.num_minibatches)
        rows = sorted({d.row for d in self.documents})
        # 4, 5, 6: random streams of their own for minibatches, sampling and the choice of on-policy rows
        order = np.random.default_rng([self.seed, 4, rollout_number, epoch]).permutation(rows)
        # the last window of an epoch may have fewer prompts than minibatches
        minibatch_count = min(self.config.num_minibatches, len(rows))
        chosen_rows = set(np.array_split(order, minibatch_count)[minibatch % minibatch_count].tolist())
        # row -1: advantages are computed already, so a group no longer has to stay in one batch
        return [replace(d, row=-1) for d in self.documents if d.row in chosen_rows], metrics

    def validate(self, prompts: Sequence[Example]) -> dict[str, float]:
        """Greedy answers to held-out prompts: mean reward, mean tokens per answer and share of truncated answers."""
        documents, answers = self._answer(prompts, Sampling(self.config.max_new_tokens))
        if self.validation is None:
            raise RuntimeError("nobody judges these answers")
        penalties = [0.0 if answer.stopped else self.config.truncation_penalty for answer in answers]
        return {
            "reward": float(np.mean(np.array(self.validation(documents, answers), dtype=np.float64) - penalties)),
            "answer_tokens": float(np.mean([d.predictions for d in documents])),
            "cut": 1.0 - float(np.mean([answer.stopped for answer in answers])),
        }

    def _generate_rollout(self, prompts: Sequence[Example], number: int) -> dict[str, Any]:
        start = time.perf_counter()
        seed = int(np.random.SeedSequence([self.seed, 5, number]).generate_state(1)[0])
        sampling = Sampling(self.config.max_new_tokens, self.config.temperature, seed, self.config.num_generations)
        self.policy.model.eval()  # no dropout: what is drawn must be what is scored
        share = self.objective.on_policy_share
        on_policy_mask = np.random.default_rng([self.seed, 6, number]).random(len(prompts)) < share
        answered_prompts = list(compress(prompts, on_policy_mask))
        if self.train is None:  # for a reward the data set holds bare prompts; for distillation full documents
            answered_prompts = [_prompt_ids(prompt) for prompt in answered_prompts]
        documents, answers = self._answer(answered_prompts, sampling)
        generation_seconds = time.perf_counter() - start
        penalties = [0.0 if answer.stopped else self.config.truncation_penalty for answer in answers]
        raw_rewards = [0.0] * len(documents) if self.train is None else self.train(documents, answers)
        rewards = [float(reward) - penalty for reward, penalty in zip(raw_rewards, penalties, strict=True)]
        reward_seconds = time.perf_counter() - start - generation_seconds
        drawn = self._drawn_by_server(documents, answers)
        # once per process: the check reads every answer a second time
        if self.train is not None and drawn is None and not self.is_decoder_checked:
            self.gate, self.is_decoder_checked = self._check_decoder(documents, answers), True
        stopped, known = [answer.stopped for answer in answers], None if drawn is None else drawn.policy_logprobs
        rollout = Rollout(documents, rewards, stopped, lambda value: self._values_by_document(documents, value), known)
        columns = self.objective.rollout_columns(self.policy, rollout)
        if drawn is not None:
            both = zip(columns, drawn.logratios, strict=True)
            columns = [{**values, SAMPLER_LOGRATIO: logratio} for values, logratio in both]
        self.policy.model.train()
        self.documents = [replace(d, columns=values) for d, values in zip(documents, columns, strict=True)]
        if self.train is None:
            self.documents = [_mark_on_policy(document, 1.0) for document in documents]
            self.documents += [_mark_on_policy(prompt, 0.0) for prompt in compress(prompts, ~on_policy_mask)]
        return {"rollout_seconds": round(generation_seconds, 4), "judge_seconds": round(reward_seconds, 4)}

    def _drawn_by_server(self, documents: Sequence[Example], answers: Sequence[GeneratedAnswer]) -> DrawnAnswers | None:
        """Log-probabilities of answers that a server drew, compared at every rollout; None without a server."""
        if self.sampler is None:
            return None
        policy_logprobs = self._values_by_document(documents, self.policy.logprobs)
        drawn = DrawnAnswers(documents, policy_logprobs, [np.array(answer.logprobs) for answer in answers])
        dtype = "bfloat16" if self.config.server is None else self.config.server.dtype
        gate = check_sampler("rollout.distribution", self.policy, drawn, dtype, self._values_by_document)
        if gate.state == "failed" or not self.is_decoder_checked:
            self.gate = gate
        if not self.is_decoder_checked and gate.state == "passed" and differs_by_rounding(self.policy, drawn):
            print_status("the server rounds otherwise than this process: importance weights correct the loss for it")
        self.is_decoder_checked = True
        return drawn

    def _check_decoder(self, documents: Sequence[Example], answers: Sequence[GeneratedAnswer]) -> Gate:
        """Gate: the decoder's log-probabilities of its samples equal those that the loss computes."""
        scored_documents = self._values_by_document(documents, self.policy.logprobs)
        differences = [
            torch.as_tensor(scored - np.array(answer.logprobs))
            for document, scored, answer in zip(documents, scored_documents, answers, strict=True)
            if not self._crosses_rope_boundary(document, answer)
        ]
        if not differences:
            return Gate("rollout.distribution", "not_reached", "every answer changes the rotary frequencies", "none")
        return compare_logprobs("rollout.distribution", torch.cat(differences), self.policy)

    def _crosses_rope_boundary(self, document: Example, answer: GeneratedAnswer) -> bool:
        """Whether the first tokens of an answer were drawn with other frequencies than those of the document."""
        boundary, length = self.policy.rope_boundary, len(document) + self.policy.method.virtual_tokens
        return boundary is not None and length - len(answer.all_tokens) <= boundary < length

    def _answer(self, prompts: Sequence[Example], sampling: Sampling) -> tuple[list[Example], list[GeneratedAnswer]]:
        """Documents and answers, in the order of the prompts; the answers to one prompt are adjacent."""
        if not prompts:
            return [], []
        ids, tasks = [p.ids.tolist() for p in prompts], [p.task for p in prompts]
        policy, stop_ids, batch_size = self.policy, self.stop_ids, self.config.batch
        if self.sampler is not None:
            answers = self.sampler.answer(ids, stop_ids, sampling)
        else:
            answers = generate_by_task(policy, ids, tasks, stop_ids=stop_ids, sampling=sampling, batch_size=batch_size)
        documents = [self._document(prompts[i // sampling.answers_per_prompt], a) for i, a in enumerate(answers)]
        return documents, answers

    def _document(self, prompt: Example, answer: GeneratedAnswer) -> Example:
        """Prompt and answer as one document. Every sampled token is supervised, also the stop with the reward."""
        ids = np.array([*prompt.ids, *answer.all_tokens], dtype=np.int32)
        return replace(prompt, ids=ids, supervised=np.arange(len(ids)) >= len(prompt.ids))

    def _values_by_document(self, documents: Sequence[Example], value: BatchValues) -> list[np.ndarray]:
        """Values [predictions] of each document, computed in packed batches without gradient."""
        policies = [self.policy, *self.objective.partner_policies()]
        return token_values_by_document(policies, documents, self.budget, value)


def _prompt_ids(document: Example) -> Example:
    """The part of a document before its answer: the prompt that the policy continues."""
    ids = document.ids[: max(1, int(document.supervised.argmax()))]
    return replace(document, ids=ids, supervised=np.arange(len(ids)) > 0)


def _mark_on_policy(document: Example, value: float) -> Example:
    """The document with a column that marks its predictions as written by the policy (1) or by the data (0)."""
    return replace(document, columns={ON_POLICY: np.full(document.predictions, value)})
