"""Generation as a source of documents: the policy answers, a judge says what the answers are worth."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from torch import Tensor

from rung.config.objective import RolloutConfig
from rung.models.generate import GeneratedAnswer, Sampling, generate_by_task
from rung.models.policy import Policy
from rung.objectives.protocol import Objective
from rung.training.gates import tolerance
from rung.training.run_folder import Gate
from rung.training.step import values_by_document
from rung.types import ON_POLICY, Example, PackedBatch, Rollout

RewardFunction = Callable[[Sequence[Example], Sequence[GeneratedAnswer]], Sequence[float]]
"""What answers are worth; each document is its prompt with the answer behind, its `row` the number of the prompt."""


@dataclass
class RolloutSource:
    """Answers of a run, made anew for each window of prompts: a function of weights, seed and number alone."""

    policy: Policy
    objective: Objective
    config: RolloutConfig
    stop_ids: Sequence[int]
    train: RewardFunction | None
    """None where own answers are not worth anything by themselves."""
    validation: RewardFunction | None
    seed: int
    budget: int
    documents: list[Example] = field(default_factory=list)
    """Of the rollout at hand, ready to be learned from."""
    gate: Gate | None = None
    """Whether what was drawn first is what is scored; taken up by the loop."""
    checked: bool = False

    @property
    def steps(self) -> int:
        """Optimizer steps of one rollout."""
        return self.config.steps

    @contextmanager
    def sampling(self) -> Iterator[None]:
        """Inside, log-probabilities of judged answers are those of the distribution that they are drawn from."""
        if self.train is None:
            yield
            return
        held = [p for p in (self.policy, self.policy.reference) if p is not None]
        before = [p.logit_map for p in held]
        for p in held:
            p.logit_map = replace(p.logit_map, temperature=self.config.temperature)
        try:
            yield
        finally:
            for p, own in zip(held, before, strict=True):
                p.logit_map = own

    def documents_for_step(self, prompts: Sequence[Example], step: int) -> tuple[list[Example], dict[str, Any]]:
        """Documents of an optimizer step, and what making them cost; `prompts` are those of its rollout."""
        number, place = divmod(step, self.config.steps)
        told = self._generate_rollout(prompts, number) if place == 0 else {}
        if not self.documents:
            raise RuntimeError("a run goes on at the first step of a rollout")
        epoch, part = divmod(place, self.config.num_minibatches)
        rows = sorted({d.row for d in self.documents})
        order = np.random.default_rng([self.seed, 4, number, epoch]).permutation(rows)
        parts = min(self.config.num_minibatches, len(rows))  # the last window of an epoch may have fewer prompts
        chosen = set(np.array_split(order, parts)[part % parts].tolist())
        # whatever compares the answers of a group has been done: a batch need not hold it whole any more
        return [replace(d, row=-1) for d in self.documents if d.row in chosen], told

    def validate(self, prompts: Sequence[Example]) -> dict[str, float]:
        """Greedy answers to held-out prompts: what they are worth on the mean, how long they are, how many are cut."""
        documents, answers = self._answer(prompts, Sampling(self.config.max_new_tokens))
        if self.validation is None:
            raise RuntimeError("nobody judges these answers")
        cut = [0.0 if a.stopped else self.config.truncation_penalty for a in answers]
        rewards = [float(r) - c for r, c in zip(self.validation(documents, answers), cut, strict=True)]
        return {
            "reward": float(np.mean(rewards)),
            "answer_tokens": float(np.mean([d.predictions for d in documents])),
            "cut": 1.0 - float(np.mean([a.stopped for a in answers])),
        }

    def _generate_rollout(self, prompts: Sequence[Example], number: int) -> dict[str, Any]:
        started = time.perf_counter()
        seed = int(np.random.SeedSequence([self.seed, 5, number]).generate_state(1)[0])
        sampling = Sampling(self.config.max_new_tokens, self.config.temperature, seed, self.config.num_generations)
        self.policy.model.eval()
        share = self.objective.on_policy_share
        own = np.random.default_rng([self.seed, 6, number]).random(len(prompts)) < share
        asked = [p for p, is_own in zip(prompts, own, strict=True) if is_own]
        asked = asked if self.train is not None else [_prompt_ids(p) for p in asked]
        documents, answers = self._answer(asked, sampling)
        made = time.perf_counter() - started
        cut = [0.0 if a.stopped else self.config.truncation_penalty for a in answers]
        worth = [0.0] * len(documents) if self.train is None else self.train(documents, answers)
        rewards = [float(r) - c for r, c in zip(worth, cut, strict=True)]
        judged = time.perf_counter() - started - made
        if self.train is not None and not self.checked:
            self.gate, self.checked = self._check_decoder(documents, answers), True
        rollout = Rollout(
            documents, rewards, [a.stopped for a in answers], lambda value: self._values_by_document(documents, value)
        )
        columns = self.objective.rollout_columns(self.policy, rollout)
        self.policy.model.train()
        self.documents = [replace(d, columns=known) for d, known in zip(documents, columns, strict=True)]
        if self.train is None:
            kept = [p for p, is_own in zip(prompts, own, strict=True) if not is_own]
            self.documents = [_mark_on_policy(d, 1.0) for d in documents] + [_mark_on_policy(d, 0.0) for d in kept]
        return {"rollout_seconds": round(made, 4), "judge_seconds": round(judged, 4)}

    def _check_decoder(self, documents: Sequence[Example], answers: Sequence[GeneratedAnswer]) -> Gate:
        """The decoder's log-probabilities of what it drew are those that the loss will see."""
        pairs = zip(self._values_by_document(documents, self.policy.logprobs), answers, strict=True)
        worst = max(float(np.abs(own - np.array(a.logprobs)).max()) for own, a in pairs)
        limit = tolerance(self.policy)
        return Gate("rollout.distribution", "passed" if worst <= limit else "failed", worst, limit)

    def _answer(self, prompts: Sequence[Example], sampling: Sampling) -> tuple[list[Example], list[GeneratedAnswer]]:
        """In the order of the prompts."""
        if not prompts:
            return [], []
        answers = generate_by_task(
            self.policy,
            [p.ids.tolist() for p in prompts],
            [p.task for p in prompts],
            stop_ids=self.stop_ids,
            sampling=sampling,
            batch_size=self.config.batch,
        )
        documents = [self._document(prompts[i // sampling.answers_per_prompt], a) for i, a in enumerate(answers)]
        return documents, answers

    def _document(self, prompt: Example, answer: GeneratedAnswer) -> Example:
        """Every token that was drawn is learned from, the stop among them: the reward lands on it."""
        ids = np.array([*prompt.ids, *answer.all_tokens], dtype=np.int32)
        return replace(prompt, ids=ids, supervised=np.arange(len(ids)) >= len(prompt.ids))

    def _values_by_document(
        self, documents: Sequence[Example], value: Callable[[PackedBatch], Tensor]
    ) -> list[np.ndarray]:
        """Of the predicted tokens of each document."""

        def apart(batch: PackedBatch) -> list[np.ndarray]:
            values, owner = value(batch).cpu(), batch.loss.owner.cpu()
            return [values[owner == i].numpy() for i in range(len(batch.documents))]

        return values_by_document([self.policy, *self.objective.partner_policies()], documents, self.budget, apart)


def _prompt_ids(document: Example) -> Example:
    """What stands before the answer of a row of the data."""
    ids = document.ids[: max(1, int(document.supervised.argmax()))]
    return replace(document, ids=ids, supervised=np.arange(len(ids)) > 0)


def _mark_on_policy(document: Example, own: float) -> Example:
    """With a column that says of every token whether the policy wrote it."""
    return replace(document, columns={ON_POLICY: np.full(document.predictions, own)})
