"""Reinforcement learning without a value model: advantages relative to a group of answers (GRPO, Dr. GRPO, RLOO).

It needs several answers to each prompt instead of a value model's memory and training. A group with equal rewards
teaches nothing, and the metrics count such groups. `training/rollout.py` supplies answers and rewards.

Suffixes: D documents, N predictions, G answers of a group.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rung.config.objective import GrpoConfig
from rung.models.policy import Policy, sum_by_document
from rung.objectives.advantages import group_normalized_advantages, leave_one_out_advantages, mean_baseline_advantages
from rung.objectives.importance import importance_metrics, truncated_importance_weights
from rung.objectives.protocol import Objective
from rung.types import SAMPLER_LOGRATIO, Counts, Example, LossTerm, PackedBatch, Rollout

ADVANTAGES = dict(grpo=group_normalized_advantages, dr_grpo=mean_baseline_advantages, rloo=leave_one_out_advantages)


def clipped_surrogate(logratio: Tensor, advantage: Tensor, clip: float) -> Tensor:
    """max(-A rho, -A clip(rho, 1 - c, 1 + c)), rho = exp(logratio) (Schulman et al. 2017, eq. 7, to be minimized)."""
    ratio = logratio.exp()
    # The larger loss is the pessimistic one: clipping never makes an update look better.
    return torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1.0 - clip, 1.0 + clip))


def kl_estimate(logprob: Tensor, reference: Tensor) -> Tensor:
    """exp(d) - d - 1 with d = reference - logprob: an unbiased, nonnegative KL estimate (Schulman, k3)."""
    d = reference - logprob
    # expm1 keeps precision for small d, where exp(d) - 1 cancels.
    return torch.expm1(d) - d


class GrpoObjective(Objective):
    """Sum over answers, each with the weight of its row; the divisor is the sum of the weights."""

    config: GrpoConfig

    def __init__(self, config: GrpoConfig) -> None:
        super().__init__(config)
        self.rollout = config.rollout
        self.rollout_metrics: dict[str, float] = {}

    def count(self, batch: PackedBatch) -> Counts:
        """Weights of the answers, and of their tokens."""
        return replace(super().count(batch), sequences=float(sum(d.weight for d in batch.documents)))

    def rollout_columns(self, policy: Policy, rollout: Rollout) -> list[Mapping[str, np.ndarray]]:
        """Advantages, and if needed log-probabilities of the sampling policy and of the reference."""
        documents, rewards = rollout.documents, np.array(rollout.rewards, dtype=np.float64)
        columns: list[dict[str, np.ndarray]] = [{} for _ in documents]
        # With one step per rollout the ratio is 1, so the sampling policy need not be evaluated.
        if self.config.rollout.steps > 1:
            store_column(columns, "old", sampling_logprobs(policy, rollout))
        if self.config.kl_weight:
            store_column(columns, "reference", rollout.evaluate_documents(policy.reference_logprobs))
        # RLOO puts the divergence into the reward of an answer, not into the loss.
        if self.config.kl_weight and self.config.loss == "rloo":
            is_stored = "old" in columns[0]
            logprobs = [c["old"] for c in columns] if is_stored else sampling_logprobs(policy, rollout)
            divergences = [float((a - c["reference"]).sum()) for a, c in zip(logprobs, columns, strict=True)]
            rewards = rewards - self.config.kl_weight * np.array(divergences)
        advantages = np.zeros(len(documents))
        groups = np.array([d.row for d in documents])
        for row in np.unique(groups):
            advantages[groups == row] = ADVANTAGES[self.config.loss](rewards[groups == row])
        full = [np.full(d.predictions, advantage) for d, advantage in zip(documents, advantages, strict=True)]
        store_column(columns, "advantage", full)
        self._record_rollout(rollout, groups)
        return list(columns)

    def has_signal(self, examples: Sequence[Example]) -> bool:
        """Whether some group has answers with different rewards."""
        return any(bool(e.columns["advantage"].any()) for e in examples)

    def loss(self, policy: Policy, batch: PackedBatch) -> list[LossTerm]:
        """One term, summed over answers."""
        logprobs_N, columns = policy.logprobs(batch), batch.loss.columns
        advantage_N = columns["advantage"].to(logprobs_N.dtype)
        # Detached: the ratio is 1 and its gradient is that of log p.
        old_N = columns["old"].to(logprobs_N.dtype) if "old" in columns else logprobs_N.detach()
        tokens_D = sum_by_document(batch, torch.ones_like(logprobs_N))
        sampler = self._sampler_logratio(batch, logprobs_N)
        if self.config.loss == "rloo":
            total_D = sum_by_document(batch, logprobs_N - old_N)
            losses_D = clipped_surrogate(total_D, sum_by_document(batch, advantage_N) / tokens_D, self.config.clip)
            losses_D = self._weigh(losses_D, sampler)
        else:
            losses_N = clipped_surrogate(logprobs_N - old_N, advantage_N, self.config.clip)
            losses_N = self._weigh(losses_N, sampler)
            if self.config.kl_weight:
                reference_N = columns["reference"].to(logprobs_N.dtype)
                losses_N = losses_N + self.config.kl_weight * kl_estimate(logprobs_N, reference_N)
            # Dr. GRPO divides by a constant: a mean over tokens would make long wrong answers cheap.
            divisor = tokens_D if self.config.loss == "grpo" else self.config.rollout.max_new_tokens
            losses_D = sum_by_document(batch, losses_N) / divisor
        self._record_batch(batch, logprobs_N.detach(), old_N, columns.get("reference"))
        if sampler is not None:
            self.batch_metrics[-1][SAMPLER_LOGRATIO] = sampler
        weight_D = losses_D.new_tensor([d.weight for d in batch.documents])
        return [LossTerm((losses_D * weight_D).sum(), "sequences", self.config.loss)]

    def summarize(self, metrics: Mapping[str, Tensor]) -> Mapping[str, float]:
        """Of the rollout: rewards, lengths, constant groups; of the step: ratio and divergence."""
        ratio = metrics["logratio"].exp()
        clipped_share = ((ratio - 1.0).abs() > self.config.clip).double().mean()
        divergence = {"kl": float(metrics["kl"].mean())} if "kl" in metrics else {}
        ratios = {"ratio": float(ratio.mean()), "clipped": float(clipped_share), **divergence}
        if (server := self.config.rollout.server) is not None:
            ratios |= importance_metrics(metrics[SAMPLER_LOGRATIO], server.importance_sampling_cap)
        return {**self.rollout_metrics, **ratios}

    def _sampler_logratio(self, batch: PackedBatch, logprobs_N: Tensor) -> Tensor | None:
        """Log-ratios of policy and server, [N], with rloo [D], whose actions are answers; None without a server."""
        if self.config.rollout.server is None:
            return None
        logratio_N = batch.loss.columns[SAMPLER_LOGRATIO].to(logprobs_N.dtype)
        return sum_by_document(batch, logratio_N) if self.config.loss == "rloo" else logratio_N

    def _weigh(self, losses: Tensor, sampler_logratio: Tensor | None) -> Tensor:
        """Policy losses of tokens or answers, weighted where a server has drawn them."""
        if sampler_logratio is None or self.config.rollout.server is None:
            return losses
        cap = self.config.rollout.server.importance_sampling_cap
        return losses * truncated_importance_weights(sampler_logratio, cap)

    def _record_batch(self, batch: PackedBatch, logprobs_N: Tensor, old_N: Tensor, reference_N: Tensor | None) -> None:
        """Record what the loss uses: RLOO has ratios of whole answers, and the plain log-ratio is in its reward."""
        by_answer = self.config.loss == "rloo"
        metrics = {"logratio": sum_by_document(batch, logprobs_N - old_N) if by_answer else logprobs_N - old_N}
        if reference_N is not None:
            logratio = logprobs_N - reference_N.to(logprobs_N.dtype)
            metrics["kl"] = logratio if by_answer else kl_estimate(logprobs_N, logprobs_N - logratio)
        self.batch_metrics.append(metrics)

    def _record_rollout(self, rollout: Rollout, groups: NDArray[np.int64]) -> None:
        rewards = np.array(rollout.rewards, dtype=np.float64)
        by_group = [rewards[groups == row] for row in np.unique(groups)]
        constant_groups = [group for group in by_group if group.max() - group.min() == 0.0]
        self.rollout_metrics = {
            "reward": float(rewards.mean()),
            "reward_spread": float(np.mean([group.std() for group in by_group])),
            "alike": len(constant_groups) / len(by_group),
            # Constant groups by cause: prompts that are too easy or too hard for the policy.
            "all_right": sum(float(group[0]) >= 1.0 for group in constant_groups) / len(by_group),
            "all_wrong": sum(float(group[0]) <= 0.0 for group in constant_groups) / len(by_group),
            "answer_tokens": float(np.mean([d.predictions for d in rollout.documents])),
            "cut": 1.0 - float(np.mean(rollout.stopped)),
        }


def sampling_logprobs(policy: Policy, rollout: Rollout) -> Sequence[np.ndarray]:
    """Log-probabilities of the policy that the rollout was drawn with, [predictions] per document."""
    known = rollout.policy_logprobs
    return rollout.evaluate_documents(policy.logprobs) if known is None else known


def store_column(columns: list[dict[str, np.ndarray]], name: str, values: Sequence[np.ndarray]) -> None:
    """Add a column of values to the columns of each document."""
    for document_columns, document_values in zip(columns, values, strict=True):
        document_columns[name] = document_values
