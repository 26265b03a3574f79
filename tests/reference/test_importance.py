"""Truncated importance weights against the formula of the paper, written out one document at a time in float64."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from builders import rows, tuned
from naive import distance, gradients, naive
from rung.config.objective import GrpoConfig, PpoConfig, RolloutConfig
from rung.config.server import RolloutServerConfig
from rung.models.packing import pack, pack_separately
from rung.objectives import grpo, ppo
from rung.objectives.grpo import GrpoObjective
from rung.objectives.importance import importance_metrics, truncated_importance_weights
from rung.objectives.ppo import PpoObjective
from rung.training.step import accumulate
from rung.types import SAMPLER_LOGRATIO, Example
from tolerances import FLOAT64

CAP = 1.5
REWARD = {"kind": "exact"}


def rollout_of(cap: float | None = CAP) -> RolloutConfig:
    if cap is None:
        return RolloutConfig(num_generations=3, max_new_tokens=9)
    server = RolloutServerConfig(url="http://127.0.0.1:9/v1", model="base", importance_sampling_cap=cap)
    return RolloutConfig(num_generations=3, max_new_tokens=9, server=server)


def test_on_average_they_are_the_gradient_of_the_policy() -> None:
    """Yao et al. 2025: E_q[min(p / q, C) A grad log p], here the exact sum over a vocabulary of five tokens.

    Without truncation it is the gradient under p itself; with it each token counts with min(p, C q).
    """
    generator = torch.Generator().manual_seed(0)
    logits, other = (torch.randn(5, generator=generator, dtype=torch.float64) for _ in range(2))
    advantage = torch.randn(5, generator=generator, dtype=torch.float64)
    logits.requires_grad_(True)
    p, q = logits.log_softmax(0), other.log_softmax(0)
    (wanted,) = torch.autograd.grad((p.exp() * advantage).sum(), logits, retain_graph=True)
    for cap in (1e9, 1.2):
        weights = truncated_importance_weights(p - q, cap)
        (found,) = torch.autograd.grad((q.exp() * weights * advantage * p).sum(), logits, retain_graph=True)
        counts = torch.minimum(p.exp(), cap * q.exp()).detach()
        (truncated,) = torch.autograd.grad((counts * advantage * p).sum(), logits, retain_graph=True)
        assert torch.allclose(found, truncated, rtol=0, atol=1e-14)
        assert torch.allclose(found, wanted, rtol=0, atol=1e-12) == (cap > 2.0)


def test_metrics_by_hand() -> None:
    told = importance_metrics(torch.tensor([1.0, 0.5, 3.0, 2.0]).double().log(), 2.0)
    assert told["importance_ratio"] == pytest.approx(1.625) and told["importance_ratio_max"] == pytest.approx(3.0)
    assert told["importance_truncated"] == 0.25
    assert float(truncated_importance_weights(torch.tensor(9999.0), 2.0)) == 2.0  # exp of it is infinite


def with_columns(examples: list[Example], seed: int, width: float) -> list[Example]:
    rng, made = np.random.default_rng(seed), []
    for i, e in enumerate(examples):
        n = e.predictions
        names = ("old", "reference", "values", "returns")
        own = {name: rng.normal(size=n) for name in names}
        own |= {name: -5.8 + 0.2 * own[name] for name in ("old", "reference")}
        own["advantage"] = np.full(n, (-1.0) ** i * (0.5 + i))
        made.append(replace(e, columns={**own, SAMPLER_LOGRATIO: width * rng.normal(size=n)}))
    return made


def column(e: Example, name: str) -> Tensor:
    return torch.from_numpy(e.columns[name])


def surrogate(ratio: Tensor, advantage: Tensor) -> Tensor:
    return -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)


def grpo_loss(lp: Tensor, e: Example, loss: str) -> Tensor:
    """One answer: the weight multiplies the surrogate, not the divergence; with rloo it is that of the whole answer."""
    a, old, ref, apart = (column(e, n) for n in ("advantage", "old", "reference", SAMPLER_LOGRATIO))
    if loss == "rloo":
        weight = min(float(torch.exp(apart.sum())), CAP)
        return weight * surrogate(torch.exp((lp - old).sum()), a[0])
    weights = torch.tensor([min(float(np.exp(x)), CAP) for x in apart.tolist()], dtype=torch.float64)
    per_token = weights * surrogate(torch.exp(lp - old), a) + 0.3 * (torch.exp(ref - lp) - (ref - lp) - 1)
    return per_token.mean() if loss == "grpo" else per_token.sum() / 9


def logprobs_of(model: object, e: Example) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the supervised tokens, and the hidden states before them."""
    ids, at = torch.from_numpy(e.ids.astype(np.int64)), torch.from_numpy(np.flatnonzero(e.supervised))
    out = model(ids[None], use_cache=False, output_hidden_states=True)  # type: ignore[operator]
    return out.logits[0].log_softmax(-1)[at - 1, ids[at]], out.hidden_states[-1][0][at - 1]


@pytest.mark.parametrize("mutation", [False, True])
@pytest.mark.parametrize("loss", ["grpo", "dr_grpo", "rloo"])
def test_loss_and_gradient_of_groups(loss: str, mutation: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutation: weights that are not truncated, which for these log-ratios are other ones."""
    if mutation:
        monkeypatch.setattr(grpo, "truncated_importance_weights", lambda logratio, cap: logratio.exp())
    examples = with_columns(rows(3, count=4, answers=3), 1, 0.4)
    policy, method = tuned("lora", "phi", dtype=torch.float64, rank=4)
    theirs, their_method = naive("lora", "phi", dtype=torch.float64, rank=4)
    objective = GrpoObjective(GrpoConfig(loss=loss, reward=REWARD, beta=0.3, rollout=rollout_of()))  # type: ignore[arg-type]
    total = torch.stack([e.weight * grpo_loss(logprobs_of(theirs, e)[0], e, loss) for e in examples]).sum()
    expected = total / sum(e.weight for e in examples)
    expected.backward()
    for batches in (pack(examples, 10_000), pack(examples, 60), pack_separately(examples)):
        policy.model.zero_grad()
        found = accumulate(policy, objective, batches)
        is_same = float(found) == pytest.approx(expected.item(), rel=FLOAT64)
        assert is_same != mutation and (distance(gradients(method), gradients(their_method)) < FLOAT64) != mutation
    by_answer = loss == "rloo"
    apart = [column(e, SAMPLER_LOGRATIO) for e in examples]
    ratios = torch.exp(torch.stack([a.sum() for a in apart]) if by_answer else torch.cat(apart))
    told = objective.take_metrics()
    assert told["importance_ratio_max"] == pytest.approx(float(ratios.max()))
    assert told["importance_truncated"] == pytest.approx(float((ratios > CAP).double().mean()))


@pytest.mark.parametrize("mutation", [False, True])
def test_loss_and_gradient_with_a_value_model(mutation: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Policy and entropy are weighted, values are not; the mutation weights nothing."""
    if mutation:
        monkeypatch.setattr(ppo, "truncated_importance_weights", lambda logratio, cap: torch.ones_like(logratio))
    examples = with_columns(rows(3, count=4), 2, 0.4)
    policy, method = tuned("lora", "phi", dtype=torch.float64, rank=4)
    theirs, their_method = naive("lora", "phi", dtype=torch.float64, rank=4)
    rollout = rollout_of()
    objective = PpoObjective(PpoConfig(reward=REWARD, entropy=0.01, vf_coef=0.3, rollout=rollout))  # type: ignore[arg-type]
    objective.begin(policy, 3)
    head, total = objective.head.weight.detach().clone().requires_grad_(True), torch.zeros((), dtype=torch.float64)
    for e in examples:
        lp, hidden = logprobs_of(theirs, e)
        old, before, a, r, apart = (column(e, n) for n in ("old", "values", "advantage", "returns", SAMPLER_LOGRATIO))
        v, ratio, weights = hidden @ head[0], torch.exp(lp - old), torch.exp(apart).clamp(max=CAP)
        near = torch.minimum(torch.maximum(v, before - 0.2), before + 0.2)
        value = 0.5 * torch.maximum((v - r) ** 2, (near - r) ** 2)
        own = weights * surrogate(ratio, a) + 0.3 * value + 0.01 * weights * ratio * lp.detach()
        total = total + e.weight * own.sum()
    expected = total / sum(e.weight * e.predictions for e in examples)
    expected.backward()
    for batches in (pack(examples, 10_000), pack_separately(examples)):
        policy.model.zero_grad()
        objective.head.zero_grad()
        found = accumulate(policy, objective, batches)
        is_same = float(found) == pytest.approx(expected.item(), rel=FLOAT64)
        assert is_same != mutation and (distance(gradients(method), gradients(their_method)) < FLOAT64) != mutation
        assert torch.allclose(objective.head.weight.grad, head.grad, rtol=0, atol=1e-9)
    assert objective.take_metrics()["importance_ratio_max"] > CAP


@pytest.mark.parametrize("loss", ["grpo", "dr_grpo", "rloo"])
def test_equal_probabilities_change_no_bit(loss: str) -> None:
    examples = with_columns(rows(3, count=4, answers=3), 1, 0.0)
    policy, method = tuned("lora", rank=4)
    found = []
    for cap in (None, CAP):
        policy.model.zero_grad()
        config = GrpoConfig(loss=loss, reward=REWARD, rollout=rollout_of(cap))  # type: ignore[arg-type]
        accumulate(policy, GrpoObjective(config), pack(examples, 10_000))
        found.append(gradients(method))
    assert all(np.array_equal(a, b) for a, b in zip(*(f.values() for f in found), strict=True)), loss
