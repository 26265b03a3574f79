"""Proximal policy optimization with a value model and a KL penalty to a reference: the third step of RLHF.

The value model is a second adapter on the same base, or a head on the policy's own states if the method trains the base
(decision 0019); either is cheaper than a separate model. Advantages are fixed once a rollout; the steps on it stop when
the policy has moved too far. `training/rollout.py` supplies answers and rewards.

Suffixes: D documents, N predictions, T tokens of one answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from rung.config.objective import PpoConfig
from rung.models.policy import Policy
from rung.objectives.advantages import Floats, generalized_advantage_estimates, whiten
from rung.objectives.grpo import clipped_surrogate, kl_estimate, sampling_logprobs
from rung.objectives.importance import importance_metrics, truncated_importance_weights
from rung.objectives.protocol import Objective
from rung.objectives.reward import ScoreHead
from rung.types import SAMPLER_LOGRATIO, Example, LossTerm, PackedBatch, Rollout


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip: float) -> Tensor:
    """Half the larger of (V - R)^2 and (V' - R)^2, V' kept within the clip of the value before the update.

    Schulman et al.'s reference implementation of PPO2, as used by Ziegler et al. 2019.
    """
    # As for the policy: a change beyond the clip brings no further gain.
    clipped_values = old_values + (values - old_values).clamp(-clip, clip)
    return 0.5 * torch.maximum((values - returns).square(), (clipped_values - returns).square())


def adapt_penalty(beta: float, divergence: float, target: float, answers: int, horizon: int) -> float:
    """The next penalty coefficient: it rises while the divergence exceeds its target (Ziegler et al. 2019, 2.2)."""
    # Clipped, so that one unusual rollout cannot change the penalty much.
    error = min(max(divergence / target - 1.0, -0.2), 0.2)
    return beta * (1.0 + error * min(1.0, answers / horizon))


class PpoObjective(Objective):
    """Sum over the tokens of answers, each with the weight of its row."""

    config: PpoConfig
    head: ScoreHead
    """Head of the value model: expected return of an answer before each of its tokens."""

    def __init__(
        self, config: PpoConfig, value_model: Policy | None = None, value_head: ScoreHead | None = None
    ) -> None:
        """Without a `value_model` values are read off the policy's hidden states; `value_head` is the initial head.

        The value model is a second adapter on the same base. Without a `value_head` training starts from a random one.
        """
        super().__init__(config)
        self.rollout, self.value_model, self.initial_head = config.rollout, value_model, value_head
        # Changes during a run if `adaptive_kl` is set, so checkpoints hold it.
        self.beta = config.kl_weight
        self.rollout_metrics: dict[str, float] = {}
        # Lowest and highest reward of the run so far, which checkpoints hold: equal rewards teach nothing.
        self.reward_range: tuple[float, float] | None = None

    def begin(self, policy: Policy, seed: int) -> None:
        """Create a random value head unless `initial_head` is set."""
        self.head = self.initial_head or ScoreHead.fresh(policy, seed)

    def trainable(self) -> dict[str, nn.Parameter]:
        """Parameters of the value model and its head."""
        value_parameters = {} if self.value_model is None else self.value_model.method.trainable()  # type: ignore[attr-defined]
        return {**{f"value.{name}": p for name, p in value_parameters.items()}, "value.score.weight": self.head.weight}

    def partner_policies(self) -> Sequence[Policy]:
        """The value model."""
        return [] if self.value_model is None else [self.value_model]

    def state(self) -> dict[str, float]:
        """The KL coefficient, which adapts during a run, and the range of the rewards so far."""
        ends = () if self.reward_range is None else zip(("reward_low", "reward_high"), self.reward_range, strict=True)
        return {"beta": self.beta, **dict(ends)}

    def load_state(self, state: Mapping[str, float]) -> None:
        """Restore what `state` returned."""
        self.beta = state["beta"]
        self.reward_range = (state["reward_low"], state["reward_high"]) if "reward_low" in state else None

    def values(self, policy: Policy, batch: PackedBatch) -> Tensor:
        """Values before each token of the answers, [N]."""
        hidden = (self.value_model or policy).hidden_states(batch)
        return self.head(hidden[batch.loss.source])  # type: ignore[no-any-return]

    def rollout_columns(self, policy: Policy, rollout: Rollout) -> list[Mapping[str, np.ndarray]]:
        """Log-probabilities, values, advantages and returns of every token under the sampling policy."""
        old = sampling_logprobs(policy, rollout)
        values = rollout.evaluate_documents(lambda batch: self.values(policy, batch))
        logratios = [np.zeros_like(reward) for reward in old]
        if self.config.kl_weight:
            logratios = [a - b for a, b in zip(old, rollout.evaluate_documents(policy.reference_logprobs), strict=True)]
        advantages, returns = [], []
        for reward, logratio, value in zip(rollout.rewards, logratios, values, strict=True):
            rewards = -self.beta * logratio.astype(np.float64)
            rewards[-1] += reward  # the reward belongs to the end of the answer: its last token
            gamma, decay = self.config.gamma, self.config.gae_lambda
            advantage = generalized_advantage_estimates(rewards, value.astype(np.float64), gamma, decay)
            advantages.append(advantage)
            returns.append(advantage + value)
        self._record_rollout(rollout, logratios, values, returns)
        if self.config.whiten:
            # After the returns are computed: these keep the scale of the rewards.
            advantages = whiten(advantages)
        if (adapt := self.config.adaptive_kl) is not None:
            n = len(rollout.documents)
            # The new coefficient applies from the next rollout on.
            self.beta = adapt_penalty(self.beta, self.rollout_metrics["kl_answer"], adapt.target, n, adapt.horizon)
        names = ("old", "values", "advantage", "returns")
        return [dict(zip(names, c, strict=True)) for c in zip(old, values, advantages, returns, strict=True)]

    def has_signal(self, examples: Sequence[Example]) -> bool:
        """Whether some token has a nonzero advantage and rewards have differed so far.

        With equal rewards the advantages are errors of the value model, which whitening would scale to 1.
        """
        lowest, highest = self.reward_range or (0.0, 0.0)
        return lowest < highest and any(bool(e.columns["advantage"].any()) for e in examples)

    def loss(self, policy: Policy, batch: PackedBatch) -> list[LossTerm]:
        """One term of the policy, one of the values, and one of the entropy if `entropy` is set."""
        hidden = policy.hidden_states(batch)
        logprobs_N = policy.logprobs_of(hidden, batch)
        # Without a value model both losses share one forward pass.
        values_N = self.head(hidden[batch.loss.source]) if self.value_model is None else self.values(policy, batch)
        columns = {name: column.to(logprobs_N.dtype) for name, column in batch.loss.columns.items()}
        weight_N = batch.loss.weight.to(logprobs_N.dtype)
        logratio_N = logprobs_N - columns["old"]
        policy_N = clipped_surrogate(logratio_N, columns["advantage"], self.config.clip)
        values_N, clip = values_N.to(logprobs_N.dtype), self.config.cliprange_value
        value_N = value_loss(values_N, columns["values"], columns["returns"], clip)
        metrics = {"logratio": logratio_N, "logprob": logprobs_N, "value_loss": value_N}
        importance_N: Tensor | float = 1.0
        if (server := self.config.rollout.server) is not None:
            metrics[SAMPLER_LOGRATIO] = columns[SAMPLER_LOGRATIO]
            importance_N = truncated_importance_weights(columns[SAMPLER_LOGRATIO], server.importance_sampling_cap)
            # not the value loss: values are fitted to the returns of the answers at hand, whoever drew them
            policy_N = policy_N * importance_N
        self.batch_metrics.append({name: values.detach() for name, values in metrics.items()})
        terms = [
            LossTerm((policy_N * weight_N).sum(), "tokens", "policy"),
            LossTerm(self.config.vf_coef * (value_N * weight_N).sum(), "tokens", "value"),
        ]
        # Gradient of the negative entropy: E[log p grad log p]. The ratio corrects for tokens of the old policy.
        if self.config.entropy:
            surprise_N = importance_N * logratio_N.exp() * logprobs_N.detach()
            terms.append(LossTerm(self.config.entropy * (surprise_N * weight_N).sum(), "tokens", "entropy"))
        return terms

    def stop_reason(self) -> str | None:
        """The reason to skip the rest of a rollout: the policy has moved too far from the sampling policy."""
        logratio = torch.cat([batch["logratio"] for batch in self.batch_metrics]).cpu().double()
        divergence, ratio = float(_k3(logratio).mean()), float(logratio.exp().mean())
        if divergence > self.config.stops.target_kl:
            return f"divergence {divergence:.3f} nats a token, at most {self.config.stops.target_kl:g}"
        if ratio > self.config.stops.ratio:
            return f"mean ratio {ratio:.2f}, at most {self.config.stops.ratio:g}"
        return None

    def summarize(self, metrics: Mapping[str, Tensor]) -> Mapping[str, float]:
        """Of the rollout: rewards, divergence, values; of the step: ratio, clipping, entropy."""
        ratio, server = metrics["logratio"].exp(), self.config.rollout.server
        importance = {}
        if server is not None:
            importance = importance_metrics(metrics[SAMPLER_LOGRATIO], server.importance_sampling_cap)
        return {
            **self.rollout_metrics,
            "ratio": float(ratio.mean()),
            "clipped": float(((ratio - 1.0).abs() > self.config.clip).double().mean()),
            "kl_step": float(_k3(metrics["logratio"]).mean()),
            "entropy": float(-(ratio * metrics["logprob"]).mean()),
            "value_loss": float(metrics["value_loss"].mean()),
            **importance,
        }

    def _record_rollout(
        self, rollout: Rollout, logratios: Sequence[Floats], values: Sequence[Floats], returns: list[Floats]
    ) -> None:
        ends = (*(self.reward_range or ()), *rollout.rewards)
        self.reward_range = (float(min(ends)), float(max(ends)))
        all_returns, all_values = np.concatenate(returns), np.concatenate([np.asarray(v) for v in values])
        # Explained variance: 1 if the values predict the returns, 0 or less if they are useless.
        variance = float(all_returns.var())
        self.rollout_metrics = {
            "reward": float(np.mean(rollout.rewards)),
            "reward_spread": float(np.std(rollout.rewards)),
            "kl": float(np.concatenate([np.asarray(a) for a in logratios]).mean()),
            "kl_answer": float(np.mean([float(a.sum()) for a in logratios])),
            "beta": self.beta,
            "explained": 1.0 - float((all_returns - all_values).var()) / variance if variance > 0 else 0.0,
            "answer_tokens": float(np.mean([d.predictions for d in rollout.documents])),
            "cut": 1.0 - float(np.mean(rollout.stopped)),
        }


def _k3(logratio: Tensor) -> Tensor:
    """KL estimate of each token, from the sampling policy to the current one (Schulman, k3)."""
    return kl_estimate(torch.zeros_like(logratio), logratio)
