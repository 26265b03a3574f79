"""Soft labels of pairs against formulas written out in numpy, finite differences and documents alone, in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from builders import rows, tuned
from models import tiny_model
from naive import distance, gradients, logprob, naive, score, written_out
from rung.config.objective import PreferenceConfig, RewardConfig
from rung.evaluation.reward_model import calibration_error, reward_model_health, score_reward_model
from rung.models.packing import MIN_PREFIX_AHEAD, pack, pack_separately
from rung.objectives.pairs import AnswerPairs, answer_pairs, soft_label_loss
from rung.objectives.preference import LOSSES, PairedPreference, PairLogprobs, paired_loss
from rung.objectives.reward import RewardObjective, bradley_terry
from rung.training.step import accumulate, count_window
from rung.types import Example
from tolerances import FLOAT64

SOFT = sorted(LOSSES.keys() - {"robust"})
"""Losses that use the probability of a pair."""
BETA = 0.3
Floats = NDArray[np.float64]


def softplus(x: Floats) -> Floats:
    return np.logaddexp(0.0, x)


def sigma(x: Floats) -> Floats:
    return 1.0 / (1.0 + np.exp(-x))


def log_odds(x: Floats) -> Floats:
    return x - np.log1p(-np.exp(x))


FORMULAS: dict[str, Callable[[Floats, Floats, Floats, Floats, Floats], Floats]] = {
    # cross-entropy with soft targets: softplus(x) - p x
    "dpo": lambda c, r, n, m, p: softplus(BETA * (c - r)) - p * BETA * (c - r),
    "sigmoid_norm": lambda c, r, n, m, p: softplus(BETA * (c / n - r / m)) - p * BETA * (c / n - r / m),
    "orpo": lambda c, r, n, m, p: (
        BETA * (softplus(log_odds(c / n) - log_odds(r / m)) - p * (log_odds(c / n) - log_odds(r / m)))
    ),
    "simpo": lambda c, r, n, m, p: (
        p * softplus(BETA * (0.5 - (c / n - r / m))) + (1 - p) * softplus(BETA * (0.5 + (c / n - r / m)))
    ),
    # a square around the expected target (2 p - 1) / (2 beta), and its variance
    "ipo": lambda c, r, n, m, p: (c / n - r / m - (2 * p - 1) / (2 * BETA)) ** 2 + p * (1 - p) / BETA**2,
    "hinge": lambda c, r, n, m, p: p * np.maximum(0, 1 - BETA * (c - r)) + (1 - p) * np.maximum(0, 1 + BETA * (c - r)),
    "apo_zero": lambda c, r, n, m, p: 1 - (2 * p - 1) * (sigma(BETA * c) - sigma(BETA * r)),
}
"""Expected loss of log-ratios c and r, of lengths n and m, with probability p: other algebra than p l + (1 - p) l."""


def some_pairs(count: int = 64) -> tuple[PairLogprobs, Tensor]:
    rng = np.random.default_rng(7)
    sides = [-rng.uniform(0.5, 30.0, size=count) for _ in range(2)]
    lengths = [rng.integers(2, 12, size=count).astype(float) for _ in range(2)]
    c, r, n, m = (torch.from_numpy(x) for x in (*sides, *lengths))
    return PairLogprobs(c.requires_grad_(), r.requires_grad_(), n, m), torch.from_numpy(rng.uniform(0.5, 1.0, count))


@pytest.mark.parametrize("loss", SOFT)
def test_expected_loss_matches_numpy_oracle(loss: str) -> None:
    pairs, p = some_pairs()
    found = paired_loss(pairs, p, PreferenceConfig(loss=loss, beta=BETA))  # type: ignore[arg-type]
    expected = FORMULAS[loss](*(x.detach().numpy() for x in pairs), p.numpy())
    assert np.allclose(found.detach().numpy(), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("loss", SOFT)
def test_gradient_is_that_of_finite_differences(loss: str) -> None:
    (c, r, n, m), p = some_pairs(8)
    config = PreferenceConfig(loss=loss, beta=BETA)  # type: ignore[arg-type]
    assert torch.autograd.gradcheck(lambda a, b: paired_loss(PairLogprobs(a, b, n, m), p, config), (c, r))


def test_gradient_of_dpo_is_sigmoid_less_probability() -> None:
    """So the loss is lowest where the implied preference sigmoid(beta h) is the label's probability."""
    pairs, p = some_pairs()
    paired_loss(pairs, p, PreferenceConfig(beta=BETA)).sum().backward()
    implied = torch.sigmoid(BETA * (pairs.chosen - pairs.rejected)).detach()
    assert torch.allclose(pairs.chosen.grad, BETA * (implied - p), rtol=0, atol=1e-14)
    assert torch.allclose(pairs.rejected.grad, -BETA * (implied - p), rtol=0, atol=1e-14)


@pytest.mark.parametrize("loss", SOFT)
def test_a_certain_pair_has_the_hard_loss_bit_for_bit(loss: str) -> None:
    """Beside soft pairs too, in value and gradient."""
    config = PreferenceConfig(loss=loss, beta=BETA)  # type: ignore[arg-type]
    found = []
    for probability in (None, torch.tensor([1.0, 0.7] * 32, dtype=torch.float64)):
        pairs, _ = some_pairs()
        losses = paired_loss(pairs, probability, config)[::2]
        losses.sum().backward()
        found.append((losses, pairs.chosen.grad[::2], pairs.rejected.grad[::2]))
    assert all(torch.equal(hard, soft) for hard, soft in zip(*found, strict=True))


@pytest.mark.parametrize("loss", SOFT)
def test_the_loss_is_symmetric(loss: str) -> None:
    """(p, chosen, rejected) is (1 - p, rejected, chosen): bit for bit where 1 - p is exact."""
    config = PreferenceConfig(loss=loss, beta=BETA)  # type: ignore[arg-type]
    pairs, p = some_pairs()
    exact = torch.round(p * 64) / 64
    assert torch.equal(paired_loss(pairs, exact, config), paired_loss(pairs.exchanged(), 1 - exact, config))
    assert torch.allclose(
        paired_loss(pairs, p, config), paired_loss(pairs.exchanged(), 1 - p, config), rtol=1e-14, atol=0
    )


def test_bradley_terry_matches_numpy_oracle() -> None:
    """With the margin demanded of whichever answer is the better one; without it, cross-entropy with soft targets."""
    pairs, p = some_pairs()
    d, q = (pairs.chosen - pairs.rejected).detach().numpy(), p.numpy()
    for m in (0.0, 0.7):
        margin = torch.full_like(p, m)
        right, wrong = bradley_terry(pairs[0], pairs[1], margin), bradley_terry(pairs[1], pairs[0], margin)
        found = soft_label_loss(right, wrong, p).detach().numpy()
        expected = softplus(d) - q * d if m == 0 else q * softplus(m - d) + (1 - q) * softplus(m + d)
        assert np.allclose(found, expected, rtol=1e-10, atol=1e-12)


def soft_rows(seed: int, count: int = 5, *, shared: int = 0) -> list[Example]:
    """Pairs of which every third is certain, and the second says nothing."""
    examples, labels = rows(seed, count, shared=shared), (None, 0.5, 0.8)
    labeled = []
    for i, e in enumerate(examples):
        p = labels[e.row % 3]
        labeled.append(replace(e, probability=p if p is None or i % 2 == 0 else 1.0 - p))
    return labeled


@pytest.mark.parametrize("shared", [0, MIN_PREFIX_AHEAD + 5])
@pytest.mark.parametrize("loss", SOFT)
def test_loss_and_gradient_are_those_of_documents_alone(loss: str, shared: int) -> None:
    """With the cross-entropy of both answers, each with its own probability."""
    examples = soft_rows(3, shared=shared)
    config = PreferenceConfig(loss=loss, beta=BETA, sft=0.5)  # type: ignore[arg-type]
    policy, method = tuned("lora", "phi", dtype=torch.float64, rank=4)
    theirs, their_method = naive("lora", "phi", dtype=torch.float64, rank=4)
    base = tiny_model("phi", dtype=torch.float64)
    base.set_attn_implementation("sdpa")
    total, weights, nats, tokens = torch.zeros((), dtype=torch.float64), 0.0, torch.zeros(()).double(), 0.0
    for pair in zip(examples[::2], examples[1::2], strict=True):
        p = 1.0 if pair[0].probability is None else pair[0].probability
        own = [logprob(theirs, e) for e in pair]
        ratios = own
        if loss not in ("simpo", "orpo"):
            ratios = [a - logprob(base, e).detach() for a, e in zip(own, pair, strict=True)]
        lengths = [int(e.supervised.sum()) for e in pair]
        right = written_out(loss, *ratios, *lengths, BETA)
        wrong = written_out(loss, *ratios[::-1], *lengths[::-1], BETA)
        w = pair[0].weight
        total, weights = total + w * (p * right + (1 - p) * wrong), weights + w
        nats = nats - w * (p * own[0] + (1 - p) * own[1])
        tokens += w * (p * lengths[0] + (1 - p) * lengths[1])
    expected = total / weights + 0.5 * nats / tokens
    expected.backward()
    for batches in (pack(examples, 10_000), pack(examples, 60), pack_separately(examples)):
        policy.model.zero_grad()
        assert count_window(PairedPreference(config), batches).tokens == pytest.approx(tokens)
        found = accumulate(policy, PairedPreference(config), batches)
        assert float(found) == pytest.approx(expected.item(), rel=FLOAT64)
        assert distance(gradients(method), gradients(their_method)) < FLOAT64


def test_reward_loss_and_gradient_are_those_of_documents_alone() -> None:
    examples = soft_rows(3)
    policy, method = tuned("lora", "phi", dtype=torch.float64, rank=4)
    theirs, their_method = naive("lora", "phi", dtype=torch.float64, rank=4)
    objective = RewardObjective(RewardConfig(margin=0.3, center_rewards_coefficient=0.05))
    objective.begin(policy, 3)
    weight = objective.head.weight.detach().clone().requires_grad_(True)
    total, weights = torch.zeros((), dtype=torch.float64), 0.0
    for a, b in zip(examples[::2], examples[1::2], strict=True):
        p, (first, second) = a.probability or 1.0, (score(theirs, weight, e) for e in (a, b))
        right, wrong = (torch.log(1 + torch.exp(0.3 - d)) for d in (first - second, second - first))
        total = total + a.weight * (p * right + (1 - p) * wrong + 0.05 * (first + second) ** 2)
        weights += a.weight
    (total / weights).backward()
    for batches in (pack(examples, 10_000), pack(examples, 60), pack_separately(examples)):
        policy.model.zero_grad()
        objective.head.zero_grad()
        found = accumulate(policy, objective, batches)
        assert float(found) == pytest.approx((total / weights).item(), rel=FLOAT64)
        assert distance(gradients(method), gradients(their_method)) < FLOAT64
        assert torch.allclose(objective.head.weight.grad, weight.grad, rtol=0, atol=1e-9)


def test_metrics_are_of_the_pairs_whose_label_prefers_an_answer() -> None:
    examples = soft_rows(5, 9)
    policy, _ = tuned("lora")
    kept = [e for e in examples if e.probability != 0.5]
    for objective in (PairedPreference(PreferenceConfig()), RewardObjective(RewardConfig())):
        objective.begin(policy, 3)
        with torch.no_grad():
            objective.loss(policy, pack(examples, 10_000)[0])
            found = objective.take_metrics()
            objective.loss(policy, pack(kept, 10_000)[0])
        expected = objective.take_metrics()
        assert len(kept) == 12 and found.keys() == expected.keys()
        assert all(found[name] == pytest.approx(expected[name], abs=1e-5) for name in expected)
        with torch.no_grad():
            undecided = [replace(e, probability=0.5) for e in examples]
            (term,) = objective.loss(policy, pack(undecided, 10_000)[0])
        # the loss is there, and nothing about it is right or wrong
        assert float(term.total) > 0 and objective.take_metrics() == {}


def test_answers_of_a_pair_share_the_cross_entropy() -> None:
    ranked = AnswerPairs([0, 0, 1, 3], [1, 2, 2, 4], [1.0] * 4, [1.0, 1.0, 1.0, 0.75])
    assert ranked.win_probabilities(6) == [1.0, 0.0, 0.0, 0.75, 0.25, 0.0]
    (batch,) = pack(soft_rows(1), 10_000)
    pairs = answer_pairs(batch)
    assert sorted(pairs.probability) == [0.5, 0.5, 0.8, 1.0, 1.0]
    certain = [1.0 - float(i in pairs.rejected) for i in range(batch.sequences)]
    shares = [c if d.probability is None else d.probability for c, d in zip(certain, batch.documents, strict=True)]
    assert pairs.win_probabilities(batch.sequences) == shares


def test_calibration_expects_what_the_labels_promise() -> None:
    """Scores that predict each probability exactly are calibrated, which they are not against certain labels."""
    rng = np.random.default_rng(0)
    p = rng.uniform(0.5, 0.95, 4000)
    d = np.log(p / (1 - p))
    assert calibration_error(d, p) < 1e-12 < 0.2 < calibration_error(d)
    # certain labels, and labels that say nothing of scores that say nothing
    assert calibration_error(d, np.ones(4000)) == calibration_error(d)
    assert calibration_error(np.zeros(100), np.full(100, 0.5)) == 0.0
    # by hand: sigmoid(ln 9) = 0.9; half of the scores contradict labels of 0.8, so they are right with 0.5
    assert calibration_error(np.array([np.log(9.0), -np.log(9.0)] * 50), np.full(100, 0.8)) == pytest.approx(0.4)


def test_health_counts_pairs_with_a_better_answer() -> None:
    rng = np.random.default_rng(0)
    d, scores, lengths = rng.normal(1.0, 1.0, 200), rng.normal(size=400), np.arange(400)
    clusters = [str(i) for i in range(200)]
    p = np.where(np.arange(200) < 150, 0.8, 0.5)
    found = reward_model_health(d, -d, clusters, scores, lengths, p)
    alone = reward_model_health(d[:150], -d[:150], clusters[:150], scores, lengths)
    assert found.pairs == 150 and found.verdict == "healthy"
    assert (found.accuracy, found.longer) == (alone.accuracy, alone.longer)
    undecided = reward_model_health(d, -d, clusters, scores, lengths, np.full(200, 0.5))
    assert (undecided.pairs, undecided.verdict, undecided.accuracy.examples) == (0, "unproven", 0)


def test_scoring_held_out_pairs_reads_their_probabilities() -> None:
    policy, _ = tuned("lora")
    objective, examples = RewardObjective(RewardConfig()), soft_rows(9, 30)
    objective.begin(policy, 3)
    health = score_reward_model(policy, objective, examples, 100)
    hard = score_reward_model(policy, objective, [replace(e, probability=None) for e in examples], 100)
    assert (health.pairs, hard.pairs) == (20, 30) and health.calibration_error != hard.calibration_error
