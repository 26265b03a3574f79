"""PPO against sums written out and against plain transformers, in float64."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from builders import rows, tuned
from naive import distance, gradients, naive
from rung.config.objective import PpoConfig
from rung.models.packing import MIN_PREFIX_AHEAD, pack, pack_separately
from rung.objectives.advantages import generalized_advantage_estimates, whiten
from rung.objectives.ppo import PpoObjective, adapt_penalty, value_loss
from rung.training.step import accumulate
from rung.types import Example, Rollout
from tolerances import FLOAT64


def spec_of(**more: object) -> PpoConfig:
    return PpoConfig(reward={"kind": "exact"}, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(("gamma", "decay"), [(1.0, 0.95), (0.9, 0.5), (1.0, 0.0), (1.0, 1.0)])
def test_advantages_are_the_direct_double_sum(gamma: float, decay: float) -> None:
    rng = np.random.default_rng(0)
    r, v = rng.normal(size=12), rng.normal(size=12)
    following = [*v[1:], 0.0]
    delta = [r[t] + gamma * following[t] - v[t] for t in range(12)]
    expected = [sum((gamma * decay) ** k * delta[t + k] for k in range(12 - t)) for t in range(12)]
    assert generalized_advantage_estimates(r, v, gamma, decay) == pytest.approx(expected, abs=1e-12)


def test_with_lambda_one_the_value_model_is_only_a_baseline() -> None:
    r, v = np.array([0.0, 0.0, 2.0]), np.array([0.3, -0.1, 0.7])
    assert generalized_advantage_estimates(r, v, 1.0, 1.0) == pytest.approx(2.0 - v)


def test_whitening_is_over_all_answers() -> None:
    parts = whiten([np.array([1.0, 2.0]), np.array([3.0, 4.0, 5.0])])
    every = np.concatenate(parts)
    assert every.mean() == pytest.approx(0.0, abs=1e-12) and every.std() == pytest.approx(1.0, abs=1e-6)
    assert [len(p) for p in parts] == [2, 3] and not whiten([np.ones(3)])[0].any()


def test_the_penalty_adapts_by_hand() -> None:
    assert adapt_penalty(0.2, 12.0, 6.0, 100, 10_000) == pytest.approx(0.2 * (1 + 0.2 * 0.01))
    assert adapt_penalty(0.2, 0.0, 6.0, 100, 10_000) == pytest.approx(0.2 * (1 - 0.2 * 0.01))
    assert adapt_penalty(0.2, 6.6, 6.0, 100, 10_000) == pytest.approx(0.2 * (1 + 0.1 * 0.01))


def test_value_loss_by_hand() -> None:
    """Held back where the value has moved too far towards its return: the larger of both counts."""
    v, before, r = (torch.tensor(x).double() for x in ([1.0, 0.1, -1.0], [0.0, 0.0, 0.0], [1.0, 1.0, 1.0]))
    assert value_loss(v, before, r, 0.2).tolist() == pytest.approx([0.5 * 0.64, 0.5 * 0.81, 0.5 * 4.0])


def with_columns(examples: list[Example]) -> list[Example]:
    rng = np.random.default_rng(1)
    made = []
    for e in examples:
        names = ("old", "values", "advantage", "returns")
        own = {name: rng.normal(size=e.predictions) for name in names}
        made.append(replace(e, columns={**own, "old": -5.8 + 0.2 * own["old"]}))
    return made


@pytest.mark.parametrize("shared", [0, MIN_PREFIX_AHEAD + 5])
@pytest.mark.parametrize("own_critic", [True, False])
def test_loss_and_gradients_are_those_of_documents_alone(own_critic: bool, shared: int) -> None:
    """Of the policy, of the value model's adapter and of its head, prompts of several rows run ahead or not."""
    examples = with_columns(rows(3, count=5, shared=shared))
    policy, method = tuned("lora", "phi", dtype=torch.float64, rank=4)
    critic, critic_method = tuned("lora", "phi", dtype=torch.float64, rank=4)
    theirs, their_method = naive("lora", "phi", dtype=torch.float64, rank=4)
    judge, judge_method = naive("lora", "phi", dtype=torch.float64, rank=4)
    objective = PpoObjective(spec_of(entropy=0.01, vf_coef=0.3), critic if own_critic else None)
    objective.begin(policy, 3)
    weight = objective.head.weight.detach().clone().requires_grad_(True)
    total, weights = torch.zeros((), dtype=torch.float64), 0.0
    for e in examples:
        ids = torch.from_numpy(e.ids.astype(np.int64))
        at = torch.from_numpy(np.flatnonzero(e.supervised))
        out = theirs(ids[None], use_cache=False, output_hidden_states=True)
        lp = out.logits[0].log_softmax(-1)[at - 1, ids[at]]
        states = judge(ids[None], use_cache=False, output_hidden_states=True) if own_critic else out
        v = states.hidden_states[-1][0][at - 1] @ weight[0]
        old, before, a, r = (torch.from_numpy(e.columns[n]) for n in ("old", "values", "advantage", "returns"))
        ratio = torch.exp(lp - old)
        pg = -torch.minimum(ratio * a, ratio.clamp(0.8, 1.2) * a)
        near = torch.minimum(torch.maximum(v, before - 0.2), before + 0.2)
        vf = 0.5 * torch.maximum((v - r) ** 2, (near - r) ** 2)
        total = total + e.weight * (pg + 0.3 * vf + 0.01 * ratio * lp.detach()).sum()
        weights += e.weight * len(at)
    (total / weights).backward()
    for batches in (pack(examples, 10_000), pack(examples, 60), pack_separately(examples)):
        for p in (policy, critic):
            p.model.zero_grad()
        objective.head.zero_grad()
        found = accumulate(policy, objective, batches)
        assert float(found) == pytest.approx((total / weights).item(), rel=FLOAT64)
        assert distance(gradients(method), gradients(their_method)) < FLOAT64
        assert torch.allclose(objective.head.weight.grad, weight.grad, rtol=0, atol=1e-9)
        if own_critic:
            assert distance(gradients(critic_method), gradients(judge_method)) < FLOAT64


def rolled(objective: PpoObjective, rewards: list[float], apart: list[np.ndarray]) -> list[dict[str, np.ndarray]]:
    policy, _ = tuned("lora")
    objective.begin(policy, 0)
    examples = rows(1, count=len(rewards), answers=1)
    examples = [
        replace(e, supervised=np.arange(len(e)) >= len(e) - len(a)) for e, a in zip(examples, apart, strict=True)
    ]
    zero = [np.zeros_like(a) for a in apart]
    read = {policy.logprobs: apart, policy.reference_logprobs: zero}
    rollout = Rollout(examples, rewards, [True] * len(rewards), lambda value: read.get(value, zero))
    return [dict(column) for column in objective.rollout_columns(policy, rollout)]


def test_the_reward_lands_on_the_last_token_and_the_penalty_on_each() -> None:
    apart = [np.array([0.5, -0.2, 0.1]), np.array([0.0, 0.4])]
    columns = rolled(PpoObjective(spec_of(beta=0.1, whiten=False, gae_lambda=0.0)), [2.0, -1.0], apart)
    assert columns[0]["advantage"] == pytest.approx([-0.05, 0.02, 2.0 - 0.01])
    assert columns[1]["advantage"] == pytest.approx([0.0, -1.0 - 0.04])
    assert columns[0]["returns"] == pytest.approx(columns[0]["advantage"])  # nothing was expected


def test_the_penalty_moves_and_is_kept() -> None:
    objective = PpoObjective(spec_of(beta=0.1, adaptive_kl={"target": 0.2, "horizon": 10}))
    rolled(objective, [1.0, 1.0], [np.array([0.5, 0.5]), np.array([0.5, 0.5])])
    assert objective.beta == pytest.approx(0.1 * (1 + 0.2 * 2 / 10))
    again = PpoObjective(spec_of(beta=0.1, adaptive_kl={}))
    again.load_state(objective.state())
    assert again.beta == objective.beta


def test_it_halts_where_it_has_gone_too_far() -> None:
    objective = PpoObjective(spec_of(stops={"target_kl": 0.1, "ratio": 3.0}))
    objective.batch_metrics = [{"logratio": torch.full((4,), 0.05)}]
    assert objective.stop_reason() is None
    objective.batch_metrics = [{"logratio": torch.full((4,), -1.0)}]
    assert "divergence" in (objective.stop_reason() or "")
    objective = PpoObjective(spec_of(stops={"target_kl": 9.0, "ratio": 3.0}))
    objective.batch_metrics = [{"logratio": torch.full((4,), 1.5)}]
    assert "ratio" in (objective.stop_reason() or "")
